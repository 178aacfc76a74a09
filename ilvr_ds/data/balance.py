"""Cut one step's samples into bins: none over the token budget, all alike in cost.

This is multi-way number partitioning (costs) under a capacity (tokens). Three parts, each over whole arrays:

1. `_deal`: longest-processing-time first in rounds: sorted by cost, each round hands every bin one sample,
   the dearest to the bin that is cheapest so far. O(n log n).
2. `_Bins.exchange`: bins are paired and every pair makes the best of all its exchanges (one sample for one sample,
   or for nothing), all pairs at once. First until no bin is over the budget, then until costs are level.
3. Where exchanges cannot make a nearly full step fit, pairs of bins share out all their samples anew
   (`_Bins.repack`), which gathers the free room in few bins; the costs are levelled from there.

Everything is integer arithmetic with stable sorts, so every rank and every machine finds the same bins.
"""

from __future__ import annotations

import numpy as np

_REPACK_SAMPLES = 10  # 2**10 ways to share out a pair of bins
_COST_BITS = 40  # costs are scaled so that their sum stays below 2**40, leaving room for overflow in one key


def partition(tokens: np.ndarray, costs: np.ndarray, bins: int, budget: int, group: int) -> list[np.ndarray] | None:
    """Split samples into `bins` bins under `budget`, alike in cost.

    Args:
        tokens: (n,) int64 lengths, each at most `budget`.
        costs: (n,) int64, non-negative.
        bins: a multiple of `group`.
        budget: tokens a bin may hold.
        group: bins that run at the same time (the world size).

    Returns:
        `bins` arrays of indices into `tokens`, each ascending, in ascending order of cost, so that `group`
        consecutive bins are alike; or None where no way was found (there may still be one).
    """
    if int(tokens.sum()) > bins * budget:
        return None
    if len(tokens) == 0:
        return [np.zeros(0, np.int64)] * bins
    shift = max(0, int(costs.sum()).bit_length() - _COST_BITS)
    scaled = costs.astype(np.int64) >> shift
    state = _Bins(tokens.astype(np.int64), scaled, _deal(scaled, bins), budget)
    if not _fit(state):
        return None
    if group > 1:
        _level(state, group)
    members = [row[row < state.n] for row in np.sort(state.slots, axis=1)]
    order = np.argsort([int(costs[m].sum()) for m in members], kind="stable")
    return [members[i] for i in order]


class _Bins:
    """Bins as a matrix of sample numbers: row = bin, `n` = an empty slot (of length and cost 0)."""

    def __init__(self, tokens: np.ndarray, costs: np.ndarray, slots: np.ndarray, budget: int):
        self.n = len(tokens)
        self.tokens = np.append(tokens, 0)  # (n + 1,)
        self.costs = np.append(costs, 0)  # (n + 1,)
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
        self.bin_costs = self.costs[self.slots].sum(axis=1)

    def overflow(self) -> int:
        return int(np.maximum(self.bin_tokens - self.budget, 0).sum())

    def exchange(self, a: np.ndarray, b: np.ndarray) -> bool:
        """Let each pair of bins (a[p], b[p]) make its best exchange; True if any pair got better.

        Better: less over the budget, or the same and the dearer of the two cheaper.
        """
        ta, tb = self.tokens[self.slots[a]], self.tokens[self.slots[b]]  # (p, w)
        ca, cb = self.costs[self.slots[a]], self.costs[self.slots[b]]
        moved = tb[:, None, :] - ta[:, :, None]  # (p, w, w) tokens that a gains
        over = np.maximum(self.bin_tokens[a][:, None, None] + moved - self.budget, 0)
        over += np.maximum(self.bin_tokens[b][:, None, None] - moved - self.budget, 0)
        paid = cb[:, None, :] - ca[:, :, None]
        dearest = np.maximum(self.bin_costs[a][:, None, None] + paid, self.bin_costs[b][:, None, None] - paid)
        key = ((over << _COST_BITS) + dearest).reshape(len(a), -1)
        best = key.argmin(axis=1)
        now = np.maximum(self.bin_tokens[a] - self.budget, 0) + np.maximum(self.bin_tokens[b] - self.budget, 0)
        now = (now << _COST_BITS) + np.maximum(self.bin_costs[a], self.bin_costs[b])
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
        key = (over << _COST_BITS) - np.minimum(np.maximum(in_a, in_b), self.budget)
        best = key.argmin(axis=1)
        before = np.maximum(self.bin_tokens[a] - self.budget, 0) + np.maximum(self.bin_tokens[b] - self.budget, 0)
        fuller = np.minimum(np.maximum(self.bin_tokens[a], self.bin_tokens[b]), self.budget)
        better = np.flatnonzero(key[np.arange(len(a)), best] < (before << _COST_BITS) - fuller)
        if len(better) == 0:
            return False
        to_a = np.concatenate([masks[best[better]], owner[better][:, k:]], axis=1).astype(bool)  # (q, 2w)
        self.slots = np.pad(self.slots, ((0, 0), (0, width)), constant_values=self.n)
        self.slots[a[better]] = np.where(to_a, both[better], self.n)
        self.slots[b[better]] = np.where(to_a, self.n, both[better])
        self._spare_slot()
        return True


def _deal(costs: np.ndarray, bins: int) -> np.ndarray:
    """(bins, rounds) slots: sorted by cost, one sample to every bin each round, dearest to cheapest bin."""
    n = len(costs)
    order = np.argsort(-costs, kind="stable")
    rounds = -(-n // bins)
    slots = np.full((bins, rounds), n, dtype=np.int64)
    load = np.zeros(bins, dtype=np.int64)
    for r in range(rounds):
        turn = order[r * bins : (r + 1) * bins]
        to = np.argsort(load, kind="stable")[: len(turn)]
        slots[to, r] = turn
        load[to] += costs[turn]
    return slots


def _fit(state: _Bins, rounds: int = 24, repack_rounds: int = 200) -> bool:
    """Bring every bin under the budget; False where that was not found."""
    half = len(state.slots) // 2
    stale = 0
    for r in range(rounds + repack_rounds):
        if state.overflow() == 0:
            return True
        if half == 0 or stale > half:
            return False
        order = np.argsort(state.bin_tokens, kind="stable")
        light, heavy = order[:half], order[len(order) - half :][::-1]
        if r < rounds:
            state.exchange(heavy, np.roll(light, r))
        else:
            stale = 0 if state.repack(heavy, np.roll(light, r)) else stale + 1
    return state.overflow() == 0


def _level(state: _Bins, group: int, rounds: int = 30, good: float = 1.005) -> None:
    """Level costs until `group` neighbours in order of cost are alike: sum of dearest <= good * sum of means."""
    half = len(state.slots) // 2
    stale = 0
    for r in range(rounds):
        order = np.argsort(state.bin_costs, kind="stable")
        costs = state.bin_costs[order].reshape(-1, group)
        if stale > half or costs[:, -1].sum() * group <= good * costs.sum():
            return
        light, heavy = order[:half], order[len(order) - half :][::-1]
        stale = 0 if state.exchange(heavy, np.roll(light, r)) else stale + 1
