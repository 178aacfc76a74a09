"""launch/report.py on results as launch/evaluate.py writes them."""

import json
import runpy
from pathlib import Path

import pytest
from PIL import Image

from ilvr_ds.inference.scoring.vsp import score_plan

report = runpy.run_path(str(Path(__file__).resolve().parents[3] / "launch" / "report.py"))["main"]
# the gift is one step to the right of the elf in all training maps; in one of the two test maps it is below
TRAINING = [[[1, 2, 0], [0, 0, 0], [0, 0, -1]], [[0, 0, 0], [1, 2, 0], [0, 0, 0]]]
TEST = [[[0, 0, 0], [0, 0, 0], [1, 2, 0]], [[1, 0, 0], [2, 0, 0], [0, 0, 0]]]


@pytest.fixture
def folder(tmp_path):
    def results(name, correct, total=4):
        groups = {"level 3": {"correct": correct, "total": total}}
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({"summary": {"groups": groups}}))
        return f"{name}={tmp_path / name}"

    for name, maps in (("training", TRAINING), ("test", TEST)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"map_desc": m}) + "\n" for m in maps))
    line = {"step": 1, "ce": 2.0, "align": 0.5, "teacher_drift": 0.0, "lr": 1e-3}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(
        json.dumps(line) + "\n" + json.dumps({**line, "step": 2, "ce": 1.0}) + "\n"
    )
    return tmp_path, results


def test_the_first_must_beat_all_others(folder, capsys):
    tmp_path, results = folder
    maps = ["--training-maps", str(tmp_path / "training.jsonl"), "--test-maps", str(tmp_path / "test.jsonl")]
    good, bad = results("good", 3), results("bad", 1)
    plot = tmp_path / "report.png"
    assert report(["--results", good, bad, *maps, "--runs", f"one={tmp_path / 'run'}", "--plot", str(plot)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["good", "75.0", "%"]
    assert lines[2].split()[:3] == ["bad", "25.0", "%"]
    # the blind plan R, learnt on the training maps, solves one of the two test maps
    assert score_plan(tuple(map(tuple, TEST[0])), "R").correct
    assert lines[3].startswith("best plan without looking") and "50.0 %" in lines[3]
    with Image.open(plot) as image:
        assert image.size[0] > 500 and len(image.convert("RGB").getcolors(2**24)) > 20
    assert report(["--results", bad, good]) == 1
    assert report(["--results", good, good.replace("good=", "again=")]) == 1  # a tie is no win


def test_bad_input_is_named(folder, capsys, tmp_path):
    root, results = folder
    assert report(["--results", f"a={root / 'nothing'}"]) == 1
    assert "nothing/results.json: no such file" in capsys.readouterr().err
    (root / "broken").mkdir()
    (root / "broken" / "results.json").write_text("{}")
    assert report(["--results", f"a={root / 'broken'}"]) == 1
    assert "not results of launch/evaluate.py" in capsys.readouterr().err
    good = results("good", 3)
    same = ["--training-maps", str(root / "test.jsonl"), "--test-maps", str(root / "test.jsonl")]
    assert report(["--results", good, *same]) == 1
    assert "held-out maps are training maps too" in capsys.readouterr().err
    for wrong in (["--results", "no-label"], ["--results", good, good], ["--results", good, "--test-maps", "x"]):
        with pytest.raises(SystemExit):
            report(wrong)
