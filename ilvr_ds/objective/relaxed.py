"""Stage 2 as one module: the student alone, its latents its own, cross-entropy on the text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ilvr_ds.config import LatentConfig, LossConfig
from ilvr_ds.contracts import LossTerms, PackedBatch
from ilvr_ds.model.backbone import Backbone
from ilvr_ds.model.host_plan import to_device
from ilvr_ds.model.latent_chain import forward_with_chain, plan_chain, rounds_needed
from ilvr_ds.objective.batch import require_latent_size, without_helpers


def alone(number: int) -> int:
    """The agreement of one rank with itself."""
    return number


class RelaxedObjective(nn.Module):
    """loss = ce_weight * CE, summed over a packed batch; no teacher, no alignment.

    Every latent pad's input is the student's hidden state before it (`ilvr_ds.model.latent_chain`), with gradient
    through the whole chain. Helper images are not looked at.

    The sequence of module calls depends on the largest number of spans in one sample, on all ranks: `agree` turns
    this rank's number into the largest of all ranks', once per micro-batch.
    """

    def __init__(self, student: Backbone, latent: LatentConfig, loss: LossConfig, agree: Callable[[int], int] = alone):
        """`agree`: the maximum over ranks of an integer; every rank calls it equally often."""
        super().__init__()
        self.student = student
        self.latent = latent
        self.loss = loss
        self.agree = agree

    def ema_pairs(self) -> list[tuple[str, str]]:
        """Nothing follows the student."""
        return []

    def forward(self, batch: PackedBatch, noise_seed: int) -> LossTerms:
        """Loss of one packed batch; `align` is 0 and `latents` counts K for every span.

        Args:
            batch: best on the CPU (pinned): its calls are planned there before it is moved to the model's device.
            noise_seed: not used: there are no targets to add noise to.

        Raises:
            BatchError: spans of another size than `latent.size`, or pixels that do not fit the grids.
        """
        require_latent_size(batch, self.latent.size)
        device = self.student.device
        plan = plan_chain(batch, self.agree(rounds_needed(batch))).to(device)
        spans = 0 if batch.is_filler else len(batch.span_starts)  # a filler's span is nobody's
        batch = to_device(without_helpers(batch), device)

        features = self.student.encode_images(batch.pixels, batch.grids)  # (N, D)
        hidden = forward_with_chain(self.student, batch, features, plan).hidden  # (T, D)
        ce, ce_per_token = self.student.head(hidden[batch.supervised_positions], batch.targets, batch.ce_weights)
        zero = torch.zeros((), device=device)
        return LossTerms(
            loss=self.loss.ce_weight * ce,
            ce=ce.detach(),
            align=zero,
            ce_per_token=ce_per_token,
            align_per_sample=torch.zeros(len(batch.sample_ids), device=device),
            latents=torch.tensor(spans * self.latent.size, device=device),
            spans=torch.tensor(spans, device=device),
            coverage_bound=torch.zeros((), dtype=torch.int64, device=device),
        )
