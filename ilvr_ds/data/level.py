"""Make bins alike in two costs at once, text and vision, without going over the token budget.

Two-way number partitioning, pair by pair: the bins that stick out in either cost are paired with others, and every
pair shares out up to eight of its samples in the best of all 2^8 ways. Best: the smallest sum of fourth powers of
the distance from the mean bin (largest deviations first, as only the dearest rank of a micro-step counts), where
text weighs more than vision because it is most of a step.

Numbers are integers held in float64, below 2^53 wherever they are summed, so that any order of summation gives the
same bins on every rank and every machine.
"""

from __future__ import annotations

import numpy as np

UNIT = 4096  # the mean bin's cost
_ITEMS = 4  # samples of each bin of a pair that are shared out at a time
_SHARES = (np.arange(4**_ITEMS) >> np.arange(2 * _ITEMS)[:, None] & 1).astype(np.float64)  # (8, 256) 1: to the first
_TEXT_WEIGHT = 1.5  # of a squared distance in text, against one in vision; measured, see benchmarks/plan.py
_GOOD = np.array([1.010, 1.030])  # text, vision: dearest bin over the mean where levelling ends


def in_units(costs: np.ndarray, bins: int) -> np.ndarray:
    """(n,) float64 whole numbers: costs scaled so that the mean of `bins` bins is about UNIT; zeros stay zeros."""
    shift = max(0, int(costs.max(initial=0)).bit_length() - 50)  # room for the factor
    small = costs >> shift
    return (small * UNIT // max(1, int(small.sum()) // bins)).astype(np.float64)


def level(
    slots: np.ndarray, tokens: np.ndarray, text: np.ndarray, vision: np.ndarray, budget: int, rounds: int
) -> np.ndarray:
    """Exchange samples between bins until all are alike, or `rounds` times.

    Args:
        slots: (bins, width) int64 indices into the arrays; n = an empty slot.
        tokens: (n + 1,) float64 lengths, 0 at n.
        text, vision: (n + 1,) float64 costs, `in_units`, 0 at n.
        budget: no bin gets over it, if none was.

    Returns:
        (bins, width') int64: the same samples.
    """
    n, bins = len(tokens) - 1, len(slots)
    if bins < 2:
        return slots
    values = np.stack([tokens, text, vision])  # (3, n + 1)
    mean = np.array([UNIT if costs.any() else 0 for costs in (text, vision)])
    for r in range(rounds):
        slots = _with_room(slots, n)
        load = values[:, slots].sum(axis=2)  # (3, bins)
        pairs = _pairs(load[1:], mean, r)
        if pairs is None:
            break
        _share(slots, values, load, *pairs, mean, budget, turn=r)
    return slots


def _with_room(slots: np.ndarray, n: int) -> np.ndarray:
    """A copy with samples first in every row, then `_ITEMS` empty columns or more: a bin can take that many more."""
    width = max(_ITEMS, int((slots < n).sum(axis=1).max()))
    wider = np.full((len(slots), max(width, slots.shape[1]) + _ITEMS), n)
    wider[:, : slots.shape[1]] = slots
    wider.sort(axis=1)
    return wider[:, : width + _ITEMS]


def _pairs(costs: np.ndarray, mean: np.ndarray, r: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Which bins share out in round `r`: those too dear, and as many cheap ones; None when all are alike."""
    bins = costs.shape[1]
    excess = ((costs.T - mean) / (mean * (_GOOD - 1) + 1)).T  # (2, bins): 1 is as dear as is good
    bad = int((excess.max(axis=0) > 1).sum())
    if bad == 0:
        return None
    by = (excess.max(axis=0), excess[1], excess[0])[r % 3]
    order = np.argsort(by, kind="stable")
    pairs = min(bins // 2, max(bad, 4))
    return order[bins - pairs :][::-1], np.roll(order[: bins - pairs], -(r // 3) * pairs)[:pairs]


def _share(
    slots: np.ndarray, values: np.ndarray, load: np.ndarray, a: np.ndarray, b: np.ndarray, mean: np.ndarray,
    budget: int, turn: int,
) -> None:  # fmt: skip
    """Every pair (a[p], b[p]) shares out anew, in place."""
    n, width = values.shape[1] - 1, slots.shape[1] - _ITEMS
    column = (np.arange(_ITEMS) + turn * _ITEMS) % width  # bins with more samples than _ITEMS take turns
    of_a, of_b = slots[a[:, None], column], slots[b[:, None], column]  # (p, 4)
    items = np.concatenate([of_a, of_b], axis=1)  # (p, 8)
    item_values = values[:, items]  # (3, p, 8)
    load_a, load_b = load[:, a], load[:, b]  # (3, p)
    in_a = item_values @ _SHARES  # (3, p, 256)
    in_a += (load_a - item_values[:, :, :_ITEMS].sum(axis=2))[:, :, None]  # what stays in a
    in_b = (load_a + load_b)[:, :, None] - in_a
    key = _distance(in_a, mean) + _distance(in_b, mean)
    key[np.maximum(in_a[0], in_b[0]) > budget] = np.inf
    to_a = _SHARES[:, key.argmin(axis=1)].T > 0  # (p, 8)
    for rows, kept in ((a, to_a), (b, ~to_a)):
        new = np.where(kept, items, n)
        slots[rows[:, None], column] = new[:, :_ITEMS]
        slots[rows, width:] = new[:, _ITEMS:]


def _distance(load: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """(3, p, s) loads -> (p, s): fourth power of the distance from the mean bin."""
    text, vision = load[1] - mean[0], load[2] - mean[1]
    squares = _TEXT_WEIGHT * text * text + vision * vision
    return squares * squares
