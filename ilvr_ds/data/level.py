"""Make bins alike in two costs at once, text and vision, without going over the token budget.

Two-way number partitioning, pair by pair: the bins that stick out in either cost are paired with others, and every
pair shares out five places of each bin, taken or empty, in the best of all 252 ways to halve them. Best: the smallest
sum of fourth powers of the distance from the mean bin (largest deviations first, as only the dearest rank of a
micro-step counts), where text weighs more than vision because it is most of a step.

Numbers are integers and their halves held in float64, below 2^52 wherever they are summed, so that any order of
summation gives the same bins on every rank and every machine.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

VISION_UNIT = 4096  # the mean bin's cost
TEXT_UNIT = 5017  # 1.5 times the weight of vision in a squared distance; measured, see benchmarks/plan.py
_PLACES = 5  # of each bin of a pair that are shared out at a time
# (252, 10) which places' contents go to the first bin. The first way leaves all as it is; the second half of the ways
# is the first one with the bins swapped.
_TO_FIRST = np.array([np.isin(np.arange(2 * _PLACES), chosen) for chosen in combinations(range(2 * _PLACES), _PLACES)])
_SIGNS = np.where(_TO_FIRST.T, 0.5, -0.5)  # (10, 252)
_HALF_THE_SIGNS = _SIGNS[:, : _SIGNS.shape[1] // 2].copy()  # (10, 126)
_GOOD = np.array([1.010, 1.030])  # text, vision: dearest bin over the mean where levelling ends


def in_units(tokens: np.ndarray, text: np.ndarray, vision: np.ndarray, bins: int) -> np.ndarray:
    """(3, n + 1) float64 whole numbers, 0 at n, of (n,) int64 lengths and costs.

    Costs are scaled so that the mean of `bins` bins is about TEXT_UNIT and VISION_UNIT; zeros stay zeros.
    """
    values = np.zeros((3, len(tokens) + 1))
    values[0, :-1] = tokens
    for row, costs, unit in ((1, text, TEXT_UNIT), (2, vision, VISION_UNIT)):
        small = costs >> max(0, int(costs.max(initial=0)).bit_length() - 50)  # room for the factor
        values[row, :-1] = small * unit // max(1, int(small.sum()) // bins)
    return values


def level(slots: np.ndarray, values: np.ndarray, budget: int, rounds: int) -> np.ndarray:
    """Exchange samples between bins until all are alike, or `rounds` times.

    Args:
        slots: (bins, width) int64 indices below n; n = an empty slot.
        values: (3, n + 1) `in_units`.
        budget: no bin gets over it, if none was.

    Returns:
        (bins, width') int64: the same samples.
    """
    if len(slots) < 2:
        return slots
    slots = _with_room(slots, values.shape[1] - 1)
    width = slots.shape[1]
    load = values[:, slots].sum(axis=2)  # (3, bins)
    mean = np.array([[TEXT_UNIT], [VISION_UNIT]]) * (load[1:].max(axis=1, keepdims=True) > 0)
    scale = 1 / (mean * (_GOOD[:, None] - 1) + 1)
    for r in range(rounds):
        pairs = _pairs((load[1:] - mean) * scale, r)
        if pairs is None:
            break
        column = (np.arange(_PLACES) + r * _PLACES) % width  # bins with more places take turns
        _share(slots, values, load, *pairs, mean, budget, column)
    return slots


def _with_room(slots: np.ndarray, n: int) -> np.ndarray:
    """A copy with samples first in every row, and empty places so that a bin can take more samples than it gives."""
    used = int((slots < n).sum(axis=1).max())
    wider = np.full((len(slots), max(_PLACES, used + 1 + used // 4)), n)
    wider[:, :used] = np.sort(slots, axis=1)[:, :used]
    return wider


def _pairs(excess: np.ndarray, r: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Which bins share out in round `r`: those too dear, and as many cheap ones; None when all are alike.

    Args:
        excess: (2, bins) of text and vision: 1 is as dear as is good.
    """
    bins = excess.shape[1]
    worst = np.maximum(excess[0], excess[1])
    bad = np.count_nonzero(worst > 1)
    if bad == 0:
        return None
    order = np.argsort((worst, excess[1], excess[0])[r % 3], kind="stable")
    pairs = min(bins // 2, max(bad, 4))
    rest = bins - pairs
    return order[rest:][::-1], order[(np.arange(pairs) + (r // 3) * pairs) % rest]


def _share(
    slots: np.ndarray, values: np.ndarray, load: np.ndarray, a: np.ndarray, b: np.ndarray, mean: np.ndarray,
    budget: int, column: np.ndarray,
) -> None:  # fmt: skip
    """Every pair (a[p], b[p]) shares out its places in `column` (5,) anew; changes `slots` and `load`."""
    at_a, at_b = (a[:, None], column), (b[:, None], column)
    items = np.concatenate([slots[at_a], slots[at_b]], axis=1)  # (p, 10)
    item_values = values[:, items]  # (3, p, 10)
    load_a, load_b = load[:, a], load[:, b]  # (3, p)
    middle = (load_a + load_b) / 2
    # A way to share out puts the bins at middle + half and middle - half.
    if slots.shape[1] == _PLACES:  # nothing stays, so one half of the ways mirrors the other
        half = item_values @ _HALF_THE_SIGNS  # (3, p, 126)
    else:
        half = item_values @ _SIGNS  # (3, p, 252)
        half += ((load_a - load_b) / 2 - item_values @ _SIGNS[:, 0])[:, :, None]
    # With m = middle - mean the squared distances of the two are s + d and s - d, where s = |half|^2 + |m|^2 and
    # d = 2 m half; and (s + d)^2 + (s - d)^2 = 2 (s^2 + d^2).
    text, vision = half[1], half[2]
    m = middle[1:] - mean  # (2, p)
    key = text * text
    key += vision * vision
    key += (m * m).sum(axis=0)[:, None]
    key *= key
    d = text * (2 * m[0])[:, None]
    d += vision * (2 * m[1])[:, None]
    d *= d
    key += d
    np.copyto(key, np.inf, where=np.abs(half[0]) > (budget - middle[0])[:, None])
    best = key.argmin(axis=1)
    to_a = _TO_FIRST[best]  # (p, 10)
    slots[at_a], slots[at_b] = items[to_a].reshape(-1, _PLACES), items[~to_a].reshape(-1, _PLACES)
    moved = half[:, np.arange(len(a)), best]
    load[:, a], load[:, b] = middle + moved, middle - moved
