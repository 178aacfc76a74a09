"""One record to the members of one sample in a shard: a pure function of the record and its image files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from ilvr_ds.contracts import ImageRef, Record
from ilvr_ds.data.images import (
    PATCH,
    Grid,
    ImageError,
    ImageSettings,
    encode_png,
    merged_tokens,
    read_image,
    resize_image,
)
from ilvr_ds.data.index import INDEX_DTYPE
from ilvr_ds.data.shards import count_tokens, record_to_json
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.errors import RecordError


@dataclass(frozen=True)
class EncodedSample:
    """What goes into the tar (member name, without the key, to bytes) and into the index (field to count)."""

    members: dict[str, bytes]
    counts: dict[str, int]


def encode_record(
    record: Record,
    image_root: Path,
    tokenizer: ChatTokenizer,
    latent_size: int,
    images: ImageSettings,
    max_tokens: int | None = None,
) -> EncodedSample:
    """Open, turn and resize a record's images, and count its tokens.

    `image_root`: folder that relative image paths start from. `max_tokens`: longest sequence allowed.
    Raises RecordError naming the record and the image: the reasons of `ImageError`, too_long, too_many_images.
    """
    members: dict[str, bytes] = {}
    grids: dict[str, Grid] = {}

    def store(parts: tuple[str | ImageRef, ...], role: Literal["input", "helper"], prefix: str) -> tuple:
        """`parts` with member names for paths; the images go into `members` and `grids`."""
        named = []
        for part in parts:
            if isinstance(part, ImageRef):
                name = f"{prefix}{sum(isinstance(p, ImageRef) for p in named)}.png"
                members[name], grids[name] = _encode_image(record, part, role, image_root, images)
                part = ImageRef(name)
            named.append(part)
        return tuple(named)

    prompt = store(record.prompt, "input", "in")
    inputs = len(grids)
    image_counts = [merged_tokens(grid) for grid in grids.values()]
    stored = replace(record, prompt=prompt, steps=store(record.steps, "helper", "help"), origin=_short(record.origin))
    input_ids, labels = tokenizer.encode_sample(stored.prompt, stored.steps, image_counts, latent_size)
    if max_tokens is not None and len(input_ids) > max_tokens:
        message = f"{len(input_ids)} tokens ({sum(image_counts)} of input images), at most {max_tokens} are allowed"
        raise RecordError("too_long", message, origin=record.origin, record_id=record.id)
    counts = count_tokens(input_ids, labels, tuple(grids.values()), inputs)
    for name, value in counts.items():
        limit = np.iinfo(INDEX_DTYPE[name]).max
        if value > limit:
            message = f"{name} is {value}, the index holds at most {limit}"
            raise RecordError("too_many_images", message, origin=record.origin, record_id=record.id)
    members["json"] = record_to_json(stored, grids)
    return EncodedSample(members, counts)


def _encode_image(
    record: Record, part: ImageRef, role: Literal["input", "helper"], image_root: Path, images: ImageSettings
) -> tuple[bytes, Grid]:
    """PNG bytes and grid of the resized image."""
    try:
        image = resize_image(read_image(image_root / part.path), *images.bounds(role))
    except ImageError as error:
        message = f"{error}" if part.path in str(error) else f"{part.path}: {error}"
        raise RecordError(
            error.reason, message, origin=record.origin, record_id=record.id, field=f"{role} image {part.path}"
        ) from error
    return encode_png(image), (1, image.height // PATCH, image.width // PATCH)


def _short(origin: str) -> str:
    """The origin without folders: a shard's bytes do not depend on where the input file lies."""
    path, _, line = origin.rpartition(":")
    return f"{Path(path).name}:{line}"
