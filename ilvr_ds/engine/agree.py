"""Small agreements between ranks outside the training step: rank 0's decision, numbers of every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist


def gather_numbers(values: Sequence[float], device: torch.device) -> list[list[float]]:
    """`values` of every rank, by rank: one all-gather of a few float64 numbers (world, n)."""
    mine = torch.tensor(list(values), dtype=torch.float64, device=device)
    everyone = torch.empty(dist.get_world_size() * mine.numel(), dtype=torch.float64, device=device)
    dist.all_gather_into_tensor(everyone, mine)
    return everyone.view(-1, mine.numel()).tolist()


def sum_over_ranks(device: torch.device) -> Callable[[Sequence[float]], list[float]]:
    """A function that adds up a few numbers over ranks: one all-reduce of 8 bytes each a call."""

    def add_up(numbers: Sequence[float]) -> list[float]:
        sums = torch.tensor(list(numbers), dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        return sums.tolist()

    return add_up


def gather_objects(value: Any) -> list[Any]:
    """Any picklable object of every rank, by rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def largest_over_ranks(device: torch.device) -> Callable[[int], int]:
    """A function that turns this rank's integer into the largest of all ranks': one all-reduce of 8 bytes a call."""

    def largest(number: int) -> int:
        if dist.get_world_size() == 1:
            return number
        box = torch.tensor(number, dtype=torch.int64, device=device)
        dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return int(box)

    return largest


def from_rank_zero(value: Any) -> Any:
    """Rank 0's `value` on every rank (any picklable object); what other ranks pass is ignored."""
    box = [value if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]
