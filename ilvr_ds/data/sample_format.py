"""One sample inside a shard: a run of tar members with one key, the 9-digit number of its record in the input file.

`KEY.help0.png ...`, `KEY.in0.png ...` and `KEY.json`:

    {"id", "origin", "prompt": [text or {"image": "in0.png"}], "steps": [text or {"image": "help0.png"}],
     "answer", "map_desc", "grids": {"in0.png": [1, h, w], ...}}
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from ilvr_ds.contracts import IGNORE_INDEX, ImageRef, Record
from ilvr_ds.data.images import MERGE, Grid, merged_tokens
from ilvr_ds.data.tar_members import read_members
from ilvr_ds.errors import ShardError


@dataclass(frozen=True)
class RawSample:
    """A sample as it lies in the tar: the record (its image paths are member names) and the images' bytes."""

    key: str
    record: Record
    grids: dict[str, tuple[int, int, int]]  # member name -> (t, h, w) in patches
    images: dict[str, bytes]  # member name -> PNG or JPEG file
    json_bytes: bytes

    @property
    def input_members(self) -> list[str]:
        """Member names of the input images, in reading order."""
        return [part.path for part in self.record.prompt if isinstance(part, ImageRef)]

    @property
    def helper_members(self) -> list[str]:
        """Member names of the helper images, in span order."""
        return [part.path for part in self.record.steps if isinstance(part, ImageRef)]


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
    for path, content in read_members(blob):
        key, _, name = path.partition(".")
        if name in members:
            raise ShardError(f"expected one sample, found the member {name!r} twice")
        members[name] = content
        keys.add(key)
    if len(keys) != 1:
        raise ShardError(f"expected one sample, found the keys {sorted(keys)}")
    key = keys.pop()
    try:
        json_bytes = members.pop("json")
        tree = json.loads(json_bytes)
        grids = {name: _grid(sides) for name, sides in tree["grids"].items()}
        record = _record_from_json(tree)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ShardError(f"{key}.json is missing or not a sample's JSON ({error!r})") from error
    named = [part.path for part in (*record.prompt, *record.steps) if isinstance(part, ImageRef)]
    if not sorted(set(named)) == sorted(members) == sorted(grids):  # one member may be shown twice
        raise ShardError(f"{key}.json names the images {sorted(named)}, the tar has {sorted(members)}")
    return RawSample(key, record, grids, members, json_bytes)


def key_of(blob: bytes) -> str:
    """ "key 000000017" from the first tar header of bytes that may be broken."""
    key = blob[:512].partition(b".")[0]
    return f"key {key.decode()}" if key.isdigit() else "key unreadable"


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


def _grid(sides: list[int]) -> Grid:
    t, h, w = sides
    if t != 1 or min(h, w) < MERGE or h % MERGE or w % MERGE:
        raise ValueError(f"the grid {sides}")
    return t, h, w


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
