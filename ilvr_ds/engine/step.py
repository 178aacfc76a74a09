"""One optimizer step over a variable number of unequal micro-batches, and the teacher's step after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ilvr_ds.contracts import PackedBatch
from ilvr_ds.engine.build import Engine
from ilvr_ds.engine.ema import drift


@dataclass(frozen=True)
class StepOutcome:
    """What a step did, the same numbers on every rank; sums are over all ranks and micro-batches."""

    loss: float
    ce: float
    align: float
    latents: int
    spans: int
    coverage_bound: int
    grad_norm: float  # global, before clipping; inf when the step was skipped
    applied: bool  # False: a loss or gradient was not finite; neither student nor teacher moved
    teacher_drift: float  # ||teacher - student|| / ||student||; 0 without a teacher or after a skipped step


def train_step(engine: Engine, batches: Sequence[PackedBatch], lr: float, noise_seed: int) -> StepOutcome:
    """Forward and backward over `batches`, one AdamW step, one step of the teacher, one small all-reduce.

    The step's gradient is the sum of the gradients of every micro-batch on every rank: losses arrive as
    sums over known global counts (`LossTerms`), so nothing is divided by the number of micro-batches, and
    DeepSpeed's average over ranks is undone by a factor `world`.

    A loss that is not finite multiplies its own gradient by NaN. The gradient reduction carries that to every
    rank, where DeepSpeed's norm check skips the step: all ranks agree without a message of their own.

    Args:
        batches: this rank's micro-batches, at least one, the same number on every rank; on the CPU, since the
            objective reads counts from them before it moves them to its device.
        lr: learning rate of this step, set on every parameter group.
        noise_seed: handed to the objective with every micro-batch of the step.

    Raises:
        ValueError: no micro-batch.
    """
    if not batches:
        raise ValueError("a step needs at least one micro-batch on every rank (an empty bin is a filler batch)")
    ds = engine.deepspeed
    for group in ds.optimizer.param_groups:
        group["lr"] = lr
    sums = torch.zeros(8, dtype=torch.float64, device=engine.device)
    for number, batch in enumerate(batches):
        ds.set_gradient_accumulation_boundary(number == len(batches) - 1)
        loss, terms = ds(batch=batch, noise_seed=noise_seed)
        finite = torch.isfinite(loss.detach())
        scale = torch.where(finite, float(engine.world), float("nan"))
        ds.backward(loss * scale, scale_wrt_gas=False)
        parts = (terms.loss, terms.ce, terms.align, terms.latents, terms.spans, terms.coverage_bound)
        sums[:6] += torch.stack([part.detach().double() for part in parts])
    ds.step()
    applied = ds.was_step_applied()
    if applied and engine.ema is not None:
        sums[6:] = engine.ema.update()
    if engine.world > 1:
        dist.all_reduce(sums)
    loss, ce, align, latents, spans, coverage_bound = sums[:6].tolist()
    return StepOutcome(
        loss=loss,
        ce=ce,
        align=align,
        latents=int(latents),
        spans=int(spans),
        coverage_bound=int(coverage_bound),
        grad_norm=float(ds.get_global_grad_norm()),
        applied=applied,
        teacher_drift=drift(sums[6:]),
    )
