"""What a person needs to see of a sample: its images in reading order, and its tokens with what each is for.

    preview = read_preview(shards, 17, tokenizer)
    preview.tokens        runs such as ("image", "64 x <|image_pad|>"), ("text", " left"), ("latent", ...)

The tokens are made by the function that training uses (`ChatTokenizer.encode_sample`), from the bytes in the shard.
`preview_html` and `preview_sheet` draw it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from ilvr_ds.contracts import IGNORE_INDEX, ImageRef
from ilvr_ds.data.images import ImageError, merged_tokens, read_image
from ilvr_ds.data.sample_format import RawSample
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.errors import ShardError

Kind = Literal["text", "marker", "image", "latent"]
Role = Literal["input", "helper"]
_SPLIT_CHARACTER = "�"  # what a byte-level tokenizer decodes part of a character to
_MOST_PARTS = 16  # tokens one character can be cut into; past that the replacement character is really in the text


@dataclass(frozen=True)
class TokenRun:
    """One token; or several that make one character together; or a run of equal pads, folded."""

    kind: Kind  # text; marker: a control token; image, latent: a pad whose embedding is replaced
    text: str  # as decoded; of folded pads the text of one
    ids: tuple[int, ...]
    supervised: bool  # the loss asks for these tokens

    @property
    def label(self) -> str:
        """What to print: the text, or "36 x <|image_pad|>"."""
        return f"{len(self.ids)} × {self.text}" if self.kind in ("image", "latent") else self.text


@dataclass(frozen=True)
class PreviewImage:
    """An image at its place in the text."""

    member: str  # its name in the tar, without the key
    role: Role
    picture: Image.Image  # RGB, as training sees it
    stored_bytes: int
    tokens: int  # merged visual tokens: places in the sequence (input), candidates for the targets (helper)


@dataclass(frozen=True)
class Preview:
    """One sample, ready to draw."""

    number: int  # position in the index
    key: str
    shard: str
    id: str
    origin: str
    answer: str | None
    prompt: tuple[str | PreviewImage, ...]
    steps: tuple[str | PreviewImage, ...]
    tokens: tuple[TokenRun, ...]
    latent_size: int

    @property
    def length(self) -> int:
        """Tokens of the sequence."""
        return sum(len(run.ids) for run in self.tokens)

    def count(self, kind: Kind | None = None, *, supervised: bool | None = None) -> int:
        """Tokens of a kind, or with (without) a label; both conditions must hold where both are given."""
        return sum(
            len(run.ids) for run in self.tokens if kind in (None, run.kind) and supervised in (None, run.supervised)
        )

    @property
    def images(self) -> tuple[PreviewImage, ...]:
        """Input images, then helper images, in reading order."""
        return tuple(part for part in (*self.prompt, *self.steps) if isinstance(part, PreviewImage))


def read_preview(shards: ShardSet, number: int, tokenizer: ChatTokenizer) -> Preview:
    """Read and tokenise the sample at row `number` of the index.

    Raises ShardError naming the shard, the key and the member when an image cannot be decoded, and what
    `ShardSet.read` raises. The tokenizer need not be the one the index was counted with (`ShardSet.require`).
    """
    raw = shards.read(number)
    shard = shards.manifest.shards[shards.index[number]["shard"]].name

    def drawn(parts: Sequence[str | ImageRef], role: Role) -> tuple[str | PreviewImage, ...]:
        return tuple(p if isinstance(p, str) else _image(raw, p, role, f"{shards.folder}/{shard}") for p in parts)

    counts = [merged_tokens(raw.grids[member]) for member in raw.input_members]
    record, size = raw.record, shards.manifest.latent_size
    ids, labels = tokenizer.encode_sample(record.prompt, record.steps, counts, size)
    return Preview(
        number=number, key=raw.key, shard=shard, id=record.id, origin=record.origin, answer=record.answer,
        prompt=drawn(record.prompt, "input"), steps=drawn(record.steps, "helper"),
        tokens=tuple(token_runs(ids, labels, tokenizer)), latent_size=size,
    )  # fmt: skip


def _image(raw: RawSample, part: ImageRef, role: Role, shard: str) -> PreviewImage:
    content = raw.images[part.path]
    try:
        picture = read_image(content)
    except ImageError as error:
        raise ShardError(
            f"{shard}: key {raw.key}: {part.path}: {error}; run `python -m data_tools.check_shards` on the folder"
        ) from error
    return PreviewImage(part.path, role, picture, len(content), merged_tokens(raw.grids[part.path]))


def token_runs(input_ids: np.ndarray, labels: np.ndarray, tokenizer: ChatTokenizer) -> Iterable[TokenRun]:
    """Cut a sequence into runs: pads folded, every other token by itself, parts of one character together.

    Args:
        input_ids: (L,) int64.
        labels: (L,) int64, IGNORE_INDEX where there is no loss.

    Yields runs whose ids, laid end to end, are `input_ids`.
    """
    v = tokenizer.vocabulary
    pads: dict[int, Kind] = {v.image_pad: "image", v.video_pad: "image", v.latent_pad: "latent"}
    markers = {v.im_start, v.im_end, v.vision_start, v.vision_end, v.latent_start, v.latent_end}
    ids, supervised = input_ids.tolist(), (labels != IGNORE_INDEX).tolist()
    start = 0
    while start < len(ids):
        token, stop = ids[start], start + 1
        text = tokenizer.decode([token])
        if token in pads:
            while stop < len(ids) and (ids[stop], supervised[stop]) == (token, supervised[start]):
                stop += 1
        elif token not in markers and _SPLIT_CHARACTER in text:
            stop, text = _whole_character(ids, start, tokenizer, {*pads, *markers})
        kind = pads.get(token, "marker" if token in markers else "text")
        yield TokenRun(kind, text, tuple(ids[start:stop]), supervised[start])
        start = stop


def _whole_character(ids: list[int], start: int, tokenizer: ChatTokenizer, control: set[int]) -> tuple[int, str]:
    """(end, text) of the shortest run from `start` that decodes to whole characters."""
    for stop in range(start + 1, min(start + _MOST_PARTS, len(ids)) + 1):
        if ids[stop - 1] in control:
            break
        text = tokenizer.decode(ids[start:stop])
        if _SPLIT_CHARACTER not in text:
            return stop, text
    return start + 1, tokenizer.decode([ids[start]])


def find_ids(shards: ShardSet, wanted: Sequence[str], progress: Iterable[int]) -> list[int]:
    """Rows of the samples with these ids, in the order asked for. Ids are in the tars, not in the index: it reads on
    until all are found.

    Args:
        progress: the rows to look at, in order (`range(len(shards))`, wrapped in a progress bar if wanted).

    Raises ShardError naming the ids that are not there.
    """
    found: dict[str, int] = {}
    for number in progress:
        record_id = shards.read(number).record.id
        if record_id in wanted:
            found[record_id] = number
            if len(found) == len(set(wanted)):
                break
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ShardError(
            f"{shards.folder}: no sample has the id {', '.join(map(repr, missing))}; was the record refused? "
            f"See {shards.folder}/rejects.jsonl"
        )
    return [found[name] for name in wanted]


def one_line(text: str) -> str:
    """Text with every run of white space as one space."""
    return re.sub(r"\s+", " ", text).strip()
