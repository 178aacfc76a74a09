"""Metrics of a run: one JSON line per optimizer step, a progress bar, TensorBoard where it is installed.

Only rank 0 holds a writer. `metrics.jsonl` is append-only while a run lasts; on resume it is cut back to
the step the checkpoint was taken at, so that every step is in the file exactly once.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

METRICS_FILE = "metrics.jsonl"


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All complete lines of a run's metrics; a last line cut short by a kill is left out."""
    path = run_dir / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]  # the piece after the last newline is not complete


def truncate_metrics(run_dir: Path, last_step: int) -> None:
    """Keep the lines of steps 1..last_step only (what came after the checkpoint will come again)."""
    path = run_dir / METRICS_FILE
    if not path.exists():
        return
    kept = [line for line in read_metrics(run_dir) if line["step"] <= last_step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


class MetricsWriter:
    """Writes a step's numbers to the file, the bar and TensorBoard."""

    def __init__(self, run_dir: Path, total_steps: int, first_step: int, tensorboard: bool):
        """`first_step` is the number of steps already done; the file must be truncated to them."""
        self._file = (run_dir / METRICS_FILE).open("a", encoding="utf-8")
        self._bar = tqdm(
            total=total_steps, initial=first_step, unit="step", desc="training", dynamic_ncols=True,
            file=sys.stderr, mininterval=0.5,
        )  # fmt: skip
        self._events = None
        if tensorboard and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)

    def write(self, line: dict[str, Any]) -> None:
        """Record one step; `line` has a key "step" (1-based) and scalar values.

        A value that is not finite is written as null: JSON has no NaN, and readers other than Python's refuse it.
        """
        written = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in line.items()}
        self._file.write(json.dumps(written, allow_nan=False) + "\n")
        self._file.flush()
        self._bar.update(1)
        self._bar.set_postfix_str(
            f"loss {line['loss']:.4f} (ce {line['ce']:.4f}, align {line['align']:.4f}), "
            f"drift {line['teacher_drift']:.2e}, {line['samples_per_s']:.1f} samples/s, "
            f"{line['tokens_per_s']:.0f} tok/s" + (f", MFU {line['mfu']:.1%}" if line["mfu"] is not None else ""),
            refresh=False,
        )
        if self._events is not None:
            for key, value in line.items():
                if isinstance(value, (int, float)) and key != "step":
                    self._events.add_scalar(key, value, line["step"])

    def say(self, message: str) -> None:
        """A line for the person who watches, above the progress bar."""
        self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        """Flush and close everything."""
        self._bar.close()
        self._file.close()
        if self._events is not None:
            self._events.close()
