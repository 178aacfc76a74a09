"""Record files of any layout, read from any record on: what build workers share.

    source = open_source(Path("train.parquet"), "zebra", scratch=Path("out/progress"))
    for item in source.read(100, 200): ...          # Record, or the RecordError that says why not

`.jsonl` (one record a line), `.json` (one array, or an object id -> record), each also as `.gz` or `.zst`, and
`.parquet`. A source is picklable; a worker's copy opens the file itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from ilvr_ds.contracts import Record
from ilvr_ds.data.formats import FormatName, line_parser
from ilvr_ds.data.formats.jsonl import Line, read_lines
from ilvr_ds.data.formats.plain_jsonl import input_sha256, plain_jsonl
from ilvr_ds.errors import ConfigError, RecordError

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet")


class RecordSource(Protocol):
    """An input file as a sequence of records. Picklable."""

    sha256: str  # of the input's bytes

    def __len__(self) -> int:
        """Records in the input, good or bad."""

    def read(self, start: int, stop: int) -> Iterator[Record | RecordError]:
        """The records at places start..stop-1 in order, exactly stop - start items.

        A bad record comes as its RecordError (never raised), so that a reader can go on. Raises IndexError outside
        0..len, and ConfigError when the input changed since it was opened.
        """


def open_source(path: Path, format_name: FormatName, scratch: Path) -> RecordSource:
    """Open an input file by its ending. Compressed files and JSON arrays are turned into JSONL inside `scratch`.

    Raises ConfigError: no such file, unknown ending, a missing library (the extra to install is named), bytes that
    cannot be decompressed, a file that is no JSON array or no parquet file.
    """
    if not path.is_file():
        raise ConfigError(f"--input {path}: no such file")
    if path.suffix == ".parquet":
        from ilvr_ds.data.formats.parquet import ParquetSource  # pyarrow is optional

        return ParquetSource(path, format_name, input_sha256(path))
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if not name.endswith((".jsonl", ".json")):
        raise ConfigError(f"--input {path}: unknown ending; allowed: {', '.join(SUFFIXES)}")
    digest, plain = input_sha256(path), path
    if name != path.name or name.endswith(".json"):
        plain = plain_jsonl(path, name.endswith(".json"), digest, scratch)
    return JsonlSource(path, plain, format_name, digest)


class JsonlSource:
    """Lines of a plain JSONL file. `path` is what the user gave, `plain` what is read."""

    def __init__(self, path: Path, plain: Path, format_name: FormatName, sha256: str):
        self.path, self.plain, self.format_name, self.sha256 = path, plain, format_name, sha256
        # Blank lines between records count as (bad) records, those at the end do not: line number = place + 1.
        self.offsets = np.fromiter((line.offset for line in read_lines(plain)), np.int64)
        self.size = plain.stat().st_size

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, start: int, stop: int) -> Iterator[Record | RecordError]:
        """See `RecordSource.read`."""
        check_range(self, start, stop)
        if start == stop:
            return
        parse = line_parser(self.format_name)
        with self.plain.open("rb") as file:
            if os.fstat(file.fileno()).st_size != self.size:
                raise ConfigError(f"{self.plain}: changed since it was opened; start again when it is finished")
            file.seek(int(self.offsets[start]))
            for place in range(start, stop):
                line = Line(self.path, place + 1, int(self.offsets[place]), file.readline())
                try:
                    yield parse(line)
                except RecordError as error:
                    yield error


def check_range(source: RecordSource, start: int, stop: int) -> None:
    """Raise IndexError unless 0 <= start <= stop <= len(source)."""
    if not 0 <= start <= stop <= len(source):
        raise IndexError(f"records {start}..{stop} of {len(source)}")
