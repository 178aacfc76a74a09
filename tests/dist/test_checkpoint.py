"""Save, resume bit for bit, resume at other world sizes and stages, and every way a checkpoint can be wrong."""

import itertools
import json
import resource
import shutil
from pathlib import Path

import pytest
import torch

from ilvr_ds.engine.build import build_engine
from ilvr_ds.engine.checkpoint import COMPLETE, latest_checkpoint, load_checkpoint, save_checkpoint
from ilvr_ds.engine.optimizer_state import OptimizerState
from ilvr_ds.engine.step import train_step
from ilvr_ds.engine.testing.ranks import run_ranks
from ilvr_ds.engine.testing.toy import ToyObjective, make_batches, toy_recipe
from ilvr_ds.errors import CheckpointError

SETUPS = [
    (0, "bfloat16"),
    (0, "float32"),
    (1, "bfloat16"),
    (1, "float32"),
    (2, "bfloat16"),
    (3, "bfloat16"),
    (3, "float32"),
]


def build(stage, dtype="bfloat16", **toy):
    return build_engine(ToyObjective(**toy), toy_recipe(dtype), {"zero_optimization": {"stage": stage}})


def steps(engine, first, last):
    """Outcomes of optimizer steps [first, last); the same tokens per step at world 1, 2 and 4."""
    outcomes = []
    for step in range(first, last):
        parts = make_batches([7, 20, 9, 12], seed=step)
        each = len(parts) // engine.world
        outcomes.append(train_step(engine, parts[engine.rank * each :][:each], lr=1e-2, noise_seed=step))
    return outcomes


def snapshot(engine) -> list:
    """Everything a step reads: this rank's masters, moments, step count, shadows; and full logits of both models."""
    state = OptimizerState(engine)
    rows = [
        (kind, name, piece.start, tensor.clone())
        for kind, tensors in state.tensors().items()
        for (name, piece), tensor in zip(state.pieces, tensors, strict=True)
        if piece.numel
    ]
    rows += [
        ("ema", p.name, p.start, s.clone())
        for p, s in zip(engine.ema.pieces, engine.ema.shadows, strict=True)
        if p.numel
    ]
    tokens = make_batches([23], seed=99)[0].input_ids
    with torch.no_grad():
        for model in ("student", "teacher"):
            rows.append(("logits", model, 0, getattr(engine.module, model)(tokens)[1].clone()))
    return [*rows, ("step", "", 0, torch.tensor([state.step_count()]))]


def assemble(per_rank) -> dict:
    """Full tensors by (kind, name) from every rank's rows."""
    full: dict = {}
    for kind, name, start, values in itertools.chain.from_iterable(per_rank):
        full.setdefault((kind, name), {})[start] = values
    return {key: torch.cat([parts[start].flatten() for start in sorted(parts)]) for key, parts in full.items()}


def equal(a: list, b: list) -> bool:
    return len(a) == len(b) and all(x[:3] == y[:3] and torch.equal(x[3], y[3]) for x, y in zip(a, b, strict=True))


def train_and_save(folder: str) -> dict:
    results = {}
    for number, (stage, dtype) in enumerate(SETUPS):
        engine = build(stage, dtype)
        steps(engine, 0, 2)
        save_checkpoint(engine, Path(folder) / str(number) / "step-00000002", {"step": 2, "note": "é"})
        saved = snapshot(engine)
        results[number] = (saved, steps(engine, 2, 4), snapshot(engine))
        engine.deepspeed.destroy()
    return results


def resume(folder: str, other_stage: bool) -> dict:
    results = {}
    for number, (stage, dtype) in enumerate(SETUPS):
        engine = build(
            (stage + 2) % 4 if other_stage else stage, dtype, seed=5
        )  # other initial weights: all must come back
        state = load_checkpoint(engine, Path(folder) / str(number) / "step-00000002")
        assert state == {"step": 2, "note": "é"}
        loaded = snapshot(engine)
        results[number] = (loaded, steps(engine, 2, 4), snapshot(engine))
        engine.deepspeed.destroy()
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def saved(folder):
    return run_ranks(train_and_save, 2, str(folder), timeout_s=250)


@pytest.fixture(scope="module")
def resumed(folder, saved):
    return {world: run_ranks(resume, world, str(folder), world != 2, timeout_s=280) for world in (1, 2, 4)}


@pytest.mark.parametrize("number", range(len(SETUPS)), ids=[f"zero{s}-{d}" for s, d in SETUPS])
def test_resume_at_the_same_world_size_is_bit_for_bit(saved, resumed, number):
    for before, after in zip(saved, resumed[2], strict=True):
        assert equal(before[number][0], after[number][0]), "state right after the load"
        assert before[number][1] == after[number][1], "outcomes of the next steps"
        assert equal(before[number][2], after[number][2]), "state after the next steps"


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("number", range(len(SETUPS)), ids=[f"zero{s}-{d}" for s, d in SETUPS])
def test_another_world_size_and_stage_loads_the_same_state(saved, resumed, world, number):
    """Saved on 2 ranks; on 1 and on 4, at another stage, every element is the same and training goes on alike."""
    before = assemble([rank[number][0] for rank in saved])
    after = assemble([rank[number][0] for rank in resumed[world]])
    assert before.keys() == after.keys()
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=0, msg=str(key))
    tolerance = 1e-5 if SETUPS[number][1] == "float32" else 2e-2
    losses = [[o.loss for o in result[0][number][1]] for result in (saved, resumed[world])]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)


def error_of(engine, folder) -> str:
    try:
        load_checkpoint(engine, folder)
    except CheckpointError as error:
        return str(error)
    return "no error"


def wrong_checkpoints(folder: str) -> dict[str, str]:
    """Error messages on this rank of loading checkpoints that are wrong in one way each."""
    source, work = Path(folder) / "source" / "step-00000001", Path(folder)
    engine = build(3, frozen=True)
    save_checkpoint(engine, source, {"step": 1})
    messages = {"good": error_of(engine, source)}

    def variant(name: str) -> Path:
        path = work / name
        if engine.rank == 0:
            shutil.copytree(source, path)
        torch.distributed.barrier()
        return path

    def spoilt(name: str, spoil) -> None:
        path = variant(name)
        if engine.rank == 0:
            spoil(path)
        torch.distributed.barrier()
        messages[name] = error_of(engine, path)

    messages["absent"] = error_of(engine, work / "absent")
    spoilt("incomplete", lambda p: (p / COMPLETE).unlink())
    spoilt("missing rank", lambda p: (p / "ema-00001-of-00002.safetensors").unlink())
    spoilt("no ema", lambda p: [f.unlink() for f in p.glob("ema-*")])
    file = "optimizer-00001-of-00002.safetensors"
    spoilt("truncated", lambda p: (p / file).write_bytes((p / file).read_bytes()[:-100]))
    spoilt("mixed", lambda p: shutil.copy(p / "ema-00000-of-00002.safetensors", p / "ema-00000-of-00001.safetensors"))
    spoilt("broken json", lambda p: (p / "state.json").write_text("{"))
    spoilt(
        "other shape",
        lambda p: (p / "model.json").write_text((p / "model.json").read_text().replace("[37, 12]", "[38, 12]", 1)),
    )
    engine.deepspeed.destroy()
    for name, options in {
        "trained": {"frozen": False},
        "no teacher": {"frozen": True, "teacher": False},
        "other base": {"frozen": True, "seed": 1},
        "other dtype": {"frozen": True, "dtype": "float32"},
    }.items():
        other = build(1, **options)
        messages[name] = error_of(other, source)
        other.deepspeed.destroy()
    return messages


@pytest.fixture(scope="module")
def messages(tmp_path_factory):
    return run_ranks(wrong_checkpoints, 2, str(tmp_path_factory.mktemp("wrong")), timeout_s=200)


@pytest.mark.parametrize(
    ("name", "parts"),
    {
        "good": ["no error"],
        "absent": ["absent: no such checkpoint"],
        "incomplete": ["not a complete checkpoint"],
        "missing rank": ["ema-00001-of-00002.safetensors: missing, one of 2 ranks"],
        "no ema": ["no ema file"],
        "truncated": ["optimizer-00001-of-00002.safetensors: cut short or damaged"],
        "mixed": ["files of [1, 2] ranks are mixed"],
        "broken json": ["state.json: missing or damaged"],
        "other shape": ["'student.embed.weight' has shape [38, 12], this model's is [37, 12]"],
        "trained": ["'student.embed.weight' was frozen, in this run it is trained"],
        "no teacher": ["only the checkpoint has parameter 'teacher.embed.weight'"],
        "other base": ["frozen parameter 'student.embed.weight' has other values"],
        "other dtype": ["saved with model.dtype=bfloat16, this run has float32"],
    }.items(),
)
def test_a_wrong_checkpoint_is_refused_on_every_rank_by_name(messages, name, parts):
    for rank in messages:
        for part in parts:
            assert part in rank[name]


def failing_saves(folder: str) -> list:
    """A state that is not JSON on rank 0; a disk that is full on rank 1; then a good save over the remains."""
    engine, log = build(3), []
    checkpoints = Path(folder) / "checkpoints"
    target = checkpoints / "step-00000007"
    try:
        save_checkpoint(engine, target, {"bad": object()})
    except CheckpointError as error:
        log.append(str(error))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if engine.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        save_checkpoint(engine, target, {"step": 7})
    except CheckpointError as error:
        log.append(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.append((latest_checkpoint(checkpoints), target.exists()))
    torch.distributed.barrier()
    for _ in range(2):  # the second replaces the first
        save_checkpoint(engine, target, {"step": 7})
    log.append((latest_checkpoint(checkpoints) == target, json.loads((target / "state.json").read_text())))
    log.append(sorted(p.name for p in checkpoints.iterdir()))
    return log


def test_a_failed_save_fails_everywhere_and_never_looks_complete(tmp_path):
    logs = run_ranks(failing_saves, 2, str(tmp_path))
    assert "not JSON serializable" in logs[0][0] and "1 other rank" in logs[1][0]
    assert "1 other rank" in logs[0][1] and "cannot write" in logs[1][1]
    for log in logs:
        assert log[2:] == [(None, False), (True, {"step": 7}), ["step-00000007"]]
