"""Samples that cannot be read in the middle of a run: left out, and the step's weights corrected for it.

A batch's weights hold the denominators of the planned step. Whoever finds a bad sample is one rank of many, so the
ranks first add up what each of them lost; then `reweighted` gives every batch the weights it would have had if the
samples had never been planned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ilvr_ds.contracts import PackedBatch
from ilvr_ds.data.plan import StepTotals
from ilvr_ds.errors import BatchError


@dataclass(frozen=True)
class BadSample:
    """A planned sample that no batch holds. The counts are the index's."""

    number: int  # row of the index
    error: str  # names shard, key and what is wrong
    supervised: int
    spans: int
    tokens: int

    @classmethod
    def of(cls, number: int, error: str, row: np.void) -> BadSample:
        """From a row of the index (INDEX_DTYPE)."""
        tokens = int(row["text_tokens"]) + int(row["image_tokens"])
        return cls(number, error, int(row["supervised"]), int(row["spans"]), tokens)


def lost_totals(bad: Sequence[BadSample]) -> StepTotals:
    """What a step loses with these samples."""
    return StepTotals(
        samples=len(bad),
        supervised=sum(b.supervised for b in bad),
        spans=sum(b.spans for b in bad),
        tokens=sum(b.tokens for b in bad),
    )


def remaining(planned: StepTotals, lost: StepTotals) -> StepTotals:
    """The denominators of a step without the samples that all ranks together lost.

    Raises BatchError when nothing is left.
    """
    left = StepTotals(
        samples=planned.samples - lost.samples,
        supervised=planned.supervised - lost.supervised,
        spans=planned.spans - lost.spans,
        tokens=planned.tokens - lost.tokens,
    )
    if left.samples <= 0:
        raise BatchError(
            f"all {planned.samples} samples of a step are bad; check the shards with data_tools.check_shards"
        )
    return left


def reweighted(
    batches: Sequence[PackedBatch], planned: StepTotals, left: StepTotals, reduction: Literal["sample", "token"]
) -> list[PackedBatch]:
    """Batches packed for `planned` totals with the weights of `left` ones (see `packing.pack`): the weights of all
    batches of all ranks sum to 1 again."""
    if reduction == "sample":
        ce = align = planned.samples / left.samples
    elif reduction == "token":
        ce = planned.supervised / left.supervised
        align = planned.spans / max(left.spans, 1)  # without a span left, no batch has an alignment weight
    else:
        raise ValueError(f"reduction={reduction!r}: 'sample' or 'token'")
    return [replace(b, ce_weights=b.ce_weights * ce, align_weights=b.align_weights * align) for b in batches]
