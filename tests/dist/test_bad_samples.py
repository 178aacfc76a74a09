"""Bad samples over two ranks: each sees its own, both know all, train on the same step and end together."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ilvr_ds.config import DataConfig
from ilvr_ds.data.loader import StepLoader
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.engine.agree import gather_objects, sum_over_ranks
from ilvr_ds.engine.testing.ranks import run_ranks
from ilvr_ds.errors import TrainingError
from ilvr_ds.train.bad_samples import BAD_SAMPLES_FILE, BadSamples

_spec = importlib.util.spec_from_file_location(
    "loader_tests", Path(__file__).parents[1] / "unit" / "data" / "test_loader.py"
)
loader_tests = importlib.util.module_from_spec(_spec)  # its small shards
_spec.loader.exec_module(loader_tests)
K, SAMPLES, STEPS = loader_tests.K, loader_tests.SAMPLES, 4  # two epochs of two steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Eleven samples; the pictures of numbers 5 and 8 are overwritten."""
    shards = loader_tests.write_shards(tmp_path_factory.mktemp("bad") / "shards", loader_tests.byte_tokenizer())
    with (shards.folder / "shard-000000.tar").open("r+b") as file:
        for number in (5, 8):
            file.seek(int(shards.index[number]["offset"]) + 532)
            file.write(b"\xff" * 30)
    return shards.folder


def go(folder: Path, cases: list[tuple[int, Path]]) -> list[dict]:
    """What a training run does with its batches before it computes; per case (allowed, run folder) what came of it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    shards, tokenizer = ShardSet.open(folder), loader_tests.byte_tokenizer()
    add_up, found = sum_over_ranks(torch.device("cpu")), []
    for allowed, run_dir in cases:
        data = DataConfig(shards="", samples_per_step=6, token_budget=600, workers=0, max_bad_samples=allowed)
        bad = BadSamples(allowed, (), run_dir / BAD_SAMPLES_FILE if rank == 0 else None, add_up, gather_objects)
        seen = {"steps": [], "own": 0, "error": None}
        with StepLoader(
            shards, tokenizer, data, latent_size=K, reduction="sample", seed=3, rank=rank, world=world, start_step=0,
            total_steps=STEPS,
        ) as loader:  # fmt: skip
            try:
                for step, plan, planned in loader:
                    seen["own"] += len(loader.last_bad)
                    batches, totals = bad.settle(step + 1, plan.totals, planned, loader.last_bad, "sample")
                    weights = [sum(float(b.ce_weights.double().sum()) for b in batches)]
                    weights.append(sum(float(b.align_weights.double().sum()) for b in batches))
                    seen["steps"].append((totals.samples, len(bad), add_up(weights)))
            except TrainingError as error:
                seen["error"] = str(error)
        found.append(seen)
    return found


@pytest.fixture(scope="module")
def outcome(folder, tmp_path_factory) -> tuple[list[list[dict]], list[Path]]:
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    ranks = run_ranks(go, 2, folder, [(1, folders[0]), (2, folders[1])], timeout_s=60)
    return ranks, folders


def test_above_the_number_every_rank_ends_at_the_same_step(outcome):
    ranks, folders = outcome
    (first, *_), (second, *_) = ranks
    assert first["error"] == second["error"] and "2 bad samples, data.max_bad_samples is 1" in first["error"]
    assert first["steps"] == second["steps"] and len(first["steps"]) < STEPS
    assert first["own"] + second["own"] == 2
    lines = [json.loads(line) for line in (folders[0] / BAD_SAMPLES_FILE).read_text().splitlines()]
    assert {line["number"] for line in lines} == {5, 8}


def test_up_to_the_number_both_train_on_the_same_corrected_steps(outcome):
    ranks, folders = outcome
    first, second = ranks[0][1], ranks[1][1]
    assert first["error"] is None and second["error"] is None
    assert first["steps"] == second["steps"] and len(first["steps"]) == STEPS
    assert sum(samples for samples, _, _ in first["steps"]) == 2 * (SAMPLES - 2)
    assert first["steps"][-1][1] == 2  # distinct ones; each came in both epochs
    for _, _, weights in first["steps"]:
        assert weights == pytest.approx([1, 1], abs=1e-5)
    assert first["own"] + second["own"] == 4
    assert min(first["own"], second["own"]) > 0  # both ranks have met one, so each was told of the other's
    assert len((folders[1] / BAD_SAMPLES_FILE).read_text().splitlines()) == 4
