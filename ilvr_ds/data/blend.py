"""How many samples of each source an optimizer step takes, by weight.

The samples of a run are handed out like seats to parties (Webster's or Sainte-Lague's rule, the divisor method with
odd divisors): source k's i-th sample is due at (i + 1/2) / weight_k, and what is due first is taken first. After any
number of samples every source has had its share to within about one sample, and since the rule never takes back what
it gave, the mix of a step is a difference of two states that are each a pure function of the number of samples so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import lcm

from ilvr_ds.errors import PlanError


class Blend:
    """Shares of several sources.

    Args:
        weights: of the sources, above 0; only their ratios count.

    Raises:
        PlanError: no source, or a weight that is not above 0.
    """

    def __init__(self, weights: Sequence[float]):
        if not weights or min(weights) <= 0:
            raise PlanError(f"data.sources: weights are above 0, one for each source; got {list(weights)}")
        exact = [Fraction(str(weight)) for weight in weights]  # as written: 0.1 is a tenth
        scale = lcm(*(weight.denominator for weight in exact))
        self._weights = [int(weight * scale) for weight in exact]

    def taken(self, samples: int) -> list[int]:
        """Samples of each source among the first `samples`; sums to `samples`, never falls as it grows."""
        weights, total = self._weights, sum(self._weights)
        # All that is due by t = (samples - k / 2) / total, for k sources, is at most `samples`: each source's count
        # floor(w t + 1/2) is at most w t + 1/2. At most k are missing then, given one by one.
        twice = max(0, 2 * samples - len(weights))  # 2 t total
        counts = [(weight * twice + total) // (2 * total) for weight in weights]
        while sum(counts) < samples:
            # the due times (2 i + 1) / (2 w); of equal ones the source named first
            due = [Fraction(2 * count + 1, weight) for count, weight in zip(counts, weights, strict=True)]
            counts[due.index(min(due))] += 1
        return counts
