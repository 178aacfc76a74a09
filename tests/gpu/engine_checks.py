"""One ZeRO-3 run of the small objective on one rank, on whatever device the engine takes."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from ilvr_ds.engine.build import Engine, build_engine
from ilvr_ds.engine.checkpoint import load_checkpoint, save_checkpoint
from ilvr_ds.engine.distributed import init_distributed
from ilvr_ds.engine.ds_config import load_ds_config
from ilvr_ds.engine.step import StepOutcome, train_step
from ilvr_ds.engine.testing.toy import toy_recipe

if "checks" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("checks", Path(__file__).with_name("checks.py"))
    sys.modules["checks"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["checks"])
checks = sys.modules["checks"]

DECAY = 0.5  # and a large learning rate: a teacher that did not move must show in its output


@dataclass
class Findings:
    """What a run of four steps did."""

    device: str
    outcomes: list[StepOutcome]
    shadow_moved: float  # by the first step, relative
    teacher_is_cast: list[bool]  # after each step
    query_new: float  # distance of the teacher's query, after the first step, to that of a plain module...
    query_old: float  # ... with the new weights, and with the old ones
    resumed: list[StepOutcome]  # steps 3 and 4 again, from the checkpoint after step 2
    same_state: bool  # shadows and masters after the resumed step 4 equal those of the run that went on
    allocated: list[int]  # bytes on the GPU after each step; 0 on a CPU
    inverse_frequencies: torch.dtype  # of the rotary embedding


def build(device: torch.device) -> Engine:
    """A ZeRO-3 engine around the small objective in bfloat16, gradient checkpointing on."""
    objective = checks.small_objective(device, torch.bfloat16, "auto", checkpointing=True)
    return build_engine(objective, toy_recipe(decay=DECAY), load_ds_config("ds_configs/zero3.json"))


def step(engine: Engine, number: int) -> StepOutcome:
    """Two unequal micro-batches."""
    samples = checks.small_samples()
    batches = [checks.pack_small(part, len(samples)) for part in (samples[:2], samples[2:])]
    return train_step(engine, batches, lr=1e-2, noise_seed=number)


def four_steps(folder: str) -> dict:
    """Four steps, a checkpoint after the second, and its last two again from there: the fields of `Findings`.

    A plain dictionary can be sent back by a process that loaded this file under another name.
    """
    _, _, device = init_distributed()
    batch = checks.pack_small(checks.small_samples(), 3)
    plain = checks.small_objective(device, torch.bfloat16, "auto")
    old_query, _ = checks.selected_targets(plain, batch)

    engine = build(device)
    start = torch.cat([shadow.clone() for shadow in engine.ema.shadows])
    outcomes, is_cast, allocated = [], [], []
    query, moved = old_query, 0.0
    for number in range(4):
        outcomes.append(step(engine, number))
        allocated.append(torch.cuda.memory_allocated() if device.type == "cuda" else 0)
        teachers, shadows = engine.ema.partition.teachers(), engine.ema.shadows
        is_cast.append(all(torch.equal(t, s.to(t.dtype)) for t, s in zip(teachers, shadows, strict=True)))
        if number == 0:
            moved = ((torch.cat(shadows) - start).norm() / start.norm()).item()
            query, _ = checks.selected_targets(engine.module, batch)  # before anything else gathers the teacher
            _copy_teacher(engine, plain)
        if number == 1:
            save_checkpoint(engine, Path(folder) / "step-2", {"step": 2})
    new_query, _ = checks.selected_targets(plain, batch)

    again = build(device)
    load_checkpoint(again, Path(folder) / "step-2")
    resumed = [step(again, number) for number in (2, 3)]
    findings = Findings(
        device=str(device),
        outcomes=outcomes,
        shadow_moved=moved,
        teacher_is_cast=is_cast,
        query_new=_distance(query, new_query),
        query_old=_distance(query, old_query),
        resumed=resumed,
        same_state=all(map(torch.equal, _state(engine), _state(again))),
        allocated=allocated,
        inverse_frequencies=engine.module.student.language_model.rotary_emb.inv_freq.dtype,
    )
    return vars(findings)


def _state(engine: Engine) -> list[torch.Tensor]:
    return [*engine.ema.shadows, *engine.ema.partition.masters()]


@torch.no_grad()
def _copy_teacher(engine: Engine, plain: torch.nn.Module) -> None:
    """The shadow's cast into the teacher of a module that DeepSpeed has never seen (one rank holds everything)."""
    for piece, shadow in zip(engine.ema.pieces, engine.ema.shadows, strict=True):
        plain.get_parameter(piece.name).copy_(shadow.view(piece.shape))


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()
