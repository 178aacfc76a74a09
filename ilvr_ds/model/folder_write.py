"""Writing a model folder in Hugging Face's layout, a chunk of a tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ilvr_ds.data.finished_folder import SETTINGS, write_folder
from ilvr_ds.model.folder import INDEX_FILE, SINGLE_FILE, file_name
from ilvr_ds.model.latent_settings import LATENT_KEY, LatentSettings
from ilvr_ds.model.safetensors_stream import TensorSource, write_safetensors

SHARD_BYTES = 5 * 10**9  # of one weight file, as the published folders
_SIDE_FILES = (".json", ".txt", ".jinja", ".model", ".md")  # what is copied along with the weights


def write_model(
    out: Path,
    sources: list[TensorSource],
    tree: dict[str, Any],
    latent: LatentSettings,
    *,
    copy_from: Path,
    texts: Mapping[str, str],
    made_with: dict[str, Any],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model folder: complete under its name, or not there at all.

    Args:
        sources: the tensors, named by parameter; written in this order, a file at a time.
        tree: config.json, to which `latent` is added.
        copy_from: a model folder whose tokenizer, template and image settings are copied.
        texts: files to write with this content in place of the copy.
        made_with: kept in settings.json; see `ilvr_ds.data.finished_folder`.

    Raises:
        OSError: the disk is full, or `out` is there and not empty.
    """
    with write_folder(out, made_with) as partial:
        skip = {"config.json", INDEX_FILE, SETTINGS, *texts}
        for file in sorted(copy_from.iterdir()):
            if file.is_file() and file.suffix in _SIDE_FILES and file.name not in skip:
                (partial / file.name).write_bytes(file.read_bytes())
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        config = {**tree, LATENT_KEY: asdict(latent)}
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _write_weights(partial, sources, shard_bytes)


def _write_weights(folder: Path, sources: list[TensorSource], shard_bytes: int) -> None:
    renamed = [TensorSource(file_name(s.name), s.dtype, s.shape, s.chunks) for s in sources]
    groups: list[list[TensorSource]] = [[]]
    filled = 0
    for source in renamed:
        if groups[-1] and filled + source.nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(source)
        filled += source.nbytes
    if len(groups) == 1:
        write_safetensors(folder / SINGLE_FILE, groups[0])
        return
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_safetensors(folder / name, group)
        weight_map.update((source.name, name) for source in group)
    index = {"metadata": {"total_size": sum(s.nbytes for s in renamed)}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
