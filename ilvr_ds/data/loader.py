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
import dataclasses
import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from ilvr_ds.config import DataConfig
from ilvr_ds.contracts import PackedBatch
from ilvr_ds.data.packing import filler_batch, pack
from ilvr_ds.data.plan import CostModel, Lengths, Planner, StepPlan
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.errors import IlvrError

# Spawned, not forked: by now the process may hold CUDA, process groups and threads, none of which survive a
# fork. Not "forkserver" either: its workers are children of the server, so they do not notice when the
# training process is killed, and stay behind.
START_METHOD = "spawn"
_ALIGN = 16  # bytes
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

    Raises:
        PlanError: on creation, if a sample is longer than `data.token_budget` or the index is empty.
        ShardError: on creation, if the shards were counted with another tokenizer or latent size.
        IlvrError: while iterating, whatever decoding a sample raises (it names the sample), also from a worker.
    """

    def __init__(
        self,
        shards: ShardSet,
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
    ):
        """`pin_memory`: page-locked batches, for asynchronous copies to a CUDA device."""
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
        shards.require(tokenizer, latent_size)
        self.planner = Planner(
            Lengths.from_index(shards.index),
            seed=seed,
            samples_per_step=data.samples_per_step,
            token_budget=data.token_budget,
            world=world,
            cost=cost or CostModel(),
            sample_id=shards.sample_id,
        )
        self.last_wait_s = 0.0
        steps = _Steps(self.planner, shards, tokenizer, rank, latent_size, reduction)
        ahead = -(-data.prefetch_steps // data.workers) if data.workers else None  # torch counts per worker
        self._loader = DataLoader(
            steps,
            batch_size=None,
            sampler=range(start_step, total_steps),
            num_workers=data.workers,
            prefetch_factor=ahead,
            multiprocessing_context=multiprocessing.get_context(START_METHOD) if data.workers else None,
            worker_init_fn=functools.partial(_start_worker, os.getpid()),
            pin_memory=pin_memory,
        )
        self._iterator: Iterator[_Bundle | _Failure] | None = None
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
                if isinstance(item, _Failure):
                    raise item.rebuild()
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
        shards: ShardSet,
        tokenizer: ChatTokenizer,
        rank: int,
        latent_size: int,
        reduction: Literal["sample", "token"],
    ):
        self.planner, self.shards, self.tokenizer = planner, shards, tokenizer
        self.rank, self.latent_size, self.reduction = rank, latent_size, reduction

    def __getitem__(self, step: int) -> _Bundle | _Failure:
        try:
            plan = self.planner.step(step)
            return _Bundle.of(plan, [self._batch(numbers, plan) for numbers in plan.of_rank(self.rank)])
        except IlvrError as error:
            # DataLoader would rebuild the exception from its message alone, which not every class allows.
            return _Failure.of(error)

    def _batch(self, numbers: tuple[int, ...], plan: StepPlan) -> PackedBatch:
        if not numbers:
            return filler_batch(self.tokenizer.vocabulary, self.latent_size)
        samples = [self.shards.load_sample(number, self.tokenizer) for number in numbers]
        return pack(samples, self.tokenizer.vocabulary, self.latent_size, totals=plan.totals, reduction=self.reduction)


@contextlib.contextmanager
def _blocked(*signals: signal.Signals) -> Iterator[None]:
    """Hold signals back in this thread; those that came meanwhile arrive at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(parent: int, _worker: int) -> None:
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


@dataclass(frozen=True)
class _Failure:
    """An error on its way out of a worker."""

    kind: type[IlvrError]
    message: str
    fields: dict[str, Any]

    @classmethod
    def of(cls, error: IlvrError) -> _Failure:
        return cls(type(error), str(error), dict(vars(error)))

    def rebuild(self) -> IlvrError:
        error = self.kind.__new__(self.kind, self.message)  # __new__ alone sets `args`: the classes differ in __init__
        vars(error).update(self.fields)
        return error


@dataclass(frozen=True)
class _Bundle:
    """One step's batches with all their tensors in one buffer.

    A tensor that leaves a worker costs a shared-memory file and an open file descriptor; a step has a hundred.
    """

    plan: StepPlan
    buffer: torch.Tensor  # (bytes,) uint8
    layout: list[dict[str, Any]]  # per batch: field -> (begin, end, dtype, shape) for tensors, else the value

    @classmethod
    def of(cls, plan: StepPlan, batches: list[PackedBatch]) -> _Bundle:
        layout, tensors, size = [], [], 0
        for batch in batches:
            fields: dict[str, Any] = {}
            for f in dataclasses.fields(batch):
                value = getattr(batch, f.name)
                if isinstance(value, torch.Tensor):
                    place = _Place(size, size + value.nbytes, value.dtype, tuple(value.shape))
                    tensors.append((place, value))
                    fields[f.name] = place
                    size += -(-value.nbytes // _ALIGN) * _ALIGN
                else:
                    fields[f.name] = value
            layout.append(fields)
        buffer = torch.zeros(size, dtype=torch.uint8)
        for place, value in tensors:
            place.view(buffer).copy_(value)
        return cls(plan, buffer, layout)

    def pin_memory(self, device: object = None) -> _Bundle:  # DataLoader calls this where pin_memory=True
        return dataclasses.replace(self, buffer=self.buffer.pin_memory())

    def batches(self) -> list[PackedBatch]:
        """The batches, their tensors views of the buffer."""
        return [
            PackedBatch(**{k: v.view(self.buffer) if isinstance(v, _Place) else v for k, v in fields.items()})
            for fields in self.layout
        ]


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in the buffer."""

    begin: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer[self.begin : self.end].view(self.dtype).view(self.shape)
