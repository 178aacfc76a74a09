"""Shares by weight: exact in the long run, level on the way, never taken back."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilvr_ds.data.blend import Blend
from ilvr_ds.errors import PlanError

weights = st.lists(st.sampled_from([0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 7.5, 100.0]), min_size=1, max_size=5)


@settings(deadline=None, max_examples=100)
@given(weights=weights, samples=st.integers(0, 10**12), more=st.integers(0, 300))
def test_shares(weights, samples, more):
    blend = Blend(weights)
    now, later = blend.taken(samples), blend.taken(samples + more)
    assert sum(now) == samples and sum(later) == samples + more
    assert all(a <= b for a, b in zip(now, later, strict=True))
    for count, weight in zip(now, weights, strict=True):
        assert abs(count - samples * Fraction(str(weight)) / sum(Fraction(str(w)) for w in weights)) <= len(weights)


@settings(deadline=None, max_examples=30)
@given(weights=weights)
def test_it_is_the_one_by_one_rule(weights):
    """Sainte-Lague: each next sample to the source with the smallest (i + 1/2) / weight, the first of equals."""
    blend, counts = Blend(weights), [0] * len(weights)
    for samples in range(60):
        assert blend.taken(samples) == counts
        due = [Fraction(2 * i + 1) / Fraction(str(w)) for i, w in zip(counts, weights, strict=True)]
        counts[due.index(min(due))] += 1


def test_a_tenth_is_a_tenth():
    assert Blend([0.1, 0.2, 0.7]).taken(10**15) == [10**14, 2 * 10**14, 7 * 10**14]


def test_weights_that_are_none():
    for wrong in ([], [1.0, 0.0], [-1.0]):
        with pytest.raises(PlanError, match=r"data\.sources"):
            Blend(wrong)
