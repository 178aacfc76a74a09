"""Samples into a tar, with every byte hashed on its way: nothing is read again."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from collections.abc import Mapping
from typing import BinaryIO

COPY = 1 << 20  # bytes handed on at a time


class ShardWriter:
    """`with ShardWriter(file) as shard: offset, size, crc32 = shard.write("000000007", {"json": ..., "in0.png": ...})`

    The tar is that of webdataset's `TarWriter` with a fixed time, owner and mode, byte for byte: it depends on the
    samples alone. Not `TarWriter` itself: it hands on blocks of 10 kB, in which the bytes of one sample, and so
    its checksum, cannot be told from those of the next.
    """

    def __init__(self, file: BinaryIO):
        self._file = _Hashing(file)
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT, copybufsize=COPY)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:  # otherwise the file is thrown away
            self._tar.close()

    @property
    def bytes(self) -> int:
        """Written so far; the whole tar once the block is left."""
        return self._file.bytes

    @property
    def sha256(self) -> str:
        """Of what is written so far."""
        return self._file.sha256.hexdigest()

    def write(self, key: str, members: Mapping[str, bytes]) -> tuple[int, int, int]:
        """Append a sample. Returns where it starts, its bytes (headers and padding included), and their crc32."""
        start, self._file.crc32 = self._file.bytes, 0
        for name in sorted(members):
            info = tarfile.TarInfo(f"{key}.{name}")
            info.size, info.mtime, info.mode = len(members[name]), 0, 0o444
            info.uname = info.gname = "ilvr_ds"
            self._tar.addfile(info, io.BytesIO(members[name]))
        return start, self._file.bytes - start, self._file.crc32


class _Hashing:
    """What `tarfile` asks of a file, and the hashes of what goes through it."""

    def __init__(self, file: BinaryIO):
        self._file, self.bytes, self.crc32, self.sha256 = file, 0, 0, hashlib.sha256()

    def tell(self) -> int:
        return self.bytes

    def write(self, piece: bytes) -> int:
        self.sha256.update(piece)
        self.crc32 = zlib.crc32(piece, self.crc32)
        self.bytes += len(piece)
        return self._file.write(piece)
