"""One shard against its manifest and its rows of the index, byte by byte: every problem, not only the first.

A shard is checked on its own, so many can be checked at the same time (`data_tools/check_shards.py`).
"""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ilvr_ds.data.images import FACTOR, PATCH, Grid, ImageError, merged_tokens, read_image
from ilvr_ds.data.index import INDEX_NAME, Manifest, ShardEntry, file_sha256
from ilvr_ds.data.sample_format import RawSample, count_tokens, parse_sample
from ilvr_ds.data.tar_members import BLOCK, END, read_header
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.errors import ShardError

ID_DTYPE = np.dtype([("hash", "<u8"), ("shard", "<u4"), ("position", "<u4")])  # position: in the shard, from 0


@dataclass(frozen=True)
class ShardReport:
    """What reading one shard found."""

    problems: list[str]  # each names the file, the key and the field
    samples: int  # whole samples in the tar
    images: int
    ids: np.ndarray  # (readable samples,) ID_DTYPE: 64 bits of each id's hash, to find ids used twice


def check_shard(
    folder: Path, manifest: Manifest, number: int, rows: np.ndarray | None, tokenizer_folder: Path | None
) -> ShardReport:
    """Check shard `number` of the manifest.

    Args:
        rows: (samples of the shard,) INDEX_DTYPE, or None where the index cannot be read.
        tokenizer_folder: count the tokens again; its tokenizer must be the one of the manifest.
    """
    tokenizer = None if tokenizer_folder is None else _load_tokenizer(tokenizer_folder)
    path, entry = folder / manifest.shards[number].name, manifest.shards[number]
    problems: list[str] = []
    ids, samples, images = [], 0, 0
    if not path.is_file():
        return ShardReport([f"{path}: the shard is missing"], 0, 0, np.zeros(0, ID_DTYPE))
    try:
        problems += _check_file(path, entry)
        row_of = _match_rows(path, rows)
        last_key = ""
        for position, (key, offset, blob) in enumerate(walk(path)):
            where = f"{path}: key {key}"
            samples += 1
            if key <= last_key:
                problems.append(f"{where}: comes after key {last_key}; keys must ascend")
            last_key = key
            row = row_of.get(position)
            if row is None and rows is not None:
                problems.append(f"{where}: the sample is not in {INDEX_NAME} (byte {offset} of the shard)")
            places = {"shard": number, "offset": offset, "size": len(blob), "crc32": zlib.crc32(blob)}
            problems += _differences(where, places, row)
            try:
                raw = parse_sample(blob)
            except ShardError as error:
                problems.append(f"{where}: {error}")
                continue
            images += len(raw.images)
            ids.append((id_hash(raw.record.id), number, position))
            problems += _check_sample(where, raw, row, manifest, tokenizer)
        matched = {int(row["offset"]) for row in row_of.values()}
        for row in [] if rows is None else rows:
            if int(row["offset"]) not in matched:
                problems.append(f"{path}: {INDEX_NAME} has a sample at byte {row['offset']}, the tar has none there")
    except (ShardError, OSError) as error:
        problems.append(str(error) if isinstance(error, ShardError) else f"{path}: cannot be read: {error}")
    if samples != entry.samples:
        problems.append(f"{path}: {samples} samples, manifest.json says {entry.samples}")
    return ShardReport(problems, samples, images, np.array(ids, dtype=ID_DTYPE))


def id_hash(record_id: str) -> int:
    """64 bits of a hash of an id. Equal hashes are a suspicion, to be settled by reading the ids."""
    return int.from_bytes(hashlib.blake2b(record_id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def ids_at(path: Path, positions: set[int]) -> dict[int, tuple[str, str]]:
    """position in the shard -> (key, id) of the samples there, which must be readable; reads no further than needed."""
    found = {}
    for position, (key, _, blob) in enumerate(walk(path)):
        if position in positions:
            found[position] = key, parse_sample(blob).record.id
        if len(found) == len(positions):
            break
    return found


def walk(path: Path, content: bool = True) -> Iterator[tuple[str, int, bytes]]:
    """(key, offset, bytes) of every sample of a tar, from the 512-byte headers themselves; without `content` empty
    bytes. Raises ShardError naming the key where the tar is damaged."""
    key, start, sample = None, 0, bytearray()
    size = path.stat().st_size
    with path.open("rb") as file:
        while (header := file.read(BLOCK)) != END:
            position = file.tell() - len(header)
            if len(header) < BLOCK:
                raise ShardError(f"{path}: key {key}: the tar ends at byte {file.tell()} without an end mark")
            try:
                member = read_header(header)
            except ShardError as error:
                raise ShardError(f"{path}: byte {position}, after key {key}: {error}") from error
            member_key = member.name.partition(".")[0]
            if key is not None and member_key != key:
                yield key, start, bytes(sample)
                start, sample = position, bytearray()
            key = member_key
            if file.tell() + member.padded > size:
                raise ShardError(f"{path}: key {key}: member {member.name!r} of {member.size} bytes is cut short")
            if content:
                sample += header + file.read(member.padded)
            else:
                file.seek(member.padded, 1)
        if key is not None:
            yield key, start, bytes(sample)
        if file.read().strip(b"\0"):
            raise ShardError(f"{path}: key {key}: bytes after the end mark")


@functools.lru_cache(maxsize=1)
def _load_tokenizer(folder: Path) -> ChatTokenizer:
    """Once in a process."""
    return ChatTokenizer.from_folder(folder)


def _check_file(path: Path, entry: ShardEntry) -> list[str]:
    size = path.stat().st_size
    if size != entry.bytes:
        return [f"{path}: field 'bytes': the file has {size}, manifest.json says {entry.bytes}"]
    digest = file_sha256(path)
    if digest != entry.sha256:
        return [f"{path}: field 'sha256': the file has {digest}, manifest.json says {entry.sha256}"]
    return []


def _match_rows(path: Path, rows: np.ndarray | None) -> dict[int, np.void]:
    """position of a sample in the tar -> its row. By position where the numbers agree, so that a wrong offset is told
    as such; else by offset, so that a lost sample does not make every later one look wrong."""
    if rows is None:
        return {}
    offsets = []
    try:
        for _, offset, _ in walk(path, content=False):
            offsets.append(offset)
    except ShardError:
        pass  # the reading proper tells it, with the samples before the damage checked
    else:
        if len(offsets) == len(rows):
            return dict(enumerate(rows))
    by_offset = {int(row["offset"]): row for row in rows}
    return {position: by_offset[offset] for position, offset in enumerate(offsets) if offset in by_offset}


def _check_sample(
    where: str, raw: RawSample, row: np.void | None, manifest: Manifest, tokenizer: ChatTokenizer | None
) -> list[str]:
    problems = []
    for role, members in (("input", raw.input_members), ("helper", raw.helper_members)):
        for member in dict.fromkeys(members):
            bounds = manifest.images.bounds(role)
            problems += _check_image(f"{where}: {member}", raw.images[member], raw.grids[member], bounds)
    inputs = [raw.grids[member] for member in raw.input_members]
    helpers = [raw.grids[member] for member in raw.helper_members]
    image_counts = [merged_tokens(grid) for grid in inputs]
    if tokenizer is None:
        helper_tokens = sum(merged_tokens(grid) for grid in helpers)
        counts = {"image_tokens": sum(image_counts), "helper_tokens": helper_tokens, "spans": len(helpers)}
    else:
        prompt, steps = raw.record.prompt, raw.record.steps
        ids, labels = tokenizer.encode_sample(prompt, steps, image_counts, manifest.latent_size)
        counts = count_tokens(ids, labels, (*inputs, *helpers), len(inputs))
    return problems + _differences(where, counts, row)


def _check_image(where: str, content: bytes, grid: Grid, bounds: tuple[int, int]) -> list[str]:
    try:
        image = read_image(content)
    except ImageError as error:
        return [f"{where}: {error}"]
    if image.height % FACTOR or image.width % FACTOR:
        return [f"{where}: {image.width}x{image.height} pixels, sides must be multiples of {FACTOR}"]
    problems = []
    found = (1, image.height // PATCH, image.width // PATCH)
    if found != grid:
        problems.append(f"{where}: field 'grids': the image has {found}, its JSON says {grid}")
    # Rounding both sides can leave a narrow image a little outside its bounds, by one row or column of tokens.
    low, high = bounds
    slack = FACTOR * (image.width + image.height)
    if not low - slack <= image.width * image.height <= high + slack:
        problems.append(f"{where}: {image.width}x{image.height} pixels, the bounds are {low} to {high} pixels")
    return problems


def _differences(where: str, found: dict[str, Any], row: np.void | None) -> list[str]:
    if row is None:
        return []
    return [
        f"{where}: field {name!r}: found {value}, {INDEX_NAME} says {row[name]}"
        for name, value in found.items()
        if value != row[name]
    ]
