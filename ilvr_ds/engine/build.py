"""Build the DeepSpeed engine around an objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor, nn

from ilvr_ds.config import Recipe
from ilvr_ds.contracts import LossTerms, PackedBatch
from ilvr_ds.engine.distributed import init_distributed
from ilvr_ds.engine.ds_config import compose_ds_config, load_ds_config, offloads_optimizer
from ilvr_ds.engine.ema import ShardedEma
from ilvr_ds.engine.optimizer import build_optimizer
from ilvr_ds.engine.partitioned_load import has_unread_weights, load_partitioned
from ilvr_ds.errors import ConfigError


class LossModule(nn.Module):
    """What DeepSpeed sees: the objective's children under their own names, and a forward that returns a tuple.

    DeepSpeed finds tensors only in tuples, lists and dicts, and starts its backward bookkeeping from those it
    finds; a `LossTerms` would be invisible to it. The objective itself is not a sub-module here, so parameter
    names (and names in checkpoints) are the objective's own.
    """

    def __init__(self, objective: nn.Module):
        super().__init__()
        for name, _ in (*objective.named_parameters(recurse=False), *objective.named_buffers(recurse=False)):
            raise ConfigError(f"the objective holds {name!r} itself: move it into a sub-module")
        self._objective = (objective,)  # in a tuple, so that nn.Module does not register it
        for name, child in objective.named_children():
            self.add_module(name, child)

    def forward(self, batch: PackedBatch, noise_seed: int) -> tuple[Tensor, LossTerms]:
        """The loss tensor DeepSpeed hooks, and the objective's terms."""
        terms = self._objective[0](batch, noise_seed)
        return terms.loss, terms


@dataclass
class Engine:
    """A built engine. `deepspeed` owns the parameters, `module` is the objective they belong to."""

    deepspeed: deepspeed.DeepSpeedEngine
    module: nn.Module
    ema: ShardedEma | None  # None: the objective has no teacher
    rank: int
    world: int
    device: torch.device
    recipe: Recipe

    @property
    def stage(self) -> int:
        """ZeRO stage, 0 to 3."""
        return self.deepspeed.zero_optimization_stage()


def build_engine(module: nn.Module, recipe: Recipe, memory: dict[str, Any] | None = None) -> Engine:
    """Initialise DeepSpeed around an objective and attach the moving average to its teacher.

    Args:
        module: `forward(batch, noise_seed) -> LossTerms`, and `ema_pairs() -> [(teacher name, student name)]`
            (empty: no teacher). Weights may be in any floating dtype; they are cast to `recipe.model.dtype`.
            Adapters (LoRA) must be added before this call. Built without weights (on the meta device), it gets
            them here, straight into ZeRO-3 partitions; see `partitioned_load`.
        recipe: precision, optimizer, teacher decay, and the path of the ds_configs file.
        memory: the content of a ds_configs file, in place of the file.

    Raises:
        ConfigError: see `load_ds_config`, `load_partitioned`, `build_optimizer`, `ShardedEma`.
    """
    rank, world, device = init_distributed()
    tree = load_ds_config(recipe.engine.deepspeed) if memory is None else memory
    stage = tree["zero_optimization"]["stage"]
    dtype = getattr(torch, recipe.model.dtype)
    for parameter in module.parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(dtype)
    wrapped = LossModule(module)
    config = compose_ds_config(tree, recipe)
    if stage == 3:
        _bound_reuse(config["zero_optimization"], sum(p.numel() for p in wrapped.parameters()))
    if has_unread_weights(wrapped):
        load_partitioned(wrapped, module.ema_pairs(), config)
    optimizer = build_optimizer(
        wrapped,
        recipe.optimizer,
        offload=offloads_optimizer(tree),
        guard=stage == 0 and recipe.model.dtype == "float32",
        device=device,
    )
    engine, *_ = deepspeed.initialize(model=wrapped, optimizer=optimizer, config=config, dist_init_required=False)
    _undo_dummy_step(engine)
    module.train()
    pairs = module.ema_pairs()
    if pairs and recipe.teacher is None:
        raise ConfigError(f"teacher=None, but the objective has {len(pairs)} parameters of a teacher to move")
    ema = ShardedEma(engine, wrapped, pairs, recipe.teacher.decay) if pairs else None
    return Engine(engine, module, ema, rank, world, device, recipe)


def _bound_reuse(zero: dict[str, Any], parameters: int) -> None:
    """Cap `stage3_max_reuse_distance` at the number of parameters: beyond that everything stays gathered anyway.

    After every module call DeepSpeed walks through its recorded calls until it has passed that many parameters. A
    small model never gets there, and a step of n calls costs n * n: 16 s in place of 1.8 s for stage 2's several
    thousand module calls on a model of a million parameters.
    """
    key, default = "stage3_max_reuse_distance", 1_000_000_000
    zero[key] = min(int(zero.get(key, default)), parameters)


def _undo_dummy_step(engine: deepspeed.DeepSpeedEngine) -> None:
    """Stage 0 in bf16: take back the zero-gradient AdamW step DeepSpeed makes to allocate its moments.

    That step decays the masters by lr * weight_decay and starts the bias correction at 2, which makes the
    first real update a quarter smaller than at every other stage.
    """
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        engine.optimizer.state.clear()
        engine.optimizer.refresh_fp32_params()
