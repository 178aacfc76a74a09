"""The comparison of controls: its table, what it refuses, and that it can be stopped and gone on with."""

import json
import re
import signal
import sys
import threading
from types import SimpleNamespace

import pytest


@pytest.fixture
def modules(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import frozenlake
    import frozenlake_commands
    import frozenlake_table

    yield SimpleNamespace(bench=frozenlake, commands=frozenlake_commands, table=frozenlake_table)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for name in ("frozenlake", "frozenlake_commands", "frozenlake_table"):
        sys.modules.pop(name)


def run_of(method: str, seed: int, accuracy: float, spans: int = 0) -> dict:
    group = {"correct": round(100 * accuracy), "total": 100, "accuracy": accuracy}
    stage = {"tokens": 1000, "samples": 10, "steps": 2}
    return {"method": method, "seed": seed, "stages": [stage, stage], "training_s": 3.0, **group,
            "groups": {"level 3": group}, "details": {"spans": spans, "unterminated": 5}}  # fmt: skip


def test_means_intervals_and_differences_by_seed(modules):
    runs = [run_of("ilvr", 0, 0.5, 150), run_of("ilvr", 1, 0.7), run_of("sft", 1, 0.4), run_of("sft", 0, 0.3)]
    summary = modules.table.summarise(runs, ["sft", "ilvr", "text"])
    assert list(summary) == ["sft", "ilvr"]  # in the order asked for; text has no run yet
    assert summary["ilvr"]["accuracy"]["mean"] == pytest.approx(0.6)
    assert summary["ilvr"]["accuracy"]["half_width_95"] == pytest.approx(12.706205 * 0.1, rel=1e-5)
    assert summary["ilvr"]["minus_reference"] is None
    difference = summary["sft"]["minus_reference"]  # 0.3 - 0.5 and 0.4 - 0.7, whatever the order of the runs
    assert difference["mean"] == pytest.approx(-0.25)
    assert difference["half_width_95"] == pytest.approx(12.706205 * 0.05, rel=1e-5)
    assert (summary["sft"]["tokens"], summary["sft"]["samples"], summary["sft"]["steps"]) == (2000, 20, 4)
    assert summary["ilvr"]["spans_per_answer"] == 0.75
    tree = {
        "blind": {"level 3": {"plan": "LD", "correct": 8, "total": 100}},
        "summary": summary,
        "methods": {"sft": "direct", "ilvr": "ILVR"},
        "runs": runs,
        "seeds": [0, 1],
        "failed": ["text, seed 0: no"],
    }
    table = modules.table.markdown(tree)
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1  # every row has every column
    assert "| direct | 35.0 ± 63.5 | 35.0 ± 63.5 | -25.0 ± 63.5 |" in table
    assert "best blind plan (level 3: LD) | 8.0 (4.1 to 15.0)" in table
    assert "- failed: text, seed 0: no" in table


def puzzles(folder, maps) -> None:
    folder.mkdir()
    (folder / "records.jsonl").write_text("".join(json.dumps({"map_desc": lake}) + "\n" for lake in maps))


@pytest.mark.parametrize(
    ("tested", "message"),
    [([[1, 2], [0, 0]], "1 of its maps are in .*--exclude"), ([[1, 2, 0], [0] * 3, [0] * 3], "3x3 cells, .* has none")],
)
def test_a_test_of_trained_maps_or_untrained_sizes_is_refused(modules, tmp_path, capsys, tested, message):
    puzzles(tmp_path / "train", [[[1, 2], [0, 0]], [[1, 0], [2, 0]]])
    puzzles(tmp_path / "test", [tested])
    arguments = ["--puzzles", tmp_path / "train", "--test", tmp_path / "test" / "records.jsonl", "--tokens", "1"]
    assert modules.bench.main([*map(str, arguments), "--out", str(tmp_path / "out")]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_runs_of_other_settings_are_not_mixed(modules, tmp_path, capsys):
    puzzles(tmp_path / "train", [[[1, 2], [0, 0]]])
    puzzles(tmp_path / "test", [[[1, 0], [2, 0]]])
    common = ["--puzzles", str(tmp_path / "train"), "--test", str(tmp_path / "test" / "records.jsonl"), "--out"]
    args = modules.bench._parser().parse_args([*common, str(tmp_path / "out"), "--tokens", "100"])
    modules.bench._claim(args)
    modules.bench._claim(args)  # the same again
    assert modules.bench.main([*common, str(tmp_path / "out"), "--tokens", "200"]) == 1
    assert "tokens: 100 there, 200 now" in capsys.readouterr().err


def test_a_finished_run_is_kept(modules, tmp_path):
    args = SimpleNamespace(out=tmp_path)
    method = next(m for m in modules.bench.METHODS if m.name == "ilvr")
    folder = modules.bench._folder(args, method, 4)
    folder.mkdir(parents=True)
    (folder / "result.json").write_text('{"accuracy": 0.25}')
    assert modules.bench._run(args, None, method, 4) == {"accuracy": 0.25}  # without commands: nothing is run


def test_a_failed_command_names_its_log_and_stop_leaves_no_child(modules, tmp_path):
    (tmp_path / "bad.py").write_text("import sys; sys.exit('no such thing')")
    (tmp_path / "long.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(600)")
    commands, log = modules.commands.Commands(), tmp_path / "log.txt"
    with pytest.raises(modules.commands.RunFailed, match=rf"bad.py ended with exit code 1: no such thing .*{log}"):
        commands.call(log, str(tmp_path / "bad.py"))
    errors = []

    def wait_for_it():
        try:
            commands.call(tmp_path / "long.txt", str(tmp_path / "long.py"))
        except modules.commands.RunFailed as error:
            errors.append(error)

    thread = threading.Thread(target=wait_for_it)
    thread.start()
    while not (tmp_path / "long.txt").is_file() or "begun" not in (tmp_path / "long.txt").read_text():
        thread.join(0.05)
    commands.stop()
    thread.join(30)
    assert not thread.is_alive() and "exit code -15" in str(errors[0])
    with pytest.raises(modules.commands.RunFailed, match="stopped before"):
        commands.call(log, str(tmp_path / "long.py"))
