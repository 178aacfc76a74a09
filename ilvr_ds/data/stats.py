"""What a shard index says about its samples, counted a chunk at a time: memory does not grow with the index."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

CHUNK = 1_000_000  # rows looked at at a time, about 60 MB
CELLS = 2**20  # values counted one by one; above, neighbours share a cell
QUANTILES = (0.5, 0.9, 0.99, 0.999)


@dataclass
class ValueCounts:
    """How often each value occurs, for non-negative integers. Exact below CELLS; when a larger value comes, cells are
    joined in pairs until it fits, so a quantile is then right to within `width`. Sum, least and greatest stay exact."""

    width: int = 1  # values in a cell
    samples: int = 0
    total: int = 0
    least: int = 0
    greatest: int = 0
    cells: np.ndarray = field(default_factory=lambda: np.zeros(CELLS, np.int64))  # (CELLS,) samples in each cell

    def add(self, values: np.ndarray) -> None:
        """Count (n,) more values. Raises ValueError on a negative one."""
        if len(values) == 0:
            return
        low, high = int(values.min()), int(values.max())
        if low < 0:
            raise ValueError(f"{low}: values are 0 or more")
        self.least = low if self.samples == 0 else min(self.least, low)
        self.greatest = max(self.greatest, high)
        self.samples += len(values)
        self.total += int(values.sum(dtype=np.int64))
        while high // self.width >= CELLS:
            self.cells = np.append(self.cells.reshape(-1, 2).sum(axis=1), np.zeros(CELLS // 2, np.int64))
            self.width *= 2
        counts = np.bincount(np.asarray(values, np.int64) // self.width)
        self.cells[: len(counts)] += counts

    @property
    def mean(self) -> float:
        """0 where nothing was counted."""
        return self.total / self.samples if self.samples else 0.0

    def quantile(self, share: float) -> int:
        """The least value that `share` of the samples do not exceed."""
        cell = int(np.searchsorted(np.cumsum(self.cells), np.ceil(share * self.samples)))
        return min(cell * self.width, self.greatest)

    def above(self, limit: int) -> int:
        """Samples with a value above `limit`; cells that `limit` cuts are counted."""
        return int(self.cells[limit // self.width + (self.width == 1) :].sum())

    def bins(self, number: int) -> tuple[list[int], list[int]]:
        """(number + 1 edges, number counts) from least to greatest, every bin equally many values wide; fewer bins
        where there are fewer values."""
        first, last = self.least // self.width, self.greatest // self.width
        step = -(-(last - first + 1) // number)
        edges = list(range(first, last + step + 1, step))
        counts = [int(self.cells[a:b].sum()) for a, b in itertools.pairwise(edges)]
        return [edge * self.width for edge in edges], counts

    def summary(self) -> dict[str, Any]:
        """Plain values for JSON."""
        quantiles = {f"p{100 * share:g}": self.quantile(share) for share in QUANTILES} if self.samples else {}
        return {
            "samples": self.samples, "total": self.total, "mean": self.mean, "least": self.least, **quantiles,
            "greatest": self.greatest, "exact_to": self.width,
        }  # fmt: skip


@dataclass(frozen=True)
class IndexStats:
    """Counts over all samples of an index."""

    columns: dict[str, ValueCounts]  # by the names of COLUMNS
    spans_total: int
    without_spans: int  # samples


COLUMNS: dict[str, str] = {
    "tokens": "sequence tokens",
    "supervised": "supervised tokens",
    "image_tokens": "input-image tokens",
    "helper_tokens": "helper-image tokens (vision tower only)",
    "spans": "latent spans",
    "candidates": "candidates per span (mean of a sample)",
    "bytes": "bytes in the shard",
}


def read_stats(index: np.ndarray, on_rows: Callable[[int], object] = lambda rows: None) -> IndexStats:
    """Count the columns of an index.

    Args:
        index: (samples,) INDEX_DTYPE, memory-mapped or not.
        on_rows: called with the number of rows of every finished chunk.

    Candidates of a span are the merged visual tokens of its helper image, from which the teacher selects at most K;
    the index keeps their sum in a sample, so a sample counts once, with its mean rounded down.
    """
    counts = {name: ValueCounts() for name in COLUMNS}
    without = 0
    for start in range(0, len(index), CHUNK):
        rows = np.array(index[start : start + CHUNK])
        spans, helper = rows["spans"].astype(np.int64), rows["helper_tokens"].astype(np.int64)
        image = rows["image_tokens"].astype(np.int64)
        values = {
            "tokens": rows["text_tokens"] + image,
            "supervised": rows["supervised"],
            "image_tokens": image,
            "helper_tokens": helper,
            "spans": spans,
            "candidates": helper[spans > 0] // spans[spans > 0],
            "bytes": rows["size"].astype(np.int64),
        }
        for name, column in values.items():
            counts[name].add(column)
        without += int((spans == 0).sum())
        on_rows(len(rows))
    return IndexStats(counts, counts["spans"].total, without)
