"""Files that are written whole or not at all, by any number of writers at once."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ilvr_ds.errors import ShardError

TEMPORARY = ".tmp"  # how the name of an unfinished file ends


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Hand out a file to write; it gets the name `path` once the body is through and the bytes are on the disk.

    The temporary name is the writer's own: two processes that write the same file never write into each other's.
    When the body raises, nothing is left behind; a killed process leaves `NAME.*.tmp`.
    Raises ShardError naming `path` for what the system refuses: disk full, no permission, file too large.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}{TEMPORARY}")
    try:
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # gone already when renamed
    except OSError as error:
        raise cannot_write(path, error) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file whole or not at all. Raises ShardError as `whole_file` does."""
    with whole_file(path) as file:
        file.write(content)


def cannot_write(path: Path, error: OSError) -> ShardError:
    """The error for a place that cannot be written to, with what to do."""
    return ShardError(
        f"{path}: cannot write: {error.strerror or error}; make room or choose another folder, then run the same "
        f"command again: what is finished is kept"
    )
