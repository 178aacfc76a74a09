"""What generation starts from: the ids, positions and pixels training would have for the same prompt.

The ids come from the one function training uses (`ChatTokenizer.encode_prompt`), the pixels from the functions
that build the shards; nothing here tokenises or resizes by itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ilvr_ds.contracts import ImageRef
from ilvr_ds.data.images import (
    Grid,
    ImageError,
    ImageSettings,
    merged_tokens,
    read_image,
    resize_image,
)
from ilvr_ds.data.pixels import PIXEL_ROW, image_pixels
from ilvr_ds.data.rotary_positions import rotary_positions
from ilvr_ds.data.tokens import ChatTokenizer, Part
from ilvr_ds.errors import ConfigError, RecordError

IMAGE_MARKER = "<image>"


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt, encoded, in CPU memory."""

    id: str
    input_ids: np.ndarray  # (L,) int64: system turn, user turn, `<|im_start|>assistant\n`
    position_ids: np.ndarray  # (3, L) int64: rotary positions
    next_position: int  # rotary position, in all three rows, of the first token after the prompt
    grids: tuple[Grid, ...]  # (t, h, w) in patches of each image
    pixels: np.ndarray  # (P, 588) uint8 or (P, 1176) float32, as in `Sample`
    seed: int = 0  # of this sequence's draws when sampling

    def sha256(self) -> str:
        """Hash of everything the model sees: ids, grids and pixels."""
        digest = hashlib.sha256(np.ascontiguousarray(self.input_ids, dtype=np.int64).tobytes())
        digest.update(json.dumps([list(map(int, grid)) for grid in self.grids]).encode())
        digest.update(f"{self.pixels.dtype}{self.pixels.shape}".encode())
        digest.update(np.ascontiguousarray(self.pixels).tobytes())
        return digest.hexdigest()


def prompt_of_ids(
    prompt_id: str,
    input_ids: np.ndarray,
    grids: Sequence[Grid],
    pixels: np.ndarray,
    image_pad: int,
    seed: int = 0,
) -> EncodedPrompt:
    """A prompt whose ids (L,) and pixels are already there.

    Raises:
        BatchError: image tokens that do not fit the grids.
    """
    # One text token more shows where the count goes on.
    one_more = rotary_positions(np.append(input_ids, image_pad + 1), grids, image_pad)  # (3, L + 1)
    return EncodedPrompt(prompt_id, input_ids, one_more[:, :-1], int(one_more[0, -1]), tuple(grids), pixels, seed)


def build_prompt(
    parts: Sequence[Part],
    tokenizer: ChatTokenizer,
    images: ImageSettings,
    image_root: Path,
    *,
    prompt_id: str,
    origin: str,
    seed: int = 0,
) -> EncodedPrompt:
    """Open, turn and resize a prompt's images and encode it as training does.

    Args:
        parts: text and images in reading order, as `Record.prompt`.
        images: pixel bounds; those of input images are used.
        image_root: folder that relative image paths start from.
        prompt_id, origin: name the prompt in messages.

    Raises:
        RecordError: an image is missing or cannot be used (reasons of `ImageError`), or a text still says
            `<image>` (marker_count).
    """
    left = sum(part.count(IMAGE_MARKER) for part in parts if isinstance(part, str))
    if left:
        given = sum(isinstance(part, ImageRef) for part in parts)
        message = f"{left} {IMAGE_MARKER} mark(s) in the text have no image; {given} image(s) are placed"
        raise RecordError("marker_count", message, origin=origin, record_id=prompt_id, field="prompt")
    grids: list[Grid] = []
    decoded: list[np.ndarray] = []
    for part in parts:
        if isinstance(part, ImageRef):
            try:
                image = resize_image(read_image(image_root / part.path), *images.bounds("input"))
            except ImageError as error:
                raise RecordError(
                    error.reason, str(error), origin=origin, record_id=prompt_id, field=f"image {part.path}"
                ) from error
            pixels, grid = image_pixels(image)
            decoded.append(pixels)
            grids.append(grid)
    ids = tokenizer.encode_prompt(parts, [merged_tokens(grid) for grid in grids])
    pixels = np.concatenate(decoded) if decoded else np.zeros((0, PIXEL_ROW), np.uint8)
    return prompt_of_ids(prompt_id, ids, grids, pixels, tokenizer.vocabulary.image_pad, seed)


def parts_of_text(text: str, images: Sequence[str]) -> tuple[Part, ...]:
    """A prompt as typed: images in the places of `<image>`, or before the text if it has none.

    Raises:
        ConfigError: the text has `<image>` marks, but not one for each image.
    """
    texts = text.split(IMAGE_MARKER)
    if len(texts) == 1:
        return (*(ImageRef(path) for path in images), text)
    if len(texts) - 1 != len(images):
        raise ConfigError(
            f"the prompt has {len(texts) - 1} {IMAGE_MARKER} mark(s), {len(images)} image(s) are given; give one image "
            "per mark, or leave the marks out to put the images first"
        )
    parts: list[Part] = [texts[0]]
    for path, following in zip(images, texts[1:], strict=True):
        parts += [ImageRef(path), following]
    return tuple(part for part in parts if part != "")


def sequence_seed(seed: int, prompt_id: str, sample: int = 0) -> int:
    """The seed of one sequence, a function of the run's seed, the prompt's id and the number of the sample.

    So a sequence draws the same numbers whatever else is in its batch and in whatever order.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{sample}:{prompt_id}".encode()).digest()[:8], "little")
