"""Read a folder of shards again, byte by byte, and list everything that is not as written down.

    python -m data_tools.check_shards DIR [--tokenizer MODEL_FOLDER] [--workers 8]

Checked: hash and size of every file; every tar header, the place, size and checksum of every sample against the
index; every JSON, image and grid, and the pixel bounds; ids and keys used once; image and span counts; with --tokenizer
also the token counts; the rejects. Prints a summary and exits 0; or prints a line for every problem, with the file,
the key and the field, and exits 1. --workers processes read one shard each.
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

from ilvr_ds.data.check import ID_DTYPE, ShardReport, check_shard, ids_at
from ilvr_ds.data.each_shard import each_shard
from ilvr_ds.data.index import INDEX_NAME, REJECTS_NAME, Manifest, file_sha256, read_index, read_manifest
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.errors import IlvrError, ShardError


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_tools.check_shards", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder written by build_shards")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder with tokenizer.json: count tokens again")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help=f"processes (default: {cores}, cores)")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers {options.workers}: 1 or more")
    try:
        problems, summary = check(options.folder, options.tokenizer, options.workers)
    except IlvrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        print(f"{options.folder}: {len(problems)} problem{'s' if len(problems) > 1 else ''}", file=sys.stderr)
        return 1
    print(summary)
    return 0


def check(folder: Path, tokenizer_folder: Path | None, workers: int = 1) -> tuple[list[str], str]:
    """Check a whole folder: (problems, a summary). Raises ShardError when there is no manifest to check against, and
    ConfigError when `tokenizer_folder` holds no tokenizer."""
    manifest = read_manifest(folder)
    problems = _check_listing(folder, manifest)
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
        for number, report in _check_all(folder, manifest, index, tokenizer_folder, workers):
            reports[number] = report
            bar.update(report.samples)
            bar.set_postfix_str(f"{sum(len(r.problems) for r in reports.values())} problems", refresh=False)
    problems += [problem for number in sorted(reports) for problem in reports[number].problems]
    problems += _ids_used_twice(folder, manifest, [reports[number].ids for number in sorted(reports)])
    samples = sum(report.samples for report in reports.values())
    if index is not None and samples != len(index):
        problems.append(f"{folder / INDEX_NAME}: {len(index)} rows, the tars hold {samples} samples")
    problems += _check_rejects(folder, manifest)
    images = sum(report.images for report in reports.values())
    counted = "tokens counted again" if tokenizer_folder is not None else "tokens not counted again (no --tokenizer)"
    return problems, f"{folder}: clean. {samples} samples, {images} images, {len(manifest.shards)} shards, {counted}"


def _check_all(
    folder: Path, manifest: Manifest, index: np.ndarray | None, tokenizer_folder: Path | None, workers: int
) -> Iterator[tuple[int, ShardReport]]:
    """(number, report) of every shard, as they get ready."""
    ends = np.cumsum([entry.samples for entry in manifest.shards])

    def arguments(number: int) -> tuple:
        entry = manifest.shards[number]
        rows = None if index is None else np.array(index[ends[number] - entry.samples : ends[number]])
        return folder, manifest, number, rows, tokenizer_folder

    yield from each_shard([f"{folder / entry.name}" for entry in manifest.shards], check_shard, arguments, workers)


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


def _check_listing(folder: Path, manifest: Manifest) -> list[str]:
    names = [entry.name for entry in manifest.shards]
    problems = [
        f"{path}: the shard is not in manifest.json; remove it"
        for path in sorted(folder.glob("*.tar"))
        if path.name not in set(names)
    ]
    if len(set(names)) != len(names):
        problems.append(f"{folder}/manifest.json: field 'shards': a name occurs twice")
    return problems


def _ids_used_twice(folder: Path, manifest: Manifest, parts: list[np.ndarray]) -> list[str]:
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
        path = folder / manifest.shards[shard].name
        for _, (key, record_id) in sorted(ids_at(path, positions[shard]).items()):
            where = f"{path}: key {key}"
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
