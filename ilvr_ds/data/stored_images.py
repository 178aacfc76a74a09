"""Pictures out of a shard, decoded into memory they are given.

The decoders are imagecodecs' (libjpeg-turbo, libspng): they write where they are told to, and take a third less time
than Pillow for large PNGs. Every pixel is Pillow's; a test compares them.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import imagecodecs
import numpy as np
from PIL import Image

from ilvr_ds.data.images import PATCH, Grid
from ilvr_ds.data.pixels import SampleRows
from ilvr_ds.errors import BatchError

_JPEG_END = b"\xff\xd9"


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
