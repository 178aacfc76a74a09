"""Checkpoints: all there or not there at all.

    run_dir/checkpoints/step-00000500/
        optimizer-00000-of-00002.safetensors   masters and Adam moments, one file per rank
        ema-00000-of-00002.safetensors         fp32 moving average, one file per rank
        model.json                             names, shapes, checksums of frozen parameters
        state.json                             what the training loop handed over
        COMPLETE                               written last; without it the folder does not count

Weights are not stored: student and teacher are the casts of masters and average, bit for bit, and frozen
parameters come from the model folder, checked against model.json. Files are written under a temporary name,
flushed, renamed; a rank that fails makes every rank raise. Any world size and ZeRO stage can load.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from ilvr_ds.engine.build import Engine
from ilvr_ds.engine.fingerprint import check_same_model, describe_model
from ilvr_ds.engine.optimizer_state import OptimizerState
from ilvr_ds.engine.shards import ShardReader, shard_path, write_shard
from ilvr_ds.errors import CheckpointError

COMPLETE = "COMPLETE"
_NAME = re.compile(r"step-(\d+)")


def complete_checkpoints(checkpoints: str | Path) -> list[Path]:
    """Complete `step-NUMBER` folders in a run's checkpoints folder, oldest first; half-written ones are left out."""
    parent = Path(checkpoints)
    if not parent.is_dir():
        return []
    found = [p for p in parent.iterdir() if _NAME.fullmatch(p.name) and (p / COMPLETE).is_file()]
    return sorted(found, key=lambda p: int(_NAME.fullmatch(p.name)[1]))


def latest_checkpoint(checkpoints: str | Path) -> Path | None:
    """The newest complete checkpoint in a run's checkpoints folder, or None."""
    found = complete_checkpoints(checkpoints)
    return found[-1] if found else None


def prune_checkpoints(checkpoints: str | Path, keep: int) -> list[Path]:
    """Delete all but the newest `keep` complete checkpoints, and remains of interrupted ones. Rank 0 only."""
    complete = complete_checkpoints(checkpoints)
    if not complete:
        return []
    kept = set(complete[-keep:])
    newest = int(_NAME.fullmatch(complete[-1].name)[1])
    removed = []
    for path in sorted(complete[-1].parent.iterdir()):
        match = _NAME.match(path.name)
        if match and path not in kept and int(match[1]) <= newest:
            (path / COMPLETE).unlink(missing_ok=True)  # first: a half-deleted folder must not count
            shutil.rmtree(path)
            removed.append(path)
    return removed


def save_checkpoint(engine: Engine, folder: str | Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; every rank calls it, with the same arguments.

    Args:
        folder: `.../checkpoints/step-NUMBER`, on a file system all ranks share. Replaced if it exists.
        state: what the training loop needs to go on; JSON.

    Raises:
        CheckpointError: on every rank, when any rank could not write; no complete folder is left.
    """
    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".tmp")
    model = describe_model(engine)
    problem = None
    try:
        if engine.rank == 0:
            text = json.dumps(state, indent=1)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            _write(temporary / "model.json", json.dumps(model))
            _write(temporary / "state.json", text)
    except (OSError, TypeError, ValueError) as error:
        problem = error
    _agree(engine, problem, f"cannot create {temporary}")
    try:
        _write_rank(engine, temporary)
    except (OSError, SafetensorError) as error:
        problem = error
    _agree(engine, problem, f"cannot write {temporary}")
    try:
        if engine.rank == 0:
            if folder.exists():
                (folder / COMPLETE).unlink(missing_ok=True)
                shutil.rmtree(folder)
            os.replace(temporary, folder)
            _write(folder / COMPLETE, "")
            _flush_folder(folder)
            _flush_folder(folder.parent)
    except OSError as error:
        problem = error
    _agree(engine, problem, f"cannot finish {folder}")


def read_state(folder: str | Path) -> dict[str, Any]:
    """The `state` a checkpoint was saved with, without an engine. Raises CheckpointError if it is not readable."""
    return _read_json(Path(folder) / "state.json")


def read_model(folder: str | Path) -> dict[str, Any]:
    """Names, shapes and kinds of a checkpoint's parameters, as `describe_model` gives them. Raises CheckpointError."""
    return _read_json(Path(folder) / "model.json")


def load_checkpoint(engine: Engine, folder: str | Path) -> dict[str, Any]:
    """Restore masters, moments, moving average and all weights; returns the saved `state`. Every rank calls it.

    The engine must be built from the same model folder; world size and ZeRO stage may differ. At the same
    world size and stage the run goes on bit for bit (with an offloaded optimizer: to rounding, because
    DeepSpeed's C++ Adam keeps the powers of its betas as running products and takes them anew after a load).

    Raises:
        CheckpointError: on every rank; incomplete folder, missing or damaged file, or another model (the first
            differing parameter is named).
    """
    folder = Path(folder)
    now = describe_model(engine)
    optimizer, problem, state = OptimizerState(engine), None, {}
    try:
        state = _load_rank(engine, optimizer, folder, now)
    except CheckpointError as error:
        problem = error
    _agree(engine, problem, f"cannot load {folder}")
    optimizer.write_weights()
    if engine.ema is not None:
        engine.ema.write_teacher()
    return state


def _write_rank(engine: Engine, folder: Path) -> None:
    """This rank's files. At stage 0 every rank has everything, and rank 0 writes it."""
    rank, world = (engine.rank, engine.world) if engine.stage else (0, 1)
    if engine.rank != rank:
        return
    optimizer = OptimizerState(engine)
    extra = {"step": str(optimizer.step_count())}
    write_shard(shard_path(folder, "optimizer", rank, world), optimizer.pieces, optimizer.tensors(), extra)
    if engine.ema is not None:
        pieces = [(piece.name, piece) for piece in engine.ema.pieces]
        write_shard(shard_path(folder, "ema", rank, world), pieces, {"ema": engine.ema.shadows}, {})


def _load_rank(engine: Engine, optimizer: OptimizerState, folder: Path, now: dict[str, Any]) -> dict[str, Any]:
    """Everything of a load that talks to no other rank."""
    if not (folder / COMPLETE).is_file():
        what = "not a complete checkpoint (no file COMPLETE)" if folder.is_dir() else "no such checkpoint"
        raise CheckpointError(f"{folder}: {what}; use an older one, or start without run.resume")
    check_same_model(read_model(folder), now, str(folder))
    readers = [ShardReader(folder, "optimizer")]
    if engine.ema is not None:
        readers.append(ShardReader(folder, "ema"))
    optimizer.load(readers[0], int(readers[0].extra["step"]))
    if engine.ema is not None:
        for piece, shadow in zip(engine.ema.pieces, engine.ema.shadows, strict=True):
            readers[1].read("ema", piece.name, piece, shadow)
    return _read_json(folder / "state.json")


def _agree(engine: Engine, problem: Exception | None, what: str) -> None:
    """A barrier after which all ranks go on, or all raise."""
    failed = torch.tensor(0 if problem is None else 1, device=engine.device)
    dist.all_reduce(failed)
    if not failed.item():
        return
    if isinstance(problem, CheckpointError):
        raise problem
    cause = f"{type(problem).__name__}: {problem}" if problem else f"failed on {failed.item()} other rank(s), see there"
    raise CheckpointError(f"{what}: {cause}") from problem


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    """Make a rename or a new name in `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: missing or damaged ({error}); use another checkpoint") from error
