"""A folder of small files that never grows past a limit, shared by any number of processes of a machine.

An entry is written under a temporary name and renamed, under one file lock, so that a killed process leaves an
entry whole or not at all; the kernel drops its lock. What is in an entry is the reader's to check: a machine that
lost power may keep a renamed file without its content.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ilvr_ds.errors import ReadError

KEEP = 0.75  # share of the limit that is left after clearing, so that clearing is rare
_ENDING = ".entry"
_TEMPORARY = ".tmp"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[BinaryIO]:
    """Hold an exclusive lock on a file (made when missing), open for reading and writing; waits for other processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file  # closing releases the lock


class DiskCache:
    """Byte strings by key, at most `limit` bytes of them together; the least recently used go first.

    Holds nothing open: safe in threads, forked and spawned processes. Folder and lock must lie on a local disk.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder = folder
        self.limit = limit

    def get(self, key: str) -> bytes | None:
        """The entry, or None. Using it makes it the youngest."""
        path = self._path(key)
        try:
            content = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:  # also: cleared between the two calls; it is fetched again
            return None
        return content

    def put(self, key: str, content: bytes) -> None:
        """Store an entry. One larger than the whole cache is not kept. Raises ReadError when the disk refuses."""
        if len(content) > self.limit:
            return
        path = self._path(key)
        try:
            with locked(self.folder / "lock") as total_file:
                if path.exists():  # another process was faster
                    return
                total = self._total(total_file)
                if total is None or total + len(content) > self.limit:
                    total = self._clear(max(0, int(self.limit * KEEP) - len(content)))
                # The sum first: a process killed in between leaves it too large, never too small.
                _write_total(total_file, total + len(content))
                self._write(path, content)
        except OSError as error:
            raise ReadError(
                f"{self.folder}: the cache cannot be written: {error}; choose another data.cache_dir or a smaller "
                f"data.cache_gib"
            ) from error

    def drop(self, key: str) -> None:
        """Remove an entry, if it is there."""
        self._path(key).unlink(missing_ok=True)

    def entries(self) -> list[tuple[float, int, Path]]:
        """(seconds of last use, bytes, path) of every entry, oldest first."""
        found = []
        for path in self.folder.glob(f"??/*{_ENDING}"):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                found.append((stat.st_mtime, stat.st_size, path))
        return sorted(found)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{_ENDING}"  # 256 folders: a folder of a million files is slow

    def _total(self, file: BinaryIO) -> int | None:
        file.seek(0)
        text = file.read()
        return int(text) if text.isdigit() else None  # new, or cut short by a crash: count again

    def _clear(self, target: int) -> int:
        """Remove the oldest entries until `target` bytes are left, and what killed writers left; returns the sum.

        Called under the lock: whoever writes holds it, so a temporary file has no owner any more.
        """
        for path in self.folder.glob(f"??/*{_TEMPORARY}"):
            path.unlink(missing_ok=True)
        entries = self.entries()
        total = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if total <= target:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    def _write(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(_TEMPORARY)
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _write_total(file: BinaryIO, total: int) -> None:
    file.seek(0)
    file.write(b"%d" % total)
    file.truncate()
    file.flush()
