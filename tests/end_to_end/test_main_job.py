"""Records to shards to a stopped and resumed ZeRO-3 run, through the programs a user starts."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from ilvr_ds.train.compare import first_difference

RECIPE = Path("launch/recipes/tiny_frozenlake.yaml")


def settings(tiny: Path, run: Path, *more: str) -> list[str]:
    return [
        f"data.shards={tiny / 'shards'}", f"model.path={tiny / 'model'}", f"run.dir={run}", "data.samples_per_step=8",
        "data.token_budget=1024", "run.epochs=2", "run.checkpoint_every=2", "run.tensorboard=false", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def full(tiny, train, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "full"
    train(2, RECIPE, *settings(tiny, run))
    return run


def test_describe_says_what_a_run_would_be(tiny, program, tmp_path):
    told = json.loads(
        program("launch/train.py", "--recipe", RECIPE, "--describe", 2, *settings(tiny, tmp_path / "none"))
    )
    assert (told["samples"], told["steps_per_epoch"], told["total_steps"], told["world"]) == (40, 5, 10, 2)
    assert told["micro_batches_per_step"] >= 1 and told["imbalance"] >= 1 and 0 < told["fill"] <= 1
    assert not (tmp_path / "none").exists()


def test_the_run_reports_what_it_did(full, metrics):
    lines = metrics(full)
    assert [line["step"] for line in lines] == list(range(1, 11))  # 40 samples / 8, twice
    assert all(line["applied"] for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["teacher_drift"] > 0
    for line in lines:
        assert line["samples"] == 8 and line["epoch"] == (line["step"] - 1) // 5
        assert line["loss"] == pytest.approx(line["ce"] + line["align"], rel=1e-5)
        assert line["micro_batches"] >= line["micro_batches_lower_bound"] >= 1
        assert 0 < line["latents_per_span"] <= 8
    assert yaml.safe_load((full / "recipe.yaml").read_text())["run"]["epochs"] == 2
    kept = sorted(path.name for path in (full / "checkpoints").iterdir() if path.is_dir())
    assert kept == ["step-00000008", "step-00000010"]  # the newest two


def test_stopped_and_resumed_equals_uninterrupted(full, tiny, train, tmp_path):
    run = tmp_path / "resumed"
    train(2, RECIPE, *settings(tiny, run, "run.stop_after=5"))
    # what a crash leaves behind: a line after the checkpoint, cut short, and a checkpoint without its end
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 1.0, "ce": 1')
    newest = max((run / "checkpoints").glob("step-*"))
    broken = newest.with_name("step-00000009")
    shutil.copytree(newest, broken)
    (broken / "COMPLETE").unlink()
    output = train(2, RECIPE, *settings(tiny, run, "data.workers=0"))
    assert "resumed after step 5" in output
    assert first_difference(full, run) is None


@pytest.mark.parametrize("stage", [0, 2])
def test_every_memory_split_computes_the_same(stage, full, tiny, train, metrics, tmp_path):
    """How memory is split decides no number: the real objective under another ZeRO stage, up to bf16 rounding."""
    run = tmp_path / "other"
    train(2, RECIPE, *settings(tiny, run, "run.stop_after=3", f"engine.deepspeed=ds_configs/zero{stage}.json"))
    for one, two in zip(metrics(run), metrics(full)[:3], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-3)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=2e-2)
        assert one["teacher_drift"] == pytest.approx(two["teacher_drift"], rel=2e-2)


def test_one_rank_with_checkpointing_computes_the_same(full, tiny, train, metrics, tmp_path):
    """Another world size, other micro-batches, recomputed activations: the same steps up to bf16 rounding."""
    run = tmp_path / "one"
    train(1, RECIPE, *settings(tiny, run, "run.stop_after=3", "model.gradient_checkpointing=true"))
    ours, theirs = metrics(run), metrics(full)[:3]
    assert len(ours) == 3
    for one, two in zip(ours, theirs, strict=True):
        assert one["samples"] == two["samples"] and one["tokens"] == two["tokens"]
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-3)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=2e-2)


def test_refusals_name_the_culprit(full, tiny, train, program, tmp_path):
    recipe = tmp_path / "typo.yaml"
    recipe.write_text(RECIPE.read_text() + "\noptimiser:\n  lr: 1.0\n")
    assert "unknown key optimiser" in train(1, recipe, expect=1)
    message = train(1, RECIPE, *settings(tiny, full, "optimizer.lr=5e-4"), expect=1)
    assert "optimizer.lr=0.0005" in message or "world size" in message
    # a checkpoint of another model
    program("launch/make_tiny_model.py", "--out", tmp_path / "model", "--seed", 0)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] > 1
    other = tmp_path / "other"
    make_smaller(tmp_path / "model", other)
    run = tmp_path / "other_run"
    train(1, RECIPE, *settings(tiny, run, "run.stop_after=1"))
    message = train(1, RECIPE, *settings(tiny, run, f"model.path={other}"), expect=1)
    assert "Error" not in message.splitlines()[-1] or "another model" in message
    assert "layers" in message and "Traceback" not in message


def test_a_run_that_only_skips_ends_with_an_error(tiny, train, metrics, tmp_path):
    """A learning rate that destroys the weights: steps are skipped, the teacher stays finite, the run says so."""
    run = tmp_path / "diverged"
    hopeless = ["optimizer.lr=1e30", "optimizer.warmup_fraction=0", "engine.max_skipped_steps=1"]
    message = train(1, RECIPE, *settings(tiny, run, *hopeless), expect=1)
    assert "steps in a row" in message and "Lower optimizer.lr" in message and "Traceback" not in message
    applied = [line["applied"] for line in metrics(run)]
    assert applied[0] and applied[-2:] == [False, False]


def make_smaller(source: Path, target: Path) -> None:
    """The same tokenizer with a model of one layer less."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    shutil.copytree(source, target)
    config = Qwen2_5_VLConfig.from_pretrained(source)
    config.text_config.num_hidden_layers -= 1
    if config.text_config.layer_types is not None:
        config.text_config.layer_types = config.text_config.layer_types[:-1]
    for weights in target.glob("*.safetensors"):
        weights.unlink()
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(target)


def test_a_signal_writes_a_checkpoint_and_ends_with_75(tiny, tmp_path, repository):
    run = tmp_path / "signalled"
    command = [sys.executable, "launch/train.py", "--recipe", str(RECIPE), *settings(tiny, run, "run.epochs=50")]
    process = subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-3000:]
            time.sleep(0.2)
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75, output[-3000:]
    steps = len((run / "metrics.jsonl").read_text().splitlines())
    assert (run / "checkpoints" / f"step-{steps:08d}" / "COMPLETE").is_file()
