"""The plan: each sample once, the same samples at any world size, purity, denominators, limits."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilvr_ds.data.index import INDEX_DTYPE
from ilvr_ds.data.plan import CostModel, Lengths, Planner, check_fits, epoch_order, run_imbalance, step_samples
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
    return Planner(lengths_of(tokens), seed=seed, samples_per_step=per_step, token_budget=budget, world=world)


@settings(deadline=None, max_examples=60)
@given(case=cases, world=st.integers(1, 9), epoch=st.integers(0, 2))
def test_each_sample_once_per_epoch_and_every_bin_within_the_budget(case, world, epoch):
    p = planner(**case, world=world)
    seen = []
    for step in range(epoch * p.steps_per_epoch, (epoch + 1) * p.steps_per_epoch):
        plan = p.step(step)
        assert plan.step == step and plan.epoch == epoch
        assert {len(micro) for micro in plan.bins} == {world}  # every rank runs every micro-step
        numbers = [n for micro in plan.bins for b in micro for n in b]
        assert max(p.lengths.tokens[list(b)].sum() for micro in plan.bins for b in micro) <= BUDGET
        t = plan.totals
        assert (t.samples, t.tokens) == (len(numbers), p.lengths.tokens[numbers].sum())
        assert (t.supervised, t.spans) == (p.lengths.supervised[numbers].sum(), p.lengths.spans[numbers].sum())
        assert plan.n_micro >= plan.lower_bound == max(1, -(-t.tokens // (world * BUDGET)))
        assert plan.imbalance >= 1 - 1e-12
        assert all(plan.of_rank(rank)[m] == micro[rank] for m, micro in enumerate(plan.bins) for rank in range(world))
        seen += numbers
    assert sorted(seen) == list(range(len(case["tokens"])))


@settings(deadline=None, max_examples=30)
@given(case=cases)
def test_same_samples_in_every_step_at_any_world_size(case):
    planners = {world: planner(**case, world=world) for world in (1, 2, 3, 4, 8)}
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
    with pytest.raises(ValueError, match="3 steps"):
        step_samples(np.arange(10), 3, 4)


def test_order_depends_on_seed_and_epoch_and_never_changes():
    orders = [epoch_order(50, seed, epoch).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0), (2**63 - 1, 0))]
    assert len({tuple(o) for o in orders}) == 4
    # Recorded: a run started with an older version must resume on the same samples.
    assert epoch_order(8, 5, 2).tolist() == [5, 2, 3, 0, 7, 4, 1, 6]


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


def test_default_cost_is_qwen2_5_vl_7b():
    assert CostModel() == CostModel.from_dims(
        hidden=3584, layers=28, intermediate=18944, kv_width=512, vocabulary=152064,
        vision_hidden=1280, vision_layers=32, vision_intermediate=3420,
    )  # fmt: skip
    # 6.53e9 weights in the decoder layers, two FLOPs each, five passes
    assert CostModel().per_token == pytest.approx(2 * 5 * 6.53e9, rel=1e-2)


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
    per_step = 16 * world
    p = Planner(comt_like(12 * per_step, world), seed=1, samples_per_step=per_step, token_budget=8192, world=world)
    plans = [p.step(step) for step in range(p.steps_per_epoch)]
    assert sum(plan.n_micro == plan.lower_bound for plan in plans) >= 0.98 * len(plans)
    assert run_imbalance(plans) <= 1.02
