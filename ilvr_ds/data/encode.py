"""One record to the members of one sample in a shard: a pure function of the record and its image files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from ilvr_ds.contracts import ImageRef, Record
from ilvr_ds.data.image_codec import encode_image
from ilvr_ds.data.image_files import read_image_file
from ilvr_ds.data.images import (
    PATCH,
    Grid,
    ImageError,
    ImageSettings,
    merged_tokens,
    read_image,
    resize_image,
)
from ilvr_ds.data.index import INDEX_DTYPE
from ilvr_ds.data.sample_format import count_tokens, record_to_json
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.errors import RecordError

Role = Literal["input", "helper"]
_Look = tuple[int, int, bytes]
_LIMITS = {name: np.iinfo(INDEX_DTYPE[name]).max for name in INDEX_DTYPE.names}  # of the index's fields


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
    store = _Images(image_root, images)
    try:
        prompt = store.named(record.prompt, "input", "in")
        steps = store.named(record.steps, "helper", "help")
    except _BadImage as error:
        raise error.of(record) from error
    grids = store.grids_of(prompt)
    inputs = len(grids)
    image_counts = [merged_tokens(grid) for grid in grids]
    stored = replace(record, prompt=prompt, steps=steps, origin=_short(record.origin))
    input_ids, labels = tokenizer.encode_sample(stored.prompt, stored.steps, image_counts, latent_size)
    if max_tokens is not None and len(input_ids) > max_tokens:
        message = f"{len(input_ids)} tokens ({sum(image_counts)} of input images), at most {max_tokens} are allowed"
        raise RecordError("too_long", message, origin=record.origin, record_id=record.id)
    counts = count_tokens(input_ids, labels, (*grids, *store.grids_of(steps)), inputs)
    for name, value in counts.items():
        if value > _LIMITS[name]:
            message = f"{name} is {value}, the index holds at most {_LIMITS[name]}"
            raise RecordError("too_many_images", message, origin=record.origin, record_id=record.id)
    return EncodedSample({**store.members, "json": record_to_json(stored, store.grids)}, counts)


class _Source(NamedTuple):
    """An image file that a sample has met."""

    content: bytes
    bounds: tuple[int, int]  # of the resized image's pixels
    member: str
    look: _Look


def _look(pixels: Image.Image) -> _Look:
    """Width, height and every 16th pixel of every 16th row: pictures that differ here are different."""
    small = pixels.resize((-(-pixels.width // 16), -(-pixels.height // 16)), Image.Resampling.NEAREST)
    return pixels.width, pixels.height, small.tobytes()


class _Images:
    """The images of one sample on their way into the tar; equal ones are stored once."""

    def __init__(self, root: Path, settings: ImageSettings):
        self.root, self.settings = root, settings
        self.members: dict[str, bytes] = {}
        self.grids: dict[str, Grid] = {}
        # What was met, by comparison: hashing a photograph's bytes costs more than comparing a few lengths.
        self._sources: list[_Source] = []

    def named(self, parts: tuple[str | ImageRef, ...], role: Role, prefix: str) -> tuple[str | ImageRef, ...]:
        """`parts` with member names for paths; new images go into `members` and `grids`. Raises _BadImage."""
        named: list[str | ImageRef] = []
        for part in parts:
            if isinstance(part, ImageRef):
                number = sum(isinstance(p, ImageRef) for p in named)
                try:
                    part = ImageRef(self._store(part, self.settings.bounds(role), f"{prefix}{number}"))
                except ImageError as error:
                    raise _BadImage(part, role, error) from error
            named.append(part)
        return tuple(named)

    def grids_of(self, parts: tuple[str | ImageRef, ...]) -> tuple[Grid, ...]:
        """The grid of every image of `parts` (member names), in reading order."""
        return tuple(self.grids[part.path] for part in parts if isinstance(part, ImageRef))

    def _store(self, image: ImageRef, bounds: tuple[int, int], name: str) -> str:
        source = read_image_file(image, self.root)
        for known in self._sources:
            if known.bounds == bounds and known.content == source:
                return known.member
        upright = read_image(source)
        pixels = resize_image(upright, *bounds)
        look = _look(pixels)
        member = self._same_picture(pixels, look)
        if member is None:
            ending, content = encode_image(pixels, self.settings, source if pixels is upright else b"")
            same = (member for member, stored in self.members.items() if stored == content)
            member = next(same, f"{name}.{ending}")
            self.members[member] = content
            self.grids[member] = (1, pixels.height // PATCH, pixels.width // PATCH)
        self._sources.append(_Source(source, bounds, member, look))
        return member

    def _same_picture(self, pixels: Image.Image, look: _Look) -> str | None:
        """The member that was made of these very pixels, out of another file.

        A JPEG stored as it came and a PNG of the same picture are different bytes, so pixels are compared, of images
        that look alike. They are made again for that: keeping those of a whole sample could take gigabytes.
        """
        for known in self._sources:
            if known.look == look:
                again = resize_image(read_image(known.content), *known.bounds)
                if again.tobytes() == pixels.tobytes():
                    return known.member
        return None


class _BadImage(Exception):
    """An image of a record cannot be used; `of` makes the record's error of it."""

    def __init__(self, image: ImageRef, role: Role, error: ImageError):
        super().__init__(str(error))
        self.image, self.role, self.error = image, role, error

    def of(self, record: Record) -> RecordError:
        name = self.image.path[:500]  # a path may be as long as a record
        message = str(self.error) if name in str(self.error) else f"{name}: {self.error}"
        return RecordError(
            self.error.reason,
            message,
            origin=record.origin,
            record_id=record.id,
            field=f"{self.role} image {name}",
        )


def _short(origin: str) -> str:
    """The origin without folders: a shard's bytes do not depend on where the input file lies."""
    path, _, line = origin.rpartition(":")
    return f"{Path(path).name}:{line}"
