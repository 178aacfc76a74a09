"""Make bins alike in two costs at once, text and vision, without going over the token budget.

Two-way number partitioning, pair by pair: every bin that sticks out in either cost tries several of the others, and
with the best of them it shares out five places of each, taken or empty, in the best of all 252 ways to halve them.
Best: the smallest sum of fourth powers of the distance from the mean bin (largest deviations first, as only the
dearest rank of a micro-step counts), where text weighs more than vision because it is most of a step.

Numbers are integers and their halves held in float64, below 2^52 wherever they are summed, so that any order of
summation gives the same bins on every rank and every machine. What is larger is multiplied and added element by
element only, which is rounded in the same way everywhere.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations

import numpy as np

VISION_UNIT = 4096  # the mean bin's cost
TEXT_UNIT = 5017  # 1.5 times the weight of vision in a squared distance; measured, see benchmarks/plan.py
_PLACES = 5  # of each bin of a pair that are shared out at a time
_COLUMNS = np.arange(_PLACES)
# (252, 10) which places' contents go to the first bin. The first way leaves all as it is; the second half of the ways
# is the first one with the bins swapped.
_TO_FIRST = np.array([np.isin(np.arange(2 * _PLACES), chosen) for chosen in combinations(range(2 * _PLACES), _PLACES)])
_PLACED = np.argsort(~_TO_FIRST, axis=1, kind="stable")  # (252, 10) the five places of the first bin, then the others
_SIGNS = np.where(_TO_FIRST.T, 0.5, -0.5)  # (10, 252)
_HALF_THE_SIGNS = _SIGNS[:, : _SIGNS.shape[1] // 2].copy()  # (10, 126)
# Dearest bin over the mean, of text and vision, where levelling ends: in the first `_FEW` rounds, and after them.
_BEST, _GOOD = np.array([[1.005], [1.010]]), np.array([[1.015], [1.025]])
_FEW = 6
_AT_A_TIME = 4  # one bin of so many is made better in a round, at most: the others are what it may choose from


def level_group(
    slots: np.ndarray, tokens: np.ndarray, text: np.ndarray, vision: np.ndarray, token_budget: int, rounds: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Level the bins of one group, and nothing but them: time and memory do not grow with the step.

    Args:
        slots: (bins, width) int64 rows of the step's samples; n = an empty slot.
        tokens, text, vision: (n,) int64 of the step's samples.

    Returns:
        rows (s,) of the group's samples; bins (bins, width') of places in `rows`, s = an empty slot; and what the bins
        cost, (3, bins) int64: in total, text, vision.
    """
    taken = slots < len(tokens)
    rows = slots[taken]
    own = np.full(slots.shape, len(rows))
    own[taken] = np.arange(len(rows))
    costs = np.zeros((3, len(rows) + 1), np.int64)
    costs[1, :-1], costs[2, :-1] = text[rows], vision[rows]
    costs[0] = costs[1] + costs[2]
    if rounds:
        own = level(own, in_units(tokens[rows], costs[1, :-1], costs[2, :-1], len(own)), token_budget, rounds)
    return rows, own, costs[:, own].sum(axis=2)


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
    target = np.concatenate([[[budget]], mean])
    beyond = load - target  # (3, bins): tokens over the budget, costs over the mean
    scales = [1 / (mean * (end - 1) + 1) for end in (_BEST, _GOOD)]
    for r in range(rounds):
        tries = _tries(beyond[1:] * scales[r >= _FEW], r)
        if tries is None:
            break
        column = (_COLUMNS + r * _PLACES) % width  # bins with more places take turns
        _share(slots, values, beyond, target, tries, column)
    return slots


def _with_room(slots: np.ndarray, n: int) -> np.ndarray:
    """A copy with samples first in every row, and an empty place so that a bin can take more samples than it gives."""
    used = int((slots < n).sum(axis=1).max())
    wider = np.full((len(slots), max(_PLACES, used + 1)), n)
    wider[:, :used] = np.sort(slots, axis=1)[:, :used]
    return wider


def _tries(excess: np.ndarray, r: int) -> np.ndarray | None:
    """(q, p, 2) pairs of bins that may share out in round `r`: p too dear ones, in each row the same, with different
    others of which one will do. None when all bins are alike.

    Args:
        excess: (2, bins) of text and vision: 1 is as dear as is good.
    """
    bins = excess.shape[1]
    worst = np.maximum(excess[0], excess[1])
    bad = np.count_nonzero(worst > 1)
    if bad == 0:
        return None
    order = np.argsort((worst, excess[1], excess[0])[r % 3], kind="stable")
    pairs = min(bad, max(1, bins // _AT_A_TIME))
    return order[_ranks(bins, pairs, r // 3 * pairs % (bins - pairs))]


@lru_cache(maxsize=256)
def _ranks(bins: int, pairs: int, shift: int) -> np.ndarray:
    """(q, pairs, 2) ranks among `bins` bins, cheapest first: the last ones, and for each q of the others."""
    rest = bins - pairs
    ranks = np.empty((rest // pairs, pairs, 2), np.int64)
    ranks[:, :, 0] = np.arange(rest, bins)
    ranks[:, :, 1] = (np.arange(rest // pairs * pairs).reshape(-1, pairs) + shift) % rest  # cheap and dear ones
    ranks.flags.writeable = False
    return ranks


def _share(
    slots: np.ndarray, values: np.ndarray, beyond: np.ndarray, target: np.ndarray, tries: np.ndarray, column: np.ndarray
) -> None:
    """One pair of bins of every column of `tries` (q, p, 2) shares out its places in `column` (5,) anew; changes
    `slots` and `beyond`.

    Rows of `slots` stay sorted: samples first. `beyond` is (3, bins), what bins have more than `target` (3, 1).
    """
    q, p, _ = tries.shape
    tried = tries.reshape(-1, 2)  # (q p, 2) bins
    items = slots[tried[:, :, None], column].reshape(-1, 2 * _PLACES)  # (q p, 10)
    both = beyond[:, tried]  # (3, q p, 2)
    double = both[:, :, 0] + both[:, :, 1]  # (3, q p)
    # A way to share out puts the bins at double / 2 + half and double / 2 - half.
    half = _halves(values[1:, items], both[1:], slots.shape[1])  # (2, q p, ways)
    # The squared distances of the two are s + d and s - d, where s = |half|^2 + |double|^2 / 4 and d = double half;
    # and (s + d)^2 + (s - d)^2 = 2 (s^2 + d^2).
    text, vision = half
    d = text * double[1][:, None]
    d += vision * double[2][:, None]
    half *= half
    key = np.add(text, vision, out=text)
    key += ((double[1] * double[1] + double[2] * double[2]) / 4)[:, None]
    key *= key
    d *= d
    key += d
    for limited in (False, True):
        if limited:  # seldom needed: bins alike in text are nearly alike in tokens
            tokens = _halves(values[:1, items], both[:1], slots.shape[1])[0]
            np.copyto(key, np.inf, where=2 * np.abs(tokens) > -double[0][:, None])
        gain = key[:, 0] - key.min(axis=1)  # (q p,)
        best = gain.reshape(q, p).argmax(axis=0) * p + np.arange(p)  # (p,) of the tries
        way = key[best].argmin(axis=1)
        changed = tried[best]  # (p, 2)
        rows = slots[changed]  # (p, 2, width)
        rows[:, :, column] = items[best[:, None], _PLACED[way]].reshape(p, 2, _PLACES)
        now = values[:, rows].sum(axis=3) - target[:, :, None]  # (3, p, 2)
        if now[0].max() <= 0:
            break
    rows.sort(axis=2)
    slots[changed] = rows
    beyond[:, changed] = now


def _halves(item_values: np.ndarray, both: np.ndarray, width: int) -> np.ndarray:
    """(k, pairs, ways): half of what the first bin of a pair has more than the second, for every way to share out.

    Args:
        item_values: (k, pairs, 10) of the places that are shared out.
        both: (k, pairs, 2) what the bins have, or how far that is beyond a target.
        width: places of a bin.
    """
    if width == _PLACES:  # nothing stays, so one half of the ways mirrors the other
        return item_values @ _HALF_THE_SIGNS
    half = item_values @ _SIGNS
    half += ((both[:, :, 0] - both[:, :, 1]) / 2 - half[:, :, 0])[:, :, None]
    return half
