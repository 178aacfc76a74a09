"""Weights from a model folder straight into ZeRO-3 partitions: no rank ever holds more than its pieces.

The objective is built with parameters on the meta device (`Backbone.load(..., read_weights=False)`). Here each of
them becomes a ZeRO-3 parameter, one at a time: DeepSpeed partitions an uninitialised tensor of the full shape, which
is freed at once, and the rank's range [rank * n, (rank + 1) * n), n = ceil(numel / world), is read from the safetensors
file into the piece. Nothing is sent between ranks, and each byte of the files is read by one rank.

On a CPU, memory that is never written is never resident, so the peak is the pieces. On a GPU it is the pieces and one
full parameter (the 7B model's embedding: 1.1 GB).

A teacher starts as the student: its pieces are copies of the student's pieces.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from ilvr_ds.config import Recipe
from ilvr_ds.engine.ds_config import load_ds_config
from ilvr_ds.errors import ConfigError
from ilvr_ds.model.backbone import Backbone
from ilvr_ds.model.folder import ModelFolder


def reads_partitions(recipe: Recipe) -> bool:
    """Whether the run's weights are read by `load_partitioned`: at ZeRO-3, but for hpZ.

    hpZ keeps a second copy of the weights per node, cut otherwise, which DeepSpeed makes from full parameters.
    """
    zero = load_ds_config(recipe.engine.deepspeed)["zero_optimization"]
    return zero["stage"] == 3 and zero.get("zero_hpz_partition_size", 1) == 1


def has_unread_weights(module: nn.Module) -> bool:
    """Whether any parameter has no memory yet."""
    return any(parameter.is_meta for parameter in module.parameters())


@torch.no_grad()
def load_partitioned(module: nn.Module, pairs: list[tuple[str, str]], ds_config: dict[str, Any]) -> None:
    """Give every meta parameter of `module` memory and values, partitioned; every rank calls it.

    Args:
        pairs: (teacher parameter, student parameter); the first becomes a copy of the second.
        ds_config: the full DeepSpeed configuration of the engine to come, stage 3.

    Raises:
        ConfigError: a parameter is neither a backbone's nor a teacher's, or the configuration is not ZeRO-3's.
        CheckpointError: a weight file became shorter since it was opened.
    """
    zero = ds_config["zero_optimization"]
    if zero["stage"] != 3 or zero.get("zero_hpz_partition_size", 1) != 1:
        raise ConfigError("the model was built without its weights, which only ZeRO-3 without hpZ reads piece by piece")
    sources = _sources(module)
    student_of = dict(pairs)
    converter = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=ds_config, dtype=_dtype(module))
    made: dict[int, nn.Parameter] = {}  # by id of the meta parameter; tied names share one
    partitioned: dict[str, nn.Parameter] = {}
    for name, parameter in module.named_parameters():
        if not parameter.is_meta:
            raise ConfigError(f"parameter {name!r} has its values already, others have not: build all without weights")
        if name not in sources and name not in student_of:
            raise ConfigError(f"parameter {name!r} is built without weights, and no model folder is known for it")
    order = sorted(module.named_parameters(), key=lambda item: item[0] not in sources)  # students before teachers
    for name, parameter in order:
        whole = nn.Parameter(
            torch.empty(parameter.shape, dtype=parameter.dtype, device=converter.local_device),
            requires_grad=parameter.requires_grad,
        )
        converter._convert_to_deepspeed_param(whole)
        whole.partition()  # makes this rank's piece, of whatever was in memory, and frees the rest
        if name in sources:
            folder, inside = sources[name]
            _read_piece(whole, folder, inside)
        else:
            whole.ds_tensor.copy_(partitioned[student_of[name]].ds_tensor)
        made[id(parameter)], partitioned[name] = whole, whole
    _replace(module, made)
    device = torch.device(get_accelerator().current_device_name())
    for submodule in module.modules():
        for name, buffer in submodule.named_buffers(recurse=False):
            setattr(submodule, name, buffer.to(device))
        if isinstance(submodule, Backbone):
            submodule.unread = None


def _sources(module: nn.Module) -> dict[str, tuple[ModelFolder, str]]:
    """Parameter of the module -> folder that holds it, and its name there."""
    found = {}
    for prefix, backbone in module.named_modules():
        if isinstance(backbone, Backbone) and backbone.unread is not None:
            for name, _ in backbone.network.named_parameters():
                found[f"{prefix}.network.{name}" if prefix else f"network.{name}"] = (backbone.unread, name)
    return found


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _read_piece(parameter: nn.Parameter, folder: ModelFolder, name: str) -> None:
    """Read this rank's range of the flattened parameter into its piece; padding behind the end stays as it is."""
    length = parameter.ds_tensor.numel()
    start = min(length * parameter.ds_zero_partition_rank, parameter.ds_numel)
    folder.read(name, start, parameter.ds_tensor[: min(length, parameter.ds_numel - start)])


def _replace(module: nn.Module, made: dict[int, nn.Parameter]) -> None:
    """Put the new parameters where the old ones were, tied ones in all their places."""
    for submodule in module.modules():
        for name, parameter in submodule.named_parameters(recurse=False, remove_duplicate=False):
            setattr(submodule, name, made[id(parameter)])
