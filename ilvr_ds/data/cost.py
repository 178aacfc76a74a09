"""What a sample costs: FLOPs of its text and of its images, for balancing ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ilvr_ds.data.lengths import Lengths


@dataclass(frozen=True)
class CostModel:
    """FLOPs a sample costs in one step, as integers so that every rank finds the same bins.

    text = per_token * L + per_token_squared * L^2 + per_supervised * N and vision = per_patch * P, in units of 1000
    FLOPs. They are kept apart because ranks meet twice in a micro-step: after the images and after the text.

    The default is Qwen2.5-VL-7B with a frozen vision tower, a teacher and gradient checkpointing.
    """

    per_token: int = 65_252_884_480  # FLOPs; see from_dims
    per_token_squared: int = 1_003_520
    per_patch: int = 1_270_415_360
    per_supervised: int = 3_269_984_256

    @classmethod
    def from_dims(
        cls,
        *,
        hidden: int,
        layers: int,
        intermediate: int,
        kv_width: int,
        vocabulary: int,
        vision_hidden: int,
        vision_layers: int,
        vision_intermediate: int,
        recompute: bool = True,
        train_vision: bool = False,
        teacher: bool = True,
    ) -> CostModel:
        """From the model's dimensions; one multiplication and one addition are two FLOPs.

        A decoder layer has 2h^2 (query, output) + 2h*kv (key, value) + 3h*m (MLP) weights, two FLOPs each per
        token, and causal attention costs 2 L^2 h. The student runs it forward, backward (twice the forward)
        and, with gradient checkpointing (`recompute`), forward again; a teacher once. The vision tower runs
        forward once, for both. Its attention windows are 64 patches; the few layers with full attention are
        counted as windows too, since the index does not keep the size of each image (an error of a few %).

        Args:
            kv_width: key-value heads x head size.
        """
        passes = 3 + int(recompute) + int(teacher)
        weights = 2 * hidden * hidden + 2 * hidden * kv_width + 3 * hidden * intermediate
        vision_passes = 3 + int(recompute) if train_vision else 1
        vision_weights = 4 * vision_hidden * vision_hidden + 3 * vision_hidden * vision_intermediate
        return cls(
            per_token=2 * weights * layers * passes,
            per_token_squared=2 * hidden * layers * passes,
            per_patch=vision_passes * vision_layers * (2 * vision_weights + 4 * 64 * vision_hidden),
            per_supervised=2 * hidden * vocabulary * 3,
        )

    def text(self, lengths: Lengths) -> np.ndarray:
        """(n,) int64 cost of every sample's language model and head, in units of 1000 FLOPs."""
        flops = self.per_token_squared * lengths.tokens
        flops += self.per_token
        flops *= lengths.tokens
        flops += self.per_supervised * lengths.supervised
        flops //= 1000
        return flops

    def vision(self, lengths: Lengths) -> np.ndarray:
        """(n,) int64 cost of every sample's images, input and helpers, in units of 1000 FLOPs."""
        return self.per_patch * lengths.patches // 1000

    def __call__(self, lengths: Lengths) -> np.ndarray:
        """(n,) int64 cost of every sample, in units of 1000 FLOPs: text and vision."""
        return self.text(lengths) + self.vision(lengths)
