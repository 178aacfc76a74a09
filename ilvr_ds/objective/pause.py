"""The pause control: spans are K pad tokens with the pad's embedding; nothing tells them what to hold."""

from __future__ import annotations

import torch
from torch import nn

from ilvr_ds.config import LatentConfig, LossConfig
from ilvr_ds.contracts import LossTerms, PackedBatch
from ilvr_ds.model.backbone import Backbone
from ilvr_ds.model.host_plan import to_device
from ilvr_ds.objective.batch import require_latent_size, without_helpers
from ilvr_ds.objective.forced import forced_terms


class PauseObjective(nn.Module):
    """loss = ce_weight * CE, summed over a packed batch; no teacher, no alignment, no helper image is looked at.

    The pads give the model K more steps to compute in, which any gain of latents must be compared with. On shards
    without spans (`build_shards --assistant text` or `answer`) this is plain supervised fine-tuning.
    """

    def __init__(self, student: Backbone, latent: LatentConfig, loss: LossConfig):
        super().__init__()
        self.student = student
        self.latent = latent
        self.loss = loss

    def ema_pairs(self) -> list[tuple[str, str]]:
        """Nothing follows the student."""
        return []

    def forward(self, batch: PackedBatch, noise_seed: int) -> LossTerms:
        """Loss of one packed batch; `align` and `latents` (filled ones) are 0.

        Args:
            batch: best on the CPU (pinned); it is moved to the model's device here.
            noise_seed: not used: there are no targets to add noise to.

        Raises:
            BatchError: spans of another size than `latent.size`, or pixels that do not fit the grids.
        """
        require_latent_size(batch, self.latent.size)
        batch = to_device(without_helpers(batch), self.student.device)
        features = self.student.encode_images(batch.pixels, batch.grids)  # (N, D)
        spans = len(batch.span_starts)
        return forced_terms(
            self.student,
            batch,
            features,
            values=features.new_zeros(spans, self.latent.size, self.student.head.in_features),
            counts=torch.zeros(spans, dtype=torch.int64, device=features.device),
            noise=None,
            coverage_bound=torch.zeros(spans, dtype=torch.bool, device=features.device),
            loss=self.loss,
        )
