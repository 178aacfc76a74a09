"""Outputs to verdicts, a summary, `results.json` and a table."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ilvr_ds.inference.progress import Answered
from ilvr_ds.inference.scoring.intervals import wilson
from ilvr_ds.inference.tasks.task import Example, Rules, Task, Verdict

MISSING_IMAGE = "missing_image"  # outcome of an example whose image is not there; it counts as wrong


def judge_all(
    task: Task,
    examples: Sequence[Example],
    answered: Mapping[int, Answered],
    missing: Mapping[int, str],
    rules: Rules,
) -> list[dict[str, Any]]:
    """One JSON object per example, in the order of the task file.

    `missing`: index -> path of an image that is not there. Fields: index, id, group, prompt_sha256, output,
    extraction, rule, outcome, correct, seconds, details.
    """
    samples = []
    for index, example in enumerate(examples):
        if index in missing:
            verdict, entry = Verdict(False, MISSING_IMAGE, None, "not asked"), None
        else:
            entry = answered[index]
            verdict = task.judge(example, entry.output, rules)
        samples.append(
            {
                "index": index,
                "id": example.id,
                "group": example.group,
                "prompt_sha256": None if entry is None else entry.prompt_sha256,
                "output": None if entry is None else entry.output,
                "extraction": verdict.extraction,
                "rule": verdict.rule,
                "outcome": verdict.outcome,
                "correct": verdict.correct,
                "seconds": None if entry is None else entry.seconds,
                "details": {"missing": missing[index]} if entry is None else entry.details,
            }
        )
    return samples


def summarise(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy with its 95 % interval (Wilson), over all and per group; counts of outcomes and rules; seconds.

    An output without an answer counts under "none (RULE)", RULE being the one that decided so.
    Numbers and true/false in `details` are added up over the samples.
    """
    groups = sorted({sample["group"] for sample in samples} - {""})
    totals: Counter[str] = Counter()
    for sample in samples:
        for name, value in sample["details"].items():
            if isinstance(value, (bool, int, float)):
                totals[name] += value
    return {
        **_accuracy(samples),
        "groups": {group: _accuracy([s for s in samples if s["group"] == group]) for group in groups},
        "outcomes": dict(sorted(Counter(sample["outcome"] for sample in samples).items())),
        "rules": dict(sorted(Counter(_found_by(sample) for sample in samples).items())),
        "details": dict(sorted(totals.items())),
        "seconds": sum(sample["seconds"] or 0.0 for sample in samples),
    }


def write_results(
    path: Path, settings: dict[str, Any], rules: Rules, samples: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Write `results.json`, all or nothing, and return its summary."""
    summary = summarise(samples)
    tree = {"settings": settings, "rules": asdict(rules), "summary": summary, "samples": list(samples)}
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(tree, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return summary


def format_table(summary: Mapping[str, Any]) -> str:
    """The summary for a terminal: accuracy per group and over all, then how the outputs ended."""
    rows = [(group, counts) for group, counts in summary["groups"].items()] + [("all", summary)]
    width = max(len(name) for name, _ in rows)
    lines = [f"{'':<{width}}  correct   total  accuracy  95 % interval"]
    for name, counts in rows:
        low, high = counts["interval_95"]
        share = "   -   " if counts["accuracy"] is None else f"{100 * counts['accuracy']:6.1f} %"
        lines.append(
            f"{name:<{width}}  {counts['correct']:7d} {counts['total']:7d}  {share}  "
            f"{100 * low:5.1f} to {100 * high:.1f} %"
        )
    lines.append("outcomes: " + _counts(summary["outcomes"].items()))
    lines.append("answers found by: " + _counts(summary["rules"].items()))
    if summary["details"]:
        lines.append("decoding: " + _counts(summary["details"].items()))
    return "\n".join(lines)


def _accuracy(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    correct, total = sum(sample["correct"] for sample in samples), len(samples)
    return {
        "correct": correct,
        "total": total,
        "accuracy": correct / total if total else None,
        "interval_95": list(wilson(correct, total)),
    }


def _found_by(sample: Mapping[str, Any]) -> str:
    return sample["rule"] if sample["extraction"] is not None else f"none ({sample['rule']})"


def _counts(pairs: Iterable[tuple[str, Any]]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in pairs)
