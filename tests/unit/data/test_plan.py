"""The plan: each sample once, the same samples at any world size, purity, denominators, limits."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilvr_ds.data.cost import CostModel
from ilvr_ds.data.index import INDEX_DTYPE
from ilvr_ds.data.lengths import IndexColumns, Lengths, check_fits
from ilvr_ds.data.order import PlanSource
from ilvr_ds.data.plan import Planner, group_size, imbalances
from ilvr_ds.errors import PlanError

BUDGET = 64


def lengths_of(tokens: list[int], seed: int = 0) -> Lengths:
    rng = np.random.default_rng(seed)
    n = len(tokens)
    counts = rng.integers(1, 20, n), rng.integers(1, 9, n), rng.integers(0, 4, n)
    return Lengths(np.array(tokens, dtype=np.int64), *counts)


cases = st.fixed_dictionaries(
    {
        "tokens": st.lists(st.integers(1, BUDGET), min_size=1, max_size=40),
        "per_step": st.integers(1, 45),
        "seed": st.integers(0, 2**63 - 1),
    }
)


def planner(tokens, per_step, seed, world, budget=BUDGET) -> Planner:
    return Planner(
        lengths_of(tokens), seed=seed, samples_per_step=per_step, token_budget=budget, world=world, window=16
    )


@settings(deadline=None, max_examples=60)
@given(case=cases, world=st.integers(1, 64), epoch=st.integers(0, 2))
def test_each_sample_once_per_epoch_and_every_bin_within_the_budget(case, world, epoch):
    p, every = planner(**case, world=world), lengths_of(case["tokens"])
    seen = []
    for step in range(epoch * p.steps_per_epoch, (epoch + 1) * p.steps_per_epoch):
        plan = p.step(step)
        assert plan.step == step and plan.epoch == epoch
        assert {len(micro) for micro in plan.bins} == {world}  # every rank runs every micro-step
        numbers = [n for micro in plan.bins for b in micro for n in b]
        assert max(every.tokens[list(b)].sum() for micro in plan.bins for b in micro) <= BUDGET
        t = plan.totals
        assert (t.samples, t.tokens) == (len(numbers), every.tokens[numbers].sum())
        assert (t.supervised, t.spans) == (every.supervised[numbers].sum(), every.spans[numbers].sum())
        assert plan.n_micro >= plan.lower_bound == max(1, -(-t.tokens // (world * BUDGET)))
        assert plan.imbalance >= 1 - 1e-12
        assert all(plan.of_rank(rank)[m] == micro[rank] for m, micro in enumerate(plan.bins) for rank in range(world))
        seen += numbers
    assert sorted(seen) == list(range(len(case["tokens"])))


@settings(deadline=None, max_examples=30)
@given(case=cases)
def test_same_samples_in_every_step_at_any_world_size(case):
    planners = {world: planner(**case, world=world) for world in (1, 2, 3, 8, 13, 64)}
    for step in range(planners[1].steps_per_epoch + 1):
        plans = [p.step(step) for p in planners.values()]
        sets = [sorted(n for micro in plan.bins for b in micro for n in b) for plan in plans]
        assert all(s == sets[0] for s in sets)
        assert len({plan.totals for plan in plans}) == 1


@settings(deadline=None, max_examples=25)
@given(case=cases, world=st.integers(1, 5), data=st.data())
def test_a_step_planned_alone_equals_the_step_in_sequence(case, world, data):
    p = planner(**case, world=world)
    last = 2 * p.steps_per_epoch
    sequence = [p.step(step) for step in range(last + 1)]
    step = data.draw(st.integers(0, last))
    assert planner(**case, world=world).step(step) == sequence[step]
    assert pickle.loads(pickle.dumps(p)).step(step) == sequence[step]  # as in a spawned worker
    assert p.step(step) == sequence[step]  # and out of order


def test_going_through_epochs_reorders_them():
    p = planner([5] * 30, 10, 0, world=2)
    in_sequence = [p.step(step) for step in range(9)]
    assert in_sequence == [planner([5] * 30, 10, 0, world=2).step(step) for step in range(9)]


def test_fewer_samples_than_ranks():
    plan = planner([10, 20, 30], 3, 0, world=8).step(0)
    assert plan.n_micro == 1
    assert sorted(len(b) for b in plan.bins[0]) == [0] * 5 + [1] * 3


def test_last_step_of_an_epoch_takes_what_is_left():
    p = planner([5] * 10, 4, 0, world=2)
    assert p.steps_per_epoch == 3
    assert [p.step(step).totals.samples for step in range(4)] == [4, 4, 2, 4]


def test_too_long_samples_are_named_with_what_to_do():
    tokens = [10, 65, 20, *[100 + i for i in range(7)]]
    with pytest.raises(PlanError) as caught:
        check_fits(lengths_of(tokens), BUDGET, lambda n: f"record-{n}")
    message = str(caught.value)
    assert "8 of 10 samples" in message and "'record-1' (65 tokens)" in message and "record-2'" not in message
    assert "data.token_budget to 106" in message and "--max-tokens" in message
    with pytest.raises(PlanError, match="token_budget=64"):
        planner(tokens, 4, 0, world=2)
    check_fits(lengths_of([64]), BUDGET)


def test_an_empty_index_is_an_error():
    with pytest.raises(PlanError, match=r"rejects\.jsonl"):
        check_fits(lengths_of([]), BUDGET)


def test_lengths_from_the_index():
    index = np.zeros(2, dtype=INDEX_DTYPE)
    for name, values in {"text_tokens": (7, 8), "image_tokens": (3, 0), "helper_tokens": (2, 5)}.items():
        index[name] = values
    index["spans"], index["supervised"] = (1, 2), (4, 6)
    lengths = Lengths.from_index(index)
    assert lengths.tokens.tolist() == [10, 8] and lengths.patches.tolist() == [20, 20]
    assert lengths.spans.tolist() == [1, 2] and lengths.supervised.tolist() == [4, 6]
    assert lengths.tokens.dtype == np.int64  # unsigned columns would wrap around in differences
    for without in (Lengths.from_index(index, helpers=False), IndexColumns(index, helpers=False).slices([slice(2)])):
        assert without.patches.tolist() == [12, 0] and without.tokens.tolist() == [10, 8]
    assert pickle.loads(pickle.dumps(IndexColumns(index, False))).slices([slice(2)]).patches.tolist() == [12, 0]


def test_default_cost_is_qwen2_5_vl_7b():
    assert CostModel() == CostModel.from_dims(
        hidden=3584, layers=28, intermediate=18944, kv_width=512, vocabulary=152064,
        vision_hidden=1280, vision_layers=32, vision_intermediate=3420,
    )  # fmt: skip
    # 6.53e9 weights in the decoder layers, two FLOPs each, five passes
    assert CostModel().per_token == pytest.approx(2 * 5 * 6.53e9, rel=1e-2)


def test_no_teacher_one_pass_less():
    dims = {"hidden": 8, "layers": 2, "intermediate": 16, "kv_width": 4, "vocabulary": 99,
            "vision_hidden": 4, "vision_layers": 2, "vision_intermediate": 8}  # fmt: skip
    with_teacher, without = (CostModel.from_dims(**dims, teacher=teacher) for teacher in (True, False))
    assert 4 * with_teacher.per_token == 5 * without.per_token
    assert 4 * with_teacher.per_token_squared == 5 * without.per_token_squared
    assert (with_teacher.per_patch, with_teacher.per_supervised) == (without.per_patch, without.per_supervised)


def test_cost_counts_every_part():
    one, zero = np.ones(1, np.int64), np.zeros(1, np.int64)
    cost = CostModel(per_token=1000, per_token_squared=2000, per_patch=3000, per_supervised=4000)
    assert cost(Lengths(3 * one, zero, zero, zero)).tolist() == [3 + 18]
    assert cost(Lengths(zero, 5 * one, zero, zero)).tolist() == [15]
    assert cost(Lengths(zero, zero, 2 * one, zero)).tolist() == [8]


def comt_like(n: int, seed: int) -> Lengths:
    rng = np.random.default_rng(seed)
    spans, text, image = rng.integers(1, 7, n), rng.integers(200, 1501, n), rng.integers(100, 1301, n)
    helpers = np.array([rng.integers(100, 1301, s).sum() for s in spans])
    return Lengths(text + image, 4 * (image + helpers), text // 2, spans)


@pytest.mark.parametrize("world", [2, 8, 64])
def test_comt_like_steps_reach_the_lower_bound_and_are_level(world):
    per_step, steps = 16 * world, 60 // world + 12
    p = Planner(comt_like(steps * per_step, world), seed=1, samples_per_step=per_step, token_budget=8192, world=world)
    plans = [p.step(step) for step in range(p.steps_per_epoch)]
    assert sum(plan.n_micro == plan.lower_bound for plan in plans) >= 0.98 * len(plans)
    assert imbalances(plans).text <= 1.02 and imbalances(plans).vision <= 1.05


@settings(deadline=None, max_examples=25)
@given(case=cases, world=st.integers(1, 64), data=st.data())
def test_a_rank_plans_the_bins_all_ranks_plan(case, world, data):
    """A rank levels its own group only; what it finds is what everybody else would find for it."""
    p = planner(**case, world=world)
    step = data.draw(st.integers(0, p.steps_per_epoch))
    whole = p.step(step)
    assert whole.ranks == range(world)
    for rank in {0, world - 1, data.draw(st.integers(0, world - 1))}:
        own = p.step(step, rank)
        assert rank in own.ranks and own.n_micro == whole.n_micro
        assert own.of_rank(rank) == whole.of_rank(rank) and own.costs_of_rank(rank) == whole.costs_of_rank(rank)
        assert (own.totals, own.lower_bound) == (whole.totals, whole.lower_bound)


def test_large_worlds_are_planned_in_groups():
    assert [group_size(world, 4) for world in (1, 8, 64, 1024, 1000, 1009)] == [1, 8, 8, 8, 8, 1009]
    p = Planner(comt_like(2 * 16 * 64, 0), seed=0, samples_per_step=16 * 64, token_budget=8192, world=64)
    assert p.step(0, rank=63).of_rank(63) == p.step(0).of_rank(63)
    assert len(p.step(0, rank=63).ranks) == 8 and p.step(0, rank=63).ranks == range(56, 64)


def test_costs_are_those_of_the_bins():
    lengths = comt_like(64, 3)
    p = Planner(lengths, seed=0, samples_per_step=64, token_budget=8192, world=4)
    plan, cost = p.step(0), CostModel()(lengths)
    for rank in range(4):
        assert plan.costs_of_rank(rank) == tuple(int(cost[list(b)].sum()) for b in plan.of_rank(rank))
    assert plan.dearest.total == sum(max(micro) for micro in plan.costs)
    assert plan.imbalance == pytest.approx(plan.dearest.total / plan.mean.total)


blends = st.fixed_dictionaries(
    {
        "sizes": st.lists(st.integers(1, 25), min_size=2, max_size=2),
        "weights": st.tuples(st.sampled_from([0.3, 1.0, 5.0]), st.sampled_from([0.5, 1.0, 2.0])),
        "per_step": st.integers(1, 20),
        "window": st.integers(1, 30),
    }
)


def blended(case, world) -> Planner:
    rng = np.random.default_rng(0)
    sources = [
        PlanSource(lengths_of(rng.integers(1, BUDGET, n).tolist(), n), (n // 2, n - n // 2), weight)
        for n, weight in zip(case["sizes"], case["weights"], strict=True)
    ]
    return Planner(
        sources, seed=4, samples_per_step=case["per_step"], token_budget=BUDGET, world=world, window=case["window"]
    )


def numbers_of(plan) -> list[int]:
    return sorted(n for micro in plan.bins for b in micro for n in b)


@settings(deadline=None, max_examples=40)
@given(case=blends, world=st.integers(1, 64))
def test_two_sources_go_through_their_own_epochs(case, world):
    """Every sample of a source once in each of its epochs, whatever the other source does; shares by weight."""
    p = blended(case, world)
    (first, second), total = case["sizes"], case["per_step"]
    steps = min(60, 1 + 3 * (first + second) * 20 // total)
    counts = np.zeros(first + second, int)
    for step in range(steps):
        numbers = p.samples_of(step)[0].tolist()
        if step % 16 == 0:
            assert numbers_of(p.step(step)) == numbers
        assert len(numbers) == total
        np.add.at(counts, numbers, 1)
        share = sum(n < first for n in numbers)
        assert abs(share - total * case["weights"][0] / sum(case["weights"])) <= 2
        for source in (counts[:first], counts[first:]):
            assert source.max() - source.min() <= 1  # a new epoch begins when the last is through


@settings(deadline=None, max_examples=40)
@given(case=blends, worlds=st.tuples(st.integers(1, 64), st.integers(1, 64)), data=st.data())
def test_a_blended_step_is_the_same_alone_and_at_any_world(case, worlds, data):
    a, b = (blended(case, world) for world in worlds)
    step = data.draw(st.integers(0, 30))
    for before in range(data.draw(st.integers(0, 3))):
        a.step(before)  # having been elsewhere changes nothing
    ours, theirs = a.step(step), b.step(step)
    assert numbers_of(ours) == numbers_of(theirs) and ours.totals == theirs.totals
    assert max(a.samples_of(step)[1].tokens) <= BUDGET
    fresh = pickle.loads(pickle.dumps(blended(case, worlds[0])))
    assert fresh.step(step) == ours


def test_numbers_count_through_the_sources():
    p = blended({"sizes": [5, 7], "weights": (5.0, 7.0), "per_step": 12, "window": 3}, world=2)
    assert p.steps_per_epoch == 1 and numbers_of(p.step(0)) == list(range(12))
    assert numbers_of(p.step(1)) == list(range(12)) and p.step(1).epoch == 1


def test_too_long_samples_of_a_later_source_are_named():
    sources = [PlanSource(lengths_of([5, 6])), PlanSource(lengths_of([7, 99]))]
    with pytest.raises(PlanError, match="'record-3' \\(99 tokens\\)"):
        Planner(sources, seed=0, samples_per_step=2, token_budget=64, world=1, sample_id=lambda n: f"record-{n}")
