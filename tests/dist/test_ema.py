"""The momentum teacher's traps, one by one. The main comparison is `benchmarks/ema.py`, run here in its short form."""

import json
import subprocess
import sys

import pytest
import torch

from ilvr_ds.engine.build import build_engine
from ilvr_ds.engine.ema import ShardedEma
from ilvr_ds.engine.step import train_step
from ilvr_ds.engine.testing.ranks import run_ranks
from ilvr_ds.engine.testing.toy import ToyModel, ToyObjective, make_batches, toy_recipe
from ilvr_ds.errors import ConfigError


def step_of(engine, seed, lr=1e-2):
    parts = make_batches([11, 6, 17, 9], seed)
    each = len(parts) // engine.world
    return train_step(engine, parts[engine.rank * each :][:each], lr=lr, noise_seed=seed)


def teacher_logits(engine):
    with torch.no_grad():
        return engine.module.teacher(make_batches([23], seed=99)[0].input_ids)[1]


def expected_logits(engine):
    """What the teacher must answer: a plain module with the cast of the shadow, gathered by hand."""
    parts = [None] * engine.world
    torch.distributed.all_gather_object(parts, list(zip(engine.ema.pieces, engine.ema.shadows, strict=True)))
    model = ToyModel()
    with torch.no_grad():
        for piece, shadow in [row for part in parts for row in part]:
            weight = model.get_parameter(piece.name.removeprefix("teacher."))
            weight.view(-1)[piece.start : piece.start + piece.numel] = shadow
        return model.to(torch.bfloat16)(make_batches([23], seed=99)[0].input_ids)[1]


def test_benchmark_in_its_short_form(repository, tmp_path):
    """Stages 0 to 3, persistence threshold 0 and 1e5, a skipped step: exact, and no byte sent at stage 3."""
    done = subprocess.run(
        [sys.executable, "benchmarks/ema.py", "--quick", "--json", str(tmp_path / "ema.json")],
        cwd=repository, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "ema.json").read_text())["results"]
    assert [(r["stage"], r["threshold"]) for r in results] == [(0, None), (1, None), (2, None), (3, 0), (3, 100_000)]
    assert [r["update_bytes"] > 0 for r in results] == [False, True, True, False, False]


def secondary_shards() -> list[bool]:
    """hpZ: is the teacher's forward the new one after each step?"""
    zero = {"stage": 3, "zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0}
    engine = build_engine(ToyObjective(), toy_recipe(), {"zero_optimization": zero})
    fresh = []
    for seed in range(3):
        step_of(engine, seed)
        fresh.append(torch.equal(teacher_logits(engine), expected_logits(engine)))
    had_secondary = any(p.ds_secondary_tensor is not None for p in engine.module.teacher.parameters())
    return [*fresh, had_secondary]


def test_hpz_secondary_shards_do_not_go_stale():
    """Four ranks, secondary shards over two. The last value proves that there were secondary shards at all."""
    assert run_ranks(secondary_shards, 4, timeout_s=200) == [[True] * 4] * 4


def message_of(pairs, prepare=lambda engine: None, **toy) -> str:
    """The ConfigError of attaching a moving average with these pairs."""
    engine = build_engine(ToyObjective(**toy), toy_recipe(), {"zero_optimization": {"stage": 3}})
    prepare(engine)
    try:
        ShardedEma(engine.deepspeed, engine.deepspeed.module, pairs, 0.9)
    except ConfigError as error:
        return str(error)
    return "no error"


def traps() -> dict:
    """Several small checks in one launch."""
    found = {}

    # bf16 would not move at decay 0.999 and lr 1e-5; the fp32 shadow does
    for stage in (1, 3):
        engine = build_engine(ToyObjective(), toy_recipe(decay=0.999), {"zero_optimization": {"stage": stage}})
        before = [s.clone() for s in engine.ema.shadows]
        stored = [t.clone() for t in engine.ema.partition.teachers()]
        for seed in range(3):
            step_of(engine, seed, lr=1e-5)
        moved = torch.cat([a != b for a, b in zip(before, engine.ema.shadows, strict=True)]).float().mean()
        same = torch.cat([a == b for a, b in zip(stored, engine.ema.partition.teachers(), strict=True)]).float().mean()
        found["rounding", stage] = (moved.item(), same.item())

    # validation forwards between steps: whole module and teacher alone, gathered copies left behind
    zero = {"stage": 3, "stage3_param_persistence_threshold": 200, "stage3_prefetch_bucket_size": 500}
    engine = build_engine(ToyObjective(), toy_recipe(decay=0.5), {"zero_optimization": zero})
    fresh = []
    for seed in range(4):
        outcome = step_of(engine, seed)
        fresh.append(torch.equal(teacher_logits(engine), expected_logits(engine)))
        with torch.no_grad():
            engine.deepspeed(batch=make_batches([13], seed)[0], noise_seed=0)
        engine.ema.update()  # with whatever those forwards left gathered
        fresh.append(torch.equal(teacher_logits(engine), expected_logits(engine)))
    found["forwards between steps"] = fresh
    found["teacher persists"] = [
        name
        for name, p in engine.module.teacher.named_parameters()
        if any(p is q for q in engine.deepspeed.optimizer.persistent_parameters)
    ]
    found["student persists"] = len(engine.deepspeed.optimizer.persistent_parameters) > 0

    # drift, from sharded sums, against dense weights
    drifts = []
    for stage in (0, 1, 3):
        engine = build_engine(ToyObjective(), toy_recipe("float32", decay=0.9), {"zero_optimization": {"stage": stage}})
        for seed in range(2):
            outcome = step_of(engine, seed)
        sums = torch.zeros(2, dtype=torch.float64)
        for master, shadow in zip(engine.ema.partition.masters(), engine.ema.shadows, strict=True):
            sums += torch.stack([(shadow.double() - master.double()).square().sum(), master.double().square().sum()])
        torch.distributed.all_reduce(sums)
        drifts.append((outcome.teacher_drift, (sums[0] / sums[1]).sqrt().item()))
    found["drift"] = drifts

    # adapters only: frozen teacher parameters stay, and have no shadow
    engine = build_engine(ToyObjective(frozen=True), toy_recipe(decay=0.5), {"zero_optimization": {"stage": 3}})
    frozen = [p.ds_tensor.clone() for n, p in engine.module.teacher.named_parameters() if "adapter" not in n]
    step_of(engine, 0)
    now = [p.ds_tensor for n, p in engine.module.teacher.named_parameters() if "adapter" not in n]
    found["frozen"] = ({p.name for p in engine.ema.pieces}, all(map(torch.equal, frozen, now)))

    # no teacher at all
    engine = build_engine(ToyObjective(teacher=False), toy_recipe(), {"zero_optimization": {"stage": 3}})
    found["no teacher"] = (engine.ema is None, step_of(engine, 0).teacher_drift)

    # pairs: tied weights under both names are one piece; every wrong pair is named
    pairs = ToyObjective().ema_pairs()
    tied = [*pairs, ("teacher.head.weight", "student.head.weight")]
    engine = build_engine(ToyObjective(), toy_recipe(), {"zero_optimization": {"stage": 3}})
    found["tied"] = len(ShardedEma(engine.deepspeed, engine.deepspeed.module, tied, 0.9).pieces) - len(pairs)

    def spoil_master(engine):
        with torch.no_grad():
            engine.ema.partition.masters()[1].add_(1.0)

    def spoil_teacher(engine):
        engine.module.teacher.embed.weight.ds_tensor.add_(1.0)

    found["messages"] = [
        message_of([("teacher.embed.weigth", "student.embed.weight")]),
        message_of([("teacher.embed.weight", "student.blocks.0.up.weight")]),
        message_of([("student.embed.weight", "student.embed.weight")]),
        message_of([("teacher.blocks.0.norm.weight", "student.blocks.0.norm.weight"),
                    ("teacher.blocks.0.norm.weight", "student.blocks.0.norm.bias")]),
        message_of(pairs, spoil_master),
        message_of(pairs, spoil_teacher, frozen=True),
    ]  # fmt: skip
    return found


@pytest.fixture(scope="module")
def found():
    return run_ranks(traps, 2, timeout_s=250)


@pytest.mark.parametrize("stage", [1, 3])
def test_the_shadow_moves_where_bf16_would_not(found, stage):
    for rank in found:
        moved, same = rank["rounding", stage]
        assert moved > 0.5 and same > 0.9


def test_copies_gathered_before_an_update_are_not_used_after_it(found):
    assert [rank["forwards between steps"] for rank in found] == [[True] * 8] * 2


def test_the_optimizer_does_not_gather_the_teacher(found):
    assert [(rank["teacher persists"], rank["student persists"]) for rank in found] == [([], True)] * 2


def test_drift_is_the_relative_distance_of_fp32_weights(found):
    for drift, dense in found[0]["drift"]:
        assert drift == pytest.approx(dense, rel=1e-4) and drift > 0


def test_frozen_parameters_have_no_shadow_and_stay(found):
    adapters = {f"teacher.blocks.0.adapter.{i}.weight" for i in (0, 1)}
    assert [rank["frozen"] for rank in found] == [(adapters, True)] * 2


def test_without_a_teacher_there_is_no_average(found):
    assert [rank["no teacher"] for rank in found] == [(True, 0.0)] * 2


def test_tied_weights_are_averaged_once(found):
    assert [rank["tied"] for rank in found] == [0, 0]


@pytest.mark.parametrize(
    ("number", "parts"),
    [
        (0, ["no parameter 'teacher.embed.weigth'"]),
        (1, ["'teacher.embed.weight' has shape (37, 12)", "'student.blocks.0.up.weight' has (29, 12)"]),
        (2, ["'student.embed.weight' requires a gradient"]),
        (3, ["'teacher.blocks.0.norm.weight'", "follows both", "'student.blocks.0.norm.bias'"]),
        (4, ["'student.blocks.0.norm.weight'", "differ from their fp32 master"]),
        (5, ["'student.embed.weight' is frozen", "'teacher.embed.weight' must be an exact copy"]),
    ],
)
def test_wrong_pairs_are_named(found, number, parts):
    for part in parts:
        assert part in found[0]["messages"][number]
