"""The same work for every shard of a folder, in several processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from ilvr_ds.errors import ShardError

Result = TypeVar("Result")


def each_shard(
    names: Sequence[str], work: Callable[..., Result], arguments: Callable[[int], tuple[Any, ...]], workers: int
) -> Iterator[tuple[int, Result]]:
    """(number, `work(*arguments(number))`) of every shard, in the order in which they get ready.

    Args:
        names: what to call the shards in an error.
        work: a function of a module, with arguments and results that pickle.
        arguments: called for a few shards ahead of the workers, so that memory does not depend on their number.
        workers: processes; with 1 the work is done in this one.

    Raises ShardError when a process dies, naming the shards it may have been at, and what `work` raises.
    """
    if workers == 1 or len(names) <= 1:
        for number in range(len(names)):
            yield number, work(*arguments(number))
        return
    context = multiprocessing.get_context("spawn")  # nothing of this process's threads and open files
    waiting: dict[Future, int] = {}
    try:
        with ProcessPoolExecutor(min(workers, len(names)), mp_context=context) as pool:
            try:
                for number in range(len(names)):
                    waiting[pool.submit(work, *arguments(number))] = number
                    if len(waiting) >= 2 * workers:
                        done = next(as_completed(waiting))
                        yield waiting.pop(done), done.result()
                for done in as_completed(list(waiting)):
                    yield waiting[done], done.result()
            finally:  # after an error or at the end of interest: what has not begun is not waited for
                for future in waiting:
                    future.cancel()
    except BrokenProcessPool as error:
        may_be = ", ".join(names[number] for number in sorted(waiting.values()))
        raise ShardError(
            f"a worker process died (out of memory?) while one of these was read: {may_be}; "
            f"run again with --workers 1 to see which"
        ) from error
