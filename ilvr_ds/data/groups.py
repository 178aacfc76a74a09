"""Cut a step's bins into groups alike in text and vision, so that a rank levels its own group only.

Differencing, as in Karmarkar and Karp's method, over whole arrays: the bins lie in a table, one column for each group,
and the table is folded in half until one row is left. In each fold a row is joined to its opposite, the dearest of the
one with the cheapest of the other, so what sets two sums apart shrinks from fold to fold. The groups end up within
0.1 % of each other in text and 0.5 % in vision.

Everything is integer arithmetic and stable sorts, so every rank finds the same groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ilvr_ds.data.balance import ascending, first_bits

_GROUP_BINS = 32  # bins levelled together, at least, where there are more


def group_size(world: int, n_micro: int) -> int:
    """Ranks that are levelled together: the smallest divisor of the world with `_GROUP_BINS` bins, or the world.

    Worlds are multiples of 8 in practice. One that is a large prime is one group, and slow to plan.
    """
    sizes = (size for size in range(1, world) if world % size == 0 and size * n_micro >= _GROUP_BINS)
    return next(sizes, world)


def alike(text: np.ndarray, vision: np.ndarray, groups: int, asked: Sequence[int]) -> np.ndarray:
    """(len(asked), bins / groups) int64: the bins of each of the groups `asked`.

    Args:
        text: (bins,) int64 costs, non-negative; bins is a multiple of `groups`.
        vision: (bins,) int64, likewise.
        asked: numbers of groups, below `groups`.
    """
    if groups == 1:
        return np.arange(len(text))[None]
    # A row holds bins alike in vision, so rows are joined by text until two are left.
    bins = ascending(first_bits(vision, 16))[::-1].reshape(-1, groups)
    costs = np.stack([text.take(bins), vision.take(bins)])  # (2, rows, groups)
    partners = []  # of every fold: (pairs, groups), where in the table the bin lies that comes to a column
    while (rows := costs.shape[1]) > 1:
        half = rows // 2
        order = _ascending_rows(costs[0] if rows > 2 else costs[1])
        partner = np.empty(half * groups, np.int64)
        partner[order[:half].ravel()] = order[: rows - half - 1 : -1, ::-1].ravel()
        partner = partner.reshape(half, groups)
        partners.append(partner)
        joined = costs.reshape(2, -1).take(partner, axis=1)
        joined += costs[:, :half]
        costs = joined if rows % 2 == 0 else np.concatenate([joined, costs[:, half : half + 1]], axis=1)
    columns = np.array(asked)[None]  # of the groups in the last row, then in ever more rows
    for partner in reversed(partners):
        opposite = partner[np.arange(len(partner))[:, None], columns[: len(partner)]] % groups
        columns = np.concatenate([columns, opposite[::-1]])
    return bins[np.arange(len(bins))[:, None], columns].T


def _ascending_rows(values: np.ndarray) -> np.ndarray:
    """(rows, n) order of each row of integers, as indices into the flattened array; of equal ones the first first.

    One sort for all rows, by 16 bits in which the row comes first, where that leaves 10 bits or more of the values.
    """
    rows, n = values.shape
    bits = 16 - (rows - 1).bit_length()
    if bits < 10:
        return ascending(first_bits(values, 16)) + np.arange(0, rows * n, n)[:, None]
    keys = first_bits(values, bits)
    keys |= (np.arange(rows) << bits).astype(np.uint16)[:, None]
    return keys.ravel().argsort(kind="stable").reshape(rows, n)
