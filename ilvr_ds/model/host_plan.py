"""What Python has to know about a batch to slice it, taken before the batch goes to the device.

Reading a number back from a device waits for everything queued there. So a batch is handed over on the CPU,
`host_plan` reads the few counts that decide shapes, and `to_device` sends the tensors off.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ilvr_ds.contracts import PackedBatch


@dataclass(frozen=True)
class HostPlan:
    """Counts of one packed batch as Python integers."""

    prompt_counts: tuple[int, ...]  # B: prompt positions of each sample
    image_counts: tuple[int, ...]  # B: input image tokens of each sample
    span_sample: tuple[int, ...]  # S: sample of each span, ascending


def host_plan(batch: PackedBatch) -> HostPlan:
    """Read the counts; costs a synchronisation only if the batch is already on a device."""
    samples = len(batch.sample_ids)

    def per_sample(positions: Tensor) -> tuple[int, ...]:
        return tuple(torch.bincount(batch.sample_of_token[positions], minlength=samples).tolist())

    return HostPlan(
        prompt_counts=per_sample(batch.prompt_positions),
        image_counts=per_sample(batch.image_positions),
        span_sample=tuple(batch.span_sample.tolist()),
    )


def to_device(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """The same batch with its tensors on `device`, without waiting where the memory is pinned."""
    moved = {
        field.name: value.to(device, non_blocking=True)
        for field in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor)
    }
    return dataclasses.replace(batch, **moved)
