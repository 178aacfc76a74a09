"""What samples cost on a recipe's model, and how evenly ranks paid."""

from __future__ import annotations

from collections.abc import Sequence

from ilvr_ds.config import Recipe
from ilvr_ds.data.cost import CostModel
from ilvr_ds.model.backbone import read_config


def cost_model(recipe: Recipe) -> CostModel:
    """What a sample costs on this model, for balancing micro-batches over ranks.

    Whether helper images are encoded is in the lengths (`Lengths.from_index`).
    """
    config = read_config(recipe.model.path)
    text, vision = config.text_config, config.vision_config
    return CostModel.from_dims(
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        intermediate=text.intermediate_size,
        kv_width=text.num_key_value_heads * text.hidden_size // text.num_attention_heads,
        vocabulary=text.vocab_size,
        vision_hidden=vision.hidden_size,
        vision_layers=vision.depth,
        vision_intermediate=vision.intermediate_size,
        recompute=recipe.model.gradient_checkpointing,
        train_vision=recipe.model.train_vision,
        teacher=recipe.teacher is not None,
    )


def imbalance_of(paid: Sequence[Sequence[float]]) -> float:
    """Sum over micro-steps of the dearest rank's cost / sum of the mean cost; `paid`: [micro-step][rank]."""
    mean = sum(sum(micro) / len(micro) for micro in paid)
    return sum(map(max, paid)) / mean if mean else 1.0
