"""The controls over ranks: a rank without spans, or without samples, neither hangs nor changes a gradient."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch

from ilvr_ds.config import LatentConfig, LossConfig, parse_recipe
from ilvr_ds.data.packing import filler_batch, pack
from ilvr_ds.data.plan import StepTotals
from ilvr_ds.engine.build import build_engine
from ilvr_ds.engine.step import train_step
from ilvr_ds.engine.testing.ranks import run_ranks
from ilvr_ds.model.backbone import Backbone
from ilvr_ds.objective.pause import PauseObjective
from ilvr_ds.objective.pooled import PooledObjective

_spec = importlib.util.spec_from_file_location("stage2_over_ranks", Path(__file__).with_name("test_stage2.py"))
stage2 = importlib.util.module_from_spec(_spec)  # its small model and samples
_spec.loader.exec_module(stage2)
K, V = stage2.K, stage2.V

# spans and images of the samples of each rank's micro-batch
CUTS = {
    "one rank has no span": [[(2, 1), (0, 1), (1, 0)], [(0, 0), (0, 1)]],
    "no span at all": [[(0, 1)], [(0, 0)]],  # what shards of texts or answers give
    "one rank has a filler": [[(2, 1), (1, 1)], None],
}
LOSSES = {"pooled": LossConfig(0.1, 1.0), "pause": LossConfig(1.0, 0.0)}
STAGES = ((0, False), (1, False), (2, False), (3, False), (3, True))  # ZeRO, gradient checkpointing
CASES = [(cut, kind, stage, ck) for cut in CUTS for kind in LOSSES for stage, ck in STAGES]


def engine_of(kind: str, stage: int, checkpointing: bool):
    loss, latent = LOSSES[kind], LatentConfig(K, kind, 0.0)
    recipe = parse_recipe(
        {
            "name": "t", "run": {"dir": "r"}, "data": {"shards": "s"},
            "model": {"path": "m", "dtype": "float32", "gradient_checkpointing": checkpointing},
            "latent": dataclasses.asdict(latent), "teacher": None, "loss": dataclasses.asdict(loss),
            "optimizer": {"lr": 1e-3, "grad_clip": 0},
        },
        "test",
    )  # fmt: skip
    student = Backbone(stage2.network(), attention="sdpa", gradient_checkpointing=checkpointing)
    objective = (PooledObjective if kind == "pooled" else PauseObjective)(student, latent, loss)
    zero = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0} if stage == 3 else {}
    return build_engine(objective, recipe, {"zero_optimization": {"stage": stage, **zero}})


def three_steps(parts: int, cases: list) -> dict:
    """Outcomes of three steps and the first Adam moments (0.1 times the gradient) after the first."""
    results = {}
    for cut, kind, stage, checkpointing in cases:
        numbers = iter(range(100))
        groups = [None if g is None else [stage2.sample(next(numbers), *shape) for shape in g] for g in CUTS[cut]]
        samples = [s for g in groups if g for s in g]
        totals = StepTotals(samples=len(samples), supervised=1, spans=1, tokens=1)
        groups = [samples] if parts == 1 else groups
        batches = [filler_batch(V, K) if g is None else pack(g, V, K, totals=totals) for g in groups]
        engine = engine_of(kind, stage, checkpointing)
        mine = batches[engine.rank :][:1]
        outcomes = [train_step(engine, mine, lr=1e-3, noise_seed=0)]
        moments = stage2.first_moments(engine)
        outcomes += [train_step(engine, mine, lr=1e-3, noise_seed=0) for _ in range(2)]
        results[cut, kind, stage, checkpointing] = ([dataclasses.asdict(o) for o in outcomes], moments)
        engine.deepspeed.destroy()
    return results


@pytest.fixture(scope="module")
def runs():
    one = [(cut, kind, 0, False) for cut in CUTS for kind in LOSSES]
    return {
        "one": run_ranks(three_steps, 1, 1, one, timeout_s=100),
        "two": run_ranks(three_steps, 2, 2, CASES, timeout_s=250),
    }


@pytest.mark.parametrize(("cut", "kind", "stage", "checkpointing"), CASES)
def test_two_ranks_have_the_gradients_of_one(runs, cut, kind, stage, checkpointing):
    expected_outcomes, expected = runs["one"][0][cut, kind, 0, False]
    ranks = [rank[cut, kind, stage, checkpointing] for rank in runs["two"]]
    for outcomes, _ in ranks:
        for outcome, wanted in zip(outcomes, expected_outcomes, strict=True):
            assert outcome["applied"]
            for key in ("loss", "ce", "align", "grad_norm"):
                assert outcome[key] == pytest.approx(wanted[key], rel=2e-5, abs=1e-7), key
    spans = sum(s for g in CUTS[cut] if g for s, _ in g)
    assert ranks[0][0][0]["spans"] == spans
    assert ranks[0][0][0]["latents"] == (K * spans if kind == "pooled" else 0)
    assert (ranks[0][0][0]["align"] > 0) == (kind == "pooled" and spans > 0)
    found, wanted = stage2.assembled([moments for _, moments in ranks]), stage2.assembled([expected])
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        difference = torch.linalg.norm(found[name][: len(value)] - value)
        assert difference <= 1e-4 * torch.linalg.norm(value) + 1e-6, (name, difference)
