"""Mirage's stage 1 as a control: the whole helper image, pooled, is the target; no language-model teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ilvr_ds.config import LatentConfig, LossConfig
from ilvr_ds.contracts import LossTerms, PackedBatch
from ilvr_ds.model.backbone import Backbone
from ilvr_ds.model.host_plan import host_plan, to_device
from ilvr_ds.model.vision import merged_tokens
from ilvr_ds.objective.batch import require_latent_size
from ilvr_ds.objective.forced import forced_terms, noise_for


def pool_to(features: Tensor, size: int) -> Tensor:
    """Features (P, D) of one image in row-major order -> (K, D) means of K contiguous runs.

    z_k = mean of rows floor(k P / K) to ceil((k + 1) P / K), k = 0..K-1: torch's 1-D adaptive average. Runs overlap
    where K does not divide P; with P < K rows are repeated. Computed in float32, returned in the features' type.
    """
    return F.adaptive_avg_pool1d(features.float().T[None], size)[0].T.to(features.dtype)


class PooledObjective(nn.Module):
    """loss = ce_weight * CE + sim_weight * (1 - mean cos), targets z_1..z_K = the pooled helper image.

    Mirage (arXiv 2506.17218) weighs them 0.1 and 1 and adds no noise; both are the recipe's. All K latents of every
    span carry a target. The same modules are called whatever the batch holds.
    """

    def __init__(self, student: Backbone, latent: LatentConfig, loss: LossConfig):
        super().__init__()
        self.student = student
        self.latent = latent
        self.loss = loss
        self.merge = student.network.config.vision_config.spatial_merge_size

    def ema_pairs(self) -> list[tuple[str, str]]:
        """Nothing follows the student."""
        return []

    def forward(self, batch: PackedBatch, noise_seed: int) -> LossTerms:
        """Losses of one packed batch.

        Args:
            batch: best on the CPU (pinned); it is moved to the model's device here.
            noise_seed: with each sample's number it decides the noise on that sample's targets.

        Raises:
            BatchError: spans of another size than `latent.size`, or pixels that do not fit the grids.
        """
        require_latent_size(batch, self.latent.size)
        noise = noise_for(batch, host_plan(batch), self.latent, self.student.head.in_features, noise_seed)
        batch = to_device(batch, self.student.device)
        features = self.student.encode_images(batch.pixels, batch.grids)  # (N + M, D), inputs then helpers
        inputs = batch.image_positions.shape[0]
        values = self._targets(batch, features[inputs:].detach())
        spans = len(values)
        return forced_terms(
            self.student,
            batch,
            features[:inputs],
            values=values,
            counts=torch.full((spans,), self.latent.size, dtype=torch.int64, device=values.device),
            noise=noise,
            coverage_bound=torch.zeros(spans, dtype=torch.bool, device=values.device),
            loss=self.loss,
        )

    def _targets(self, batch: PackedBatch, helper_features: Tensor) -> Tensor:
        """(M, D) features of the S helper images -> (S, K, D)."""
        sizes = [merged_tokens(grid, self.merge) for grid in batch.grids[batch.num_input_images :]]
        if not sizes:
            return helper_features.new_zeros(0, self.latent.size, helper_features.shape[1])
        return torch.stack([pool_to(image, self.latent.size) for image in helper_features.split(sizes)])
