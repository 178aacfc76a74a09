"""launch/evaluate.py with a real (tiny, untrained) model: from a file of puzzles to results.json."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from ilvr_ds.data.frozenlake import MapSpec, make_maps
from ilvr_ds.data.frozenlake_records import puzzle_record
from ilvr_ds.data.frozenlake_render import render
from ilvr_ds.model.tiny import build_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and six puzzles of two sizes."""
    folder = tmp_path_factory.mktemp("command")
    build_tiny_model(folder / "model", seed=0)
    lines = []
    for index, grid in enumerate(make_maps(MapSpec((3, 4), (0.2, 0.3), seed=1), 6)):
        record = puzzle_record(grid, 1, index, moves_per_helper=2)
        frame = record.frames[0]
        (folder / frame.path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(render(grid, frame.position, frame.last_move)).save(folder / frame.path)
        lines.append(json.dumps(record.fields))
    (folder / "task.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def arguments(folder, out, *more):
    return ["--task", "vsp", "--file", str(folder / "task.jsonl"), "--checkpoint", str(folder / "model"),
            "--out", str(folder / out), "--max-new-tokens", "24", "--latent-size", "4", "--device", "cpu",
            *more]  # fmt: skip


@pytest.fixture(scope="module")
def command(repository):
    spec = importlib.util.spec_from_file_location("evaluate_command", repository / "launch/evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def samples(folder, out):
    tree = json.loads((folder / out / "results.json").read_text())
    return [{k: v for k, v in sample.items() if k != "seconds"} for sample in tree["samples"]]


def test_alone_in_batches_and_on_two_ranks(folder, command, repository, capsys, monkeypatch):
    """The same outputs, prompts and verdicts, sampled with a temperature, however the work is cut."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert command(arguments(folder, "alone", "--temperature", "1", "--batch-size", "6")) == 0
    table = capsys.readouterr().out
    assert "level 3" in table and "level 4" in table and "95 % interval" in table
    processes = [
        subprocess.Popen(
            [sys.executable, str(repository / "launch/evaluate.py"), *arguments(folder, "two", "--temperature", "1"),
             "--batch-size", "1", "--save-every", "2"],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
        )
        for rank in (1, 0)
    ]  # fmt: skip
    assert [process.wait(120) for process in processes] == [0, 0]
    alone = samples(folder, "alone")
    assert alone == samples(folder, "two")
    assert len({sample["prompt_sha256"] for sample in alone}) == len(alone) == 6
    assert all(sample["details"]["tokens"] <= 24 for sample in alone)
    # Again: nothing is left to generate, and laxer rules judge what is there.
    assert command(arguments(folder, "alone", "--temperature", "1", "--published-rules")) == 0
    assert json.loads((folder / "alone/results.json").read_text())["rules"]["published"] is True
    assert [s["output"] for s in samples(folder, "alone")] == [s["output"] for s in alone]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "task.jsonl").write_text(""), "the task file has no record"),
        (lambda f: (f / "task.jsonl").unlink(), "cannot read the task file"),
        (lambda f: next(f.glob("images/*/*.png")).unlink(), "(1 of 6 examples lack an image)"),
        (lambda f: next(f.glob("images/*/*.png")).write_bytes(b"no picture"), "image"),
        (lambda f: shutil.rmtree(f / "model"), "model"),
    ],
)
def test_what_is_wrong_is_said(folder, command, change, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    change(copy)
    assert command(arguments(copy, "out")) == 1
    error = capsys.readouterr().err
    assert "evaluate: " in error and message in error and str(copy) in error
    assert not (copy / "out/results.json").exists()


def test_another_model_is_not_mixed_in(folder, command, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert command(arguments(copy, "out", "--limit", "1")) == 0
    shutil.rmtree(copy / "model")
    build_tiny_model(copy / "model", seed=1)
    assert command(arguments(copy, "out", "--limit", "2")) == 1
    assert "checkpoint_sha256" in capsys.readouterr().err


def test_in_other_words_and_without_images(folder, command, tmp_path, capsys, monkeypatch):
    """The text is replaced, the images stay or go; what was asked is recorded, and not mixed with another asking."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    (tmp_path / "prompt.txt").write_text("Look: <image> Plan your way.\n")
    words = ("--prompt-file", str(tmp_path / "prompt.txt"))

    def settings(out):
        return json.loads((folder / out / "results.json").read_text())["settings"]

    def asked(*more, out):
        assert command(arguments(folder, out, "--limit", "2", *more)) == 0
        return [sample["prompt_sha256"] for sample in samples(folder, out)]

    plain, other = asked(out="asked-plain"), asked(*words, out="asked-words")
    blind, both = asked("--without-images", out="asked-blind"), asked(*words, "--without-images", out="asked-both")
    assert len({*plain, *other}) == 4
    assert not set(blind) & {*plain, *other}
    assert len(set(both)) == 1  # one text for all, and nothing else to see
    assert settings("asked-plain")["prompt_text"] is None
    assert settings("asked-both")["prompt_text"] == "Look: <image> Plan your way."
    assert settings("asked-both")["without_images"] is True
    for out, more in (("asked-plain", words), ("asked-words", ()), ("asked-plain", ("--without-images",))):
        assert command(arguments(folder, out, "--limit", "2", *more)) == 1
        assert "begun with other settings" in capsys.readouterr().err

    (tmp_path / "prompt.txt").write_text("Plan your way.")
    assert command(arguments(folder, "asked-wrong", *words)) == 1
    error = capsys.readouterr().err
    assert "task.jsonl:1" in error and "0 <image> mark(s), this record has 1 image(s)" in error
    (tmp_path / "prompt.txt").write_text("\n")
    assert command(arguments(folder, "asked-wrong", *words)) == 1
    assert "prompt.txt: holds no text" in capsys.readouterr().err
    assert command(arguments(folder, "asked-wrong", "--prompt-file", str(tmp_path / "none.txt"))) == 1
    assert "none.txt: cannot be read" in capsys.readouterr().err
    assert not (folder / "asked-wrong").exists()
    with pytest.raises(SystemExit):
        command([*arguments(folder, "asked-wrong", *words), "--task", "ilvr"])


def test_patience(folder, command, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command(arguments(folder, "patience", "--limit", "2", "--patience", "1")) == 1
    assert "nothing new came for 1 s; rank(s) 1 of 2" in capsys.readouterr().err
