"""Run a task: read its file, have every prompt answered, judge the outputs, write `results.json`.

Each of `world` ranks answers the examples whose index is its rank modulo `world`, and appends them to its own
progress file; rank 0 waits until every index is there, judges and writes. Ranks share nothing but the folder, so
no process group is needed. Started again, only what is not on disk is answered. Verdicts are computed at the end
from the stored outputs: judging by other rules costs no generation.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ilvr_ds.errors import EvaluationError, RecordError
from ilvr_ds.inference.asking import Asking
from ilvr_ds.inference.progress import Answered, Progress
from ilvr_ds.inference.requests import Request
from ilvr_ds.inference.results import judge_all, write_results
from ilvr_ds.inference.tasks import TaskName, task_named
from ilvr_ds.inference.tasks.task import Example, Rules

RESULTS = "results.json"


@dataclass(frozen=True)
class Output:
    """What the model says."""

    text: str  # the assistant turn
    prompt_sha256: str  # of everything the model saw
    details: dict[str, Any] = field(default_factory=dict)  # JSON values; numbers are summed in the summary


Generate = Callable[[Sequence[Request]], Sequence[Output]]


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate and how to judge it."""

    task: TaskName
    file: Path
    out: Path  # folder of the progress files and results.json
    image_root: Path  # folder that relative image paths start from
    rules: Rules = field(default_factory=Rules)
    asking: Asking = field(default_factory=Asking)
    save_every: int = 64  # examples answered between two saves: what a kill can cost
    limit: int | None = None  # only the first examples of the file
    allow_missing_images: bool = False  # count them as wrong instead of refusing the file
    patience_s: float = 3600.0  # how long rank 0 waits for another rank without seeing a new output


def rank_and_world() -> tuple[int, int]:
    """RANK and WORLD_SIZE of the environment, (0, 1) without. Raises EvaluationError if they make no sense."""
    texts = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        rank, world = int(texts[0]), int(texts[1])
    except ValueError as error:
        raise EvaluationError(f"RANK={texts[0]!r} WORLD_SIZE={texts[1]!r}: expected whole numbers") from error
    if not 0 <= rank < world:
        raise EvaluationError(f"RANK={rank} WORLD_SIZE={world}: the rank must be 0 or more and below the world size")
    return rank, world


def check_task(job: Evaluation) -> tuple[list[Example], dict[int, str]]:
    """The examples of a job, and those (index -> path) whose image is not there.

    Raises RecordError: the file is wrong, `asking` does not fit a record, or an image is missing and
    `allow_missing_images` is off.
    """
    examples = job.asking.apply(task_named(job.task).read(job.file, job.image_root)[: job.limit])
    missing = find_missing_images(examples, job.image_root)
    if missing and not job.allow_missing_images:
        raise _missing_error(examples, missing)
    return examples, missing


def evaluate(
    job: Evaluation,
    generation: dict[str, Any],
    generate: Generate,
    *,
    rank: int = 0,
    world: int = 1,
    report: Callable[[str], None] = print,
) -> dict[str, Any] | None:
    """Run `job` on this rank. Returns the summary (see `results.summarise`) on rank 0, None elsewhere.

    `generate` gets at most `save_every` requests and returns an output for each, in order. `generation`: JSON values
    its outputs depend on (checkpoint, temperature, ...), the same on every rank and every start.
    Raises RecordError (see `check_task`) and EvaluationError (other settings in the folder, a rank that stopped,
    `generate` returning another number of outputs).
    """
    examples, missing = check_task(job)
    settings = {
        "task": job.task,
        "file_sha256": hashlib.sha256(job.file.read_bytes()).hexdigest(),
        **job.asking.settings(),
        "generation": generation,
    }
    progress = Progress(job.out, settings, rank, world)
    try:
        done = progress.read()
        todo = [i for i in range(rank, len(examples), world) if i not in done and i not in missing]
        for first in range(0, len(todo), job.save_every):
            batch = todo[first : first + job.save_every]
            progress.add(_answer(batch, [_request(examples[i], job.image_root) for i in batch], generate))
            report(f"rank {rank}: {min(first + job.save_every, len(todo))} of {len(todo)} answered")
        if rank != 0:
            return None
        wanted = [i for i in range(len(examples)) if i not in missing]
        answered = _wait_for_all(progress, wanted, world, job.patience_s)
    finally:
        progress.close()
    samples = judge_all(task_named(job.task), examples, answered, missing, job.rules)
    return write_results(job.out / RESULTS, settings, job.rules, samples)


def find_missing_images(examples: Sequence[Example], image_root: Path) -> dict[int, str]:
    """Index of each example with an image that is not there -> that image's path."""
    missing = {}
    for index, example in enumerate(examples):
        absent = [path for path in example.images if not (image_root / path).is_file()]
        if absent:
            missing[index] = absent[0]
    return missing


def _request(example: Example, image_root: Path) -> Request:
    return Request(example.id, example.prompt, image_root, example.origin)


def _answer(indices: Sequence[int], requests: Sequence[Request], generate: Generate) -> list[Answered]:
    started = time.perf_counter()
    outputs = generate(requests)
    seconds = (time.perf_counter() - started) / len(requests)
    if len(outputs) != len(requests):
        raise EvaluationError(f"generation returned {len(outputs)} outputs for {len(requests)} requests")
    return [
        Answered(index, request.id, output.prompt_sha256, output.text, seconds, output.details)
        for index, request, output in zip(indices, requests, outputs, strict=True)
    ]


def _wait_for_all(progress: Progress, wanted: Sequence[int], world: int, patience_s: float) -> dict[int, Answered]:
    """Everything answered, once every wanted index is there. Raises EvaluationError when the others stand still."""
    seen, last_news = -1, time.monotonic()
    while True:
        answered = progress.read()
        absent = [i for i in wanted if i not in answered]
        if not absent:
            return answered
        if len(answered) > seen:
            seen, last_news = len(answered), time.monotonic()
        elif time.monotonic() - last_news > patience_s:
            ranks = sorted({i % world for i in absent})
            raise EvaluationError(
                f"{progress.folder}: {len(absent)} examples are not answered, and nothing new came for "
                f"{patience_s:g} s; rank(s) {', '.join(map(str, ranks))} of {world} have stopped or were never "
                "started. Start the same command again: only what is missing is answered"
            )
        time.sleep(min(1.0, patience_s / 4))


def _missing_error(examples: Sequence[Example], missing: dict[int, str]) -> RecordError:
    index, path = next(iter(missing.items()))
    message = (
        f"the image {path} is not there ({len(missing)} of {len(examples)} examples lack an image); check "
        "--image-root, or count such examples as wrong with --allow-missing-images"
    )
    return RecordError(
        "missing_image", message, origin=examples[index].origin, record_id=examples[index].id, field="image"
    )
