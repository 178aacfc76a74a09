"""Which objective a recipe asks for. A stage is a recipe: where the latents come from decides."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ilvr_ds.config import Recipe
from ilvr_ds.data.tokens import Vocabulary
from ilvr_ds.objective.alignment import AlignmentObjective
from ilvr_ds.objective.pause import PauseObjective
from ilvr_ds.objective.pooled import PooledObjective
from ilvr_ds.objective.relaxed import RelaxedObjective, alone
from ilvr_ds.objective.student import load_student

Objective = AlignmentObjective | RelaxedObjective | PooledObjective | PauseObjective


def reads_helpers(recipe: Recipe) -> bool:
    """Whether the objective looks at helper images; if not, nobody decodes them."""
    return recipe.latent.source in ("teacher", "pooled")


def build_objective(
    recipe: Recipe,
    vocabulary: Vocabulary,
    device: torch.device | str = "cpu",
    agree: Callable[[int], int] = alone,
    read_weights: bool = True,
) -> Objective:
    """`latent.source` decides.

    "teacher": student, teacher and alignment; "self": the student with its own latents; "pooled": the student and
    alignment with the pooled helper image; "pause": the student with empty pads.

    Args:
        device: where training will run.
        agree: the maximum of an integer over ranks; see `RelaxedObjective`.
        read_weights: False leaves the weights to whoever partitions the parameters (ZeRO-3).

    Raises:
        ConfigError, CheckpointError, AttentionError: as `Backbone.load`.
    """
    if recipe.latent.source == "teacher":
        return AlignmentObjective.from_recipe(recipe, vocabulary, device, read_weights)
    student = load_student(recipe.model, vocabulary, device, read_weights)
    match recipe.latent.source:
        case "self":
            return RelaxedObjective(student, recipe.latent, recipe.loss, agree)
        case "pooled":
            return PooledObjective(student, recipe.latent, recipe.loss)
        case "pause":
            return PauseObjective(student, recipe.latent, recipe.loss)
