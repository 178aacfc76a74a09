"""A training checkpoint -> a model folder that stock transformers loads. No engine, no GPU, any world size.

A checkpoint holds the fp32 masters and the moving average as pieces per rank; what the run did not train is in the
model folder it started from. Tensor after tensor, a chunk at a time, the pieces are put together, cast and written.
The cast of a master to the trained dtype is the weight the run had, bit for bit.

Config, tokenizer, chat template and image settings come from the model folder; config.json gets the latents'
settings and a summary of the run (`ilvr_ds.model.latent_settings`), preprocessor_config.json the pixel bounds of the
run's shards (`ilvr_ds.model.pixel_bounds`), so that generation and stock processors resize as training did.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ilvr_ds.config import Recipe, parse_recipe, recipe_to_dict
from ilvr_ds.data.finished_folder import is_finished
from ilvr_ds.data.index import read_manifest
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.engine.checkpoint import COMPLETE, read_model, read_state
from ilvr_ds.engine.fingerprint import as_text, checksum
from ilvr_ds.engine.partition import Piece
from ilvr_ds.engine.shards import ShardReader
from ilvr_ds.errors import CheckpointError, ConfigError
from ilvr_ds.model.folder import ModelFolder
from ilvr_ds.model.folder_write import SHARD_BYTES, write_model
from ilvr_ds.model.latent_settings import LatentSettings, check_latent_tokens
from ilvr_ds.model.pixel_bounds import PREPROCESSOR_FILE, preprocessor_with_bounds
from ilvr_ds.model.safetensors_stream import CHUNK, TensorSource

STUDENT = "student.network."  # names in a checkpoint: the objective's `student` is a Backbone around a stock network
TEACHER, DECODER = "teacher.language_model.", "model.language_model."
_SUMMARY = ("latent", "teacher", "loss", "optimizer")  # sections of the recipe that go into config.json


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    teacher: bool = False,
    dtype: torch.dtype | None = None,
    model: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> bool:
    """Write the model of a checkpoint; True if written, False if it was there already.

    Args:
        checkpoint: a complete `step-NUMBER` folder.
        teacher: the moving average in place of the student's decoder. Vision tower and (untied) head, which the
            teacher does not have, are the student's.
        dtype: of the written weights; None: the dtype of the run.
        model: the model folder the run started from; None: where its recipe says.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged, or the model folder is another than the run's.
        ConfigError: the run has no teacher; the model folder has no latent tokens; `out` holds something else.
        ShardError: the checkpoint does not say how large its images were, and the recipe's shards are not there.
    """
    if not (checkpoint / COMPLETE).is_file():
        raise CheckpointError(f"{checkpoint}: not a complete checkpoint (no file {COMPLETE})")
    state, described = read_state(checkpoint), read_model(checkpoint)
    if "recipe" not in state:
        raise CheckpointError(f"{checkpoint / 'state.json'}: no recipe in it: not a checkpoint of launch/train.py")
    recipe = parse_recipe(state["recipe"], str(checkpoint / "state.json"))
    folder_path = Path(recipe.model.path) if model is None else model
    trained = getattr(torch, recipe.model.dtype)
    target = trained if dtype is None else dtype
    made_with = {
        "made_by": "export",
        "checkpoint": str(checkpoint.resolve()),
        "weights": "teacher" if teacher else "student",
        "dtype": str(target).removeprefix("torch."),
    }
    if is_finished(out, made_with):
        return False
    folder = ModelFolder(folder_path)
    vocabulary = ChatTokenizer.from_folder(folder_path).vocabulary
    check_latent_tokens(folder_path, vocabulary)
    low, high = _input_pixels(state, recipe)
    pieces = _Pieces(checkpoint, described, folder, trained)
    pieces.check(teacher)
    sources = [
        TensorSource(name, target, shape, lambda name=name: pieces.chunks(name, teacher))
        for name, shape in folder.shapes.items()
    ]
    write_model(
        out,
        sources,
        _with_dtype(folder.tree, made_with["dtype"]),
        LatentSettings.of(recipe.latent.size, vocabulary, _summary(recipe, state, made_with["weights"], (low, high))),
        copy_from=folder_path,
        texts={PREPROCESSOR_FILE: preprocessor_with_bounds(folder_path, low, high)},
        made_with=made_with,
        shard_bytes=shard_bytes,
    )
    return True


def _with_dtype(tree: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json with `dtype` in the place of every dtype in it (old name, new name, sections)."""
    changed = {key: value for key, value in tree.items() if key != "torch_dtype"} | {"dtype": dtype}
    for section in ("text_config", "vision_config"):
        if {"dtype", "torch_dtype"} & set(tree.get(section, ())):
            changed[section] = _with_dtype(tree[section], dtype)
    return changed


def _input_pixels(state: dict[str, Any], recipe: Recipe) -> tuple[int, int]:
    """(min, max) pixels of the run's input images: the checkpoint's word, in older ones that of the recipe's shards."""
    if "input_pixels" in state:
        low, high = state["input_pixels"]
        return low, high
    return read_manifest(Path(recipe.data.shards or recipe.data.sources[0].shards)).images.bounds("input")


def _summary(recipe: Recipe, state: dict[str, Any], weights: str, input_pixels: tuple[int, int]) -> dict[str, Any]:
    tree = recipe_to_dict(recipe)
    facts = {"recipe": recipe.name, "step": state["step"], "weights": weights, "input_pixels": list(input_pixels)}
    return facts | {key: tree[key] for key in _SUMMARY}


@dataclass
class _Pieces:
    """Where each parameter's values are: in the checkpoint's pieces, or in the model folder."""

    checkpoint: Path
    described: dict[str, Any]  # model.json
    folder: ModelFolder
    trained: torch.dtype

    def __post_init__(self) -> None:
        self.kinds = {name: (tuple(shape), kind) for name, shape, kind in self.described["parameters"]}
        self.masters = ShardReader(self.checkpoint, "optimizer")
        self.averages: ShardReader | None = None

    def check(self, teacher: bool) -> None:
        """The model folder and the checkpoint have the same parameters; opens the average if it is asked for."""
        for name, shape in self.folder.shapes.items():
            if STUDENT + name not in self.kinds:
                raise CheckpointError(f"{self.checkpoint}: has no {STUDENT + name!r}, {self.folder.path} has {name!r}")
            found = self.kinds[STUDENT + name][0]
            if found != shape:
                raise CheckpointError(
                    f"{self.checkpoint}: {STUDENT + name!r} has shape {found}, in {self.folder.path} it is {shape}: "
                    "give the model folder the run started from"
                )
        if teacher:
            if not any(kind == "averaged" for _, kind in self.kinds.values()):
                raise ConfigError(f"{self.checkpoint}: this run has no teacher; export the student")
            self.averages = ShardReader(self.checkpoint, "ema")

    def chunks(self, name: str, teacher: bool) -> Iterator[Tensor]:
        """The elements of a parameter in order, flat (n,), fp32 or the trained dtype."""
        kept = STUDENT + name
        averaged = TEACHER + name.removeprefix(DECODER)
        if teacher and name.startswith(DECODER) and self.kinds[averaged][1] == "averaged":
            yield from self._joined(self.averages, "ema", averaged)
        elif self.kinds[kept][1] == "trained":
            yield from self._joined(self.masters, "master", kept)
        else:
            yield from self._frozen(name, self.described["frozen"][kept])

    def _joined(self, reader: ShardReader, kind: str, name: str) -> Iterator[Tensor]:
        shape = self.kinds[name][0]
        numel = torch.Size(shape).numel()
        buffer = torch.empty(min(CHUNK, numel), dtype=torch.float32)
        for start in range(0, numel, CHUNK):
            part = buffer[: min(CHUNK, numel - start)]
            reader.read(kind, name, Piece(name, name, shape, start, part.numel()), part)
            yield part

    def _frozen(self, name: str, expected: str) -> Iterator[Tensor]:
        """A frozen parameter as the run had it: the folder's values in the trained dtype, checksum compared."""
        total, start = torch.zeros((), dtype=torch.int64), 0
        for part in self.folder.chunks(name, self.trained):
            total += checksum(part, start)
            start += part.numel()
            yield part
        if as_text(total) != expected:
            raise CheckpointError(
                f"{self.folder.path}: {name!r} has other values than the run was trained with; give the model folder "
                "the run started from"
            )
