"""How sure an accuracy is."""

from __future__ import annotations

from math import sqrt

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
