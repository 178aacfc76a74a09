"""Pieces of parameters in files: written by any number of ranks, read back by any other number.

One safetensors file per rank, `PREFIX-RANK-of-WORLD.safetensors`, holding flat tensors under `KIND/NAME`
(`master/student.head.weight`). The header says where each piece lies in its parameter, so a reader can
put any range together from whatever ranges were written.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ilvr_ds.engine.partition import Piece
from ilvr_ds.errors import CheckpointError


def shard_path(folder: Path, prefix: str, rank: int, world: int) -> Path:
    """File of one rank."""
    return folder / f"{prefix}-{rank:05d}-of-{world:05d}.safetensors"


def write_shard(
    path: Path, pieces: list[tuple[str, Piece]], tensors: dict[str, list[Tensor]], extra: dict[str, str]
) -> None:
    """Write one rank's pieces and flush them to the disk.

    Args:
        pieces: (parameter name, piece); pieces without elements are left out.
        tensors: per kind, one flat (numel,) tensor per entry of `pieces`.
        extra: more header entries.

    Raises:
        OSError or SafetensorError: the file cannot be written.
    """
    addresses = {name: [piece.start, piece.numel, list(piece.shape)] for name, piece in pieces if piece.numel}
    content = {
        f"{kind}/{name}": tensor.detach().to("cpu", copy=True).contiguous()
        for kind, values in tensors.items()
        for (name, piece), tensor in zip(pieces, values, strict=True)
        if piece.numel
    }
    save_file(content, path, metadata={"pieces": json.dumps(addresses), **extra})
    with path.open("rb") as file:
        os.fsync(file.fileno())


class ShardReader:
    """Reads ranges of parameters out of the files of all ranks."""

    def __init__(self, folder: Path, prefix: str):
        """Open every rank's file.

        Raises:
            CheckpointError: a rank's file is missing, cut short or damaged; the file is named.
        """
        self.folder = folder
        pattern = re.compile(rf"{re.escape(prefix)}-(\d+)-of-(\d+)\.safetensors")
        worlds = {int(m[2]) for m in map(pattern.fullmatch, os.listdir(folder)) if m}
        if len(worlds) != 1:
            found = f"files of {sorted(worlds)} ranks are mixed" if worlds else f"no {prefix} file"
            raise CheckpointError(f"{folder}: {found}; use another checkpoint of the run")
        self.world = worlds.pop()
        self._files, self._pieces = [], []
        for rank in range(self.world):
            path = shard_path(folder, prefix, rank, self.world)
            if not path.is_file():
                raise CheckpointError(f"{path}: missing, one of {self.world} ranks; use another checkpoint")
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: cut short or damaged ({error}); use another checkpoint") from error
            self._files.append(file)
            self._pieces.append(json.loads(file.metadata()["pieces"]))
        self.extra = self._files[0].metadata()

    def read(self, kind: str, name: str, piece: Piece, out: Tensor) -> None:
        """Fill `out` (piece.numel,) with elements [piece.start, piece.start + piece.numel) of `kind/name`.

        Raises:
            CheckpointError: the parameter has another shape, or some of its elements are in no file.
        """
        end, filled = piece.start + piece.numel, 0
        for file, pieces in zip(self._files, self._pieces, strict=True):
            if name not in pieces:
                continue
            start, numel, shape = pieces[name]
            if tuple(shape) != piece.shape:
                raise CheckpointError(f"{self.folder}: {name!r} has shape {tuple(shape)}, the model's is {piece.shape}")
            low, high = max(piece.start, start), min(end, start + numel)
            if low < high:
                values = file.get_slice(f"{kind}/{name}")[low - start : high - start]
                out[low - piece.start : high - piece.start] = values.to(out.device)
                filled += high - low
        if filled != piece.numel:
            raise CheckpointError(
                f"{self.folder}: {kind}/{name} has {filled} of elements {piece.start} to {end}; use another checkpoint"
            )
