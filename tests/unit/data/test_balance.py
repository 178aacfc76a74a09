"""Bins under a budget: the properties that must hold whatever the numbers."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilvr_ds.data.balance import ascending, bin_sums, deal, first_bits, fit, fit_step
from ilvr_ds.data.lengths import Lengths
from ilvr_ds.errors import PlanError


def check(slots: np.ndarray | None, tokens: np.ndarray, count: int, budget: int) -> None:
    assert slots is not None and len(slots) == count
    n = len(tokens)
    assert sorted(slots[slots < n].tolist()) == list(range(n))  # each sample once
    assert (slots <= n).all()
    assert np.append(tokens, 0)[slots].sum(axis=1).max() <= budget


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_bins_are_valid_or_refused(data):
    budget = data.draw(st.integers(20, 60))
    tokens = np.array(data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=24)))
    second = np.array(data.draw(st.lists(st.integers(0, 10**15), min_size=len(tokens), max_size=len(tokens))))
    count = data.draw(st.integers(1, 20))
    slots = fit(tokens, count, budget, second)
    if slots is not None:
        check(slots, tokens, count, budget)
        assert np.array_equal(slots, fit(tokens.copy(), count, budget, second.copy()))
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
    check(fit(tokens, 2, budget), tokens, 2, budget)
    assert fit(tokens, 2, budget - 1) is None


@pytest.mark.parametrize("bins", [8, 64])
def test_a_nearly_full_step_fits(bins):
    """Bins cut to exactly 99.8 % of the budget, five samples each, then shuffled: they are put together again."""
    rng = np.random.default_rng(bins)
    budget = 8192
    cuts = np.sort(rng.integers(1, int(0.998 * budget), (bins, 4)), axis=1)
    tokens = np.diff(cuts, prepend=0, append=int(0.998 * budget), axis=1).ravel()
    tokens = rng.permutation(tokens[tokens > 0])
    check(fit(tokens, bins, budget), tokens, bins, budget)


def test_empty_bins_and_no_samples():
    tokens = np.array([5, 7])
    slots = fit(tokens, 4, 10)
    check(slots, tokens, 4, 10)
    assert sorted((slots < 2).sum(axis=1)) == [0, 0, 1, 1]
    assert (fit(tokens[:0], 3, 10) == 0).all() and len(fit(tokens[:0], 3, 10)) == 3


def test_more_tokens_than_room_is_refused():
    tokens = np.array([6, 6, 6])
    assert fit(tokens, 2, 8) is None
    assert fit(tokens, 2, 10) is None  # 18 of 20, but no two go together


def test_dealing_levels_the_second_value_among_items_of_a_size():
    rng = np.random.default_rng(0)
    tokens, second = rng.integers(200, 2800, 4096), rng.integers(0, 10**6, 4096)
    spread = [np.append(second, 0)[deal(tokens, 1024, other)].sum(axis=1).std() for other in (None, second)]
    assert spread[1] < 0.5 * spread[0]
    full = np.append(tokens, 0)[deal(tokens, 1024, second)].sum(axis=1)
    assert full.max() <= 1.1 * full.mean()


@settings(deadline=None, max_examples=50)
@given(values=st.lists(st.integers(0, 2**63 - 1), max_size=30))
def test_order_is_the_stable_one(values):
    array = np.array(values, dtype=np.int64)
    assert ascending(array).tolist() == np.argsort(array, kind="stable").tolist()
    small = array % 5  # with ties
    assert ascending(small).tolist() == np.argsort(small, kind="stable").tolist()


@settings(deadline=None, max_examples=50)
@given(top=st.sampled_from([1, 8, 15, 16, 17, 40, 54, 60, 63]), n=st.integers(1, 300))
def test_order_is_the_stable_one_for_numbers_of_any_size(top, n):
    """By their digits, beside their index in a key, or neither: in rows as in one line, with ties."""
    values = np.random.default_rng(n).integers(0, 2**top, (3, n))
    values[:, ::3], values[:, 0] = values[0, 0], 2**top - 1
    assert np.array_equal(ascending(values), np.argsort(values, axis=-1, kind="stable"))
    assert ascending(values).dtype == np.int64


@pytest.mark.parametrize("top", [10, 2**20, 2**46])
def test_dealing_levels_a_second_value_of_any_size(top):
    """Small counts or large costs, and one that is far above the others."""
    rng = np.random.default_rng(1)
    values, second = np.full(4096, 7), rng.integers(0, top, 4096)
    second[0] = 8 * top
    slots = deal(values, 512, second)
    assert sorted(slots.ravel().tolist()) == list(range(4096))
    spread = [np.sort(bin_sums(second, s))[:-1].std() for s in (slots, deal(values, 512))]  # but for that one
    assert spread[0] < 0.3 * spread[1]


def test_first_bits_keep_the_order_of_what_differs_enough():
    values = np.array([1005, 1000, 1003, 1004, 1007])
    assert first_bits(values, 3).tolist() == [5, 0, 3, 4, 7] and first_bits(values, 3).dtype == np.uint16
    assert first_bits(values, 2).tolist() == [2, 0, 1, 2, 3]
    assert first_bits(values * 2**40, 16).tolist() == [40960, 0, 24576, 32768, 57344]
    assert first_bits(np.zeros(3, np.int64), 11).tolist() == [0, 0, 0] and len(first_bits(values[:0], 4)) == 0


def test_bins_of_a_step_and_what_they_sum_to():
    tokens = np.array([5, 4, 3, 3, 2, 1])
    lengths = Lengths(tokens, 4 * tokens, tokens, tokens)
    slots, lower_bound = fit_step(lengths, 6, 2)
    assert lower_bound == 2 and len(slots) == 4  # 18 tokens in two micro-steps of two bins
    check(slots, tokens, 4, 6)
    assert bin_sums(tokens, slots).tolist() == np.append(tokens, 0)[slots].sum(axis=1).tolist()
    with pytest.raises(PlanError, match="up to 7"):
        fit_step(Lengths(*np.array([[7]] * 4)), 6, 1)
