"""Is the sharded momentum teacher the dense one, to the last bit, and what does it cost?

    python benchmarks/ema.py [--quick] [--json FILE]

Runs a toy objective on 1, 2 and 4 CPU ranks, ZeRO 0 to 3, persistence threshold 0 and 1e5, one and three
micro-batches a step, all parameters or (LoRA-like) adapters only, 50 steps of which one has a non-finite
gradient. Prints one JSON object per configuration and exits with 1 when a limit is broken:

- `max_error` <= 1e-6: largest |sharded shadow - dense average in float64 of the gathered fp32 masters|
- `teacher_is_cast`: the gathered teacher is the bf16 cast of the shadow, exactly
- `forward_is_new`: the teacher's forward right after the update equals that of a plain module with these weights
- `update_bytes`: bytes one rank sent in all updates, counted at the collectives; 0 at ZeRO-3, and what the
  engine reports elsewhere (a ring all-gather sends (world - 1) times a rank's part)
- `update_share`: time of the update / time of the step. The toy is tiny, so this is overhead, not bandwidth.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ilvr_ds.engine.build import Engine, build_engine
from ilvr_ds.engine.step import StepOutcome, train_step
from ilvr_ds.engine.testing.ranks import run_ranks
from ilvr_ds.engine.testing.toy import ToyModel, ToyObjective, make_batches, toy_recipe

MAX_ERROR = 1e-6
DECAY = 0.99


@dataclass(frozen=True)
class Case:
    """One configuration."""

    world: int
    stage: int
    threshold: int | None  # stage3_param_persistence_threshold; None below stage 3
    accumulation: int  # micro-batches per rank and step
    frozen: bool  # adapters only
    steps: int
    skipped_step: int


def all_cases(quick: bool) -> list[Case]:
    """Every world and layout, each with (accumulation, adapters only) of (1, no), (3, no), (1, yes).

    `quick`: two ranks and (3, no) only.
    """
    worlds = (2,) if quick else (1, 2, 4)
    variants = [(3, False)] if quick else [(1, False), (3, False), (1, True)]
    steps = 12 if quick else 50
    layouts = [(0, None), (1, None), (2, None), (3, 0), (3, 100_000)]
    return [
        Case(world, stage, threshold, accumulation, frozen, steps, skipped_step=steps // 3)
        for world, (stage, threshold), (accumulation, frozen) in itertools.product(worlds, layouts, variants)
    ]


class CollectiveBytes(TorchDispatchMode):
    """Counts what this rank sends in collectives, below every wrapper: at torch's c10d operators."""

    def __init__(self):
        super().__init__()
        self.calls: list[str] = []
        self.sent = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.calls.append(str(function))
            if "_allgather_base_" in str(function):  # (output, input, group, ...)
                self.sent += args[1].numel() * args[1].element_size() * (dist.get_world_size() - 1)
        return function(*args, **(kwargs or {}))


class DenseReference:
    """float64 average of full masters, read through DeepSpeed's public interface."""

    def __init__(self, engine: Engine):
        parameters = dict(engine.module.named_parameters())
        self._pairs = [(t, parameters[s]) for t, s in engine.module.ema_pairs() if parameters[s].requires_grad]
        self._engine = engine
        self.average = {name: value.double() for name, value in self._masters()}

    def _masters(self) -> list[tuple[str, Tensor]]:
        optimizer = self._engine.deepspeed.optimizer
        if isinstance(optimizer, FP16_UnfusedOptimizer):  # stage 0: there is no public interface
            lows = [p for group in optimizer.fp16_groups for p in group]
            highs = [p for group in optimizer.fp32_groups for p in group]
            position = {id(p): i for i, p in enumerate(lows)}
            return [(name, highs[position[id(p)]].detach().clone()) for name, p in self._pairs]
        return [(name, safe_get_full_fp32_param(p).detach().clone()) for name, p in self._pairs]

    def update(self) -> None:
        """average <- decay * average + (1 - decay) * master."""
        for name, master in self._masters():
            self.average[name] = DECAY * self.average[name] + (1 - DECAY) * master.double()


def full_shadow(engine: Engine) -> dict[str, Tensor]:
    """The shadow put together from every rank's pieces, by parameter name."""
    parts = [None] * engine.world
    dist.all_gather_object(parts, list(zip(engine.ema.pieces, engine.ema.shadows, strict=True)))
    full = {piece.name: torch.full(piece.shape, float("nan")) for piece in engine.ema.pieces}
    for piece, shadow in itertools.chain.from_iterable(parts):
        full[piece.name].view(-1)[piece.start : piece.start + piece.numel] = shadow
    return full


def teacher_weights(engine: Engine) -> dict[str, Tensor]:
    """The teacher's full weights, gathered by DeepSpeed at stage 3."""
    named = list(engine.module.teacher.named_parameters())
    if engine.stage < 3:
        return {name: p.detach().clone() for name, p in named}
    with deepspeed.zero.GatheredParameters([p for _, p in named]):
        return {name: p.detach().clone() for name, p in named}


def forward_uses(engine: Engine, weights: dict[str, Tensor]) -> bool:
    """The teacher's forward equals that of a plain module holding `weights`."""
    tokens = make_batches([23], seed=99)[0].input_ids
    plain = ToyModel().to(torch.bfloat16)
    plain.load_state_dict({**weights, "head.weight": weights["embed.weight"]})
    with torch.no_grad():
        return torch.equal(engine.module.teacher(tokens)[1], plain(tokens)[1])


def measured_step(engine: Engine, case: Case, step: int) -> tuple[StepOutcome, float]:
    """One training step on batches that depend on (step, world, accumulation) only; and its seconds."""
    sizes = [5 + (7 * i) % 11 for i in range(case.world * case.accumulation)]
    mine = make_batches(sizes, seed=step)[engine.rank :: case.world]
    bad = step == case.skipped_step and engine.rank == case.world - 1
    engine.module.fault = "nan gradient" if bad else None
    begin = time.perf_counter()
    outcome = train_step(engine, mine, lr=3e-3, noise_seed=step)
    return outcome, time.perf_counter() - begin


def run_case(case: Case) -> dict:
    """Train one configuration on this rank and compare it with the dense reference."""
    zero = {"stage": case.stage}
    if case.threshold is not None:
        zero["stage3_param_persistence_threshold"] = case.threshold
    engine = build_engine(ToyObjective(frozen=case.frozen), toy_recipe(decay=DECAY), {"zero_optimization": zero})
    reference, initial = DenseReference(engine), teacher_weights(engine)
    counter, step_s, update_s = CollectiveBytes(), 0.0, 0.0
    update = engine.ema.update

    def counted_update() -> Tensor:
        nonlocal update_s
        with counter:
            begin = time.perf_counter()
            sums = update()
            update_s += time.perf_counter() - begin
        return sums

    engine.ema.update = counted_update  # measuring only: train_step calls it where it always does
    applied, forward_is_new, teacher_is_cast = [], True, True
    for step in range(case.steps):
        outcome, seconds = measured_step(engine, case, step)
        step_s += seconds
        applied.append(outcome.applied)
        if outcome.applied:
            reference.update()
        if step % 10 in (0, 1) or step == case.steps - 1 or step == case.skipped_step:
            shadow = full_shadow(engine)
            expected = {n.removeprefix("teacher."): v.to(torch.bfloat16) for n, v in shadow.items()}
            expected = {**initial, **expected}
            forward_is_new &= forward_uses(engine, expected)  # first: gathering below would refresh stale copies
            weights = teacher_weights(engine)
            teacher_is_cast &= all(torch.equal(weights[name], value) for name, value in expected.items())
    shadow = full_shadow(engine)
    error = max((shadow[name].double() - value).abs().max().item() for name, value in reference.average.items())
    moved = max(
        (shadow[f"teacher.{n}"] - v.float()).abs().max().item() for n, v in initial.items() if f"teacher.{n}" in shadow
    )
    result = {
        **dataclasses.asdict(case),
        "max_error": error,
        "max_moved": moved,
        "teacher_is_cast": teacher_is_cast,
        "forward_is_new": forward_is_new,
        "applied_as_expected": applied == [step != case.skipped_step for step in range(case.steps)],
        "update_bytes": counter.sent,
        "update_bytes_reported": engine.ema.update_bytes,
        "update_collectives": len(counter.calls),
        "update_share": round(update_s / step_s, 4),
        "step_ms": round(1e3 * step_s / case.steps, 2),
    }
    engine.deepspeed.destroy()
    return result


def run_cases(cases: list[dict]) -> list[dict]:
    """What each rank runs: several configurations in one process group."""
    return [run_case(Case(**case)) for case in cases]


def broken_limits(result: dict) -> list[str]:
    """Names of the limits a result breaks."""
    checks = {
        "max_error": result["max_error"] <= MAX_ERROR,
        "max_moved": result["max_moved"] > 1e-4,
        "teacher_is_cast": result["teacher_is_cast"],
        "forward_is_new": result["forward_is_new"],
        "applied_as_expected": result["applied_as_expected"],
        "update_bytes": result["update_bytes"] == result["update_bytes_reported"],
        "zero_traffic": result["stage"] in (1, 2) or result["update_collectives"] == 0,
    }
    return [name for name, holds in checks.items() if not holds]


def main() -> int:
    """Run all configurations; 0 when every limit holds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two ranks, 12 steps, five configurations")
    parser.add_argument("--json", type=Path, help="also write all results to this file")
    arguments = parser.parse_args()
    cases = all_cases(arguments.quick)
    results, failures, begin = [], 0, time.perf_counter()
    for world in sorted({case.world for case in cases}):
        chosen = [dataclasses.asdict(case) for case in cases if case.world == world]
        per_rank = run_ranks(run_cases, world, chosen, timeout_s=600)
        for number, result in enumerate(per_rank[0]):
            broken = sorted({name for rank in per_rank for name in broken_limits(rank[number])})
            results.append({**result, "broken": broken})
            failures += bool(broken)
            print(json.dumps(results[-1]), flush=True)
    seconds = time.perf_counter() - begin
    print(f"{len(results)} configurations, {failures} with a broken limit, {seconds:.0f} s", file=sys.stderr)
    if arguments.json:
        arguments.json.write_text(json.dumps({"seconds": round(seconds, 1), "results": results}, indent=1) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
