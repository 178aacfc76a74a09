"""Samples into a tar, with every byte hashed on its way: nothing is read again."""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections.abc import Mapping
from typing import BinaryIO

NAME_BYTES = 100  # what a header has room for
SIZE_DIGITS = 11  # octal: contents under 8 GiB


class ShardWriter:
    """`with ShardWriter(file) as shard: offset, size, crc32 = shard.write("000000007", {"json": ..., "in0.png": ...})`

    The tar is that of webdataset's `TarWriter` with a fixed time, owner and mode, byte for byte: it depends on the
    samples alone. Not `TarWriter` itself: it hands on blocks of 10 kB, in which the bytes of one sample, and so
    its checksum, cannot be told from those of the next. Not `tarfile` either, which copies every content once more.
    """

    def __init__(self, file: BinaryIO):
        self._file, self._sha256 = file, hashlib.sha256()
        self.bytes = 0  # written so far; the whole tar once the block is left

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:  # otherwise the file is thrown away
            end = 2 * tarfile.BLOCKSIZE
            self._append(bytes(end + -(self.bytes + end) % tarfile.RECORDSIZE))

    @property
    def sha256(self) -> str:
        """Of what is written so far."""
        return self._sha256.hexdigest()

    def write(self, key: str, members: Mapping[str, bytes]) -> tuple[int, int, int]:
        """Append a sample. Returns where it starts, its bytes (headers and padding included), and their crc32.

        Raises ValueError when a name or a content is too long for a tar header.
        """
        start, crc32 = self.bytes, 0
        for name in sorted(members):
            content = members[name]
            header = _header(f"{key}.{name}", len(content))
            for piece in (header, content, bytes(-len(content) % tarfile.BLOCKSIZE)):
                crc32 = zlib.crc32(piece, crc32)
                self._append(piece)
        return start, self.bytes - start, crc32

    def _append(self, piece: bytes) -> None:
        self._sha256.update(piece)
        self._file.write(piece)
        self.bytes += len(piece)


def _blank_header() -> bytes:
    """The header of an empty file without a name: all that is the same for every member."""
    info = tarfile.TarInfo()
    info.mtime, info.mode = 0, 0o444
    info.uname = info.gname = "ilvr_ds"
    return info.tobuf(tarfile.USTAR_FORMAT)


_BLANK = _blank_header()
_BLANK_SUM = int(_BLANK[148:154], 8)  # the checksum: the sum of the header's bytes, its own field taken as blanks
_ZEROS = SIZE_DIGITS * ord("0")  # what an empty file's size is in that sum


def _header(name: str, size: int) -> bytes:
    """A member's ustar header, (512,) bytes: name, size and checksum put into the blank one."""
    encoded, digits = name.encode(), b"%011o" % size
    if len(encoded) > NAME_BYTES or len(digits) > SIZE_DIGITS:
        raise ValueError(f"member {name!r} of {size} bytes does not fit into a tar header")
    checksum = _BLANK_SUM + sum(encoded) + sum(digits) - _ZEROS
    filled = encoded.ljust(NAME_BYTES, b"\0") + _BLANK[100:124] + digits + _BLANK[135:148]
    return filled + b"%06o" % checksum + _BLANK[154:]
