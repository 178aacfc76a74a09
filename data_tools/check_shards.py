"""Read a folder of shards again, byte by byte, and stop at the first thing that is not as written down.

    python -m data_tools.check_shards DIR [--tokenizer MODEL_FOLDER]

Checked: hash and size of every file; every tar header, the place and size of every sample against the index; every
JSON, image and grid, and the pixel bounds; ids and keys used once; image and span counts; with --tokenizer also the
token counts; the rejects. Prints a summary and exits 0, or prints the file, the key and the field and exits 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tarfile import BLOCKSIZE, NUL, TarError, TarInfo

import numpy as np
from tqdm import tqdm

from ilvr_ds.data.images import FACTOR, PATCH, ImageError, merged_tokens, read_image
from ilvr_ds.data.index import INDEX_NAME, REJECTS_NAME, Manifest, ShardEntry, file_sha256, read_index, read_manifest
from ilvr_ds.data.shards import RawSample, count_tokens, parse_sample
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.errors import IlvrError, ShardError


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_tools.check_shards", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder written by build_shards")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder with tokenizer.json: count tokens again")
    options = parser.parse_args(arguments)
    try:
        tokenizer = None if options.tokenizer is None else ChatTokenizer.from_folder(options.tokenizer)
        print(check(options.folder, tokenizer))
    except IlvrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def check(folder: Path, tokenizer: ChatTokenizer | None) -> str:
    """Check a whole folder and return a summary. Raises ShardError at the first lie."""
    manifest = read_manifest(folder)
    index = read_index(folder, manifest)
    if tokenizer is not None and tokenizer.vocabulary.fingerprint != manifest.tokenizer_fingerprint:
        raise ShardError(
            f"{folder}/manifest.json: field 'tokenizer_fingerprint': the shards were counted with "
            f"{manifest.tokenizer_fingerprint[:16]}, --tokenizer is {tokenizer.vocabulary.fingerprint[:16]}"
        )
    _check_listing(folder, manifest)
    ids: dict[str, str] = {}
    images = 0
    row = 0
    with tqdm(total=len(index), unit="sample", desc="check_shards", file=sys.stderr) as bar:
        for number, entry in enumerate(manifest.shards):
            path = folder / entry.name
            _check_file(path, entry)
            last_key = ""
            first_row = row
            for key, offset, blob in _walk(path):
                where = f"{path}: key {key}"
                if key <= last_key:
                    raise ShardError(f"{where}: comes after key {last_key}; keys must ascend")
                last_key = key
                if row >= len(index):
                    raise ShardError(f"{where}: the sample is not in {INDEX_NAME}, which has {len(index)} rows")
                places = {"shard": number, "offset": offset, "size": len(blob), "crc32": zlib.crc32(blob)}
                for name, value in places.items():
                    _compare(where, name, value, index[row][name])
                raw = _parse(where, blob)
                if raw.record.id in ids:
                    raise ShardError(f"{where}: field 'id': {raw.record.id!r} is also the id of {ids[raw.record.id]}")
                ids[raw.record.id] = where
                _check_sample(where, raw, index[row], manifest, tokenizer)
                images += len(raw.images)
                row += 1
                bar.update()
            if row - first_row != entry.samples:
                raise ShardError(f"{path}: {row - first_row} samples, manifest.json says {entry.samples}")
    if row != len(index):
        raise ShardError(f"{folder / INDEX_NAME}: {len(index)} rows, the tars hold {row} samples")
    _check_rejects(folder, manifest)
    counted = "tokens counted again" if tokenizer is not None else "tokens not counted again (no --tokenizer)"
    return f"{folder}: clean. {row} samples, {images} images, {len(manifest.shards)} shards, {counted}"


def _check_listing(folder: Path, manifest: Manifest) -> None:
    names = [entry.name for entry in manifest.shards]
    for path in sorted(folder.glob("*.tar")):
        if path.name not in names:
            raise ShardError(f"{path}: the shard is not in manifest.json; remove it")
    if len(set(names)) != len(names):
        raise ShardError(f"{folder}/manifest.json: field 'shards': a name occurs twice")


def _check_file(path: Path, entry: ShardEntry) -> None:
    if not path.is_file():
        raise ShardError(f"{path}: the shard is missing")
    size = path.stat().st_size
    if size != entry.bytes:
        raise ShardError(f"{path}: field 'bytes': the file has {size}, manifest.json says {entry.bytes}")
    digest = file_sha256(path)
    if digest != entry.sha256:
        raise ShardError(f"{path}: field 'sha256': the file has {digest}, manifest.json says {entry.sha256}")


def _walk(path: Path) -> Iterator[tuple[str, int, bytes]]:
    """(key, offset, bytes) of every sample, from the 512-byte headers themselves."""
    key, start, sample = None, 0, bytearray()
    with path.open("rb") as file:
        while (header := file.read(BLOCKSIZE)) != NUL * BLOCKSIZE:
            position = file.tell() - len(header)
            if len(header) < BLOCKSIZE:
                raise ShardError(f"{path}: key {key}: the tar ends at byte {file.tell()} without an end mark")
            try:
                info = TarInfo.frombuf(header, "utf-8", "strict")
            except (TarError, UnicodeDecodeError) as error:
                raise ShardError(f"{path}: byte {position}, after key {key}: not a tar header ({error})") from error
            member_key = info.name.partition(".")[0]
            if key is not None and member_key != key:
                yield key, start, bytes(sample)
                start, sample = position, bytearray()
            key = member_key
            padded = -(-info.size // BLOCKSIZE) * BLOCKSIZE
            content = file.read(padded)
            if len(content) < padded:
                raise ShardError(f"{path}: key {key}: member {info.name!r} of {info.size} bytes is cut short")
            sample += header + content
        if key is not None:
            yield key, start, bytes(sample)
        if file.read().strip(NUL):
            raise ShardError(f"{path}: key {key}: bytes after the end mark")


def _parse(where: str, blob: bytes) -> RawSample:
    try:
        return parse_sample(blob)
    except ShardError as error:
        raise ShardError(f"{where}: {error}") from error


def _check_sample(
    where: str, raw: RawSample, row: np.void, manifest: Manifest, tokenizer: ChatTokenizer | None
) -> None:
    for role, members in (("input", raw.input_members), ("helper", raw.helper_members)):
        for member in members:
            _check_image(f"{where}: {member}", raw.images[member], raw.grids[member], manifest.images.bounds(role))
    inputs = [raw.grids[member] for member in raw.input_members]
    helpers = [raw.grids[member] for member in raw.helper_members]
    image_counts = [merged_tokens(grid) for grid in inputs]
    _compare(where, "image_tokens", sum(image_counts), row["image_tokens"])
    _compare(where, "helper_tokens", sum(merged_tokens(grid) for grid in helpers), row["helper_tokens"])
    _compare(where, "spans", len(helpers), row["spans"])
    if tokenizer is not None:
        prompt, steps = raw.record.prompt, raw.record.steps
        ids, labels = tokenizer.encode_sample(prompt, steps, image_counts, manifest.latent_size)
        for name, value in count_tokens(ids, labels, (*inputs, *helpers), len(inputs)).items():
            _compare(where, name, value, row[name])


def _check_image(where: str, content: bytes, grid: tuple[int, int, int], bounds: tuple[int, int]) -> None:
    try:
        image = read_image(content)
    except ImageError as error:
        raise ShardError(f"{where}: {error}") from error
    found = (1, image.height // PATCH, image.width // PATCH)
    if image.height % FACTOR or image.width % FACTOR:
        raise ShardError(f"{where}: {image.width}x{image.height} pixels, sides must be multiples of {FACTOR}")
    if found != grid:
        raise ShardError(f"{where}: field 'grids': the image has {found}, its JSON says {grid}")
    # Rounding both sides can leave a narrow image a little outside its bounds, by one row or column of tokens.
    low, high = bounds
    slack = FACTOR * (image.width + image.height)
    if not low - slack <= image.width * image.height <= high + slack:
        raise ShardError(f"{where}: {image.width}x{image.height} pixels, the bounds are {low} to {high} pixels")


def _check_rejects(folder: Path, manifest: Manifest) -> None:
    path = folder / REJECTS_NAME
    try:
        rejects = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        reasons = Counter(reject["reason"] for reject in rejects)
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path}: cannot be read: {error!r}") from error
    _compare(str(path), "rejected", len(rejects), manifest.rejected, "manifest.json")
    if reasons != manifest.reject_reasons:
        raise ShardError(f"{path}: field 'reason': {dict(reasons)}, manifest.json says {manifest.reject_reasons}")


def _compare(where: str, name: str, found: int, written: int, book: str = INDEX_NAME) -> None:
    if found != written:
        raise ShardError(f"{where}: field {name!r}: found {found}, {book} says {written}")


if __name__ == "__main__":
    sys.exit(main())
