"""Records to a folder of shards: survey the input, write each shard on its own, then index and manifest.

    survey(input)              one pass, no image opened: line offsets, who owns each id, hash of the file
    write_shard(..., number)   records [number * S, (number + 1) * S) of the input: one tar, or none if all are refused
    finish(...)                index.npy, rejects.jsonl, manifest.json

Which record goes into which shard depends on its place in the input alone, so shards can be written in any order,
by any number of workers, with the same bytes; a build that stopped keeps the shards it had finished
(`OUT/progress` says which, with their hashes).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from webdataset import TarWriter

from ilvr_ds.contracts import Record
from ilvr_ds.data.assistant_view import AssistantView, assistant_view
from ilvr_ds.data.encode import encode_record
from ilvr_ds.data.formats import FormatName, line_parser
from ilvr_ds.data.formats.jsonl import Line, read_lines
from ilvr_ds.data.images import FACTOR, ImageSettings
from ilvr_ds.data.index import (
    FORMAT_VERSION,
    INDEX_DTYPE,
    MANIFEST_NAME,
    REJECTS_NAME,
    Manifest,
    ShardEntry,
    file_sha256,
    run_checksums,
    write_index,
    write_text,
)
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.errors import ConfigError, RecordError, ShardError

PROGRESS = "progress"  # folder inside OUT: build.json (what is being built) and one JSON per finished shard
COUNTS = INDEX_DTYPE.names[1:]  # the fields of a row but `shard`, which is known when all shards are


@dataclass(frozen=True)
class BuildSettings:
    """Everything that decides the bytes of the shards, but the tokenizer. Raises ConfigError when impossible."""

    source: Path  # a JSONL file
    source_format: FormatName
    image_root: Path
    out: Path
    latent_size: int = 8
    samples_per_shard: int = 1000
    max_tokens: int | None = None
    assistant: AssistantView = "interleaved"
    images: ImageSettings = field(default_factory=ImageSettings)

    def __post_init__(self) -> None:
        if not self.source.is_file():
            raise ConfigError(f"--input {self.source}: no such file")
        if not self.image_root.is_dir():
            raise ConfigError(f"--image-root {self.image_root}: no such folder")
        for name in ("latent_size", "samples_per_shard"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: allowed: 1 or more")
        for role in ("input", "helper"):
            low, high = self.images.bounds(role)
            if not (1 <= low <= high and high >= FACTOR**2):
                raise ConfigError(
                    f"--{role}-min-pixels {low}, --{role}-max-pixels {high}: the smaller must come first, "
                    f"and the larger must be {FACTOR**2} (one token) or more"
                )


@dataclass(frozen=True)
class Survey:
    """What one pass over the input tells, before any image is opened."""

    sha256: str
    offsets: np.ndarray  # (records,) int64: byte where each record's line starts
    numbers: np.ndarray  # (records,) int64: its 1-based line
    duplicates: dict[int, int]  # record -> line of the earlier record that owns its id


@dataclass(frozen=True)
class ShardResult:
    """One finished shard: what its file in `OUT/progress` holds."""

    entry: ShardEntry | None  # None: no record of it was good, there is no tar
    rows: list[list[int]]  # per sample, the fields of COUNTS
    rejects: list[dict[str, Any]]  # lines of rejects.jsonl


def survey(settings: BuildSettings) -> Survey:
    """Read the input once. An id belongs to the first record whose fields are good; a later one is a duplicate."""
    parse = line_parser(settings.source_format)
    owners: dict[str, int] = {}
    offsets, numbers, duplicates = [], [], {}
    for position, line in enumerate(read_lines(settings.source)):
        offsets.append(line.offset)
        numbers.append(line.number)
        try:
            record_id = parse(line).id
        except RecordError:
            continue  # reported when its shard is written
        owner = owners.setdefault(record_id, line.number)
        if owner != line.number:
            duplicates[position] = owner
    digest = file_sha256(settings.source)
    return Survey(digest, np.array(offsets, np.int64), np.array(numbers, np.int64), duplicates)


def shard_count(settings: BuildSettings, plan: Survey) -> int:
    """Number of shards, those that may turn out empty included."""
    return -(-len(plan.offsets) // settings.samples_per_shard)


def build(settings: BuildSettings, tokenizer: ChatTokenizer, on_records: Callable[[int], None]) -> Manifest:
    """Build everything that is not there yet. `on_records(n)` is called when n more records are done.

    Raises ShardError when OUT holds another build.
    """
    plan = survey(settings)
    identity = build_identity(settings, plan, tokenizer)
    claim_folder(settings.out, identity)
    results = []
    for number in range(shard_count(settings, plan)):
        result = finished_shard(settings.out, number)
        if result is None:
            (settings.out / MANIFEST_NAME).unlink(missing_ok=True)  # not finished any more
            result = write_shard(settings, plan, tokenizer, number, on_records)
        else:
            on_records(len(result.rows) + len(result.rejects))
        results.append(result)
    return finish(settings, plan, tokenizer, results)


def build_identity(settings: BuildSettings, plan: Survey, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """What two builds must share for one to keep the other's shards (the image files are taken as unchanged)."""
    return {
        "format_version": FORMAT_VERSION,
        "input": settings.source.name,
        "input sha256": plan.sha256,
        "format": settings.source_format,
        "image root": str(settings.image_root.resolve()),
        "tokenizer": tokenizer.vocabulary.fingerprint,
        "latent size": settings.latent_size,
        "samples per shard": settings.samples_per_shard,
        "max tokens": settings.max_tokens,
        "assistant": settings.assistant,
        "images": {
            **dataclasses.asdict(settings.images),
            "mean": list(settings.images.mean),
            "std": list(settings.images.std),
        },
        "pillow": PIL.__version__,
    }


def claim_folder(out: Path, identity: dict[str, Any]) -> None:
    """Make OUT, or accept it as the same build begun earlier. Raises ShardError naming what differs."""
    path = out / PROGRESS / "build.json"
    if path.is_file():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            changed = [f"{k}: {known.get(k)!r} there, {v!r} now" for k, v in identity.items() if known.get(k) != v]
        except (ValueError, AttributeError) as error:
            raise ShardError(f"{path}: not readable ({error}); remove {out} or give another --out") from error
        if changed:
            raise ShardError(f"{out} holds another build; remove it or give another --out. {'; '.join(changed)}")
    elif (out / MANIFEST_NAME).exists():
        raise ShardError(f"{out} holds finished shards of unknown settings; remove it or give another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(identity, indent=1) + "\n")


def write_shard(
    settings: BuildSettings, plan: Survey, tokenizer: ChatTokenizer, number: int, on_records: Callable[[int], None]
) -> ShardResult:
    """Write shard `number`: the tar under a temporary name, renamed when whole, then its progress file."""
    first = number * settings.samples_per_shard
    positions = range(first, min(first + settings.samples_per_shard, len(plan.offsets)))
    rows, rejects = [], []
    name = f"shard-{number:06d}.tar"
    temporary = settings.out / f"{name}.tmp"
    with temporary.open("wb") as file, settings.source.open("rb") as source:
        # same owner, time and mode everywhere: the bytes depend on the samples alone
        with TarWriter(file, encoder=False, mtime=0, user="ilvr_ds", group="ilvr_ds", mode=0o444) as tar:
            for position in positions:
                source.seek(int(plan.offsets[position]))
                line = Line(settings.source, int(plan.numbers[position]), source.tell(), source.readline())
                try:
                    record = assistant_view(_parse_owner(settings, plan, position, line), settings.assistant)
                    sample = encode_record(
                        record,
                        image_root=settings.image_root,
                        tokenizer=tokenizer,
                        latent_size=settings.latent_size,
                        images=settings.images,
                        max_tokens=settings.max_tokens,
                    )
                except RecordError as error:
                    rejects.append(_reject(error))
                else:
                    start = tar.tarstream.offset
                    tar.write({"__key__": f"{position:09d}", **sample.members})
                    counts = {**sample.counts, "offset": start, "size": tar.tarstream.offset - start, "crc32": 0}
                    rows.append([int(counts[key]) for key in COUNTS])
                on_records(1)
        file.flush()
        os.fsync(file.fileno())
    offset, size, crc32 = map(COUNTS.index, ("offset", "size", "crc32"))
    for row, checksum in zip(rows, run_checksums(temporary, [(r[offset], r[size]) for r in rows]), strict=True):
        row[crc32] = checksum
    entry = None
    if rows:
        entry = ShardEntry(name, temporary.stat().st_size, file_sha256(temporary), len(rows))
        os.replace(temporary, settings.out / name)
    else:
        temporary.unlink()
        (settings.out / name).unlink(missing_ok=True)
    result = ShardResult(entry, rows, rejects)
    write_text(settings.out / PROGRESS / f"shard-{number:06d}.json", json.dumps(dataclasses.asdict(result)) + "\n")
    return result


def finished_shard(out: Path, number: int) -> ShardResult | None:
    """The shard as an earlier run left it; None if it is not there, or its bytes are not what was written."""
    try:
        tree = json.loads((out / PROGRESS / f"shard-{number:06d}.json").read_text(encoding="utf-8"))
        entry = None if tree["entry"] is None else ShardEntry(**tree["entry"])
        result = ShardResult(entry, tree["rows"], tree["rejects"])
        if entry is not None and file_sha256(out / entry.name) != entry.sha256:
            return None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return result


def finish(settings: BuildSettings, plan: Survey, tokenizer: ChatTokenizer, results: list[ShardResult]) -> Manifest:
    """Write rejects.jsonl, index.npy and, last, manifest.json. Raises ConfigError if records were lost."""
    entries = [result.entry for result in results if result.entry is not None]
    rows = [row for result in results for row in result.rows]
    shard_of_row = np.repeat(np.arange(len(entries)), [entry.samples for entry in entries])
    index = np.zeros(len(rows), dtype=INDEX_DTYPE)
    index["shard"] = shard_of_row
    for column, name in enumerate(COUNTS):
        index[name] = [row[column] for row in rows]
    rejects = [reject for result in results for reject in result.rejects]
    if len(rows) + len(rejects) != len(plan.offsets):
        raise ShardError(
            f"{settings.out}: {len(rows)} built and {len(rejects)} rejected of {len(plan.offsets)} records: "
            f"did {settings.source} change during the build? Remove {settings.out} and build again"
        )
    lines = [json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects]
    write_text(settings.out / REJECTS_NAME, "".join(lines))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        latent_size=settings.latent_size,
        tokenizer_fingerprint=tokenizer.vocabulary.fingerprint,
        images=settings.images,
        shards=tuple(entries),
        index_sha256=write_index(settings.out, index),
        built=len(rows),
        rejected=len(rejects),
        reject_reasons=dict(sorted(Counter(reject["reason"] for reject in rejects).items())),
        source=settings.source.name,
        source_sha256=plan.sha256,
        source_format=settings.source_format,
        assistant=settings.assistant,
    )
    write_text(settings.out / MANIFEST_NAME, manifest.to_json())
    return manifest


def _parse_owner(settings: BuildSettings, plan: Survey, position: int, line: Line) -> Record:
    record = line_parser(settings.source_format)(line)
    if position in plan.duplicates:
        message = f"line {plan.duplicates[position]} already has this id; ids must differ"
        raise RecordError("duplicate_id", message, origin=line.origin, record_id=record.id, field="id")
    return record


def _reject(error: RecordError) -> dict[str, Any]:
    return {
        "origin": error.origin,
        "id": error.record_id,
        "field": error.field,
        "reason": error.reason,
        "message": error.message,
    }
