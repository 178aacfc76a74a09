"""The published training code's schedule, as a baseline: one sample per micro-batch, the teacher run once per span
plus once on the same inputs. Same model, engine, samples and optimizer step as the packed runs it is compared with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from ilvr_ds.model.teacher import Teacher

Item = TypeVar("Item")


def one_each(bins: Sequence[Sequence[Item]]) -> list[list[Item]]:
    """Micro-batches of one sample each, from the bins of a packed plan."""
    return [[item] for part in bins for item in part]


@contextmanager
def repeated_teacher(teacher: Teacher) -> Iterator[None]:
    """Within: each call of the teacher runs its forward once more for every span of the micro-batch."""

    def repeat(module: Teacher, arguments: tuple) -> None:
        plan = arguments[1]  # HostPlan
        for _ in plan.span_sample:
            module.forward(*arguments)

    handle = teacher.register_forward_pre_hook(repeat)
    try:
        yield
    finally:
        handle.remove()
