"""Pictures out of a shard to patches, each decoded once and cut straight into the sample's array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ilvr_ds.data.images import FACTOR, MERGE, PATCH, Grid, ImageError, read_image
from ilvr_ds.errors import BatchError

if TYPE_CHECKING:
    from PIL import Image

WIDTH = 3 * PATCH * PATCH  # uint8 values of a patch
_RUN = np.dtype((np.void, PATCH))  # a row of a patch in one channel: what stays together when patches are cut


def decode_patches(images: dict[str, bytes], members: Sequence[str], grids: dict[str, Grid]) -> np.ndarray:
    """The patches of `members`, in that order, (P, 588) uint8 as `images.image_to_patches` cuts them.

    Args:
        images: member name -> file bytes; a member that is named twice is decoded once.
        grids: member name -> (1, h, w) that the picture must have.

    Raises BatchError naming the member: it cannot be decoded, or is not of its grid's size.
    """
    patches = np.empty((sum(h * w for _, h, w in map(grids.__getitem__, members)), WIDTH), np.uint8)
    done: dict[str, np.ndarray] = {}
    begin = 0
    for member in members:
        _, rows, columns = grids[member]
        out = patches[begin : begin + rows * columns]
        begin += rows * columns
        if member in done:
            out[:] = done[member]
            continue
        try:
            image = read_image(images[member], own=True)
        except ImageError as error:
            raise BatchError(f"{member}: {error}") from error
        if image.size != (PATCH * columns, PATCH * rows):
            raise BatchError(
                f"{member}: the image has {image.width}x{image.height} pixels, its grid {grids[member]} in the JSON "
                f"means {PATCH * columns}x{PATCH * rows}"
            )
        cut_patches(image, out)
        done[member] = out
    return patches


def cut_patches(image: Image.Image, out: np.ndarray) -> None:
    """Cut an RGB image, sides multiples of 28, into `out`, (P, 588) uint8 without gaps.

    What `images.image_to_patches` gives (the readable form of the same), in two thirds of the time: Pillow takes the
    channels apart, and rows of 14 pixels are moved at once instead of one by one.
    """
    rows, columns = image.height // PATCH, image.width // PATCH
    if image.mode != "RGB" or image.width % FACTOR or image.height % FACTOR or out.shape != (rows * columns, WIDTH):
        raise ValueError(f"{image.mode} image of {image.width}x{image.height} pixels into {out.shape}")
    # block row, block column, row, column, channel, y
    runs = out.view(_RUN).reshape(rows // MERGE, columns // MERGE, MERGE, MERGE, 3, PATCH)
    for channel, name in enumerate("RGB"):
        plane = np.frombuffer(image.tobytes("raw", name), _RUN).reshape(
            rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE
        )
        runs[:, :, :, :, channel] = plane.transpose(0, 3, 1, 4, 2)
