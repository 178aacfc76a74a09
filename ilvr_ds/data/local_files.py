"""Read runs of bytes from the files of a local folder: few system calls, few open files."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from ilvr_ds.data.byte_ranges import ByteRange, coalesce
from ilvr_ds.errors import ReadError

MAX_OPEN = 64  # files open at once in a process; the usual limit is 1,024
GAP = 64 << 10  # bytes read for nothing rather than asked for in two calls
LONGEST = 16 << 20  # bytes in one read


class LocalFiles:
    """The files of a folder. Safe in threads and after a fork: `pread` has no position that could be shared.

    Files stay open until `MAX_OPEN` others were used since. What replaces a shard under the same name is not seen
    by a process that has it open.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._open: OrderedDict[str, int] = OrderedDict()  # name -> descriptor, least recently used first
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._open)

    def read(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """The bytes of every range, unchecked; fewer than asked for where the file ends.

        Raises ReadError naming the file when it cannot be opened or read.
        """
        found = [b""] * len(ranges)
        for run in coalesce(ranges, gap=GAP, longest=LONGEST):
            try:
                blob = self._pread(run.file, run.offset, run.size)
            except OSError as error:
                raise ReadError(
                    f"{self.folder / run.file}: bytes {run.offset} to {run.stop} cannot be read: {error}; "
                    f"copy the shard again, or check the disk"
                ) from error
            for member in run.members:
                found[member] = run.cut(blob, ranges[member])
        return found

    def _pread(self, name: str, offset: int, size: int) -> bytes:
        with self._lock:  # so that no other thread closes the file meanwhile
            file = self._descriptor(name)
            blob = os.pread(file, size, offset)
            while len(blob) < size and (more := os.pread(file, size - len(blob), offset + len(blob))):
                blob += more
        return blob

    def _descriptor(self, name: str) -> int:
        if name not in self._open:
            self._open[name] = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._open) > MAX_OPEN:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(name)
        return self._open[name]


def _close_all(descriptors: OrderedDict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])
