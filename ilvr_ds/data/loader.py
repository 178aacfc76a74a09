"""Batches of one rank, step after step, decoded in the background.

    with StepLoader(shards, tokenizer, recipe.data, latent_size=8, reduction="sample", seed=0,
                    rank=rank, world=world, start_step=0, total_steps=1000) as loader:
        for step, plan, batches in loader:
            ...  # plan.n_micro batches on every rank

The unit of work is a step: a worker plans it (a pure function), decodes this rank's bins and packs them, so
the order and the content do not depend on how many workers there are. Steps decoded ahead are bounded by
`data.prefetch_steps`.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Literal

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ilvr_ds.config import DataConfig
from ilvr_ds.contracts import PackedBatch
from ilvr_ds.data.bad_samples import BadSample
from ilvr_ds.data.blended_shards import BlendedShards
from ilvr_ds.data.bundle import Bundle, Failure
from ilvr_ds.data.cost import CostModel
from ilvr_ds.data.kept_memory import keep_freed_memory
from ilvr_ds.data.packing import check_sample, filler_batch, pack
from ilvr_ds.data.pixels import BatchRows, lay_out
from ilvr_ds.data.plan import Planner, StepPlan
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.data.step_memory import StepMemory
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.errors import BatchError, IlvrError, ShardError

# Spawned, not forked: by now the process may hold CUDA, process groups and threads, none of which survive a
# fork. Not "forkserver" either: its workers are children of the server, so they do not notice when the
# training process is killed, and stay behind.
START_METHOD = "spawn"
# A terminal's Ctrl-C and a scheduler's warning reach every process of the job. Stopping in good order is the
# trainer's business: a worker that died of the signal would turn it into a crash. Workers end with the trainer.
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

LoadedStep = tuple[int, StepPlan, list[PackedBatch]]


class StepLoader:
    """Iterates `(step, plan, batches)` for steps `start_step .. total_steps - 1`; step counts from 0.

    `batches` has `plan.n_micro` micro-batches on every rank; where this rank's bin is empty it is the filler.
    Iterate once. `close()` (or the `with` statement) ends the workers; leaving early is fine.

    Attributes:
        planner: plans any step; `planner.steps_per_epoch` is exact.
        last_wait_s: seconds the last step made its caller wait.
        last_bad: where `data.max_bad_samples` is above 0: samples of this rank's bins of the last step that could not
            be read and are in none of its batches. The batches' weights are still the plan's: the caller adds up what
            all ranks lost and corrects them (`ilvr_ds.data.bad_samples.reweighted`).

    Raises:
        PlanError: on creation, if a sample is longer than `data.token_budget` or the index is empty.
        ShardError: on creation, if the shards were counted with another tokenizer or latent size.
        IlvrError: while iterating, whatever decoding a sample raises (it names the sample), also from a worker; with
            `data.max_bad_samples` above 0 only what is not the sample's fault, as ReadError.
    """

    def __init__(
        self,
        shards: ShardSet | BlendedShards,
        tokenizer: ChatTokenizer,
        data: DataConfig,
        *,
        latent_size: int,
        reduction: Literal["sample", "token"],
        seed: int,
        rank: int,
        world: int,
        start_step: int,
        total_steps: int,
        cost: CostModel | None = None,
        pin_memory: bool = False,
        decode_helpers: bool = True,
    ):
        """Args:
        pin_memory: page-locked batches, for asynchronous copies to a CUDA device.
        decode_helpers: False leaves helper images out of the batches and of what samples cost, for an objective that
            looks at none.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
        shards.require(tokenizer, latent_size)
        self.planner = Planner(
            shards.plan_sources(helpers=decode_helpers),
            seed=seed,
            samples_per_step=data.samples_per_step,
            token_budget=data.token_budget,
            world=world,
            window=data.shuffle_window,
            cost=cost or CostModel(),
            sample_id=shards.sample_id,
        )
        self.last_wait_s = 0.0
        self.last_bad: tuple[BadSample, ...] = ()
        keep_going = data.max_bad_samples > 0
        ahead = -(-data.prefetch_steps // data.workers) if data.workers else 0  # torch counts per worker
        steps = _Steps(self.planner, shards, tokenizer, rank, latent_size, reduction, decode_helpers, keep_going, ahead)
        self._loader = DataLoader(
            steps,
            batch_size=None,
            sampler=range(start_step, total_steps),
            num_workers=data.workers,
            prefetch_factor=ahead or None,
            multiprocessing_context=multiprocessing.get_context(START_METHOD) if data.workers else None,
            worker_init_fn=functools.partial(_start_worker, os.getpid()),
            pin_memory=pin_memory,
        )
        self._iterator: Iterator[Bundle | Failure] | None = None
        self._started = False

    def __iter__(self) -> Iterator[LoadedStep]:
        if self._started:
            raise RuntimeError("a StepLoader is iterated once; make another one to start elsewhere")
        self._started = True
        with _blocked(*_STOP_SIGNALS):  # a spawned process inherits the mask, and keeps it
            self._iterator = iter(self._loader)  # starts the workers
        return self._run(self._iterator)

    def _run(self, iterator: Iterator) -> Iterator[LoadedStep]:
        try:
            while True:
                begin = time.perf_counter()
                item = next(iterator, None)
                self.last_wait_s = time.perf_counter() - begin
                if item is None:
                    return
                if isinstance(item, Failure):
                    raise item.rebuild()
                self.last_bad = item.bad
                yield item.plan.step, item.plan, item.batches()
        finally:
            del iterator
            self.close()

    def close(self) -> None:
        """End the workers; torch does that when the iterator is dropped. May be called twice."""
        self._iterator = None

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class _Steps(Dataset):
    """Map-style: step number to its bundle. What workers run."""

    def __init__(
        self,
        planner: Planner,
        shards: ShardSet | BlendedShards,
        tokenizer: ChatTokenizer,
        rank: int,
        latent_size: int,
        reduction: Literal["sample", "token"],
        decode_helpers: bool,
        keep_going: bool,
        ahead: int,
    ):
        self.planner, self.shards, self.tokenizer = planner, shards, tokenizer
        self.rank, self.latent_size, self.reduction = rank, latent_size, reduction
        self.decode_helpers, self.keep_going, self.ahead = decode_helpers, keep_going, ahead
        self.memory: StepMemory | None = None  # made in the process that decodes

    def __getitem__(self, step: int) -> Bundle | Failure:
        try:
            plan = self.planner.step(step, self.rank)
            bins = plan.of_rank(self.rank)
            numbers = [number for own in bins for number in own]
            blobs = dict(zip(numbers, self.shards.read_bytes(numbers), strict=True))  # neighbours in one read
            buffer, rows = lay_out(
                [[self.shards.row(number) for number in own] for own in bins],
                helpers=self.decode_helpers,
                memory=self._step_memory(),
            )
            bad: list[BadSample] = []
            batches = [
                self._batch([(number, blobs[number]) for number in own], own_rows, plan, bad)
                for own, own_rows in zip(bins, rows, strict=True)
            ]
            return Bundle.of(plan, batches, buffer, tuple(bad))
        except IlvrError as error:
            # DataLoader would rebuild the exception from its message alone, which not every class allows.
            return Failure.of(error)

    def _step_memory(self) -> StepMemory:
        """This process's own."""
        if self.memory is None:
            # in use at once: those decoded ahead, one in the caller's hands, one on its way to pinned memory, this one
            self.memory = StepMemory(self.ahead + 3, shared=get_worker_info() is not None)
        return self.memory

    def _batch(
        self, blobs: list[tuple[int, bytes]], rows: BatchRows, plan: StepPlan, bad: list[BadSample]
    ) -> PackedBatch:
        """Pack the samples of one bin, (number, bytes), maybe one twice; with `keep_going`, bad ones go into `bad`."""
        samples = []
        for (number, blob), into in zip(blobs, rows.samples, strict=True):
            try:
                sample = self.shards.load_sample(
                    number, self.tokenizer, blob=blob, decode_helpers=self.decode_helpers, into=into
                )
                if self.keep_going:
                    check_sample(sample, self.tokenizer.vocabulary, self.latent_size)
                samples.append(sample)
            except (BatchError, ShardError) as error:
                if not self.keep_going:
                    raise
                bad.append(BadSample.of(number, str(error), self.shards.row(number)))
        if not samples:
            return filler_batch(self.tokenizer.vocabulary, self.latent_size)
        return pack(
            samples,
            self.tokenizer.vocabulary,
            self.latent_size,
            totals=plan.totals,
            reduction=self.reduction,
            pixels=rows.rows if len(samples) == len(blobs) else None,  # otherwise there are holes
        )


@contextlib.contextmanager
def _blocked(*signals: signal.Signals) -> Iterator[None]:
    """Hold signals back in this thread; those that came meanwhile arrive at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(parent: int, _worker: int) -> None:
    keep_freed_memory()
    torch.set_num_threads(1)  # decoding is one sample at a time; more threads only fight over the cores
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process once `parent` is gone, however it went.

    torch's own watch remembers the parent it finds when the worker's loop begins, seconds after the process
    does: a training process killed in between leaves its workers waiting for ever.
    """
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
