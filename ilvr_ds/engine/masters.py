"""Where the fp32 master weights and Adam moments of a parameter lie on this rank, per ZeRO stage.

This is the one place that knows DeepSpeed's flat buffers. `check_alignment` in `partition.py` proves at build
time, on the values, that the addresses are right.
"""

from __future__ import annotations

from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor, nn


@dataclass(frozen=True)
class Slot:
    """This rank's fp32 copy of elements [start, start + numel) of a flattened parameter."""

    flat: Tensor | None  # the tensor the optimizer steps (its state is keyed by it); None where numel is 0
    offset: int  # first element of the range inside the flattened `flat`
    start: int
    numel: int

    def view(self, tensor: Tensor | None = None) -> Tensor:
        """(numel,) view of the range in `flat`, or in a moment shaped like it."""
        whole = self.flat if tensor is None else tensor
        return torch.empty(0) if whole is None else whole.detach().view(-1).narrow(0, self.offset, self.numel)


def torch_optimizer(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    """The AdamW that holds the moments, inside whatever DeepSpeed wrapped around it."""
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def find_slots(engine: deepspeed.DeepSpeedEngine, parameters: list[nn.Parameter]) -> list[Slot]:
    """The slot of each parameter; all must be trainable parameters of the engine.

    Slots hold until the engine is rebuilt: DeepSpeed updates its flat buffers in place.
    """
    stage = engine.zero_optimization_stage()
    if stage == 3:
        return [_sharded_slot(engine.optimizer, p) for p in parameters]
    if stage in (1, 2):
        return [_flat_slot(engine.optimizer, p) for p in parameters]
    master_of = {id(p): p for p in parameters}  # fp32: the weights are the masters
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        for lows, highs in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
            master_of.update((id(low), high) for low, high in zip(lows, highs, strict=True))
    return [Slot(master_of[id(p)], 0, 0, p.numel()) for p in parameters]


def _flat_slot(optimizer, parameter: nn.Parameter) -> Slot:
    """Stages 1, 2: the parameter's overlap with this rank's slice of its group's flat master."""
    mapping = parameter._hp_mapping
    if mapping is None:  # another rank's slice
        return Slot(None, 0, 0, 0)
    if isinstance(optimizer, BF16_Optimizer):
        flats = optimizer.fp32_groups_flat_partition
    else:
        flats = optimizer.single_partition_of_fp32_groups
    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Slot(flats[mapping.param_group_index], high.start, low.start, low.numel)


def _sharded_slot(optimizer, parameter: nn.Parameter) -> Slot:
    """Stage 3: [rank * n, (rank + 1) * n) with n = ceil(numel / world), cut off at numel.

    The rest of the last ranks' shards is padding: uninitialised memory, not part of any slot.
    """
    group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = min(dist.get_rank(optimizer.dp_process_group) * length, parameter.ds_numel)
    numel = min(length, parameter.ds_numel - start)
    return Slot(optimizer.fp32_partitioned_groups_flat[group], offset, start, numel)
