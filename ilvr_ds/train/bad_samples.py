"""Bad samples met in training: every rank knows all of them, the step is corrected, the run ends above a number."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from ilvr_ds.contracts import PackedBatch
from ilvr_ds.data.bad_samples import BadSample, lost_totals, remaining, reweighted
from ilvr_ds.data.plan import StepTotals
from ilvr_ds.errors import TrainingError

BAD_SAMPLES_FILE = "bad_samples.jsonl"  # in the run folder: a line for each time a bad sample was left out


def truncate_bad_samples(run_dir: Path, last_step: int) -> tuple[int, ...]:
    """Keep the lines of steps 1..last_step (what came after the checkpoint will come again); returns their samples."""
    path = run_dir / BAD_SAMPLES_FILE
    if not path.exists():
        return ()
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last newline was cut by a kill
    kept = [line for line in lines if json.loads(line)["step"] <= last_step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)
    return tuple(sorted({json.loads(line)["number"] for line in kept}))


class BadSamples:
    """The distinct bad samples of a run, the same set on every rank.

    Args:
        allowed: `data.max_bad_samples`. 0: nothing is ever asked of other ranks; the loader raises by itself.
        known: those of the steps before a resume.
        file: where rank 0 writes them; None on other ranks.
        add_up: sums a few numbers over ranks (one small all-reduce); called once per step by every rank.
        gather: a picklable object of every rank, by rank; called only in a step with bad samples, by every rank.
    """

    def __init__(
        self,
        allowed: int,
        known: Iterable[int],
        file: Path | None,
        add_up: Callable[[Sequence[float]], list[float]],
        gather: Callable[[Any], list[Any]],
    ):
        self.allowed, self.file, self._add_up, self._gather = allowed, file, add_up, gather
        self.known = set(known)

    def __len__(self) -> int:
        """Distinct bad samples so far; one that comes again in the next epoch counts once."""
        return len(self.known)

    def settle(
        self,
        step: int,
        planned: StepTotals,
        batches: list[PackedBatch],
        bad: Sequence[BadSample],
        reduction: Literal["sample", "token"],
    ) -> tuple[list[PackedBatch], StepTotals]:
        """This rank's batches with corrected weights, and the totals of what the step really trains on.

        Args:
            step: 1-based.
            batches: weighted by `planned`.
            bad: what this rank's bins lost.

        Raises:
            TrainingError: on every rank, when the run has met more than `allowed` bad samples.
            BatchError: on every rank, when a step has no sample left.
        """
        if self.allowed == 0:
            return batches, planned
        mine = lost_totals(bad)
        lost = StepTotals(*(int(n) for n in self._add_up([float(n) for n in dataclasses.astuple(mine)])))
        if lost.samples == 0:
            return batches, planned
        found = sorted((b for rank in self._gather(list(bad)) for b in rank), key=lambda b: b.number)
        self.known |= {b.number for b in found}
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, **dataclasses.asdict(b)}) + "\n" for b in found)
        if len(self.known) > self.allowed:
            raise TrainingError(
                f"step {step}: {len(self.known)} bad samples, data.max_bad_samples is {self.allowed}; the last: "
                f"{found[-1].error}. All are in {BAD_SAMPLES_FILE} of the run folder. Mend the shards, or allow more"
            )
        left = remaining(planned, lost)
        return reweighted(batches, planned, left, reduction), left
