"""The vision tower's patch embedding as one matrix product.

Upstream writes it as a 3-D convolution whose kernel covers its whole input, (P, C, T, 14, 14) -> (P, D, 1, 1, 1).
That is `patch @ weight.T`; convolution libraries do not notice, and take a slow path for it (in bfloat16 on a CPU
11 microseconds a patch instead of under 1; several releases of cuDNN are as bad).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PatchProjection(nn.Conv3d):
    """A Conv3d (same parameter, same name, same result) for inputs exactly as large as its kernel."""

    def forward(self, patches: Tensor) -> Tensor:
        """(P, C, T, h, w) with (T, h, w) the kernel size -> (P, D, 1, 1, 1).

        Raises:
            ValueError: a larger input, which would need a real convolution.
        """
        if tuple(patches.shape[2:]) != self.kernel_size:
            raise ValueError(f"patches of {tuple(patches.shape[2:])}, the kernel is {self.kernel_size}")
        flat = nn.functional.linear(patches.flatten(1), self.weight.flatten(1), self.bias)  # (P, D)
        return flat[:, :, None, None, None]


def replace_patch_embedding(vision_tower: nn.Module) -> None:
    """Put a `PatchProjection` in the place of `vision_tower.patch_embed.proj`, on the very same weight."""
    old = vision_tower.patch_embed.proj
    with torch.device("meta"):
        new = PatchProjection(old.in_channels, old.out_channels, old.kernel_size, old.stride, bias=old.bias is not None)
    new.weight, new.bias = old.weight, old.bias
    vision_tower.patch_embed.proj = new
