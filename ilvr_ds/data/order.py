"""The order of an epoch: shards shuffled, then samples shuffled inside windows, so that reads stay close together.

The shards of an epoch are put in a random order and laid end to end; that line of samples is cut into windows of
`window` samples, and each window is shuffled by itself. So all reads of a while fall into the few shards of one
window, and a window is found without the others: memory is O(window + shards), never O(samples). A data set of at
most `window` samples is one window, shuffled as a whole.

Every random choice comes from a Philox generator keyed by (seed, source) whose counter starts at (epoch, window):
nothing is carried along, any window of any epoch stands alone.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from ilvr_ds.data.lengths import Lengths, LengthTable
from ilvr_ds.errors import PlanError

WINDOW = 65_536  # samples; the default of data.shuffle_window
_KEPT = 2  # windows in memory: a step may lie across the edge of two


@dataclass(frozen=True)
class PlanSource:
    """One data set as the planner sees it."""

    lengths: LengthTable
    shards: tuple[int, ...] | None = None  # samples of each shard, in index order; None: all in one
    weight: float = 1.0  # share of a step's samples, relative to the other sources' weights


class SourceOrder:
    """The endless order of one source: epoch after epoch, each with every sample once.

    Args:
        source: number of the source among those that are blended; another number, another order.
        window: samples that are shuffled together.
    """

    def __init__(self, source: PlanSource, *, number: int, seed: int, window: int):
        if window < 1:
            raise ValueError("a shuffle window holds 1 or more samples")
        self.lengths = source.lengths
        self.samples = len(source.lengths)
        shards = np.array([self.samples] if source.shards is None else source.shards, dtype=np.int64)  # (m,)
        if int(shards.sum()) != self.samples:
            raise PlanError(
                f"field 'shards' of the manifest counts {int(shards.sum())} samples, the index has {self.samples}; run "
                "`python -m data_tools.check_shards DIR` on the shard folder"
            )
        self._shards = shards
        self._begins = np.cumsum(shards) - shards  # (m,) first row of each shard
        self._number, self._seed, self._window = number, seed, window
        self._epoch, self._line = -1, (shards, shards)
        self._kept: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray, Lengths]] = OrderedDict()

    def take(self, position: int, count: int) -> tuple[np.ndarray, Lengths]:
        """Rows (count,) int64 and lengths of the samples at `position` .. `position + count - 1` of the order."""
        rows, lengths = [], []
        while count:
            epoch, within = divmod(position, self.samples)
            window, first = divmod(within, self._window)
            shuffled, places, of_window = self.window(epoch, window)
            here = slice(first, first + count)
            rows.append(shuffled[here])
            lengths.append(of_window.take(places[here]))
            position, count = position + len(rows[-1]), count - len(rows[-1])
        if len(rows) == 1:
            return rows[0], lengths[0]
        return np.concatenate(rows), Lengths.join(lengths)

    def window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray, Lengths]:
        """Rows (w,) int64 of one window in their shuffled order, their places (w,) among the window's rows as the index
        has them, and the lengths of these."""
        key = (epoch, window)
        if key not in self._kept:
            pieces = self.slices(epoch, window)
            counts = np.array([piece.stop - piece.start for piece in pieces])
            ahead = np.array([piece.start for piece in pieces]) - (np.cumsum(counts) - counts)  # of a row's place
            rows = np.repeat(ahead, counts)
            rows += np.arange(len(rows))
            places = self._random(epoch, window + 1).permutation(len(rows))
            self._kept[key] = rows.take(places), places, self.lengths.slices(pieces)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def slices(self, epoch: int, window: int) -> list[slice]:
        """The rows of a window before they are shuffled: one slice of the index for each shard it touches."""
        shards, ends = self._line_of(epoch)
        begin = window * self._window
        end = min(self.samples, begin + self._window)
        touched = shards[np.searchsorted(ends, begin, "right") : np.searchsorted(ends, end, "left") + 1]
        at = ends[np.searchsorted(ends, begin, "right") :][: len(touched)] - self._shards[touched]  # place in the line
        first = self._begins[touched] + np.maximum(begin - at, 0)
        last = self._begins[touched] + np.minimum(end - at, self._shards[touched])
        return [slice(a, b) for a, b in zip(first.tolist(), last.tolist(), strict=True) if a < b]

    def _line_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards of an epoch in their order, and where each ends on the line of samples; both (m,)."""
        if epoch != self._epoch:
            shards = self._random(epoch, 0).permutation(len(self._shards))
            self._epoch, self._line = epoch, (shards, np.cumsum(self._shards[shards]))
        return self._line

    def _random(self, epoch: int, stream: int) -> np.random.Generator:
        # The counter's low half counts the numbers drawn, so streams that differ in the high half never meet.
        bits = np.random.Philox(key=[self._seed, self._number], counter=[0, 0, epoch, stream])
        return np.random.Generator(bits)

    def __getstate__(self) -> dict:
        return vars(self) | {"_kept": OrderedDict()}  # windows are found again; they need not travel to workers
