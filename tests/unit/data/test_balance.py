"""Bins under a budget, alike in cost: the properties that must hold whatever the numbers."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilvr_ds.data.balance import partition


def check(bins: list[np.ndarray] | None, tokens: np.ndarray, costs: np.ndarray, count: int, budget: int) -> None:
    assert bins is not None and len(bins) == count
    assert sorted(np.concatenate(bins).tolist()) == list(range(len(tokens)))  # each sample once
    assert max(int(tokens[b].sum()) for b in bins) <= budget
    paid = [int(costs[b].sum()) for b in bins]
    assert paid == sorted(paid)
    assert all((np.diff(b) > 0).all() for b in bins)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_partition_is_valid_or_refused(data):
    budget = data.draw(st.integers(20, 60))
    tokens = np.array(data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=24)))
    costs = np.array(data.draw(st.lists(st.integers(0, 10**15), min_size=len(tokens), max_size=len(tokens))))
    group = data.draw(st.integers(1, 5))
    count = group * data.draw(st.integers(1, 4))
    bins = partition(tokens, costs, count, budget, group)
    if bins is not None:
        check(bins, tokens, costs, count, budget)
        again = partition(tokens.copy(), costs.copy(), count, budget, group)
        assert [b.tolist() for b in bins] == [b.tolist() for b in again]
    else:  # never refuses where room abounds: half of every bin stays free and no sample needs more than half
        assert 2 * int(tokens.sum()) > count * budget


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_finds_what_exhaustive_search_finds_at_small_sizes(data):
    """Two bins: all 2^n splits. Feasibility is found whenever it exists (n is within one repack)."""
    n = data.draw(st.integers(1, 9))
    tokens = np.array(data.draw(st.lists(st.integers(1, 50), min_size=n, max_size=n)))
    sums = [int(tokens[np.array(mask, bool)].sum()) for mask in itertools.product([0, 1], repeat=n)]
    budget = min(max(s, int(tokens.sum()) - s) for s in sums)
    bins = partition(tokens, tokens, 2, budget, 2)
    check(bins, tokens, tokens, 2, budget)
    assert partition(tokens, tokens, 2, budget - 1, 2) is None


@pytest.mark.parametrize("bins", [8, 64])
def test_a_nearly_full_step_fits(bins):
    """Bins cut to exactly 99.8 % of the budget, five samples each, then shuffled: they are put together again."""
    rng = np.random.default_rng(bins)
    budget = 8192
    cuts = np.sort(rng.integers(1, int(0.998 * budget), (bins, 4)), axis=1)
    tokens = np.diff(cuts, prepend=0, append=int(0.998 * budget), axis=1).ravel()
    tokens = rng.permutation(tokens[tokens > 0])
    check(partition(tokens, tokens, bins, budget, bins), tokens, tokens, bins, budget)


def test_costs_are_level_even_where_they_do_not_follow_length():
    rng = np.random.default_rng(0)
    tokens = rng.integers(300, 2800, 512)
    costs = rng.permutation(tokens) ** 2
    bins = partition(tokens, costs, 64, 16384, 32)
    check(bins, tokens, costs, 64, 16384)
    paid = np.array([costs[b].sum() for b in bins]).reshape(2, 32)
    assert paid.max(axis=1).sum() / paid.mean(axis=1).sum() < 1.02


def test_empty_bins_and_no_samples():
    tokens = np.array([5, 7])
    bins = partition(tokens, tokens, 4, 10, 4)
    check(bins, tokens, tokens, 4, 10)
    assert [len(b) for b in bins] == [0, 0, 1, 1]
    assert [len(b) for b in partition(tokens[:0], tokens[:0], 3, 10, 3)] == [0, 0, 0]


def test_more_tokens_than_room_is_refused():
    tokens = np.array([6, 6, 6])
    assert partition(tokens, tokens, 2, 8, 2) is None
    assert partition(tokens, tokens, 2, 10, 2) is None  # 18 of 20, but no two go together


def test_huge_costs_do_not_drown_the_budget():
    """Perfect costs (11, 11) need 12 tokens in a bin of 10: the budget comes first, however large the costs are."""
    tokens, costs = np.array([6, 6, 4, 4]), np.array([10, 1, 8, 3]) * 2**50
    bins = partition(tokens, costs, 2, 10, 2)
    check(bins, tokens, costs, 2, 10)
    assert [int(costs[b].sum()) // 2**50 for b in bins] == [9, 13]


def test_exchanges_level_what_dealing_leaves():
    """Dealing alone leaves the dearest of 32 bins of five 2-3 % above the mean."""
    costs = np.random.default_rng(0).integers(300, 2800, 32 * 5)
    bins = partition(np.ones(len(costs), np.int64), costs, 32, 1000, 32)
    paid = [int(costs[b].sum()) for b in bins]
    assert max(paid) <= 1.01 * np.mean(paid)
