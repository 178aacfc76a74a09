"""Runs of bytes in the files of a shard folder, and how neighbouring ones are read together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ByteRange:
    """The bytes of one sample."""

    file: str  # name inside the shard folder
    offset: int
    size: int
    crc32: int  # zlib.crc32 of the bytes, from the index


@dataclass(frozen=True)
class Run:
    """Bytes that are read at once, and the ranges that lie in them."""

    file: str
    offset: int
    size: int
    members: tuple[int, ...]  # positions in the list of ranges that was coalesced

    @property
    def stop(self) -> int:
        """First byte after the run."""
        return self.offset + self.size

    def cut(self, blob: bytes, wanted: ByteRange) -> bytes:
        """The bytes of one of its ranges out of the bytes of the run (shorter where `blob` ends early)."""
        begin = wanted.offset - self.offset
        return blob if begin == 0 and wanted.size == len(blob) else blob[begin : begin + wanted.size]


def coalesce(ranges: Sequence[ByteRange], *, gap: int, longest: int) -> list[Run]:
    """Join ranges of the same file that are at most `gap` bytes apart into runs of at most `longest` bytes.

    Every range is a member of exactly one run, which holds all of it; a range longer than `longest` is a run by
    itself. Runs come in order of file and offset, so that a disk reads forwards.
    """
    runs: list[Run] = []
    for position in sorted(range(len(ranges)), key=lambda i: (ranges[i].file, ranges[i].offset, ranges[i].size)):
        r = ranges[position]
        last = runs[-1] if runs else None
        if last is not None and last.file == r.file and r.offset - last.stop <= gap:
            stop = max(last.stop, r.offset + r.size)
            if stop - last.offset <= max(longest, last.size):
                runs[-1] = Run(r.file, last.offset, stop - last.offset, (*last.members, position))
                continue
        runs.append(Run(r.file, r.offset, r.size, (position,)))
    return runs
