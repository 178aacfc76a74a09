"""Pictures out of a shard to pixels, decoded straight into the memory a step's batches are made of.

A worker only decodes. Nothing is copied between the decoder and the batch: the index says how many pixels each sample
has, so the memory is laid out before a picture is opened. Cutting pixels into patches takes a CPU a tenth of the time
of decoding, and the device next to none: it is done there (`ilvr_ds.model.vision.cut_patches`).

The decoders are those of imagecodecs (libjpeg-turbo, libspng), which write into memory they are given and need a
third less time than Pillow for large PNGs. Every pixel is the same as Pillow's; a test compares them.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import imagecodecs
import numpy as np
import torch
from PIL import Image

from ilvr_ds.data.images import FACTOR, PATCH, Grid
from ilvr_ds.data.lengths import PATCHES_PER_TOKEN
from ilvr_ds.data.step_memory import StepMemory
from ilvr_ds.errors import BatchError

PIXEL_ROW = 3 * PATCH * PATCH  # bytes: as many as a patch has
_JPEG_END = b"\xff\xd9"


@dataclass(frozen=True)
class SampleRows:
    """Where the pixels of one sample go."""

    inputs: np.ndarray  # (P_in, 588) uint8, without gaps
    helpers: np.ndarray  # (P_help, 588) uint8; (0, 588) where helper images are not decoded


@dataclass(frozen=True)
class BatchRows:
    """Where the pixels of one micro-batch go: input images of all samples in order, then helper images."""

    rows: np.ndarray  # (P, 588) uint8
    samples: tuple[SampleRows, ...]


def lay_out(
    bins: Sequence[Sequence[np.void]], *, helpers: bool, memory: StepMemory
) -> tuple[torch.Tensor, list[BatchRows]]:
    """Memory for the pixels of a step.

    Args:
        bins: per micro-batch the index rows (INDEX_DTYPE) of its samples, in the order they are packed.
        helpers: whether helper images are decoded.

    Returns:
        What `memory` gave, (bytes,) uint8; and the part of each micro-batch.
    """
    counts = [  # per bin (samples, 2): rows of input images, of helper images
        np.array([(r["image_tokens"], r["helper_tokens"] if helpers else 0) for r in own], np.int64).reshape(-1, 2)
        * PATCHES_PER_TOKEN
        for own in bins
    ]
    total = sum(int(count.sum()) for count in counts)
    piece = memory.take(total * PIXEL_ROW)
    rows, laid = piece.numpy()[: total * PIXEL_ROW].reshape(total, PIXEL_ROW), []
    for count in counts:
        own, rows = rows[: count.sum()], rows[count.sum() :]
        cuts = np.split(own, np.cumsum(count.T.ravel())[:-1]) if len(count) else []
        laid.append(BatchRows(own, tuple(map(SampleRows, cuts[: len(count)], cuts[len(count) :]))))
    return piece, laid


def sample_rows(row: np.void, *, helpers: bool) -> SampleRows:
    """Memory for the pixels of a single sample; arguments as in `lay_out`."""
    inputs, others = int(row["image_tokens"]), int(row["helper_tokens"]) if helpers else 0
    return SampleRows(*(np.empty((PATCHES_PER_TOKEN * n, PIXEL_ROW), np.uint8) for n in (inputs, others)))


def decode_pixels(
    images: dict[str, bytes], grids: dict[str, Grid], inputs: Sequence[str], helpers: Sequence[str], into: SampleRows
) -> None:
    """Decode the pictures of a sample into its rows, as `Sample.input_pixels` and `helper_pixels` hold them.

    Args:
        images: member name -> file bytes.
        grids: member name -> (1, h, w) that the picture must have.
        inputs, helpers: member names in order; one that is named twice is decoded once.

    Raises BatchError naming the member: it cannot be decoded, or is not of its grid's size.
    """
    done: dict[str, np.ndarray] = {}
    for members, out in ((inputs, into.inputs), (helpers, into.helpers)):
        begin = 0
        for member in members:
            _, rows, columns = grids[member]
            own = out[begin : begin + rows * columns]
            begin += rows * columns
            if member in done:
                own[:] = done[member]
            else:
                _decode(member, images[member], grids[member], own)
                done[member] = own
        if begin != len(out):
            raise ValueError(f"{begin} rows of pixels into {len(out)}")


def _decode(member: str, content: bytes, grid: Grid, out: np.ndarray) -> None:
    """Decode a PNG or JPEG as the build stores them into `out`, (h w, 588)."""
    _, rows, columns = grid
    pixels = out.reshape(rows * PATCH, columns * PATCH, 3)
    try:
        if member.endswith(".png"):
            imagecodecs.spng_decode(content, out=pixels)
            return
        # libjpeg fills in what is missing of a file that was cut, and only warns
        if content.endswith(_JPEG_END):
            imagecodecs.jpeg8_decode(content, out=pixels)
            return
        message = "the image cannot be decoded (the JPEG has no end)"
    except ValueError:  # the codec's word for an array of another shape
        message = _why_not(content, grid)
    except RuntimeError as error:  # SpngError, Jpeg8Error
        message = f"the image cannot be decoded ({type(error).__name__}: {error})"
    raise BatchError(f"{member}: {message}")


def _why_not(content: bytes, grid: Grid) -> str:
    _, rows, columns = grid
    with Image.open(io.BytesIO(content)) as image:
        return (
            f"the image has {image.width}x{image.height} pixels and is {image.mode}, its grid {grid} in the JSON means "
            f"{PATCH * columns}x{PATCH * rows} and RGB"
        )


def image_pixels(image: Image.Image) -> tuple[np.ndarray, Grid]:
    """The pixels of an RGB image with sides multiples of 28, (h w, 588) uint8, and its grid (1, h, w) in patches.

    Raises ValueError for another image.
    """
    if image.mode != "RGB" or image.width % FACTOR or image.height % FACTOR:
        raise ValueError(f"{image.mode} image of {image.width}x{image.height} pixels")
    return np.asarray(image).reshape(-1, PIXEL_ROW), (1, image.height // PATCH, image.width // PATCH)
