"""Which model is this? Names and shapes of all parameters, and a checksum of those no checkpoint stores.

Frozen parameters (the vision tower, LoRA's base) come from the model folder and are not in a checkpoint. A
resume on another base model would train on quietly, so their checksums are stored and compared.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ilvr_ds.engine.build import Engine
from ilvr_ds.engine.partition import full_shape
from ilvr_ds.errors import CheckpointError

_CHUNK = 2**22


def describe_model(engine: Engine) -> dict[str, Any]:
    """{"dtype", "parameters": [[name, shape, "trained" | "averaged" | "frozen"], ...], "frozen": {name: checksum}}.

    Does not depend on rank, world size or ZeRO stage. Every rank must call it: at stage 3 the checksums of
    the shards are summed in one all-reduce.
    """
    averaged = {piece.name for piece in engine.ema.pieces} if engine.ema else set()
    parameters, frozen = [], {}
    for name, parameter in engine.deepspeed.module.named_parameters():
        kind = "trained" if parameter.requires_grad else "averaged" if name in averaged else "frozen"
        parameters.append([name, list(full_shape(parameter)), kind])
        if kind == "frozen":
            frozen[name] = parameter
    sums = [_checksum(p) for p in frozen.values()]
    if engine.stage == 3 and sums:
        total = torch.stack(sums).to(engine.device)
        dist.all_reduce(total)
        sums = list(total)
    return {
        "dtype": engine.recipe.model.dtype,
        "parameters": parameters,
        "frozen": {name: as_text(value) for name, value in zip(frozen, sums, strict=True)},
    }


def check_same_model(saved: dict[str, Any], now: dict[str, Any], origin: str) -> None:
    """Raise CheckpointError naming the first parameter in which two descriptions differ."""
    if saved["dtype"] != now["dtype"]:
        raise CheckpointError(f"{origin}: saved with model.dtype={saved['dtype']}, this run has {now['dtype']}")
    parameters = zip(saved["parameters"], now["parameters"], strict=False)
    for (name, shape, kind), (other, other_shape, other_kind) in parameters:
        if name != other:
            raise CheckpointError(f"{origin}: another model: it has parameter {name!r} where this one has {other!r}")
        if shape != other_shape:
            raise CheckpointError(f"{origin}: another model: {name!r} has shape {shape}, this model's is {other_shape}")
        if kind != other_kind:
            raise CheckpointError(f"{origin}: {name!r} was {kind}, in this run it is {other_kind}; use the same recipe")
    longer, shorter = len(saved["parameters"]), len(now["parameters"])
    if longer != shorter:
        extra = (saved if longer > shorter else now)["parameters"][min(longer, shorter)][0]
        where = "the checkpoint" if longer > shorter else "this model"
        raise CheckpointError(f"{origin}: another model: only {where} has parameter {extra!r}")
    for name, value in saved["frozen"].items():
        if now["frozen"][name] != value:
            raise CheckpointError(
                f"{origin}: frozen parameter {name!r} has other values than in the model folder it was trained from; "
                "set model.path to that folder"
            )


def as_text(value: Tensor) -> str:
    """A checksum () int64 as it stands in model.json: 16 hexadecimal digits."""
    return f"{int(value) % 2**64:016x}"


def _checksum(parameter: nn.Parameter) -> Tensor:
    """() int64: sum over this rank's elements of (bits + 1) * (index * a + b), modulo 2^64; shards simply add up."""
    flat, start = parameter.detach().view(-1), 0
    if hasattr(parameter, "ds_id"):
        length = parameter.ds_tensor.numel()
        start = min(dist.get_rank(parameter.ds_process_group) * length, parameter.ds_numel)
        flat = parameter.ds_tensor.detach()[: min(length, parameter.ds_numel - start)]
    return checksum(flat, start)


def checksum(flat: Tensor, start: int) -> Tensor:
    """() int64: the part of a parameter's checksum that `flat` (n,), its elements from `start` on, adds to it."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for begin in range(0, flat.numel(), _CHUNK):
        bits = flat[begin : begin + _CHUNK].view(integer).to(torch.int64)
        index = torch.arange(start + begin, start + begin + bits.numel(), device=flat.device)
        total += ((bits + 1) * (index * 6364136223846793005 + 1442695040888963407)).sum()
    return total
