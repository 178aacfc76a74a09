"""Records to a folder of shards, by any number of processes and jobs, with the same bytes.

    build(settings, tokenizer, on_progress, workers=8)              all of it, on one machine
    build_job(settings, tokenizer, on_progress, Job(3, 64), ...)    every 64th shard; `build_merge.merge` finishes

Which record goes into which shard depends on its place in the input alone, so shards can be written in any order, by
any worker of any job. A build that stopped, however it was stopped, keeps the shards it had finished (`OUT/progress`
says which, with their hashes) and ends with the bytes of one that never stopped.

    build_settings   what is built, and how a folder remembers it
    build_survey     ids and duplicates, before any image is opened
    build_worker     one task: a range surveyed, a shard written
    build_pool       worker processes that may die
    build_merge      shards to index, rejects and manifest
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ilvr_ds.data.build_merge import finish, remove_temporaries
from ilvr_ds.data.build_pool import InProcess, WorkerPool
from ilvr_ds.data.build_settings import (
    PROGRESS,
    BuildSettings,
    Job,
    build_identity,
    claim_folder,
    prepare_folder,
    shard_count,
)
from ilvr_ds.data.build_survey import ID_HASH, SURVEY, Survey, find_duplicates, load_survey, save_survey
from ilvr_ds.data.build_worker import ShardSummary, Task, Work
from ilvr_ds.data.formats.source import open_sources
from ilvr_ds.data.index import Manifest
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.data.whole_file import TEMPORARY, cannot_write
from ilvr_ds.errors import ShardError

__all__ = ["PROGRESS", "BuildSettings", "Job", "Progress", "build", "build_job", "survey_only"]

SURVEY_RANGE = 4096  # records surveyed in one task


@dataclass(frozen=True)
class Progress:
    """How far a build is."""

    stage: Literal["survey", "shards"]
    records: int  # of this stage, those kept from an earlier run included
    total: int  # records of this stage in this job
    bytes: int  # of shards written or kept
    rejected: int


def build(
    settings: BuildSettings,
    tokenizer: ChatTokenizer,
    on_progress: Callable[[Progress], None],
    workers: int = 0,
    max_reject_fraction: float = 1.0,
) -> Manifest:
    """Build everything that is not there yet, and finish the folder.

    `workers`: processes; 0 does the work in this one, which keeps freed memory from then on (`kept_memory`). Nothing of
    the output depends on it.
    Raises ShardError when OUT holds another build or cannot be written, as soon as more than `max_reject_fraction` of
    the records are rejected, and when workers keep being killed; ConfigError when the input cannot be read.
    """
    identity, summaries = _build(settings, tokenizer, on_progress, Job(), workers, max_reject_fraction)
    return finish(settings.out, identity, summaries)


def build_job(
    settings: BuildSettings,
    tokenizer: ChatTokenizer,
    on_progress: Callable[[Progress], None],
    job: Job,
    workers: int = 0,
    max_reject_fraction: float = 1.0,
) -> list[ShardSummary]:
    """Build one job's shards. Raises what `build` raises; `max_reject_fraction` is of all records, as in `build`."""
    return _build(settings, tokenizer, on_progress, job, workers, max_reject_fraction)[1]


def survey_only(
    settings: BuildSettings, tokenizer: ChatTokenizer, on_progress: Callable[[Progress], None], workers: int = 0
) -> Survey:
    """Survey the input and keep the result in OUT, so that jobs started afterwards need not."""
    work, _ = _begin(settings, tokenizer)
    return _survey(work, on_progress, workers)


def check_reject_fraction(reasons: Counter[str], records: int, allowed: float, examples: dict[str, str]) -> None:
    """Raise ShardError when more than the `allowed` share of `records` is rejected. `examples`: reason to message."""
    if reasons.total() <= allowed * records:
        return
    lines = [
        f"\n  {reason}: {count}" + (f", such as {examples[reason]}" if reason in examples else "")
        for reason, count in sorted(reasons.items())
    ]
    raise ShardError(
        f"{reasons.total()} of {records} records are rejected ({reasons.total() / records:.2%}), "
        f"--max-reject-fraction is {allowed:.2%}; finished shards are kept:{''.join(lines)}"
    )


def _begin(settings: BuildSettings, tokenizer: ChatTokenizer) -> tuple[Work, dict[str, Any]]:
    prepare_folder(settings.out)
    source = open_sources(settings.inputs, settings.source_format, settings.out / PROGRESS)
    identity = build_identity(settings, source.sha256, len(source), tokenizer)
    claim_folder(settings.out, identity)
    return Work(settings, source, tokenizer), identity


def _build(
    settings: BuildSettings,
    tokenizer: ChatTokenizer,
    on_progress: Callable[[Progress], None],
    job: Job,
    workers: int,
    max_reject_fraction: float,
) -> tuple[dict[str, Any], list[ShardSummary]]:
    before = _stamps(settings)
    work, identity = _begin(settings, tokenizer)
    total = len(work.source)
    numbers = job.shards(shard_count(total, settings.samples_per_shard))
    remove_temporaries(settings.out, None if job.count == 1 else numbers)
    survey = _survey(work, on_progress, workers)
    known = Counter({"duplicate_id": len(survey.duplicates), "records that do not follow the format": survey.bad})
    check_reject_fraction(known, total, max_reject_fraction, {})
    tally = _Tally(on_progress, total, sum(len(_places(settings, total, n)) for n in numbers), max_reject_fraction)
    try:
        with _pool(work, workers, tally.tick) as pool:
            for task, summary in pool.run(_shard_tasks(settings, survey, total, numbers)):
                tally.finished(task, summary, pool)
    finally:
        remove_temporaries(settings.out, numbers)  # of workers that were stopped
    changed = [path for path, stamp in _stamps(settings).items() if stamp != before[path]]
    if changed:
        raise ShardError(f"{changed[0]} changed during the build; remove {settings.out} and build again")
    return identity, tally.summaries


def _stamps(settings: BuildSettings) -> dict[Path, tuple[int, int]]:
    """Size and time of change of every input file."""
    facts = {path: path.stat() for path in settings.inputs}
    return {path: (fact.st_size, fact.st_mtime_ns) for path, fact in facts.items()}


def _survey(work: Work, on_progress: Callable[[Progress], None], workers: int) -> Survey:
    """The survey kept in OUT, or a new one."""
    out, source = work.settings.out, work.source
    survey = load_survey(out, source.sha256)
    if survey is not None:
        return survey
    total = len(source)
    hashes = out / PROGRESS / f"{SURVEY}.{uuid.uuid4().hex[:12]}{TEMPORARY}"
    done = 0

    def tick(pool: InProcess | WorkerPool) -> None:
        on_progress(Progress("survey", done + pool.live()[0], total, 0, 0))

    tasks = (Task(start, min(start + SURVEY_RANGE, total)) for start in range(0, total, SURVEY_RANGE))
    try:
        with hashes.open("xb") as file, _pool(work, workers, tick) as pool:
            for task, ids in pool.run(tasks):
                file.seek(task.start * ID_HASH.itemsize)
                file.write(ids)
                done += task.stop - task.start
                tick(pool)
        survey = find_duplicates(hashes, total)
    except OSError as error:
        raise cannot_write(hashes, error) from error
    finally:
        hashes.unlink(missing_ok=True)
    save_survey(out, source.sha256, survey)
    return survey


def _pool(work: Work, workers: int, tick: Callable[[Any], None]) -> InProcess | WorkerPool:
    return InProcess(work, tick) if workers == 0 else WorkerPool(work, workers, tick)


def _places(settings: BuildSettings, total: int, number: int) -> range:
    """The places in the input of the records of a shard."""
    start = number * settings.samples_per_shard
    return range(start, min(start + settings.samples_per_shard, total))


def _shard_tasks(settings: BuildSettings, survey: Survey, total: int, numbers: range) -> Iterator[Task]:
    for number in numbers:
        places = _places(settings, total, number)
        yield Task(places.start, places.stop, number, survey.duplicates_within(places.start, places.stop))


class _Tally:
    """What is done, what is under way, and whether too much was rejected."""

    def __init__(self, on_progress: Callable[[Progress], None], records: int, of_job: int, allowed: float):
        self.summaries: list[ShardSummary] = []
        self._on_progress, self._records, self._of_job, self._allowed = on_progress, records, of_job, allowed
        self._done = self._bytes = 0
        self._reasons: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def finished(self, task: Task, summary: ShardSummary, pool: InProcess | WorkerPool) -> None:
        """One shard more."""
        self.summaries.append(summary)
        self._done += task.stop - task.start
        self._bytes += 0 if summary.entry is None else summary.entry.bytes
        self._reasons += summary.reasons
        self.tick(pool)

    def tick(self, pool: InProcess | WorkerPool) -> None:
        """Report; raises ShardError as soon as the rejects are too many, whatever the records to come are like."""
        records, written, rejects = pool.live()
        for reason, message in rejects:
            self._examples.setdefault(reason, message)
        reasons = self._reasons + Counter(reason for reason, _ in rejects) if rejects else self._reasons
        progress = Progress("shards", self._done + records, self._of_job, self._bytes + written, reasons.total())
        self._on_progress(progress)
        check_reject_fraction(reasons, self._records, self._allowed, self._examples)
