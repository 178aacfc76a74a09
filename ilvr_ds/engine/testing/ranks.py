"""Run one function on several gloo ranks of this machine, with a time limit.

Ranks are spawned processes that meet through a file. The function's results come back per rank. A rank that
raises has its traceback reported and the others are killed at once: without that, they would wait in a
collective for a message that never comes.
"""

from __future__ import annotations

import datetime
import importlib.util
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any


class RankError(AssertionError):
    """A rank raised, died or ran out of time; the message has its traceback."""


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any, timeout_s: float = 120.0) -> list[Any]:
    """[function(*arguments) on rank 0, ..., on rank world - 1]; the process group is up when it is called.

    Args:
        function: at the top level of its file (the ranks load the file, so it need not be importable by name);
            its arguments and result can be pickled.
        timeout_s: of the whole call, start of the processes included.

    Raises:
        RankError: with the rank's number and its traceback.
    """
    context = multiprocessing.get_context("spawn")
    target = (function.__code__.co_filename, function.__name__)
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], {}
        for rank in range(world):
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_main, args=(target, rank, world, os.path.join(folder, "store"), timeout_s, theirs, arguments)
            )
            process.start()
            theirs.close()
            processes.append(process)
            pipes[mine] = rank
        try:
            return _collect(pipes, world, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _collect(pipes: dict, world: int, deadline: float) -> list[Any]:
    results: list[Any] = [None] * world
    open_pipes = dict(pipes)
    while open_pipes:
        ready = wait(list(open_pipes), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(open_pipes.values())} did not finish in time")
        for pipe in ready:
            rank = open_pipes.pop(pipe)
            try:
                failed, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise RankError(f"rank {rank} died without a word") from None
            if failed:
                raise RankError(f"rank {rank} of {world} raised:\n{value}")
            results[rank] = value
    return results


def _load(file: str, name: str) -> Callable[..., Any]:
    """The function `name` of a Python file, loaded as a module of its own."""
    spec = importlib.util.spec_from_file_location("ranks_target", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["ranks_target"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return getattr(module, name)


def _main(target, rank: int, world: int, store: str, timeout_s: float, pipe, arguments) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        import torch

        torch.set_num_threads(1)
        limit = datetime.timedelta(seconds=timeout_s)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit
        )
        result = _load(*target)(*arguments)
    except BaseException:  # whatever it is, the parent must hear of it
        pipe.send_bytes(pickle.dumps((True, traceback.format_exc())))
        sys.stdout.flush()
        os._exit(1)  # no orderly end: the other ranks may hang in a collective
    # plain pickle: torch's own sends a handle to shared memory, which dies with this process
    pipe.send_bytes(pickle.dumps((False, result)))
    pipe.close()
    os._exit(0)  # skip destructors that would wait for other ranks
