"""What the vision tower needs besides its weights: normalised patches, and index tensors made on the CPU.

Qwen2.5-VL's tower derives positions, windows and sequence bounds from the grids. Done inside the forward on a
CUDA device that is one synchronisation each; `vision_layout` does it on the CPU from Python integers, and the
tower takes the result as keyword arguments.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from ilvr_ds.data.images import MERGE, PATCH
from ilvr_ds.data.packing import FLOAT_PATCH
from ilvr_ds.data.pixels import PIXEL_ROW
from ilvr_ds.errors import BatchError

# mean and standard deviation of Qwen2.5-VL's image processor (those of CLIP), for values in 0..1
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

Grid = tuple[int, int, int]  # (t, h, w) in patches
# a grey 2x2-patch image: what a micro-batch without images runs through the tower, so that every rank calls it
DUMMY_GRID: Grid = (1, 2, 2)


@dataclass(frozen=True)
class VisionLayout:
    """Keyword arguments of Qwen2.5-VL's vision tower for P patches in G images, on the CPU."""

    position_ids: Tensor  # (P, 2) int64: row and column of each patch, in merge-block order
    cu_seqlens: Tensor  # (frames + 1,) int32: full-attention bounds
    max_seqlen: int
    window_index: Tensor  # (P / 4,) int64: order of merged tokens by window
    cu_window_seqlens: Tensor  # (windows + 1,) int32: window-attention bounds
    max_window_seqlen: int

    def kwargs(self, device: torch.device) -> dict[str, Tensor | int]:
        """The arguments by the names the tower reads, tensors on `device`."""
        return {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }


def vision_layout(grids: tuple[Grid, ...], merge: int, window_size: int, patch_size: int) -> VisionLayout:
    """Positions, windows and bounds of images with `grids` (at least one).

    Args:
        merge: patches per side that become one token (`spatial_merge_size`).
        window_size, patch_size: of the vision config, in pixels.
    """
    grid_tensor = torch.tensor(grids, dtype=torch.int64)  # (G, 3), CPU
    cu_seqlens = get_vision_cu_seqlens(grid_tensor)
    window_index, cu_window_seqlens = get_vision_window_index(grid_tensor, merge, window_size, patch_size)
    return VisionLayout(
        position_ids=get_vision_position_ids(grid_tensor, merge),
        cu_seqlens=cu_seqlens,
        max_seqlen=int(cu_seqlens.diff().max()),
        window_index=window_index,
        cu_window_seqlens=cu_window_seqlens,
        max_window_seqlen=int(cu_window_seqlens.diff().max()),
    )


def merged_tokens(grid: Grid, merge: int = 2) -> int:
    """Visual tokens of an image: t h w / merge^2."""
    t, h, w = grid
    return t * h * w // merge**2


def patches_of(pixels: Tensor, grids: tuple[Grid, ...]) -> Tensor:
    """What the tower takes, (P, 1176) float32 [channel, frame, row, column], of a batch's pixels, on their device.

    Args:
        pixels: (P, 588) uint8 or (P, 1176) floats, as in `PackedBatch`; the latter pass through unchanged.
        grids: (1, h, w) of each image.

    Raises:
        BatchError: another shape or type.
    """
    if pixels.ndim == 2 and pixels.shape[1] == FLOAT_PATCH and pixels.is_floating_point():
        return pixels
    if pixels.ndim != 2 or pixels.shape[1] != PIXEL_ROW or pixels.dtype != torch.uint8:
        raise BatchError(
            f"pixels of shape {tuple(pixels.shape)} and type {pixels.dtype}: expected (P, {PIXEL_ROW}) uint8 or "
            f"(P, {FLOAT_PATCH}) floats"
        )
    return normalise_patches(cut_patches(pixels, grids))


def cut_patches(pixels: Tensor, grids: tuple[Grid, ...]) -> Tensor:
    """Pixels as in `PackedBatch` to patches, both (P, 588) uint8: every row becomes one patch [channel, row, column].

    Patches of an image are in Qwen's merge-block order: the four of a merged token are neighbours, blocks run row by
    row. Neighbouring images of one size are cut together, in one kernel.
    """
    patches = torch.empty_like(pixels)
    begin = 0
    for (_, h, w), equal in itertools.groupby(grids):
        n = len(list(equal))
        rows = slice(begin, begin + n * h * w)
        begin = rows.stop
        # image, block row, row, y, block column, column, x, channel
        images = pixels[rows].view(n, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH, 3)
        # image, block row, block column, row, column, channel, y, x
        blocks = patches[rows].view(n, h // MERGE, w // MERGE, MERGE, MERGE, 3, PATCH, PATCH)
        blocks.copy_(images.permute(0, 1, 4, 2, 5, 7, 3, 6))
    return patches


def normalise_patches(patches: Tensor) -> Tensor:
    """(P, 588) uint8 [channel, row, column] -> (P, 1176) float32 [channel, frame, row, column].

    x = (byte / 255 - mean_c) / std_c, the still image standing for both frames of a temporal patch, as in
    Qwen2.5-VL's image processor.
    """
    mean, std = (torch.tensor(v, device=patches.device)[:, None] for v in (IMAGE_MEAN, IMAGE_STD))  # (3, 1)
    values = (patches.unflatten(1, (3, -1)).float() / 255 - mean) / std  # (P, 3, 196)
    return values.unsqueeze(2).expand(-1, -1, 2, -1).flatten(1)
