"""One optimizer step on the toy objective: gradients, accumulation, world size, the non-finite guard."""

import itertools

import pytest
import torch

from ilvr_ds.engine.build import build_engine
from ilvr_ds.engine.optimizer import parameter_groups
from ilvr_ds.engine.optimizer_state import OptimizerState
from ilvr_ds.engine.step import StepOutcome, train_step
from ilvr_ds.engine.testing.ranks import run_ranks
from ilvr_ds.engine.testing.toy import ToyObjective, make_batches, toy_recipe

STAGES = (0, 1, 2, 3)
DTYPES = ("float32", "bfloat16")
SIZES = [7, 20, 9, 12]  # unequal micro-batches of one step
STEPS = 3


def pieces_of(engine) -> list:
    """This rank's state: (kind, name, start, values) of every master, moment and shadow."""
    state = OptimizerState(engine)
    rows = [
        (kind, name, piece.start, tensor.clone())
        for kind, tensors in state.tensors().items()
        for (name, piece), tensor in zip(state.pieces, tensors, strict=True)
    ]
    rows += [("ema", p.name, p.start, s.clone()) for p, s in zip(engine.ema.pieces, engine.ema.shadows, strict=True)]
    return rows


def assemble(per_rank: list) -> dict[tuple[str, str], torch.Tensor]:
    """Flat full tensors by (kind, name) from every rank's pieces."""
    full: dict = {}
    for kind, name, start, values in itertools.chain.from_iterable(per_rank):
        if values.numel():
            full.setdefault((kind, name), {})[start] = values
    return {key: torch.cat([parts[start] for start in sorted(parts)]) for key, parts in full.items()}


def train_cut(cut: str) -> dict:
    """Three steps of 48 tokens each. `cut` "one": in one batch; "four": in four micro-batches over the ranks."""
    results = {}
    for stage, dtype in itertools.product(STAGES, DTYPES):
        engine = build_engine(ToyObjective(), toy_recipe(dtype, grad_clip=1.0), {"zero_optimization": {"stage": stage}})
        outcomes = []
        for step in range(STEPS):
            parts = make_batches(SIZES if cut == "four" else [sum(SIZES)], seed=step)
            each = len(parts) // engine.world
            outcomes.append(train_step(engine, parts[engine.rank * each :][:each], lr=1e-2, noise_seed=step))
            if step == 0:
                first = pieces_of(engine)
        results[stage, dtype] = (outcomes, first, pieces_of(engine))
        engine.deepspeed.destroy()
    return results


def plain_training() -> tuple[list, dict, dict]:
    """The same three steps in plain PyTorch, fp32: the oracle."""
    objective, decay = ToyObjective(), 0.99
    named = [(n, p) for n, p in objective.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameter_groups(named, 0.01), lr=1e-2)
    log, first = [], None
    for step in range(STEPS):
        terms = objective(make_batches([sum(SIZES)], seed=step)[0], step)
        terms.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.append((terms.loss.item(), norm.item()))
        with torch.no_grad():
            for teacher, student in objective.ema_pairs():
                t, s = objective.get_parameter(teacher), objective.get_parameter(student)
                t.copy_(decay * t + (1 - decay) * s)
        first = first or {n: optimizer.state[p]["exp_avg"].flatten().clone() for n, p in named}
    return log, first, {n: p.detach().flatten() for n, p in objective.named_parameters()}


@pytest.fixture(scope="module")
def cuts():
    return {
        "1 rank, one batch": run_ranks(train_cut, 1, "one"),
        "1 rank x 4": run_ranks(train_cut, 1, "four"),
        "2 ranks x 2": run_ranks(train_cut, 2, "four"),
    }


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("cut", ["1 rank, one batch", "1 rank x 4", "2 ranks x 2"])
def test_fp32_steps_are_those_of_plain_pytorch(cuts, cut, stage):
    """Loss, gradient norm, first gradient (in Adam's first moment), weights after three steps, moving average."""
    log, first, final = plain_training()
    per_rank = [rank[stage, "float32"] for rank in cuts[cut]]
    for outcomes, _, _ in per_rank:
        assert [(o.loss, o.grad_norm) for o in outcomes] == [pytest.approx(row, rel=1e-5) for row in log]
        assert all(o.applied and o.spans == 0 for o in outcomes)
        assert [o.latents for o in outcomes] == [sum(SIZES)] * STEPS
    moments, state = assemble([r[1] for r in per_rank]), assemble([r[2] for r in per_rank])
    for name, value in first.items():
        torch.testing.assert_close(moments["exp_avg", name], value, rtol=1e-5, atol=1e-8)
    for name, value in final.items():
        kind = "ema" if name.startswith("teacher") else "master"
        # Adam divides by the root of the second moment: where a gradient is all rounding, so is the update
        torch.testing.assert_close(state[kind, name], value, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("cut", ["1 rank x 4", "2 ranks x 2"])
def test_bf16_cuts_agree(cuts, cut, stage):
    """In bf16 the micro-batches' gradients are rounded one by one: the sum agrees to 2 % of its norm."""
    whole = assemble([r[stage, "bfloat16"][1] for r in cuts["1 rank, one batch"]])
    parts = assemble([r[stage, "bfloat16"][1] for r in cuts[cut]])
    flat = [torch.cat([v for (kind, _), v in sorted(s.items()) if kind == "exp_avg"]) for s in (whole, parts)]
    assert torch.linalg.norm(flat[0] - flat[1]) < 0.02 * torch.linalg.norm(flat[0])
    losses = [[o.loss for o in cuts[c][0][stage, "bfloat16"][0]] for c in ("1 rank, one batch", cut)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_bf16_stages_take_the_same_first_step(cuts):
    """Stage 0's masters and bias correction are those of the other stages (DeepSpeed makes a dummy step there)."""
    states = [assemble([cuts["1 rank, one batch"][0][stage, "bfloat16"][2]]) for stage in STAGES]
    for name in [name for kind, name in states[3] if kind == "master"]:
        for stage in (0, 1, 2):
            assert torch.linalg.norm(states[stage]["master", name] - states[3]["master", name]) < 5e-3 * (
                1e-3 + torch.linalg.norm(states[3]["master", name])
            )


def guarded_run(stage: int, dtype: str, fault: str | None) -> tuple[list, StepOutcome | None]:
    """Two good steps, with a bad one between them if `fault` is given: (final state, outcome of the bad step)."""
    engine = build_engine(ToyObjective(), toy_recipe(dtype), {"zero_optimization": {"stage": stage}})
    bad_outcome = None
    for step, bad in [(0, False), (9, True), (1, False)]:
        if bad and fault is None:
            continue
        engine.module.fault = fault if bad and engine.rank == 1 else None
        outcome = train_step(engine, make_batches(SIZES, seed=step)[2 * engine.rank :][:2], lr=1e-2, noise_seed=step)
        if bad:
            bad_outcome = outcome
        else:
            assert outcome.applied
    state = pieces_of(engine)
    engine.deepspeed.destroy()
    return state, bad_outcome


def guard() -> list:
    """Where a bad step was not skipped, or did not leave exactly the state of a run that never saw it."""
    failures = []
    for stage, dtype in itertools.product(STAGES, DTYPES):
        clean, _ = guarded_run(stage, dtype, None)
        for fault in ("inf loss", "nan gradient"):
            state, bad = guarded_run(stage, dtype, fault)
            if bad.applied or bad.teacher_drift != 0.0 or bad.grad_norm != float("inf"):
                failures.append((stage, dtype, fault, bad))
            failures += [
                (stage, dtype, fault, *a[:2]) for a, b in zip(clean, state, strict=True) if not torch.equal(a[3], b[3])
            ]
    return failures


def test_a_fault_on_one_rank_skips_the_step_everywhere_and_leaves_nothing():
    assert run_ranks(guard, 2, timeout_s=250) == [[], []]
