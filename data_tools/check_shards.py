"""Read a folder of shards again, byte by byte, and list everything that is not as written down.

    python -m data_tools.check_shards DIR [--tokenizer MODEL_FOLDER] [--workers 8]

Checked: hash and size of every file; every tar header, the place, size and checksum of every sample against the
index; every JSON, image and grid, and the pixel bounds; ids and keys used once; image and span counts; with --tokenizer
also the token counts; the rejects. Prints a summary and exits 0; or prints a line for every problem, with the file,
the key and the field, and exits 1. --workers processes read one shard each.

DIR may be a URL (https://..., s3://...) with --cache-dir: every shard is fetched, checked and removed. What else lies
behind the URL cannot be listed and is not looked at.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ilvr_ds.data.check import ID_DTYPE, ShardReport, ids_at
from ilvr_ds.data.check_place import LocalFolder, RemoteFolder
from ilvr_ds.data.each_shard import each_shard
from ilvr_ds.data.index import INDEX_NAME, REJECTS_NAME, Manifest, file_sha256, read_index, read_manifest
from ilvr_ds.data.remote_files import is_url
from ilvr_ds.data.remote_folder import RemoteSettings
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.errors import IlvrError, ShardError

Place = LocalFolder | RemoteFolder


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_tools.check_shards", description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="DIR", help="folder written by build_shards, or its URL")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder with tokenizer.json: count tokens again")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help=f"processes (default: {cores}, cores)")
    parser.add_argument("--cache-dir", metavar="DIR", help="for a URL: on a local disk, for a shard per worker")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers {options.workers}: 1 or more")
    try:
        if is_url(options.folder):
            place = RemoteFolder.fetch(options.folder, RemoteSettings(options.cache_dir))
        else:
            place = LocalFolder(Path(options.folder))
        problems, summary = check(place, options.tokenizer, options.workers)
    except IlvrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        print(f"{place.name}: {len(problems)} problem{'s' if len(problems) > 1 else ''}", file=sys.stderr)
        return 1
    print(summary)
    return 0


def check(place: Place, tokenizer_folder: Path | None, workers: int = 1) -> tuple[list[str], str]:
    """Check a whole folder: (problems, a summary). Raises ShardError when there is no manifest to check against, and
    ConfigError when `tokenizer_folder` holds no tokenizer."""
    folder = place.folder
    manifest = read_manifest(folder)
    problems = _check_listing(place, manifest)
    if tokenizer_folder is not None:
        fingerprint = ChatTokenizer.from_folder(tokenizer_folder).vocabulary.fingerprint
        if fingerprint != manifest.tokenizer_fingerprint:
            problems.append(
                f"{folder}/manifest.json: field 'tokenizer_fingerprint': the shards were counted with "
                f"{manifest.tokenizer_fingerprint[:16]}, --tokenizer is {fingerprint[:16]}; tokens not counted again"
            )
            tokenizer_folder = None
    index = _read_index(folder, manifest, problems)
    reports: dict[int, ShardReport] = {}
    with tqdm(total=manifest.built, unit="sample", desc="check_shards", file=sys.stderr) as bar:
        for number, report in _check_all(place, manifest, index, tokenizer_folder, workers):
            reports[number] = report
            bar.update(report.samples)
            bar.set_postfix_str(f"{sum(len(r.problems) for r in reports.values())} problems", refresh=False)
    problems += [problem for number in sorted(reports) for problem in reports[number].problems]
    problems += _ids_used_twice(place, manifest, [reports[number].ids for number in sorted(reports)])
    samples = sum(report.samples for report in reports.values())
    if index is not None and samples != len(index):
        problems.append(f"{folder / INDEX_NAME}: {len(index)} rows, the tars hold {samples} samples")
    problems += _check_rejects(folder, manifest)
    images = sum(report.images for report in reports.values())
    counted = "tokens counted again" if tokenizer_folder is not None else "tokens not counted again (no --tokenizer)"
    problems = [problem.replace(f"{folder}/", f"{place.name}/") for problem in problems]
    shards = len(manifest.shards)
    return problems, f"{place.name}: clean. {samples} samples, {images} images, {shards} shards, {counted}"


def _check_all(
    place: Place, manifest: Manifest, index: np.ndarray | None, tokenizer_folder: Path | None, workers: int
) -> Iterator[tuple[int, ShardReport]]:
    """(number, report) of every shard, as they get ready."""
    ends = np.cumsum([entry.samples for entry in manifest.shards])

    def arguments(number: int) -> tuple:
        entry = manifest.shards[number]
        rows = None if index is None else np.array(index[ends[number] - entry.samples : ends[number]])
        return place, manifest, number, rows, tokenizer_folder

    names = [f"{place.name}/{entry.name}" for entry in manifest.shards]
    yield from each_shard(names, _check_one, arguments, workers)


def _check_one(place: Place, *arguments) -> ShardReport:
    return place.check_shard(*arguments)


def _read_index(folder: Path, manifest: Manifest, problems: list[str]) -> np.ndarray | None:
    """The index; None, and the reason among the problems, where it cannot be used: the tars are checked anyway."""
    try:
        index = read_index(folder, manifest)
    except ShardError as error:
        problems.append(str(error))
        return None
    digest = file_sha256(folder / INDEX_NAME)
    if digest != manifest.index_sha256:
        problems.append(f"{folder / INDEX_NAME}: sha256 is {digest}, manifest.json says {manifest.index_sha256}")
    return index


def _check_listing(place: Place, manifest: Manifest) -> list[str]:
    problems = [f"{path}: the shard is not in manifest.json; remove it" for path in place.surplus(manifest)]
    if len({entry.name for entry in manifest.shards}) != len(manifest.shards):
        problems.append(f"{place.folder}/manifest.json: field 'shards': a name occurs twice")
    return problems


def _ids_used_twice(place: Place, manifest: Manifest, parts: list[np.ndarray]) -> list[str]:
    """Ids of more than one sample, over all shards. 16 bytes a sample, whatever the length of its id."""
    ids = np.concatenate([*parts, np.zeros(0, ID_DTYPE)])
    ids = ids[np.argsort(ids["hash"], kind="stable")]
    same = ids["hash"][1:] == ids["hash"][:-1]
    suspects = ids[np.append(same, False) | np.append(False, same)]
    positions = defaultdict(set)
    for suspect in suspects:
        positions[int(suspect["shard"])].add(int(suspect["position"]))
    problems, owner = [], {}
    for shard in sorted(positions):
        entry = manifest.shards[shard]
        with place.shard(entry) as path:
            found = ids_at(path, positions[shard])
        for _, (key, record_id) in sorted(found.items()):
            where = f"{place.folder / entry.name}: key {key}"
            if record_id in owner:
                problems.append(f"{where}: field 'id': {record_id!r} is also the id of {owner[record_id]}")
            owner.setdefault(record_id, where)
    return problems


def _check_rejects(folder: Path, manifest: Manifest) -> list[str]:
    path = folder / REJECTS_NAME
    reasons: Counter[str] = Counter()
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                reasons[json.loads(line)["reason"]] += 1
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        return [f"{path}: cannot be read: {error!r}"]
    if reasons.total() != manifest.rejected:
        return [f"{path}: field 'rejected': found {reasons.total()}, manifest.json says {manifest.rejected}"]
    if reasons != manifest.reject_reasons:
        return [f"{path}: field 'reason': {dict(reasons)}, manifest.json says {manifest.reject_reasons}"]
    return []


if __name__ == "__main__":
    sys.exit(main())
