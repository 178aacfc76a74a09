"""Bins alike in text and vision at once, never over the budget, never a sample lost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilvr_ds.data.balance import fit
from ilvr_ds.data.level import TEXT_UNIT, VISION_UNIT, in_units, level, level_group


def leveled(tokens, text, vision, bins, budget, rounds=24):
    slots = fit(tokens, bins, budget)
    return slots, level(slots, in_units(tokens, text, vision, bins), budget, rounds)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_no_sample_is_lost_and_no_bin_goes_over(data):
    n, bins = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 9))
    tokens, text, vision = (
        np.array(data.draw(st.lists(st.integers(low, high), min_size=n, max_size=n)))
        for low, high in ((1, 20), (0, 10**17), (0, 10**17))
    )
    budget = data.draw(st.integers(20, 120))
    slots = fit(tokens, bins, budget)
    if slots is None:
        return
    _, after = leveled(tokens, text, vision, bins, budget)
    assert sorted(after[after < n].tolist()) == list(range(n))
    assert np.append(tokens, 0)[after].sum(axis=1).max() <= budget
    again = leveled(tokens, text, vision, bins, budget)[1]
    assert np.array_equal(after, again)


def test_both_costs_are_level_even_where_they_are_opposed():
    rng = np.random.default_rng(0)
    tokens = rng.integers(200, 2800, 32 * 4)
    text, vision = tokens * 10**9, rng.permutation(tokens.max() - tokens) * 10**7
    before, after = leveled(tokens, text, vision, 32, 16384)
    for costs, good in ((text, 1.04), (vision, 1.06)):
        loads = np.append(costs, 0)[after].sum(axis=1)
        assert loads.max() <= good * loads.mean()
    loads = np.append(vision, 0)[before].sum(axis=1)
    assert loads.max() > 1.2 * loads.mean()  # what there was to do


def test_bins_of_many_samples_take_turns():
    """More samples than are shared out at a time: those at the end get their turn too."""
    rng = np.random.default_rng(1)
    tokens = np.full(64, 10)
    vision = np.where(np.arange(64) < 48, 0, rng.integers(1, 1000, 64) * 10**6)  # the last four of every bin
    _, after = leveled(tokens, tokens, vision, 4, 1000)
    loads = np.append(vision, 0)[after].sum(axis=1)
    assert loads.max() <= 1.05 * loads.mean()


def test_a_bin_can_take_more_samples_than_it_gives():
    """Odd costs of 102 in all: bins of 51 hold an odd number of samples, and six each is what they begin with."""
    costs = np.array([19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 1, 1]) * 10**6
    before, after = leveled(np.ones(12, np.int64), costs, costs, 2, 100)
    assert (before < 12).sum(axis=1).tolist() == [6, 6]
    assert np.append(costs, 0)[after].sum(axis=1).tolist() == [51 * 10**6] * 2


def test_the_budget_comes_before_level_costs():
    """Perfect costs (11, 11) need 12 tokens in a bin of 10, however large the costs are."""
    tokens, costs = np.array([6, 6, 4, 4]), np.array([10, 1, 8, 3]) * 2**50
    _, after = leveled(tokens, costs, costs, 2, 10)
    assert sorted(int(c) // 2**50 for c in np.append(costs, 0)[after].sum(axis=1)) == [9, 13]


@pytest.mark.parametrize("scale", [1, 10**6, 2**55])
def test_units_are_whole_numbers_around_the_mean_bin(scale):
    costs = np.array([1, 2, 3, 1, 2, 3, 1, 3]) * scale
    units = in_units(np.arange(8), costs, 3 * costs, 4)
    assert (units == np.floor(units)).all() and (units[:, -1] == 0).all() and units[0, :-1].tolist() == [*range(8)]
    assert units[1].sum() == pytest.approx(4 * TEXT_UNIT, rel=0.3)
    assert units[2].sum() == pytest.approx(4 * VISION_UNIT, rel=0.3)
    assert (in_units(*np.zeros((3, 3), np.int64), 2) == 0).all()


def test_a_dear_bin_finds_the_one_that_helps():
    """{9, 7} gains nothing from the first bin of 10, which holds one sample, and halves 26 with the second, {6, 4}."""
    costs = np.array([9, 7, 10, 6, 4, *[12] * 5]) * 10**6
    slots = np.array([[0, 1], [2, 10], [3, 4], *[[5 + i, 10] for i in range(5)]])
    after = level(slots, in_units(np.ones(10, np.int64), costs, costs, 8), 100, 1)
    assert sorted((np.append(costs, 0)[after].sum(axis=1) // 10**6).tolist()) == [10, 12, 12, 12, 12, 12, 13, 13]


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), room=st.integers(0, 40), each=st.sampled_from([2, 4, 5, 7]))
def test_no_bin_goes_over_where_costs_pull_against_tokens(seed, room, each):
    """Costs that have nothing to do with tokens: the best exchange is often one that the budget forbids."""
    rng = np.random.default_rng(seed)
    tokens, text, vision = rng.integers(1, 100, (3, 16 * each))
    slots = np.arange(16 * each).reshape(16, each)
    budget = int(tokens[slots].sum(axis=1).max()) + room
    units = in_units(tokens, text * 10**6, vision * 10**6, 16)
    after = level(slots, units, budget, 24)
    assert sorted(after[after < 16 * each].tolist()) == list(range(16 * each))
    assert np.append(tokens, 0)[after].sum(axis=1).max() <= budget
    apart = [units[1:, bins].sum(axis=2) - [[TEXT_UNIT], [VISION_UNIT]] for bins in (slots, after)]
    assert ((apart[1] ** 2).sum(axis=0) ** 2).sum() <= ((apart[0] ** 2).sum(axis=0) ** 2).sum()


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_group_is_leveled_without_the_rest_of_the_step(data):
    """What other samples cost changes nothing; costs are exact however large they are."""
    n, bins = 40, data.draw(st.integers(2, 6))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    tokens, text, vision = rng.integers(1, 20, n), *rng.integers(0, 2**55, (2, n))
    members = rng.permutation(n)[: 3 * bins - 1]
    slots = np.append(members, n).reshape(bins, 3)
    rows, own, loads = level_group(slots, tokens, text, vision, 60, 24)
    assert sorted(rows.tolist()) == sorted(members.tolist())
    in_bins = np.append(rows, n)[own]
    for kind, costs in enumerate((text + vision, text, vision)):
        assert loads[kind].tolist() == np.append(costs, 0)[in_bins].sum(axis=1).tolist()
    others = np.setdiff1d(np.arange(n), members)
    text[others] = vision[others] = 0
    again = level_group(slots, tokens, text, vision, 60, 24)
    assert all(np.array_equal(a, b) for a, b in zip((rows, own, loads), again, strict=True))
    untouched = level_group(slots, tokens, text, vision, 60, 0)
    assert np.array_equal(np.append(untouched[0], n)[untouched[1]], slots)
