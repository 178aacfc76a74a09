"""AdamW and its parameter groups."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ilvr_ds.config import OptimizerConfig
from ilvr_ds.errors import ConfigError


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict]:
    """Two groups: matrices (embeddings and convolution kernels included) decay, vectors do not.

    Vectors are norm weights and biases, which decay would pull to a meaningless zero. This is the split the
    transformers trainer makes, and so the published runs. Frozen parameters are in no group; a group without
    parameters is left out.
    """
    decayed, plain = [], []
    for _, parameter in named:
        if parameter.requires_grad:
            shape = parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape
            (decayed if len(shape) >= 2 else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "name": "decay"},
        {"params": plain, "weight_decay": 0.0, "name": "no_decay"},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    module: nn.Module, config: OptimizerConfig, *, offload: bool, guard: bool, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters of `module`.

    `offload`: DeepSpeed's vectorised CPU Adam. `guard`: the fp32 stage-0 case, where DeepSpeed steps our
    optimizer directly and would not notice a non-finite gradient. Otherwise torch's AdamW, fused on CUDA.

    Raises:
        ConfigError: nothing is trainable, or the CPU Adam extension cannot be compiled.
    """
    groups = parameter_groups(module.named_parameters(), config.weight_decay)
    if not groups:
        raise ConfigError("no parameter of the module requires a gradient: there is nothing to train")
    arguments = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
        from deepspeed.ops.op_builder import CPUAdamBuilder

        if not CPUAdamBuilder().is_compatible():
            raise ConfigError(
                "optimizer offload needs DeepSpeed's CPU Adam extension, which cannot be built here (see `ds_report`): "
                "install a C++ compiler and ninja, or use a ds_configs file without offload_optimizer"
            )
        return DeepSpeedCPUAdam(groups, adamw_mode=True, **arguments)
    if guard:
        return GuardedAdamW(groups, max_norm=config.grad_clip, **arguments)
    return torch.optim.AdamW(groups, fused=device.type == "cuda" or None, **arguments)


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that measures, clips and, when the norm is not finite, refuses its step.

    Used at ZeRO stage 0 in fp32. DeepSpeed reads `overflow` and `_global_grad_norm` from the optimizer it
    steps, so with these two attributes `engine.was_step_applied()` and `get_global_grad_norm()` are right
    there too. Gradients are already reduced over ranks, so every rank decides alike without a message.
    """

    def __init__(self, params, max_norm: float, **arguments):
        super().__init__(params, **arguments)
        self.max_norm = max_norm
        self.overflow = False
        self._global_grad_norm: Tensor | float = 0.0

    @torch.no_grad()
    def step(self, closure=None):
        """One AdamW step, or none (`overflow` True) when the global gradient norm is not finite."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.overflow = not bool(torch.isfinite(norm))
        self._global_grad_norm = float("inf") if self.overflow else norm
        if self.overflow:
            return None
        if self.max_norm > 0:
            torch._foreach_mul_(gradients, (self.max_norm / (norm + 1e-6)).clamp(max=1.0))
        return super().step(closure)
