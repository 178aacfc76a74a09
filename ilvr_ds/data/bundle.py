"""What a decoding worker sends: one step's batches in two buffers, or the error it met."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from ilvr_ds.contracts import PackedBatch
from ilvr_ds.data.bad_samples import BadSample
from ilvr_ds.data.plan import StepPlan
from ilvr_ds.data.step_memory import received
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
    """One step's batches with all their tensors in two buffers.

    A tensor that leaves a worker costs a shared-memory file and an open file descriptor; a step has a hundred.
    """

    plan: StepPlan
    pixels: torch.Tensor  # (bytes,) uint8: what pictures were decoded into (`step_memory`), maybe larger than they are
    rest: torch.Tensor  # (bytes,) uint8: everything else
    layout: list[dict[str, Any]]  # per batch: field -> _Place for tensors, else the value
    used: int  # bytes of `pixels`, from its begin
    bad: tuple[BadSample, ...]  # planned samples that are in no batch

    @classmethod
    def of(
        cls, plan: StepPlan, batches: list[PackedBatch], pixels: torch.Tensor, bad: tuple[BadSample, ...] = ()
    ) -> Bundle:
        """Tensors that lie in `pixels` stay where they are, all others are copied together."""
        layout, tensors, size, used = [], [], 0, 0
        for batch in batches:
            fields: dict[str, Any] = {}
            for f in dataclasses.fields(batch):
                value = getattr(batch, f.name)
                if isinstance(value, torch.Tensor) and _inside(value, pixels):
                    begin = value.data_ptr() - pixels.data_ptr()
                    place = _Place(True, begin, begin + value.nbytes, value.dtype, tuple(value.shape))
                    fields[f.name], used = place, max(used, place.end)
                elif isinstance(value, torch.Tensor):
                    place = _Place(False, size, size + value.nbytes, value.dtype, tuple(value.shape))
                    tensors.append((place, value))
                    fields[f.name] = place
                    size += -(-value.nbytes // _ALIGN) * _ALIGN
                else:
                    fields[f.name] = value
            layout.append(fields)
        bundle = cls(plan, pixels, torch.empty(size, dtype=torch.uint8), layout, used, bad)
        for place, value in tensors:
            bundle._view(place).copy_(value)
        return bundle

    def __reduce__(self) -> tuple:  # on its way out of a worker
        return _arrived, tuple(getattr(self, f.name) for f in dataclasses.fields(self))

    def pin_memory(self, device: object = None) -> Bundle:  # DataLoader calls this where pin_memory=True
        return dataclasses.replace(self, pixels=self.pixels[: self.used].pin_memory(), rest=self.rest.pin_memory())

    def batches(self) -> list[PackedBatch]:
        """The batches, their tensors views of the buffers."""
        return [
            PackedBatch(**{k: self._view(v) if isinstance(v, _Place) else v for k, v in fields.items()})
            for fields in self.layout
        ]

    def _view(self, place: _Place) -> torch.Tensor:
        buffer = self.pixels if place.in_pixels else self.rest
        return buffer[place.begin : place.end].view(place.dtype).view(place.shape)


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in one of the bundle's buffers."""

    in_pixels: bool  # else in the rest
    begin: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def _arrived(plan: StepPlan, pixels: torch.Tensor, *others: Any) -> Bundle:
    return Bundle(plan, received(pixels), *others)


def _inside(value: torch.Tensor, buffer: torch.Tensor) -> bool:
    begin = buffer.data_ptr()
    return value.nbytes > 0 and begin <= value.data_ptr() < begin + buffer.nbytes
