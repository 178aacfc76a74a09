"""The student's forward with given latents and its losses: what stage 1 and its controls share.

An objective says where the targets come from; everything after that is here, once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ilvr_ds.config import LatentConfig, LossConfig
from ilvr_ds.contracts import LossTerms, PackedBatch
from ilvr_ds.model.backbone import Backbone
from ilvr_ds.model.host_plan import HostPlan
from ilvr_ds.model.student import forward_with_targets
from ilvr_ds.objective.losses import alignment_loss, target_noise


def noise_for(batch: PackedBatch, plan: HostPlan, latent: LatentConfig, width: int, seed: int) -> Tensor | None:
    """`target_noise` of a batch's spans: (S, K, D) float32 on the CPU, None without noise."""
    return target_noise(batch.sample_numbers, plan.span_sample, latent.size, width, latent.noise_std, seed)


def forced_terms(
    student: Backbone,
    batch: PackedBatch,
    input_features: Tensor,
    *,
    values: Tensor,
    counts: Tensor,
    noise: Tensor | None,
    coverage_bound: Tensor,
    loss: LossConfig,
) -> LossTerms:
    """loss = ce_weight * CE + sim_weight * (1 - mean cos(h[t - 1], z_t + eps)), summed over a packed batch.

    The first K* pads of each span carry its targets, the others keep the pad token's embedding. With K* = 0
    everywhere this is plain cross-entropy over pads, and `align` is 0.

    Args:
        batch: on the student's device.
        input_features: (N, D) of the input images, in the order of `batch.image_positions`.
        values: (S, K, D) targets, without a graph, ignored beyond `counts` (S,) int64, K*.
        noise: eps (S, K, D), or None.
        coverage_bound: (S,) bool.
    """
    hidden = forward_with_targets(student, batch, input_features, values, counts).hidden  # (T, D)
    ce, ce_per_token = student.head(hidden[batch.supervised_positions], batch.targets, batch.ce_weights)
    align, align_per_sample = alignment_loss(
        hidden,
        span_starts=batch.span_starts,
        span_sample=batch.span_sample,
        values=values,
        counts=counts,
        noise=None if noise is None else noise.to(hidden.device, non_blocking=True),
        align_weights=batch.align_weights,
    )
    real = int(not batch.is_filler)  # a filler's span is nobody's: it must not count in the means of a step
    return LossTerms(
        loss=loss.ce_weight * ce + loss.sim_weight * align,
        ce=ce.detach(),
        align=align.detach(),
        ce_per_token=ce_per_token,
        align_per_sample=align_per_sample.detach(),
        latents=counts.sum() * real,
        spans=torch.tensor(len(batch.span_starts) * real, device=hidden.device),
        coverage_bound=coverage_bound.sum() * real,
    )
