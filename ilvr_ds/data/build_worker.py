"""What a build worker does: survey a range of records, or write one shard. No process is started here."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator, MutableSequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ilvr_ds.contracts import Record
from ilvr_ds.data.assistant_view import assistant_view
from ilvr_ds.data.build_settings import PROGRESS, BuildSettings
from ilvr_ds.data.build_survey import ID_HASH, id_hash
from ilvr_ds.data.encode import encode_record
from ilvr_ds.data.formats.source import RecordSource
from ilvr_ds.data.index import INDEX_DTYPE, MANIFEST_NAME, ShardEntry, file_sha256
from ilvr_ds.data.kept_memory import keep_freed_memory
from ilvr_ds.data.shard_writer import ShardWriter
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.data.whole_file import cannot_write, whole_file, write_whole
from ilvr_ds.errors import RecordError, ShardError

COUNTS = INDEX_DTYPE.names[1:]  # the fields of a row but `shard`, which is known when all shards are


@dataclass(frozen=True)
class Work:
    """What every task of a build needs. Picklable."""

    settings: BuildSettings
    source: RecordSource
    tokenizer: ChatTokenizer


@dataclass(frozen=True)
class Task:
    """Records start..stop-1: to be surveyed, or to become shard `number`."""

    start: int
    stop: int
    number: int | None = None  # None: survey
    duplicates: dict[int, int] = field(default_factory=dict)  # place -> place of the owner of its id
    crashed: dict[int, str] = field(default_factory=dict)  # place -> how it ended the workers that tried it


@dataclass(frozen=True)
class ShardResult:
    """One finished shard: what its file in `OUT/progress` holds."""

    entry: ShardEntry | None  # None: no record of it was good, there is no tar
    rows: list[list[int]]  # per sample, the fields of COUNTS
    rejects: list[dict[str, Any]]  # lines of rejects.jsonl


@dataclass(frozen=True)
class ShardSummary:
    """What the one who waits keeps of a finished shard: nothing that grows with its records."""

    number: int
    entry: ShardEntry | None
    reasons: Counter[str]  # of its rejects

    @property
    def samples(self) -> int:
        return 0 if self.entry is None else self.entry.samples


@dataclass(frozen=True)
class Watch:
    """Where a worker is, seen from outside while it works."""

    numbers: MutableSequence[int]  # [place of the record at hand, records done, bytes written] of the task
    on_reject: Callable[[str, str], None]  # reason, message
    on_record: Callable[[], None] = lambda: None  # called when one more is done

    def begin(self, task: Task) -> None:
        """A task is taken up: nothing of it is done."""
        self.numbers[0], self.numbers[1], self.numbers[2] = task.start, 0, 0

    def record_done(self) -> None:
        """One more record is surveyed, built or rejected."""
        self.numbers[1] += 1
        self.on_record()


def perform(work: Work, task: Task, watch: Watch) -> bytes | ShardSummary:
    """Do a task. Survey: 16 bytes per record, see `build_survey`. Shard: written, unless it is finished already.

    Raises ShardError when a file cannot be written or the input cannot be read, ConfigError when the input changed.
    """
    watch.begin(task)
    if task.number is None:
        return _survey(work, task, watch)
    result = finished_shard(work.settings.out, task.number)
    if result is None:
        result = _write_shard(work, task, watch)
    return summarise(task.number, result)


def summarise(number: int, result: ShardResult) -> ShardSummary:
    """The summary of shard `number`."""
    return ShardSummary(number, result.entry, Counter(reject["reason"] for reject in result.rejects))


def shard_name(number: int) -> str:
    """Name of a shard's tar."""
    return f"shard-{number:06d}.tar"


def progress_file(out: Path, number: int) -> Path:
    """Where the result of a finished shard is kept."""
    return out / PROGRESS / f"shard-{number:06d}.json"


def finished_shard(out: Path, number: int) -> ShardResult | None:
    """The shard as an earlier run left it; None if it is not there, or its bytes are not what was written."""
    try:
        tree = json.loads(progress_file(out, number).read_text(encoding="utf-8"))
        entry = None if tree["entry"] is None else ShardEntry(**tree["entry"])
        result = ShardResult(entry, tree["rows"], tree["rejects"])
        if entry is not None and file_sha256(out / entry.name) != entry.sha256:
            return None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return result


def _survey(work: Work, task: Task, watch: Watch) -> bytes:
    hashes = []
    for _, item in _records(work, task, watch, work.source.ids):
        hashes.append(id_hash(item) if isinstance(item, str) else bytes(ID_HASH.itemsize))
        watch.record_done()
    return b"".join(hashes)


def _write_shard(work: Work, task: Task, watch: Watch) -> ShardResult:
    """The tar, then its progress file, each under a temporary name and renamed when whole."""
    out, name = work.settings.out, shard_name(task.number)
    keep_freed_memory()
    try:
        (out / MANIFEST_NAME).unlink(missing_ok=True)  # the folder is not finished any more
    except OSError as error:
        raise cannot_write(out / MANIFEST_NAME, error) from error
    with whole_file(out / name) as file:
        with ShardWriter(file) as shard:
            rows, rejects = _write_samples(work, task, watch, shard)
        entry = ShardEntry(name, shard.bytes, shard.sha256, len(rows)) if rows else None
    if entry is None:
        (out / name).unlink()
    tree = {"entry": None if entry is None else dataclasses.asdict(entry), "rows": rows, "rejects": rejects}
    write_whole(progress_file(out, task.number), (json.dumps(tree) + "\n").encode())
    return ShardResult(entry, rows, rejects)


def _write_samples(
    work: Work, task: Task, watch: Watch, shard: ShardWriter
) -> tuple[list[list[int]], list[dict[str, Any]]]:
    rows, rejects = [], []
    for place, item in _records(work, task, watch, work.source.read):
        try:
            members, counts = _encode(work, task, place, item)
        except RecordError as error:
            rejects.append(_reject(error))
            watch.on_reject(error.reason, str(error))
        else:
            offset, size, crc32 = shard.write(f"{place:09d}", members)
            row = {**counts, "offset": offset, "size": size, "crc32": crc32}
            rows.append([int(row[key]) for key in COUNTS])
            watch.numbers[2] = shard.bytes
        watch.record_done()
    return rows, rejects


def _encode(work: Work, task: Task, place: int, item: Record | RecordError) -> tuple[dict[str, bytes], dict[str, int]]:
    """Members and counts of one record. Raises RecordError: `item` itself, duplicate_id, and what encoding raises."""
    if isinstance(item, RecordError):
        raise item
    if place in task.duplicates:
        owner = task.duplicates[place]
        message = f"record {owner + 1} of the input, {work.source.origin(owner)}, already has this id; ids must differ"
        raise RecordError("duplicate_id", message, origin=item.origin, record_id=item.id, field="id")
    sample = encode_record(
        assistant_view(item, work.settings.assistant),
        image_root=work.settings.image_root,
        tokenizer=work.tokenizer,
        latent_size=work.settings.latent_size,
        images=work.settings.images,
        max_tokens=work.settings.max_tokens,
    )
    return sample.members, sample.counts


def _records(
    work: Work, task: Task, watch: Watch, read: Callable[[int, int], Iterator[Any]]
) -> Iterator[tuple[int, Any]]:
    """(place, item) of the task's records: what `read` gives, or the RecordError of one that crashes its reader.

    `watch` names a place before its record is read: whatever ends the worker there is known by its place.
    """
    start = task.start
    for stop in [*sorted(task.crashed), task.stop]:
        try:
            items = read(start, stop)
            for place in range(start, stop):
                watch.numbers[0] = place
                yield place, next(items)
        except OSError as error:
            at = work.source.origin(watch.numbers[0])
            raise ShardError(f"--input {at}: cannot read: {error}; is it still there?") from error
        if stop in task.crashed:
            message = (
                f"reading or encoding this record ended the process that did it, twice ({task.crashed[stop]}); "
                f"its images may break the image library: look at them, or leave the record out"
            )
            yield stop, RecordError("worker_died", message, origin=work.source.origin(stop))
        start = stop + 1


def _reject(error: RecordError) -> dict[str, Any]:
    return {
        "origin": error.origin,
        "id": error.record_id,
        "field": error.field,
        "reason": error.reason,
        "message": error.message,
    }
