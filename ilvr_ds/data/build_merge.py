"""Finished shards to a finished folder: rejects.jsonl, index.npy and, last, manifest.json.

    finish(out, identity, summaries)     what a build on one machine ends with
    merge(out, parts, ...)               what several jobs end with: the shards of OUT and of other folders together

Nothing here holds more than one shard's rows, whatever the number of samples.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ilvr_ds.data.build_settings import (
    IDENTITY,
    PROGRESS,
    claim_folder,
    image_settings,
    prepare_folder,
    read_identity,
    require_identity,
    shard_count,
)
from ilvr_ds.data.build_worker import (
    COUNTS,
    ShardResult,
    ShardSummary,
    finished_shard,
    progress_file,
    shard_name,
    summarise,
)
from ilvr_ds.data.index import FORMAT_VERSION, INDEX_DTYPE, INDEX_NAME, MANIFEST_NAME, REJECTS_NAME, Manifest
from ilvr_ds.data.whole_file import TEMPORARY, cannot_write, whole_file, write_whole
from ilvr_ds.errors import ShardError

# What a file system says that has no hard links between these two places; the file is then copied.
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK}


def finish(out: Path, identity: dict[str, Any], summaries: Sequence[ShardSummary]) -> Manifest:
    """Write index, rejects and manifest of a folder whose shards are all there. `summaries`: of every shard, any order.

    Raises ShardError if records were lost, or when a file cannot be written.
    """
    summaries = sorted(summaries, key=lambda summary: summary.number)
    samples = sum(summary.samples for summary in summaries)
    reasons = sum((summary.reasons for summary in summaries), Counter())
    if samples + reasons.total() != identity["records"]:
        raise ShardError(
            f"{out}: {samples} built and {reasons.total()} rejected of {identity['records']} records: did "
            f"{identity['input']} change during the build? Remove {out} and build again"
        )
    with whole_file(out / REJECTS_NAME) as rejects, whole_file(out / INDEX_NAME) as index:
        digest = _write_rows(index, rejects, samples, _results(out, summaries))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        latent_size=identity["latent size"],
        tokenizer_fingerprint=identity["tokenizer"],
        images=image_settings(identity),
        shards=tuple(summary.entry for summary in summaries if summary.entry is not None),
        index_sha256=digest,
        built=samples,
        rejected=reasons.total(),
        reject_reasons=dict(sorted(reasons.items())),
        source=identity["input"],
        source_sha256=identity["input sha256"],
        source_format=identity["format"],
        assistant=identity["assistant"],
    )
    write_whole(out / MANIFEST_NAME, manifest.to_json().encode())
    return manifest


def merge(
    out: Path,
    parts: Sequence[Path],
    workers: int,
    on_progress: Callable[[int, int], None],
    check_rejects: Callable[[Counter[str], int], None],
) -> Manifest:
    """Finish a folder that several jobs built: all into OUT, or each into a folder of its own (`parts`).

    Every shard's bytes are read again (by `workers` threads) and must be what its job wrote. Shards of `parts` get a
    second name in OUT (a hard link), or are copied where the file system has no links; the parts are left as they are.
    `on_progress(done, shards)`; `check_rejects(reasons, records)` may raise before anything is finished.
    Raises ShardError naming shards that are missing, are in two parts, or differ, and settings or inputs that differ.
    """
    begun = (out / PROGRESS / IDENTITY).is_file()
    folders = [out, *parts] if begun or not parts else list(parts)
    if len({folder.resolve() for folder in folders}) != len(folders):
        raise ShardError(f"a folder is named twice: {', '.join(map(str, folders))}; name OUT and every part once")
    identity = read_identity(folders[0])
    for folder in folders[1:]:
        require_identity(folder, identity)
    total = shard_count(identity["records"], identity["samples per shard"])
    for folder in folders:
        _refuse_strangers(folder, total)
    prepare_folder(out)
    claim_folder(out, identity)
    with ThreadPoolExecutor(workers) as threads:
        found = list(_counted(threads.map(lambda n: _holders(folders, n), range(total)), total, on_progress))
    _require_once(out, found)
    summaries = [next(iter(holders.values())) for holders in found]
    check_rejects(sum((summary.reasons for summary in summaries), Counter()), identity["records"])
    for number, holders in enumerate(found):
        if out not in holders:
            _take_over(out, next(iter(holders)), number)
    remove_temporaries(out, None)
    return finish(out, identity, summaries)


def remove_temporaries(out: Path, shards: Iterable[int] | None) -> None:
    """Delete what a killed build left half-written: of these shards alone (other jobs may be at theirs); None: all.

    A second process at work on the same shards loses its unfinished files and ends with an error; its finished ones,
    and ours, hold the same bytes.
    """
    wanted = None if shards is None else set(shards)
    try:
        for path in [*out.glob(f"*{TEMPORARY}"), *(out / PROGRESS).glob(f"*{TEMPORARY}")]:
            number = path.name.partition(".")[0].removeprefix("shard-")
            if wanted is None or (number.isdecimal() and int(number) in wanted):
                path.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from error


def _results(out: Path, summaries: Sequence[ShardSummary]) -> Iterator[ShardResult]:
    """The kept results one by one; their tars were checked when the summaries were made."""
    for summary in summaries:
        path = progress_file(out, summary.number)
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            result = ShardResult(summary.entry, tree["rows"], tree["rejects"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ShardError(f"{path}: not readable any more ({error!r}); run the same build again") from error
        if (len(result.rows), len(result.rejects)) != (summary.samples, summary.reasons.total()):
            raise ShardError(f"{path}: changed during the build; run the same build again")
        yield result


def _write_rows(index: BinaryIO, rejects: BinaryIO, samples: int, results: Iterable[ShardResult]) -> str:
    """Append every result's rows and rejects; returns the index's sha256. The bytes of `np.save`, a shard at a time."""
    header = {"descr": np.lib.format.dtype_to_descr(INDEX_DTYPE), "fortran_order": False, "shape": (samples,)}
    np.lib.format.write_array_header_1_0(index, header)
    index.flush()
    digest = hashlib.sha256(Path(index.name).read_bytes())
    shard = 0
    for result in results:
        rows = np.zeros(len(result.rows), dtype=INDEX_DTYPE)
        rows["shard"] = shard
        for column, name in enumerate(COUNTS):
            rows[name] = [row[column] for row in result.rows]
        shard += result.entry is not None
        index.write(rows.tobytes())
        digest.update(rows.tobytes())
        for reject in result.rejects:
            rejects.write((json.dumps(reject, ensure_ascii=False) + "\n").encode())
    return digest.hexdigest()


def _holders(folders: Sequence[Path], number: int) -> dict[Path, ShardSummary]:
    """The folders that hold shard `number`, whole, and what they say of it."""
    results = {folder: finished_shard(folder, number) for folder in folders}
    return {folder: summarise(number, result) for folder, result in results.items() if result is not None}


def _counted(items: Iterable[Any], total: int, on_progress: Callable[[int, int], None]) -> Iterator[Any]:
    for done, item in enumerate(items, start=1):
        on_progress(done, total)
        yield item


def _require_once(out: Path, found: Sequence[dict[Path, ShardSummary]]) -> None:
    """Every shard is there, in OUT and at most one part, and the same in both."""
    missing = [number for number, holders in enumerate(found) if not holders]
    if missing:
        some = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
        raise ShardError(
            f"{len(missing)} of {len(found)} shards are missing or damaged: {some}; shard n belongs to the job with "
            f"--job-index n mod --job-count: run these jobs again, then merge again"
        )
    for number, holders in enumerate(found):
        parts = [folder for folder in holders if folder != out]
        if len(parts) > 1:
            raise ShardError(
                f"shard {number} is in both {parts[0]} and {parts[1]}: were two jobs given the same --job-index, or "
                f"different --job-count? Leave one of the folders out"
            )
        if len({result.entry for result in holders.values()}) > 1:
            raise ShardError(
                f"shard {number} in {parts[0]} is not the one in {out}: did images change between the jobs?"
            )


def _refuse_strangers(folder: Path, total: int) -> None:
    """No shard beyond the last: it would come from another input."""
    for path in (folder / PROGRESS).glob("shard-*.json"):
        number = path.stem.removeprefix("shard-")
        if not number.isdecimal() or int(number) >= total:
            raise ShardError(f"{path}: no such shard in this build of {total}; remove {folder} and build it again")


def _take_over(out: Path, part: Path, number: int) -> None:
    """Shard `number` of a part into OUT: first the tar, then, as a sign that it is whole, its progress file."""
    name = shard_name(number)
    if (part / name).exists():
        temporary = out / f"{name}.{os.getpid()}{TEMPORARY}"
        try:
            try:
                temporary.unlink(missing_ok=True)
                os.link(part / name, temporary)
            except OSError as error:
                if error.errno not in _NO_LINK:
                    raise
                shutil.copyfile(part / name, temporary)
            os.replace(temporary, out / name)
        except OSError as error:
            raise cannot_write(out / name, error) from error
        finally:
            temporary.unlink(missing_ok=True)
    write_whole(progress_file(out, number), progress_file(part, number).read_bytes())
