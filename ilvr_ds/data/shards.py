"""Read samples from a folder of shards, each by its place in the index, without scanning a tar.

    shards = ShardSet.open("data/frozenlake")
    shards.require(tokenizer, latent_size=8)
    sample = shards.load_sample(17, tokenizer)

A sample is a run of tar members with one key, the 9-digit number of its record in the input file:
`KEY.help0.png ...`, `KEY.in0.png ...` and `KEY.json`:

    {"id", "origin", "prompt": [text or {"image": "in0.png"}], "steps": [text or {"image": "help0.png"}],
     "answer", "map_desc", "grids": {"in0.png": [1, h, w], ...}}
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ilvr_ds.contracts import IGNORE_INDEX, ImageRef, Record, Sample
from ilvr_ds.data.images import ImageError, image_to_patches, merged_tokens, read_image
from ilvr_ds.data.index import Manifest, read_index, read_manifest
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.errors import BatchError, ShardError


@dataclass(frozen=True)
class RawSample:
    """A sample as it lies in the tar: the record (its image paths are member names) and the images' bytes."""

    key: str
    record: Record
    grids: dict[str, tuple[int, int, int]]  # member name -> (t, h, w) in patches
    images: dict[str, bytes]  # member name -> PNG bytes
    json_bytes: bytes

    @property
    def input_members(self) -> list[str]:
        """Member names of the input images, in reading order."""
        return [part.path for part in self.record.prompt if isinstance(part, ImageRef)]

    @property
    def helper_members(self) -> list[str]:
        """Member names of the helper images, in span order."""
        return [part.path for part in self.record.steps if isinstance(part, ImageRef)]


class ShardSet:
    """A finished shard folder. Picklable, and safe in forked, spawned and threaded workers: each read opens its
    own file (microseconds on a local disk), so no file position is shared."""

    def __init__(self, folder: Path, manifest: Manifest, index: np.ndarray):
        self.folder = folder
        self.manifest = manifest
        self.index = index  # (samples,) INDEX_DTYPE, memory-mapped, read-only

    @classmethod
    def open(cls, folder: str | Path) -> ShardSet:
        """Open a folder written by `data_tools/build_shards.py`.

        Checks the manifest's version, the index's hash and length, and every shard's size (not its bytes: that is
        `data_tools/check_shards.py`). Raises ShardError naming the file and the command to run.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        index = read_index(folder, manifest)
        for entry in manifest.shards:
            path = folder / entry.name
            size = path.stat().st_size if path.is_file() else None
            if size != entry.bytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise ShardError(
                    f"{path}: the shard {found}, manifest.json says {entry.bytes} bytes; copy it again, or remove it "
                    f"and repeat the build command (finished shards are kept)"
                )
        return cls(folder, manifest, index)

    def __reduce__(self) -> tuple:
        return ShardSet.open, (self.folder,)  # a memory map does not pickle as one

    def __len__(self) -> int:
        return len(self.index)

    def require(self, tokenizer: ChatTokenizer, latent_size: int) -> None:
        """Raise ShardError unless the index was counted with this tokenizer and number of latents per span."""
        command = f"run `python -m data_tools.reindex_shards {self.folder} --tokenizer DIR --latent-size {latent_size}`"
        ours, theirs = self.manifest.tokenizer_fingerprint, tokenizer.vocabulary.fingerprint
        if ours != theirs:
            raise ShardError(
                f"{self.folder}: the index was counted with tokenizer {ours[:16]}, this tokenizer is {theirs[:16]}; "
                f"use the tokenizer the shards were built with, or {command} with the new one"
            )
        if self.manifest.latent_size != latent_size:
            raise ShardError(
                f"{self.folder}: the shards were counted with {self.manifest.latent_size} latents per span, "
                f"the recipe's latent.size is {latent_size}; change latent.size, or {command}"
            )

    def sample_id(self, number: int) -> str:
        """The record id of a sample, read from its tar."""
        return self.read(number).record.id

    def read(self, number: int) -> RawSample:
        """The undecoded sample at row `number` of the index.

        Raises IndexError outside 0..len-1, and ShardError naming the shard and the offset when the bytes there are
        not one whole sample.
        """
        if not 0 <= number < len(self.index):
            raise IndexError(f"sample {number} of {len(self.index)}")
        row = self.index[number]
        offset, size = int(row["offset"]), int(row["size"])
        if row["shard"] >= len(self.manifest.shards):
            raise ShardError(
                f"{self.folder}/index.npy: row {number}: field 'shard' is {row['shard']}, past the last one"
            )
        path = self.folder / self.manifest.shards[row["shard"]].name
        where = f"{path}: sample {number} at byte {offset}"
        try:
            with path.open("rb") as file:
                file.seek(offset)
                blob = file.read(size)
        except OSError as error:
            raise ShardError(f"{where}: cannot be read: {error}") from error
        try:
            if len(blob) != size:
                raise ShardError(f"{len(blob)} of {size} bytes are there")
            return parse_sample(blob)
        except ShardError as error:
            raise ShardError(
                f"{where}: {error}; the index does not match the tar, "
                f"run `python -m data_tools.check_shards {self.folder}`"
            ) from error

    def load_sample(self, number: int, tokenizer: ChatTokenizer) -> Sample:
        """Decode and tokenise one sample.

        Raises BatchError naming its id when the tokens, images or spans are not what the index says, and what
        `read` raises.
        """
        raw = self.read(number)
        grids, patches = [], []
        for member in (*raw.input_members, *raw.helper_members):
            try:
                cut, grid = image_to_patches(np.asarray(read_image(raw.images[member])))
            except (ImageError, ValueError) as error:
                raise BatchError(f"sample {raw.record.id!r} ({self.folder}, {raw.key}.{member}): {error}") from error
            if grid != raw.grids[member]:
                raise BatchError(
                    f"sample {raw.record.id!r} ({self.folder}, {raw.key}.{member}): the image has grid {grid}, "
                    f"its JSON says {raw.grids[member]}"
                )
            grids.append(grid)
            patches.append(cut)
        inputs = len(raw.input_members)
        image_counts = [merged_tokens(grid) for grid in grids[:inputs]]
        latent_size = self.manifest.latent_size
        input_ids, labels = tokenizer.encode_sample(raw.record.prompt, raw.record.steps, image_counts, latent_size)
        counts = count_tokens(input_ids, labels, tuple(grids), inputs)
        for name, value in counts.items():
            if self.index[number][name] != value:
                raise BatchError(
                    f"sample {raw.record.id!r} ({self.folder}, number {number}): {name} is {value}, the index says "
                    f"{self.index[number][name]}; run `python -m data_tools.check_shards {self.folder} --tokenizer DIR`"
                )
        return Sample(
            number=number,
            id=raw.record.id,
            input_ids=input_ids,
            labels=labels,
            grids=tuple(grids),
            num_input_images=inputs,
            patches=np.concatenate(patches) if patches else np.zeros((0, 588), dtype=np.uint8),
        )


def count_tokens(
    input_ids: np.ndarray, labels: np.ndarray, grids: tuple[tuple[int, int, int], ...], num_input_images: int
) -> dict[str, int]:
    """The counts of an index row, by its field names, from a tokenised sample (fields as in `Sample`)."""
    image_tokens = sum(merged_tokens(grid) for grid in grids[:num_input_images])
    return {
        "text_tokens": len(input_ids) - image_tokens,
        "image_tokens": image_tokens,
        "helper_tokens": sum(merged_tokens(grid) for grid in grids[num_input_images:]),
        "spans": len(grids) - num_input_images,
        "supervised": int(np.count_nonzero(labels != IGNORE_INDEX)),
    }


def parse_sample(blob: bytes) -> RawSample:
    """Take one sample's run of tar members apart. Raises ShardError (without naming the shard: the caller does)."""
    members: dict[str, bytes] = {}
    keys = set()
    try:
        with tarfile.open(fileobj=io.BytesIO(blob), mode="r:") as tar:
            for info in tar:
                key, _, name = info.name.partition(".")
                content = tar.extractfile(info)
                if content is None:
                    raise ShardError(f"member {info.name!r} is not a file")
                members[name] = content.read()
                keys.add(key)
                if len(members[name]) != info.size:
                    raise ShardError(f"member {info.name!r} is cut short")
    except tarfile.TarError as error:
        raise ShardError(f"not a tar member ({error})") from error
    if len(keys) != 1:
        raise ShardError(f"expected one sample, found the keys {sorted(keys)}")
    key = keys.pop()
    try:
        json_bytes = members.pop("json")
        tree = json.loads(json_bytes)
        grids = {name: tuple(grid) for name, grid in tree["grids"].items()}
        record = _record_from_json(tree)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ShardError(f"{key}.json is missing or not a sample's JSON ({error!r})") from error
    named = [part.path for part in (*record.prompt, *record.steps) if isinstance(part, ImageRef)]
    if not sorted(named) == sorted(members) == sorted(grids):
        raise ShardError(f"{key}.json names the images {sorted(named)}, the tar has {sorted(members)}")
    return RawSample(key, record, grids, members, json_bytes)


def record_to_json(record: Record, grids: dict[str, tuple[int, int, int]]) -> bytes:
    """A sample's JSON member: the record with member names for image paths, and each image's grid."""

    def plain(part: str | ImageRef) -> Any:
        return part if isinstance(part, str) else {"image": part.path}

    tree = {
        "id": record.id,
        "origin": record.origin,
        "prompt": [plain(part) for part in record.prompt],
        "steps": [plain(part) for part in record.steps],
        "answer": record.answer,
        "map_desc": record.map_desc,
        "grids": grids,
    }
    return json.dumps(tree, ensure_ascii=False, sort_keys=True).encode()


def _record_from_json(tree: dict[str, Any]) -> Record:
    def part(value: Any) -> str | ImageRef:
        return value if isinstance(value, str) else ImageRef(value["image"])

    return Record(
        id=tree["id"],
        prompt=tuple(part(value) for value in tree["prompt"]),
        steps=tuple(part(value) for value in tree["steps"]),
        answer=tree["answer"],
        map_desc=None if tree["map_desc"] is None else tuple(tuple(row) for row in tree["map_desc"]),
        origin=tree["origin"],
    )
