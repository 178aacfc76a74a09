"""Stage 2's forward the published way: for every latent, run the whole prefix again.

    e[t] = decoder(e[:t])[t - 1] at latent pads, one pad after the other; then decoder(e) once

No cache, so nothing to get wrong: the oracle for `ilvr_ds.model.latent_chain` and the baseline of `stage2.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ilvr_ds.contracts import LossTerms, PackedBatch, StudentOutput
from ilvr_ds.model.backbone import Backbone, packed_position_ids, run_packed
from ilvr_ds.model.host_plan import to_device
from ilvr_ds.model.placement import latent_positions, place_image_features
from ilvr_ds.model.sequence_attention import Bounds


def forward_recomputing(student: Backbone, batch: PackedBatch, input_features: Tensor) -> StudentOutput:
    """Hidden states (T, D) of a packed batch; the n-th latents of all samples are computed in one packed call.

    Args:
        input_features: (N, D) of the input images.
    """
    embeddings = place_image_features(student.embed(batch.input_ids), batch.image_positions, input_features)
    position_ids = packed_position_ids(batch)
    starts = batch.cu_seqlens.tolist()
    pads: list[list[int]] = [[] for _ in batch.sample_ids]
    for sample, positions in zip(
        batch.span_sample.tolist(), latent_positions(batch.span_starts, batch.latent_size).tolist(), strict=True
    ):
        pads[sample] += positions
    for number in range(max(map(len, pads))):
        prefixes = [(starts[b], own[number]) for b, own in enumerate(pads) if len(own) > number]
        tokens = torch.cat([torch.arange(low, high) for low, high in prefixes]).to(embeddings.device)
        lengths = torch.tensor([high - low for low, high in prefixes])
        bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32).to(embeddings.device)
        longest = int(lengths.max())
        hidden = run_packed(
            student.language_model,
            embeddings[tokens],
            position_ids[:, tokens],
            Bounds(bounds, bounds, longest, longest),
        )
        slots = torch.tensor([high for _, high in prefixes], device=embeddings.device)
        embeddings = embeddings.index_copy(0, slots, hidden[bounds[1:].long() - 1])
    return StudentOutput(hidden=student.decode(embeddings, batch))


class RecomputingObjective(nn.Module):
    """Cross-entropy on the text, every latent from a prefix of its own; the interface of the real objective."""

    def __init__(self, student: Backbone, ce_weight: float = 1.0):
        super().__init__()
        self.student = student
        self.ce_weight = ce_weight

    def forward(self, batch: PackedBatch, noise_seed: int) -> LossTerms:
        """Loss of one packed batch."""
        batch = to_device(batch, self.student.device)
        features = self.student.encode_images(batch.pixels, batch.grids)[: batch.image_positions.shape[0]]
        hidden = forward_recomputing(self.student, batch, features).hidden
        ce, per_token = self.student.head(hidden[batch.supervised_positions], batch.targets, batch.ce_weights)
        zero = torch.zeros((), device=hidden.device)
        none = torch.zeros(len(batch.sample_ids), device=hidden.device)
        spans = torch.tensor(len(batch.span_starts))
        return LossTerms(
            self.ce_weight * ce, ce.detach(), zero, per_token, none, spans * batch.latent_size, spans, zero
        )
