"""What a decoding worker sends: one step's batches in one buffer, or the error it met."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ilvr_ds.contracts import PackedBatch
from ilvr_ds.data.bad_samples import BadSample
from ilvr_ds.data.plan import StepPlan
from ilvr_ds.errors import IlvrError

_ALIGN = 16  # bytes


@dataclass(frozen=True)
class Failure:
    """An error on its way out of a worker."""

    kind: type[IlvrError]
    message: str
    fields: dict[str, Any]

    @classmethod
    def of(cls, error: IlvrError) -> Failure:
        return cls(type(error), str(error), dict(vars(error)))

    def rebuild(self) -> IlvrError:
        error = self.kind.__new__(self.kind, self.message)  # __new__ alone sets `args`: the classes differ in __init__
        vars(error).update(self.fields)
        return error


@dataclass(frozen=True)
class Bundle:
    """One step's batches with all their tensors in one buffer.

    A tensor that leaves a worker costs a shared-memory file and an open file descriptor; a step has a hundred.
    """

    plan: StepPlan
    buffer: torch.Tensor  # (bytes,) uint8
    layout: list[dict[str, Any]]  # per batch: field -> (begin, end, dtype, shape) for tensors, else the value
    bad: tuple[BadSample, ...]  # planned samples that are in no batch

    @classmethod
    def of(cls, plan: StepPlan, batches: list[PackedBatch], bad: tuple[BadSample, ...] = ()) -> Bundle:
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
        # numpy asks for large pages, which torch does not: half the time for the tens of megabytes of a step
        buffer = torch.from_numpy(np.empty(size, np.uint8))
        for place, value in tensors:
            place.view(buffer).copy_(value)
        return cls(plan, buffer, layout, bad)

    def pin_memory(self, device: object = None) -> Bundle:  # DataLoader calls this where pin_memory=True
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
