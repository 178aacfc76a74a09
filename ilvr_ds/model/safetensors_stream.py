"""Safetensors files read and written a range at a time: memory is bounded by a chunk, whatever the tensors' sizes.

The library's reader maps the file, so that what was read stays counted as resident memory of the process, and its
writer wants all tensors of a file at once. A file is eight bytes (the length of the header, little-endian), the
header in JSON (name -> dtype, shape, byte range) and the bytes; that is all that is needed here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ilvr_ds.errors import CheckpointError

CHUNK = 2**22  # elements read or written at a time where a conversion is needed: 16 MiB in float32
MAX_HEADER = 100_000_000  # bytes; the format's own limit
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # first byte, from the start of the file

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.numel * self.dtype.itemsize


class SafetensorsFile:
    """The tensors of one file, by name. Holds no file open and maps nothing."""

    def __init__(self, path: Path):
        """Read and check the header.

        Raises:
            CheckpointError: the file is missing, cut short, longer than its header says, or no safetensors file.
        """
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(MAX_HEADER, size - 8):
                    raise CheckpointError(f"{path}: cut short or not a safetensors file ({size} bytes); fetch it again")
                header = json.loads(file.read(length))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path}: its header is damaged ({error}); fetch it again") from error
        header.pop("__metadata__", None)
        self.entries = {name: self._entry(name, value, 8 + length) for name, value in header.items()}
        needed = max((entry.begin + entry.nbytes for entry in self.entries.values()), default=8 + length)
        if size != needed:
            what = "cut short" if size < needed else "longer than its header says"
            raise CheckpointError(f"{path}: {what}: {size} bytes, its header asks for {needed}; fetch it again")

    def _entry(self, name: str, value: dict, offset: int) -> Entry:
        if value["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has dtype {value['dtype']}; {', '.join(DTYPES)} can be read: "
                "give the unquantised model"
            )
        begin, end = value["data_offsets"]
        entry = Entry(DTYPES[value["dtype"]], tuple(value["shape"]), offset + begin)
        if end - begin != entry.nbytes:
            raise CheckpointError(f"{self.path}: tensor {name!r}: {end - begin} bytes for shape {entry.shape}")
        return entry

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out` (n,) with elements [start, start + n) of the flattened tensor, cast to `out`'s dtype.

        Raises:
            ValueError: the range is not inside the tensor, or `out` is not flat and contiguous.
            CheckpointError: the file became shorter since it was opened.
        """
        entry = self.entries[name]
        if out.ndim != 1 or not out.is_contiguous() or not 0 <= start <= start + out.numel() <= entry.numel:
            raise ValueError(f"elements {start} to {start + out.numel()} of {name!r} with {entry.numel} elements")
        direct = out.dtype == entry.dtype and out.device.type == "cpu"
        with self.path.open("rb", buffering=0) as file:
            file.seek(entry.begin + start * entry.dtype.itemsize)
            if direct:
                self._fill(file, out)
                return
            staging = torch.empty(min(CHUNK, out.numel()), dtype=entry.dtype)
            for at in range(0, out.numel(), CHUNK):
                part = staging[: min(CHUNK, out.numel() - at)]
                self._fill(file, part)
                out[at : at + part.numel()] = part.to(out.device)

    def _fill(self, file, tensor: Tensor) -> None:
        view = memoryview(tensor.view(torch.uint8).numpy())
        while view:
            count = file.readinto(view)
            if not count:
                raise CheckpointError(f"{self.path}: cut short while it was being read; fetch it again")
            view = view[count:]

    def chunks(self, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        """The flattened tensor in order, (n,) at most `CHUNK` elements at a time, in `dtype`. The buffer is reused."""
        entry = self.entries[name]
        buffer = torch.empty(min(CHUNK, entry.numel), dtype=dtype)
        for start in range(0, entry.numel, CHUNK):
            part = buffer[: min(CHUNK, entry.numel - start)]
            self.read(name, start, part)
            yield part


@dataclass(frozen=True)
class TensorSource:
    """A tensor to be written: its name in the file, and its elements in order as flat chunks of `dtype`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, sources: list[TensorSource]) -> None:
    """Write one file, a chunk at a time, and flush it to the disk.

    Raises:
        ValueError: a source gives another number of elements than its shape has.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0  # transformers refuses a file without this entry
    for source in sources:
        header[source.name] = {
            "dtype": _NAMES[source.dtype],
            "shape": list(source.shape),
            "data_offsets": [offset, offset + source.nbytes],
        }
        offset += source.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the bytes start at a multiple of eight
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for source in sources:
            before = file.tell()
            for chunk in source.chunks():
                file.write(memoryview(chunk.detach().to("cpu", source.dtype).contiguous().view(torch.uint8).numpy()))
            if file.tell() - before != source.nbytes:
                raise ValueError(f"{source.name!r}: {file.tell() - before} bytes written, {source.nbytes} announced")
        file.flush()
        os.fsync(file.fileno())
