"""The stage-2 recipe through the programs a user starts: it trains, stops, resumes, and refuses what cannot be."""

import json
import shutil
from pathlib import Path

RECIPE = Path("launch/recipes/tiny_frozenlake_stage2.yaml")


def settings(tiny: Path, run: Path, *more: str) -> list[str]:
    return [
        f"data.shards={tiny / 'shards'}", f"model.path={tiny / 'model'}", f"run.dir={run}", "data.samples_per_step=8",
        "data.token_budget=512", "run.max_steps=4", "run.checkpoint_every=2", "run.tensorboard=false", *more,
    ]  # fmt: skip


def test_two_ranks_train_stop_and_go_on(tiny, train, metrics, tmp_path):
    """That the numbers after a restart are those without one is tests/dist/test_stage2.py."""
    run = settings(tiny, tmp_path / "run", "model.gradient_checkpointing=true")
    train(2, RECIPE, *run, "run.stop_after=2")
    train(2, RECIPE, *run)
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["loss"] < lines[0]["loss"]
    for line in lines:
        assert line["applied"]
        assert line["latents_per_span"] == 8
        assert line["align"] == line["teacher_drift"] == line["coverage_bound_fraction"] == 0
        assert line["teacher_tflops_per_rank"] == 0
        assert line["loss"] == line["ce"]


def test_other_latent_tokens_than_the_shards_are_refused(tiny, train, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny / "model", model)
    file = model / "tokenizer.json"
    spec = json.loads(file.read_text())
    entries = {entry["content"]: entry for entry in spec["added_tokens"]}
    pad, start = entries["<|latent_pad|>"], entries["<|latent_start|>"]
    pad["id"], start["id"] = start["id"], pad["id"]
    spec["added_tokens"].sort(key=lambda entry: entry["id"])
    file.write_text(json.dumps(spec))
    told = train(1, RECIPE, *settings(tiny, tmp_path / "run", f"model.path={model}"), expect=1)
    assert "tokenizer" in told
    assert str(tiny / "shards") in told
    assert "Traceback" not in told
