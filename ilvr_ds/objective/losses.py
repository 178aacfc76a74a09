"""The alignment loss and its noise; the cross-entropy is `ilvr_ds.model.loss_head`.

Every loss is a sum with weights that are known before the forward (`PackedBatch.ce_weights`,
`align_weights`), so terms of micro-batches and ranks are added and nothing is divided afterwards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ilvr_ds.model.placement import filled_slots, latent_positions
from ilvr_ds.model.selection import membership


def alignment_loss(
    hidden: Tensor,
    *,
    span_starts: Tensor,
    span_sample: Tensor,
    values: Tensor,
    counts: Tensor,
    noise: Tensor | None,
    align_weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """sum_b align_weight_b (1 - mean over filled latents t of sample b of cos(h[t - 1], z_t + eps_t)).

    h[t - 1] is the hidden state that decoding will feed back at position t, hence the one that is aligned.

    Args:
        hidden: (T, D) after the final norm.
        span_starts, span_sample, counts: (S,) int64; values: (S, K, D); S may be 0.
        noise: eps (S, K, D), or None for none.
        align_weights: (B,) float32.

    Returns:
        the sum () float32 with gradient to `hidden`, and 1 - mean cos (B,) float32 with gradient; 0 for a
        sample without spans, which adds nothing. Cosines are in float32.
    """
    spans, size = values.shape[:2]
    before = latent_positions(span_starts, size).flatten() - 1  # (S * K,)
    states = hidden[before].unflatten(0, (spans, size)).float()  # (S, K, D)
    targets = values.float() if noise is None else values.float() + noise
    cosines = F.cosine_similarity(states, targets, dim=-1) * filled_slots(counts, size)  # (S, K)
    member = membership(span_sample, align_weights.shape[0])  # (S, B)
    latents = member.T @ counts.float()  # (B,)
    per_sample = torch.where(latents > 0, 1 - (member.T @ cosines.sum(1)) / latents.clamp(min=1), 0.0)
    return (align_weights * per_sample).sum(), per_sample


def target_noise(
    sample_numbers: Sequence[int], span_sample: Sequence[int], latent_size: int, width: int, std: float, seed: int
) -> Tensor | None:
    """eps ~ N(0, std^2) for every latent slot, (S, K, D) float32 on the CPU; None if std is 0.

    Each sample draws from a generator of its own, seeded from (seed, sample number): the noise does not depend
    on how samples are packed, on the number of ranks or on the device.
    """
    if std == 0:
        return None
    parts = [torch.empty(0, latent_size, width)]
    for sample in sorted(set(span_sample)):
        generator = torch.Generator().manual_seed(_mixed_seed(seed, sample_numbers[sample]))
        spans = span_sample.count(sample)
        parts.append(torch.randn(spans, latent_size, width, generator=generator) * std)
    return torch.cat(parts)


def _mixed_seed(seed: int, number: int) -> int:
    """63 bits that differ in unrelated ways for neighbouring seeds and numbers."""
    digest = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
