"""Stage 1 as one module: student, teacher and both losses, so that one DeepSpeed engine can hold it all."""

from __future__ import annotations

import torch
from torch import nn

from ilvr_ds.config import LatentConfig, LossConfig, Recipe
from ilvr_ds.contracts import LossTerms, PackedBatch
from ilvr_ds.data.tokens import Vocabulary
from ilvr_ds.errors import ConfigError
from ilvr_ds.model.backbone import Backbone
from ilvr_ds.model.host_plan import host_plan, to_device
from ilvr_ds.model.teacher import Teacher
from ilvr_ds.objective.batch import require_latent_size
from ilvr_ds.objective.forced import forced_terms, noise_for
from ilvr_ds.objective.student import load_student


class AlignmentObjective(nn.Module):
    """loss = ce_weight * CE + sim_weight * (1 - mean cos), summed over a packed batch.

    The sequence of module calls is the same for every batch on every rank, whatever it holds (no image, no
    span, no prompt, no supervised token), and every trainable module takes part in backward: collectives of
    partitioned parameters stay matched.
    """

    def __init__(self, student: Backbone, teacher: Teacher, latent: LatentConfig, loss: LossConfig):
        """Own both models. The teacher's parameters never require a gradient."""
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.latent = latent
        self.loss = loss

    @classmethod
    def from_recipe(
        cls, recipe: Recipe, vocabulary: Vocabulary, device: torch.device | str = "cpu", read_weights: bool = True
    ) -> AlignmentObjective:
        """Load the student, copy the teacher from it (both on the CPU; the engine moves them).

        Args:
            device: where training will run; decides what attention "auto" is.
            read_weights: False leaves the weights to whoever partitions the parameters (ZeRO-3).

        Raises:
            ConfigError, CheckpointError, AttentionError: as `Backbone.load`.
        """
        if recipe.teacher is None:
            raise ConfigError("teacher=None: alignment needs a teacher; see latent.source")
        student = load_student(recipe.model, vocabulary, device, read_weights)
        return cls(student, Teacher.of(student, recipe.teacher), recipe.latent, recipe.loss)

    def ema_pairs(self) -> list[tuple[str, str]]:
        """(teacher's, student's) names as in `named_parameters()`, for every parameter of the language model."""
        prefixes = {}
        for name, module in self.named_modules():
            if module is self.teacher.language_model:
                prefixes["teacher"] = name
            elif module is self.student.language_model:
                prefixes["student"] = name
        return [
            (f"{prefixes['teacher']}.{name}", f"{prefixes['student']}.{name}")
            for name, _ in self.teacher.language_model.named_parameters()
        ]

    def forward(self, batch: PackedBatch, noise_seed: int) -> LossTerms:
        """Losses of one packed batch.

        Args:
            batch: best on the CPU (pinned); it is moved to the model's device here, after the counts that
                decide shapes were read from it.
            noise_seed: with each sample's number it decides the noise on that sample's targets.

        Raises:
            BatchError: spans of another size than `latent.size`, or pixels that do not fit the grids.
        """
        require_latent_size(batch, self.latent.size)
        plan = host_plan(batch)
        noise = noise_for(batch, plan, self.latent, self.student.head.in_features, noise_seed)  # (S, K, D)
        batch = to_device(batch, self.student.device)

        features = self.student.encode_images(batch.pixels, batch.grids)  # (N + M, D), inputs then helpers
        input_features = features[: batch.image_positions.shape[0]]
        helper_features = features[batch.image_positions.shape[0] :]
        targets = self.teacher.targets(batch, plan, input_features, helper_features)  # without a graph
        return forced_terms(
            self.student,
            batch,
            input_features,
            values=targets.values,
            counts=targets.counts,
            noise=noise,
            coverage_bound=targets.coverage_bound,
            loss=self.loss,
        )
