"""Groups of bins: every bin in one group, alike in both costs, the same whoever asks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilvr_ds.data.groups import _ascending_rows, alike


@settings(deadline=None, max_examples=80)
@given(rows=st.integers(1, 12), groups=st.integers(1, 12), top=st.sampled_from([0, 3, 10**6, 2**60]), data=st.data())
def test_every_bin_is_in_one_group_and_a_group_is_found_alone(rows, groups, top, data):
    text, vision = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, top + 1, (2, rows * groups))
    whole = alike(text // rows, vision // rows, groups, range(groups))
    assert whole.shape == (groups, rows) and sorted(whole.ravel().tolist()) == list(range(rows * groups))
    asked = data.draw(st.lists(st.integers(0, groups - 1), min_size=1, max_size=3, unique=True))
    assert np.array_equal(alike(text // rows, vision // rows, groups, asked), whole[asked])


@pytest.mark.parametrize("rows", [32, 33, 40, 130])
def test_groups_are_alike_in_both_costs_even_where_they_are_opposed(rows):
    rng = np.random.default_rng(rows)
    text = rng.integers(5 * 10**6, 7 * 10**6, rows * 128)
    for vision in (rng.integers(10**5, 10**6, len(text)), 8 * 10**6 - text, rng.permutation(text)):
        groups = alike(text, vision, 128, range(128))
        for costs, most in ((text, 1.004), (vision, 1.01)):
            sums = costs[groups].sum(axis=1)
            assert sums.max() <= most * sums.mean() and sums.min() >= (2 - most) * sums.mean()


def test_two_rows_are_joined_the_dearest_in_vision_with_the_cheapest():
    vision = np.array([1, 2, 3, 10, 20, 30])
    groups = alike(np.array([1, 7, 4, 2, 9, 3]), vision, 3, range(3))
    assert sorted(vision[groups].sum(axis=1).tolist()) == [13, 22, 31]


@pytest.mark.parametrize("rows", [1, 2, 64, 65, 300])
def test_rows_are_sorted_by_themselves(rows):
    """In one sort while 16 bits hold the row and 10 bits of the values, and row by row beyond."""
    values = np.random.default_rng(rows).integers(0, 1000, (rows, 40))
    order = _ascending_rows(values)
    assert np.array_equal(order % 40, values.argsort(axis=1, kind="stable"))
    assert np.array_equal(order // 40, np.repeat(np.arange(rows)[:, None], 40, axis=1))
