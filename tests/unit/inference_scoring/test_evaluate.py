"""The evaluation run: batches, ranks, kills, missing images, other settings."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ilvr_ds.errors import EvaluationError, RecordError
from ilvr_ds.inference import evaluate as module
from ilvr_ds.inference.evaluate import Evaluation, Output, rank_and_world
from ilvr_ds.inference.requests import Request
from ilvr_ds.inference.results import format_table
from ilvr_ds.inference.scoring.intervals import wilson
from ilvr_ds.inference.tasks.task import Rules

SIDES = (2, 3)
COUNT = 23


@pytest.fixture
def folder(tmp_path):
    """A task of 23 maps without holes, start and goal in opposite corners: levels 2 and 3 in turn."""
    lines = []
    for number in range(COUNT):
        side = SIDES[number % 2]
        grid = [[0] * side for _ in range(side)]
        grid[0][0], grid[-1][-1] = 1, 2
        (tmp_path / f"{number}.png").write_bytes(b"picture %d" % number)
        lines.append(
            {"text_input": "Plan <image>?", "image_input": f"{number}.png", "id": f"m{number}", "map_desc": grid}
        )
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def job(folder, **changes):
    settings = {"task": "vsp", "file": folder / "task.jsonl", "out": folder / "out", "image_root": folder,
                "save_every": 4, "patience_s": 20.0}  # fmt: skip
    return Evaluation(**settings | changes)


def index_of(request: Request) -> int:
    return int(request.id.removeprefix("m"))


def answer(request: Request) -> Output:
    """Right for every example but each fifth."""
    index = index_of(request)
    side = SIDES[index % 2]
    plan = "R" * (side - 1) + "D" * (side - 1 - (index % 5 == 0))
    return Output(f"\\boxed{{{plan}}}", f"hash {request.id}", {"spans": 1, "unterminated": False, "note": "x"})


def evaluate(job, generate, checkpoint="a", **ranks):
    return module.evaluate(job, {"checkpoint": checkpoint}, generate, report=lambda line: None, **ranks)


def generate(requests):
    return [answer(request) for request in requests]


def results(folder):
    return json.loads((folder / "out/results.json").read_text())


def test_what_results_hold(folder):
    sizes = []

    def counting(requests):
        sizes.append(len(requests))
        return generate(requests)

    summary = evaluate(job(folder), counting)
    assert sizes == [4, 4, 4, 4, 4, 3]
    tree = results(folder)
    assert tree["summary"] == summary
    assert [sample["index"] for sample in tree["samples"]] == list(range(COUNT))
    correct = sum(i % 5 != 0 for i in range(COUNT))
    assert (summary["correct"], summary["total"], summary["accuracy"]) == (correct, COUNT, correct / COUNT)
    assert summary["interval_95"] == list(wilson(correct, COUNT))
    assert summary["outcomes"] == {"not_reached": COUNT - correct, "success": correct}
    assert summary["groups"]["level 2"]["total"] + summary["groups"]["level 3"]["total"] == COUNT
    assert summary["groups"]["level 2"]["correct"] == sum(i % 5 != 0 for i in range(0, COUNT, 2))
    assert summary["rules"] == {"boxed": COUNT}
    assert summary["details"] == {"spans": COUNT, "unterminated": 0}
    sample = tree["samples"][3]
    assert (sample["id"], sample["group"], sample["extraction"], sample["correct"]) == ("m3", "level 3", "RRDD", True)
    assert sample["output"] == "\\boxed{RRDD}" and sample["rule"] == "boxed" and sample["seconds"] >= 0
    assert sample["prompt_sha256"] == "hash m3"
    table = format_table(summary)
    assert "level 3" in table and "78.3 %" in table and "not_reached 5" in table


def test_ranks_share_the_work_and_rank_0_merges(folder):
    asked = {0: [], 1: [], 2: []}

    def run(rank):
        def noting(requests):
            asked[rank] += [index_of(request) for request in requests]
            time.sleep(0.02 * rank)
            return generate(requests)

        returned[rank] = evaluate(job(folder), noting, rank=rank, world=3)

    returned = {}
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert asked == {rank: list(range(rank, COUNT, 3)) for rank in range(3)}
    assert returned[1] is None and returned[2] is None
    shared = results(folder)
    evaluate(job(folder, out=folder / "alone"), generate)
    alone = json.loads((folder / "alone/results.json").read_text())
    for tree in (shared, alone):
        tree["summary"].pop("seconds")
        for sample in tree["samples"]:
            sample.pop("seconds")
    assert shared == alone


def test_a_rank_that_never_came_is_named_and_another_world_can_finish(folder):
    with pytest.raises(EvaluationError, match=r"11 examples are not answered.*rank\(s\) 1 of 2"):
        evaluate(job(folder, patience_s=0.2), generate, rank=0, world=2)
    assert not (folder / "out/results.json").exists()
    asked = []

    def noting(requests):
        asked.extend(index_of(request) for request in requests)
        return generate(requests)

    summary = evaluate(job(folder), noting)
    assert (asked, summary["total"]) == (list(range(1, COUNT, 2)), COUNT)


KILLED = """
import sys, time, pathlib
from ilvr_ds.inference.evaluate import Evaluation, Output, evaluate
folder = pathlib.Path(sys.argv[1])
def generate(requests):
    with (folder / "asked").open("a") as file:
        file.write("".join(f"{p.id[1:]}\\n" for p in requests))
    time.sleep(float(sys.argv[2]))
    return [Output("\\\\boxed{RD}", "h") for p in requests]
evaluate(Evaluation("vsp", folder / "task.jsonl", folder / "out", folder, save_every=3), {}, generate)
"""


def test_killed_and_started_again(folder):
    """SIGKILL in the middle: no results, no output lost, nothing that was on disk is asked again."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder), "0.2"])
    progress = folder / "out/progress-0-of-1.jsonl"
    deadline = time.monotonic() + 60
    while not (progress.exists() and progress.read_bytes().count(b"\n") >= 7):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    assert not (folder / "out/results.json").exists()
    kept = progress.read_bytes().count(b"\n") - 1
    assert 6 <= kept < COUNT
    subprocess.run([sys.executable, "-c", KILLED, str(folder), "0"], check=True, timeout=60, stdout=subprocess.DEVNULL)
    asked = [int(line) for line in (folder / "asked").read_text().split()]
    assert set(asked) == set(range(COUNT))
    assert all(asked.count(index) == 1 for index in range(kept))
    assert len(asked) <= COUNT + 3  # at most the batch in flight is asked twice
    assert results(folder)["summary"]["total"] == COUNT
    assert not list((folder / "out").glob(".*"))


@pytest.mark.parametrize("cut", [1, 30])
def test_a_torn_last_line_is_answered_again(folder, cut):
    evaluate(job(folder), generate)
    progress = folder / "out/progress-0-of-1.jsonl"
    progress.write_bytes(progress.read_bytes()[:-cut])
    asked = []

    def noting(requests):
        asked.extend(index_of(request) for request in requests)
        return generate(requests)

    before = results(folder)["samples"]
    evaluate(job(folder), noting)
    assert asked == [COUNT - 1]
    assert [s["output"] for s in results(folder)["samples"]] == [s["output"] for s in before]
    assert all(json.loads(line) for line in progress.read_text().splitlines())


def test_a_header_torn_by_a_kill(folder):
    (folder / "out").mkdir()
    (folder / "out/progress-0-of-1.jsonl").write_bytes(b'{"settings": {"ta')
    assert evaluate(job(folder), generate)["total"] == COUNT


def test_a_damaged_line_is_refused(folder):
    evaluate(job(folder), generate)
    progress = folder / "out/progress-0-of-1.jsonl"
    lines = progress.read_bytes().splitlines(keepends=True)
    progress.write_bytes(b"".join([*lines[:3], b"{}\n", *lines[4:]]))
    with pytest.raises(EvaluationError, match=r"progress-0-of-1\.jsonl:4: damaged line"):
        evaluate(job(folder), generate)


def test_other_settings_are_refused_by_name(folder):
    evaluate(job(folder), generate)
    with pytest.raises(EvaluationError, match=r"generation: \{'checkpoint': 'a'\} there, \{'checkpoint': 'b'\} asked"):
        evaluate(job(folder), generate, checkpoint="b")
    with (folder / "task.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(EvaluationError, match="file_sha256"):
        evaluate(job(folder), generate)


def test_other_rules_need_no_generation(folder):
    def prose(requests):
        return [Output("\\boxed{go R and D}", "h") for _ in requests]

    def never(requests):
        raise AssertionError("everything was answered before")

    strict = evaluate(job(folder), prose)
    assert (strict["outcomes"], strict["rules"]) == ({"no_plan": COUNT}, {"none (boxed)": COUNT})
    lax = evaluate(job(folder, rules=Rules(published=True)), never)
    twos = sum(index % 2 == 0 for index in range(COUNT))  # R, the D of "and", D: over the edge of a 2x2 map
    assert lax["outcomes"] == {"not_reached": COUNT - twos, "success": twos}
    assert results(folder)["rules"] == {"published": True, "goal": "mirage"}


def test_missing_images_are_refused_or_counted(folder):
    (folder / "3.png").unlink()
    (folder / "8.png").unlink()
    with pytest.raises(RecordError, match=r"task\.jsonl:4.*'m3'.*3\.png is not there \(2 of 23") as caught:
        evaluate(job(folder), generate)
    assert caught.value.reason == "missing_image"
    assert not (folder / "out").exists()
    summary = evaluate(job(folder, allow_missing_images=True), generate)
    assert summary["outcomes"]["missing_image"] == 2
    assert (summary["total"], summary["correct"]) == (COUNT, sum(i % 5 != 0 for i in range(COUNT)) - 2)
    sample = results(folder)["samples"][3]
    assert (sample["outcome"], sample["output"], sample["correct"]) == ("missing_image", None, False)
    (folder / "3.png").write_bytes(b"found")
    again = evaluate(job(folder, allow_missing_images=True), generate)
    assert again["outcomes"]["missing_image"] == 1  # what has come is answered now


def test_an_empty_task_file(folder):
    (folder / "task.jsonl").write_text("")
    with pytest.raises(RecordError, match="nothing to evaluate"):
        evaluate(job(folder), generate)


def test_limit(folder):
    assert evaluate(job(folder, limit=5), generate)["total"] == 5
    assert evaluate(job(folder), generate)["total"] == COUNT


def test_too_few_outputs_are_an_error(folder):
    with pytest.raises(EvaluationError, match="3 outputs for 4 requests"):
        evaluate(job(folder), lambda requests: generate(requests)[1:])


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("-1", "2"), ("x", "2"), ("0", "0")])
def test_wrong_rank_variables(rank, world, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(EvaluationError, match="RANK"):
        rank_and_world()


def test_rank_variables(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert rank_and_world() == (0, 1)
    monkeypatch.setitem(os.environ, "RANK", "1")
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "4")
    assert rank_and_world() == (1, 4)
