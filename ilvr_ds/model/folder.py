"""Model folders in Hugging Face's layout: config.json, safetensors in one file or several, tokenizer files.

    model.safetensors                                          or
    model-00001-of-00005.safetensors, ... and model.safetensors.index.json (tensor -> file)

Names in files are those stock `save_pretrained` writes and the published Qwen2.5-VL and ILVR checkpoints have
(`model.*`, `visual.*`, `lm_head.weight`); names a newer library writes, equal to its modules', are read too. In the
package a tensor goes by its parameter's name in the stock module (`model.language_model.*`, `model.visual.*`).

Written by `ilvr_ds.model.folder_write`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from ilvr_ds.errors import CheckpointError, ConfigError
from ilvr_ds.model.safetensors_stream import Entry, SafetensorsFile

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
MODEL_TYPE = "qwen2_5_vl"
INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


class ModelFolder:
    """A model folder whose config and weight files belong together; weights are read by range."""

    def __init__(self, path: str | Path):
        """Open and check the folder; no weight is read.

        Raises:
            ConfigError: no config.json, or another architecture's.
            CheckpointError: a weight file is missing, cut short or damaged; a tensor is missing, unknown or of
                another shape than config.json asks for (each named).
        """
        self.path = Path(path)
        self.tree = read_tree(self.path)
        self.config = Qwen2_5_VLConfig.from_pretrained(self.path, local_files_only=True)
        self.shapes = {n: tuple(p.shape) for n, p in empty_network(self.config).named_parameters()}
        self._files: dict[str, tuple[SafetensorsFile, str]] = {}  # parameter -> (file, name in it)
        for file in _weight_files(self.path):
            for name in file.entries:
                if not name.endswith("rotary_emb.inv_freq"):  # old checkpoints hold it; it follows from the config
                    self._files[parameter_name(name)] = (file, name)
        self._check()

    def _check(self) -> None:
        extra = [name for name in self._files if name not in self.shapes]
        if self.config.tie_word_embeddings and HEAD in extra:
            self._check_tied_head()
            extra.remove(HEAD)
        for name, shape in self.shapes.items():
            if name not in self._files:
                raise CheckpointError(f"{self.path}: tensor {file_name(name)!r} is in no weight file; fetch it again")
            file, inside = self._files[name]
            found = file.entries[inside].shape
            if found == shape:
                continue
            if name in (EMBEDDING, HEAD) and found[1:] == shape[1:]:
                raise CheckpointError(
                    f"{file.path}: {inside!r} has {found[0]} rows, config.json says vocab_size={shape[0]}: the config "
                    "belongs to another vocabulary; set vocab_size to the rows there are"
                )
            raise CheckpointError(f"{file.path}: {inside!r} has shape {found}, config.json asks for {shape}")
        if extra:
            file, inside = self._files[extra[0]]
            raise CheckpointError(
                f"{file.path}: tensor {inside!r} (one of {len(extra)}) is not part of a {ARCHITECTURE} with this "
                "config.json"
            )

    def _check_tied_head(self) -> None:
        """A tied model's file may hold the head once more, but not another one: stock transformers would untie it."""
        file, inside = self._files[HEAD]
        same = file.entries[inside].shape == self.shapes[EMBEDDING] and all(
            torch.equal(a, b)
            for a, b in zip(file.chunks(inside, torch.float32), self.chunks(EMBEDDING, torch.float32), strict=True)
        )
        if not same:
            raise CheckpointError(
                f"{file.path}: {inside!r} differs from the embedding, but config.json says tie_word_embeddings=true; "
                "set it to false, or remove the tensor"
            )

    def entry(self, parameter: str) -> Entry:
        """Shape and dtype of a parameter as stored."""
        file, name = self._files[parameter]
        return file.entries[name]

    def read(self, parameter: str, start: int, out: Tensor) -> None:
        """Fill `out` (n,) with elements [start, start + n) of a parameter, cast to its dtype.

        Raises:
            CheckpointError: the file became shorter since the folder was opened.
        """
        file, name = self._files[parameter]
        file.read(name, start, out)

    def chunks(self, parameter: str, dtype: torch.dtype) -> Iterator[Tensor]:
        """A parameter's elements in order as flat chunks of `dtype`."""
        file, name = self._files[parameter]
        return file.chunks(name, dtype)


def read_tree(path: Path) -> dict[str, Any]:
    """config.json as it stands. Raises ConfigError if there is none, or it is another architecture's."""
    file = path / "config.json"
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{path}: no config.json there; give the folder of a Qwen2.5-VL model") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file}: not a readable JSON file: {error}") from error
    if not isinstance(tree, dict) or tree.get("model_type") != MODEL_TYPE:
        found = tree.get("model_type") if isinstance(tree, dict) else type(tree).__name__
        raise ConfigError(f"{file}: model_type is {found!r}, this is for {MODEL_TYPE!r} ({ARCHITECTURE})")
    if tree.get("architectures", [ARCHITECTURE]) != [ARCHITECTURE]:
        raise ConfigError(f"{file}: architectures is {tree['architectures']}, this is for {ARCHITECTURE}")
    return tree


def empty_network(config: Qwen2_5_VLConfig, dtype: torch.dtype | None = None) -> Qwen2_5_VLForConditionalGeneration:
    """A stock network whose parameters are on the meta device (no memory) and whose buffers are real.

    Buffers (the rotary frequencies) are in no file: their modules are built once more, on the CPU.
    """
    with torch.device("meta"):
        network = Qwen2_5_VLForConditionalGeneration(config)
    for module in network.modules():
        if any(True for _ in module.buffers(recurse=False)):
            for name, value in type(module)(module.config).named_buffers(recurse=False):
                setattr(module, name, value)
    if dtype is not None:
        for parameter in network.parameters():
            parameter.data = parameter.data.to(dtype)
    return network.eval()


def parameter_name(name: str) -> str:
    """Name in a file, old or new -> name of the parameter in the stock module."""
    if name.startswith(("model.language_model.", "model.visual.", "lm_head.")):
        return name
    if name.startswith("visual."):
        return f"model.{name}"
    return f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name


def file_name(parameter: str) -> str:
    """Name of the parameter in the stock module -> name stock `save_pretrained` gives it in a file."""
    for inside, outside in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if parameter.startswith(inside):
            return outside + parameter.removeprefix(inside)
    return parameter


def _weight_files(path: Path) -> list[SafetensorsFile]:
    """Every weight file, checked against the index where there is one."""
    index = path / INDEX_FILE
    if not index.is_file():
        if not (path / SINGLE_FILE).is_file():
            raise CheckpointError(f"{path}: neither {SINGLE_FILE} nor {INDEX_FILE} there; the weights are missing")
        return [SafetensorsFile(path / SINGLE_FILE)]
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(f"{index}: not a readable weight index ({error!r}); fetch it again") from error
    files = {}
    for name in sorted(set(weight_map.values())):
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name}: missing, {INDEX_FILE} names it; fetch it again")
        files[name] = SafetensorsFile(path / name)
    for tensor, name in weight_map.items():
        if tensor not in files[name].entries:
            raise CheckpointError(f"{path / name}: tensor {tensor!r} is not in it, {INDEX_FILE} says it is")
    for name, file in files.items():
        for tensor in file.entries:
            if weight_map.get(tensor) != name:
                raise CheckpointError(f"{path / name}: tensor {tensor!r} is in it, {INDEX_FILE} does not say so")
    return list(files.values())
