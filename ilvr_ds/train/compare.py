"""Compare runs: did a resumed run repeat the uninterrupted one, did the loss fall, did the teacher move?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ilvr_ds.errors import TrainingError
from ilvr_ds.train.metrics import read_metrics

# What a step computed; everything else in a line (seconds, memory) may differ between equal runs.
NUMBERS = (
    "loss",
    "ce",
    "align",
    "lr",
    "grad_norm",
    "applied",
    "samples",
    "tokens",
    "latents_per_span",
    "teacher_drift",
)


@dataclass(frozen=True)
class RunSummary:
    """A finished run in a few numbers; first and last are means over a tenth of the steps (at least one)."""

    steps: int
    first: dict[str, float]  # loss, ce, align
    last: dict[str, float]
    teacher_drift: float  # at the last step
    samples_per_s: float
    tokens_per_s: float
    step_s: float


def summarise(run_dir: Path) -> RunSummary:
    """Summary of a run's metrics; TrainingError if it has none."""
    lines = read_metrics(run_dir)
    if not lines:
        raise TrainingError(f"{run_dir}: no finished step in its metrics")
    window = max(1, len(lines) // 10)

    def mean(part: list[dict[str, Any]], key: str) -> float:
        values = [line[key] for line in part if line[key] is not None]  # null: was not finite
        return sum(values) / len(values) if values else math.nan

    terms = ("loss", "ce", "align")
    steady = lines[1:] or lines  # the first step pays for start-up
    return RunSummary(
        steps=len(lines),
        first={key: mean(lines[:window], key) for key in terms},
        last={key: mean(lines[-window:], key) for key in terms},
        teacher_drift=lines[-1]["teacher_drift"],
        samples_per_s=mean(steady, "samples_per_s"),
        tokens_per_s=mean(steady, "tokens_per_s"),
        step_s=mean(steady, "step_s"),
    )


def first_difference(a: Path, b: Path) -> str | None:
    """The first step and number in which two runs differ, in words; None if they are equal bit for bit."""
    lines_a, lines_b = read_metrics(a), read_metrics(b)
    if [line["step"] for line in lines_a] != [line["step"] for line in lines_b]:
        return f"{a} has {len(lines_a)} steps, {b} has {len(lines_b)}"
    for line_a, line_b in zip(lines_a, lines_b, strict=True):
        for key in NUMBERS:
            if line_a[key] != line_b[key]:
                return f"step {line_a['step']}: {key} is {line_a[key]!r} in {a} and {line_b[key]!r} in {b}"
    return None
