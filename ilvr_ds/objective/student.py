"""The student a recipe asks for."""

from __future__ import annotations

import torch

from ilvr_ds.config import ModelConfig
from ilvr_ds.data.tokens import Vocabulary
from ilvr_ds.model.backbone import Backbone

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}  # the values of model.dtype


def load_student(
    model: ModelConfig, vocabulary: Vocabulary, device: torch.device | str, read_weights: bool = True
) -> Backbone:
    """Read `model.path` on the CPU (the engine moves it).

    Args:
        device: where training will run; decides what attention "auto" is.
        read_weights: False leaves the weights to whoever partitions the parameters.

    Raises:
        ConfigError, CheckpointError, AttentionError: as `Backbone.load`.
    """
    return Backbone.load(
        model.path,
        dtype=DTYPES[model.dtype],
        attention=model.attention,
        device=device,
        gradient_checkpointing=model.gradient_checkpointing,
        train_vision=model.train_vision,
        vocabulary=vocabulary,
        read_weights=read_weights,
    )
