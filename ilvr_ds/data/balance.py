"""Put one step's samples into bins under a token budget.

This is bin packing with a given number of bins. Three parts, each over whole arrays:

1. `deal`: longest-processing-time first in rounds: sorted by length, each round hands every bin one sample,
   the longest to the bin that is emptiest so far. O(n log n).
2. `_Bins.exchange`: where a bin is over the budget, it and a light one make the best of all their exchanges (one
   sample for one sample, or for nothing), all such pairs at once.
3. Where exchanges cannot make a nearly full step fit, pairs of bins share out all their samples anew
   (`_Bins.repack`), which gathers the free room in few bins.

`ilvr_ds.data.level` makes the bins alike in cost afterwards. Everything is integer arithmetic and stable sorts, so
every rank and every machine finds the same bins.
"""

from __future__ import annotations

import numpy as np

from ilvr_ds.data.lengths import Lengths
from ilvr_ds.errors import PlanError

_REPACK_SAMPLES = 10  # 2**10 ways to share out a pair of bins
_BLOCKS = 16  # sizes, 31 at most, that `deal` tells apart where it looks at a second value
_SECOND_BITS = 11  # of the second value that count: with the block, 16
_OVER_BITS = 40  # of the secondary aim below the overflow in one key


def fit_step(lengths: Lengths, token_budget: int, world: int) -> tuple[np.ndarray, int]:
    """Put one step's samples into as few bins as are found: (n_micro * world, width) slots as in `fit`, and the lower
    bound of n_micro.

    Starts at the lower bound ceil(tokens / (world * budget)) and takes one micro-step more where `fit` finds no way.
    Every rank computes this for all ranks, and so knows how many micro-steps there are.

    Raises:
        PlanError: a sample longer than the budget.
    """
    tokens = lengths.tokens
    lower_bound = max(1, -(-int(tokens.sum()) // (world * token_budget)))
    # With one bin per sample every bin fits, so the search ends.
    for n_micro in range(lower_bound, max(lower_bound, len(tokens)) + 1):
        slots = fit(tokens, n_micro * world, token_budget, lengths.patches)
        if slots is not None:
            return slots, lower_bound
    raise PlanError(
        f"no bins of {token_budget} tokens for samples of up to {int(tokens.max())}; check_fits() names those too long"
    )


def bin_sums(values: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """(bins,) sums of the (n,) values in (bins, width) slots."""
    return np.append(values, 0).take(slots.T).sum(axis=0)


def fit(tokens: np.ndarray, bins: int, budget: int, second: np.ndarray | None = None) -> np.ndarray | None:
    """Put samples into `bins` bins of at most `budget` tokens.

    Args:
        tokens: (n,) int64 lengths, each at most `budget`.
        second: (n,) int64, non-negative: what else should be about level (`deal`).

    Returns:
        (bins, width) int64: row = bin, indices into `tokens`, n = an empty slot; or None where no way was found
        (there may still be one).
    """
    if int(tokens.sum()) > bins * budget:
        return None
    if len(tokens) == 0:
        return np.zeros((bins, 1), np.int64)
    slots = deal(tokens, bins, second)
    if int(bin_sums(tokens, slots).max()) <= budget:  # nearly always, where there is room
        return slots
    state = _Bins(tokens, slots, budget)
    return state.slots if _fit(state) else None


def deal(values: np.ndarray, bins: int, second: np.ndarray | None = None) -> np.ndarray:
    """(bins, rounds) slots: in falling order of value, one item to every bin each round, largest to smallest bin.

    Rows differ by at most one item in number; n = an empty slot. Columns lie together in memory.

    Args:
        second: (n,) int64, non-negative: among items and bins that are about as large, the item with most of this goes
            to the bin with least of it.
    """
    n = len(values)
    order = ascending(values)[::-1]
    rounds = -(-n // bins)
    slots = np.full((rounds, bins), n, dtype=np.int64)
    block = max(1, bins // _BLOCKS)
    if second is not None:
        lacking = first_bits(int(second.max(initial=0)) - second, _SECOND_BITS)
        blocks = (np.arange(bins) // block << _SECOND_BITS).astype(np.uint16)
    for r in range(rounds):
        turn = order[r * bins : (r + 1) * bins]
        if r == 0:
            to = np.arange(len(turn))  # the bins, in an order that each round changes
            load, second_load = values.take(turn), None if second is None else second.take(turn)
        else:
            at = ascending(load)[: len(turn)]
            if second is not None and block > 1:
                turn = _within_blocks(turn, lacking, blocks)
                at = _within_blocks(at, first_bits(second_load, _SECOND_BITS), blocks)
            to, load = to.take(at), load.take(at) + values.take(turn)
            if second is not None:
                second_load = second_load.take(at) + second.take(turn)
        slots[r][to] = turn
    return slots.T


def _within_blocks(items: np.ndarray, values: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """`items` (m,) with those of one block in ascending order of `values[items]`.

    Args:
        values: (n,) uint16 below 2**_SECOND_BITS.
        blocks: (m,) or longer uint16: multiples of 2**_SECOND_BITS, ascending.
    """
    return items.take((blocks[: len(items)] | values.take(items)).argsort(kind="stable"))


def first_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """(...) uint16: what integers have more than the smallest of them, without the last bits of it where that is
    2**bits or more: about 2^-bits of the range."""
    above = values - values.min(initial=np.iinfo(np.int64).max)
    above >>= max(0, int(above.max(initial=0)).bit_length() - bits)
    return above.astype(np.uint16)


def ascending(values: np.ndarray) -> np.ndarray:
    """(..., n) order of non-negative integers along the last axis, of equal ones the first first.

    Numbers of 16 bits are sorted by their digits, which takes the same few microseconds on every processor. Others get
    their index as lowest bits: a sort of distinct keys, several times faster than numpy's stable one.
    """
    n = values.shape[-1]
    most = int(values.max(initial=0))
    if most < 1 << 16:
        return values.astype(np.uint16).argsort(kind="stable")
    bits = max(1, (n - 1).bit_length())
    if most >> (63 - bits):
        return np.argsort(values, kind="stable")  # no room for the index beside such values
    keys = values << bits
    keys |= np.arange(n)
    keys.sort()
    keys &= (1 << bits) - 1
    return keys


class _Bins:
    """Bins as a matrix of sample numbers: row = bin, `n` = an empty slot (of length 0)."""

    def __init__(self, tokens: np.ndarray, slots: np.ndarray, budget: int):
        self.n = len(tokens)
        self.tokens = np.append(tokens, 0)  # (n + 1,)
        self.budget = budget
        self.slots = slots  # (bins, width)
        self._spare_slot()

    def _spare_slot(self) -> None:
        """Keep one free slot in every bin, so that a bin can take a sample without giving one."""
        self.slots.sort(axis=1)  # empty slots last
        width = int((self.slots < self.n).sum(axis=1).max()) + 1
        if width > self.slots.shape[1]:
            self.slots = np.pad(self.slots, ((0, 0), (0, width - self.slots.shape[1])), constant_values=self.n)
        else:
            self.slots = self.slots[:, :width]
        self.bin_tokens = self.tokens[self.slots].sum(axis=1)

    def overflow(self) -> int:
        return int(np.maximum(self.bin_tokens - self.budget, 0).sum())

    def exchange(self, a: np.ndarray, b: np.ndarray) -> bool:
        """Let each pair of bins (a[p], b[p]) make its best exchange; True if any pair got better.

        Better: less over the budget, or the same and the fuller of the two less full.
        """
        ta, tb = self.tokens[self.slots[a]], self.tokens[self.slots[b]]  # (p, w)
        in_a, in_b = self.bin_tokens[a], self.bin_tokens[b]  # (p,)
        moved = tb[:, None, :] - ta[:, :, None]  # (p, w, w) tokens that a gains
        gained, left = in_a[:, None, None] + moved, in_b[:, None, None] - moved
        over = np.maximum(gained - self.budget, 0) + np.maximum(left - self.budget, 0)
        key = ((over << _OVER_BITS) + np.maximum(gained, left)).reshape(len(a), -1)
        best = key.argmin(axis=1)
        now = np.maximum(in_a - self.budget, 0) + np.maximum(in_b - self.budget, 0)
        now = (now << _OVER_BITS) + np.maximum(in_a, in_b)
        better = np.flatnonzero(key[np.arange(len(a)), best] < now)
        if len(better) == 0:
            return False
        i, j = np.divmod(best[better], self.slots.shape[1])
        rows_a, rows_b = a[better], b[better]
        from_a, from_b = self.slots[rows_a, i].copy(), self.slots[rows_b, j].copy()
        self.slots[rows_a, i], self.slots[rows_b, j] = from_b, from_a
        self._spare_slot()
        return True

    def repack(self, a: np.ndarray, b: np.ndarray) -> bool:
        """Let each pair of bins share out all their samples anew, one bin as full as can be; True on a change.

        Better: less over the budget, or the same and the fuller bin fuller. So free room gathers in few bins,
        where a whole sample fits into it. Pairs with more than `_REPACK_SAMPLES` samples leave the rest in place.
        """
        width = self.slots.shape[1]
        both = np.concatenate([self.slots[a], self.slots[b]], axis=1)  # (p, 2w)
        owner = np.repeat([1, 0], width)  # 1: belongs to a
        order = np.argsort(both == self.n, axis=1, kind="stable")  # samples first
        both, owner = np.take_along_axis(both, order, 1), owner[order]
        k = min(_REPACK_SAMPLES, int((both < self.n).sum(axis=1).max()))
        tokens = self.tokens[both]  # (p, 2w)
        fixed = (tokens[:, k:] * owner[:, k:]).sum(axis=1)  # (p,) tokens of a that stay
        masks = (np.arange(2**k)[:, None] >> np.arange(k)) & 1  # (2^k, k)
        in_a = fixed[:, None] + tokens[:, :k] @ masks.T  # (p, 2^k) tokens of a
        in_b = tokens.sum(axis=1)[:, None] - in_a
        over = np.maximum(in_a - self.budget, 0) + np.maximum(in_b - self.budget, 0)
        key = (over << _OVER_BITS) - np.minimum(np.maximum(in_a, in_b), self.budget)
        best = key.argmin(axis=1)
        before = np.maximum(self.bin_tokens[a] - self.budget, 0) + np.maximum(self.bin_tokens[b] - self.budget, 0)
        fuller = np.minimum(np.maximum(self.bin_tokens[a], self.bin_tokens[b]), self.budget)
        better = np.flatnonzero(key[np.arange(len(a)), best] < (before << _OVER_BITS) - fuller)
        if len(better) == 0:
            return False
        to_a = np.concatenate([masks[best[better]], owner[better][:, k:]], axis=1).astype(bool)  # (q, 2w)
        self.slots = np.pad(self.slots, ((0, 0), (0, width)), constant_values=self.n)
        self.slots[a[better]] = np.where(to_a, both[better], self.n)
        self.slots[b[better]] = np.where(to_a, self.n, both[better])
        self._spare_slot()
        return True


def _fit(state: _Bins, rounds: int = 24, repack_rounds: int = 200) -> bool:
    """Bring every bin under the budget; False where that was not found."""
    bins = len(state.slots)
    half = bins // 2
    stale = 0
    for r in range(rounds + repack_rounds):
        if state.overflow() == 0:
            return True
        if half == 0 or stale > half:
            return False
        order = ascending(state.bin_tokens)
        # Exchanges: the bins that are too full, each with one of as many of the lightest. Repacking: all.
        pairs = min(half, int((state.bin_tokens > state.budget).sum())) if r < rounds else half
        light, heavy = order[:pairs], order[bins - pairs :][::-1]
        if r < rounds:
            state.exchange(heavy, np.roll(light, r))
        else:
            stale = 0 if state.repack(heavy, np.roll(light, r)) else stale + 1
    return state.overflow() == 0
