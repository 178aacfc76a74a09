"""Pixels of a step: one piece of memory, laid out before a picture is opened.

The index says how many pixels each sample has, so pictures are decoded straight into their place in the batch
(`stored_images`). They stay pictures there: cutting them into patches takes a CPU a tenth of the time of decoding, and
the device next to none, so it is done there (`ilvr_ds.model.vision.cut_patches`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ilvr_ds.data.images import FACTOR, PATCH, Grid
from ilvr_ds.data.lengths import PATCHES_PER_TOKEN
from ilvr_ds.data.step_memory import StepMemory

PIXEL_ROW = 3 * PATCH * PATCH  # bytes: as many as a patch has


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


def image_pixels(image: Image.Image) -> tuple[np.ndarray, Grid]:
    """The pixels of an RGB image with sides multiples of 28, (h w, 588) uint8, and its grid (1, h, w) in patches.

    Raises ValueError for another image.
    """
    if image.mode != "RGB" or image.width % FACTOR or image.height % FACTOR:
        raise ValueError(f"{image.mode} image of {image.width}x{image.height} pixels")
    return np.asarray(image).reshape(-1, PIXEL_ROW), (1, image.height // PATCH, image.width // PATCH)
