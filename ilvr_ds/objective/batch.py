"""What an objective asks of a batch before it runs."""

from __future__ import annotations

import dataclasses

from ilvr_ds.contracts import PackedBatch
from ilvr_ds.errors import BatchError


def require_latent_size(batch: PackedBatch, size: int) -> None:
    """Raise BatchError unless the batch was packed with the recipe's `latent.size`."""
    if batch.latent_size != size:
        raise BatchError(
            f"samples {batch.sample_ids}: packed with {batch.latent_size} latents per span, latent.size is {size}"
        )


def without_helpers(batch: PackedBatch) -> PackedBatch:
    """The batch with its input images only, for an objective that looks at no helper image.

    Raises BatchError when pixels and grids of the batch do not fit.
    """
    grids = batch.grids[: batch.num_input_images]
    rows = sum(t * h * w for t, h, w in batch.grids)
    if rows != batch.pixels.shape[0]:
        raise BatchError(
            f"samples {batch.sample_ids}: {batch.pixels.shape[0]} rows of pixels, the {len(batch.grids)} grids of the "
            f"batch need {rows}"
        )
    return dataclasses.replace(batch, grids=grids, pixels=batch.pixels[: sum(t * h * w for t, h, w in grids)])
