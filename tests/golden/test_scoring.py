"""Agreement with upstream verdicts on real model outputs; every disagreement is explained in docs/scoring.md."""

import importlib.util
import json

import pytest


@pytest.fixture(scope="module")
def script(repository):
    spec = importlib.util.spec_from_file_location("scoring_agreement", repository / "tests/golden/scoring_agreement.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lines(realdata):
    text = (realdata / "scoring/answers.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_agreement(script, lines):
    report = script.agreement(lines, script.explained_ids())
    assert {name: part["outputs"] for name, part in report.items()} == {
        "blink unboxed": 600,
        "emma-mini boxed": 384,
        "emma-mini unboxed": 16,
    }
    assert report["emma-mini boxed"]["agreement"] >= 0.98
    assert report["blink unboxed"]["agreement"] >= 0.96
    assert report["emma-mini unboxed"]["equal"] >= 15
    assert [part["unexplained"] for part in report.values()] == [[], [], []]


def test_we_are_never_more_lenient_than_the_model_was_clear(script, lines):
    """Where upstream says that no option was chosen ("Z"), we read none either."""
    undecided = [line for line in lines if line["upstream_extraction"] == "(Z)"]
    assert len(undecided) == 32
    assert [script.judge(line)[1] for line in undecided] == [None] * 32


def test_an_unexplained_disagreement_is_seen(script, lines):
    flipped = [line | {"upstream_correct": not line["upstream_correct"]} for line in lines[:3]]
    report = script.agreement(flipped, explained=set())
    assert sum(len(part["unexplained"]) for part in report.values()) == 3
