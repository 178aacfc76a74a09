"""How sure an accuracy is."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, stdev

Z_95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


def wilson(correct: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share, 95 % by default (E. B. Wilson, 1927).

    With p = correct / total: centre (p + z²/2n) / (1 + z²/n), half width z·sqrt(p(1−p)/n + z²/4n²) / (1 + z²/n).
    Always inside [0, 1] and never of zero width; (0, 1) for no samples. Raises ValueError on impossible counts.

    >>> tuple(round(bound, 4) for bound in wilson(81, 263))
    (0.2553, 0.3662)
    """
    if not 0 <= correct <= total:
        raise ValueError(f"{correct} correct of {total} is impossible")
    if total == 0:
        return 0.0, 1.0
    share, square = correct / total, z * z
    centre = (share + square / (2 * total)) / (1 + square / total)
    half = z * sqrt(share * (1 - share) / total + square / (4 * total * total)) / (1 + square / total)
    return (0.0 if correct == 0 else max(0.0, centre - half)), (1.0 if correct == total else min(1.0, centre + half))


# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom
T_95 = (
    12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139,
    2.200985, 2.178813, 2.160369, 2.144787, 2.131450, 2.119905, 2.109816, 2.100922, 2.093024, 2.085963,
    2.079614, 2.073873, 2.068658, 2.063899, 2.059539, 2.055529, 2.051831, 2.048407, 2.045230, 2.042272,
)  # fmt: skip


def t_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of a few runs and the half width of its 95 % interval, t_{n-1} · s / √n with s the sample deviation.

    The half width is None for one value, which says nothing of the spread. Raises ValueError for none, or more than
    31 (the table ends there).

    >>> [round(x, 3) for x in t_interval([0.30, 0.34, 0.35])]
    [0.33, 0.066]
    """
    if not values:
        raise ValueError("no values")
    if len(values) == 1:
        return values[0], None
    if len(values) - 1 > len(T_95):
        raise ValueError(f"{len(values)} values: the table holds at most {len(T_95) + 1}")
    return fmean(values), T_95[len(values) - 2] * stdev(values) / sqrt(len(values))
