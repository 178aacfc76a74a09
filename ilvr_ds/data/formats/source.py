"""Record files of any layout, read from any record on: what build workers share.

    source = open_sources(input_files([Path("zebra/*.parquet")]), "zebra", scratch=Path("out/progress"))
    for item in source.read(100, 200): ...          # Record, or the RecordError that says why not

`.jsonl` (one record a line), `.json` (one array, or an object id -> record), each also as `.gz` or `.zst`, and
`.parquet`; several files are one source, in their order. A source is small and picklable: a worker's copy opens the
files itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np

from ilvr_ds.contracts import Record
from ilvr_ds.data.formats import FormatName, line_parser
from ilvr_ds.data.formats.input_files import SUFFIXES, id_stems, joint_sha256
from ilvr_ds.data.formats.jsonl import Line
from ilvr_ds.data.formats.plain_jsonl import OFFSET, input_sha256, line_offsets, plain_jsonl
from ilvr_ds.errors import ConfigError, RecordError


class RecordSource(Protocol):
    """Input files as a sequence of records. Picklable."""

    sha256: str  # of the input's bytes; of several files see `joint_sha256`

    def __len__(self) -> int:
        """Records in the input, good or bad."""

    def read(self, start: int, stop: int) -> Iterator[Record | RecordError]:
        """The records at places start..stop-1 in order, exactly stop - start items.

        A bad record comes as its RecordError (never raised), so that a reader can go on. Raises IndexError outside
        0..len, and ConfigError when the input changed since it was opened.
        """

    def ids(self, start: int, stop: int) -> Iterator[str | None]:
        """The same records' ids, None for a bad record, without reading images where that is possible: a record that is
        bad for its images alone may have its id here. Raises as `read`."""

    def origin(self, place: int) -> str:
        """FILE:LINE of the record at a place, or FILE:ROW; lines and rows are counted from 1."""


def open_sources(paths: Sequence[Path], format_name: FormatName, scratch: Path) -> RecordSource:
    """Open input files as one source, each by its ending.

    Compressed files and JSON arrays are turned into JSONL inside `scratch`; where lines start is noted there.
    Raises ConfigError: no such file, unknown ending, a missing library (the extra to install is named), bytes that
    cannot be decompressed, a file that is no JSON array or no parquet file. ShardError: `scratch` cannot be written.
    """
    sources = [_open(path, stem, format_name, scratch) for path, stem in zip(paths, id_stems(paths), strict=True)]
    if len(sources) == 1:
        return sources[0]
    return SourceList(sources, joint_sha256([(path.name, s.sha256) for path, s in zip(paths, sources, strict=True)]))


def open_source(path: Path, format_name: FormatName, scratch: Path) -> RecordSource:
    """`open_sources` of one file."""
    return open_sources((path,), format_name, scratch)


def _open(path: Path, stem: str, format_name: FormatName, scratch: Path) -> RecordSource:
    if not path.is_file():
        raise ConfigError(f"--input {path}: no such file")
    if path.suffix == ".parquet":
        from ilvr_ds.data.formats.parquet import ParquetSource  # pyarrow is optional

        return ParquetSource(path, stem, format_name, input_sha256(path))
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if not name.endswith((".jsonl", ".json")):
        raise ConfigError(f"--input {path}: unknown ending; allowed: {', '.join(SUFFIXES)}")
    digest, plain = input_sha256(path), path
    if name != path.name or name.endswith(".json"):
        plain = plain_jsonl(path, name.endswith(".json"), digest, scratch)
    return JsonlSource(path, plain, stem, format_name, digest, line_offsets(plain, digest, scratch))


class JsonlSource:
    """Lines of a plain JSONL file. `path` is what the user gave, `plain` what is read."""

    def __init__(self, path: Path, plain: Path, stem: str, format_name: FormatName, sha256: str, offsets: Path):
        self.path, self.plain, self.stem, self.format_name, self.sha256 = path, plain, stem, format_name, sha256
        # Blank lines between records count as (bad) records, those at the end do not: line number = place + 1.
        self.offsets = offsets  # a file: 100 million lines are 800 MB, which no worker needs more than a slice of
        self.count = offsets.stat().st_size // OFFSET.itemsize
        self.size = plain.stat().st_size

    def __len__(self) -> int:
        return self.count

    def read(self, start: int, stop: int) -> Iterator[Record | RecordError]:
        """See `RecordSource.read`."""
        check_range(self, start, stop)
        if start == stop:
            return
        parse = line_parser(self.format_name)
        offsets = np.fromfile(self.offsets, OFFSET, stop - start, offset=start * OFFSET.itemsize)
        with self.plain.open("rb") as file:
            if os.fstat(file.fileno()).st_size != self.size:
                raise ConfigError(f"{self.plain}: changed since it was opened; start again when it is finished")
            file.seek(int(offsets[0]))
            for place, offset in zip(range(start, stop), offsets.tolist(), strict=True):
                line = Line(self.path, place + 1, offset, file.readline(), self.stem)
                try:
                    yield parse(line)
                except RecordError as error:
                    yield error

    def ids(self, start: int, stop: int) -> Iterator[str | None]:
        """See `RecordSource.ids`."""
        return ids_of(self.read(start, stop))

    def origin(self, place: int) -> str:
        """See `RecordSource.origin`."""
        return f"{self.path}:{place + 1}"


class SourceList:
    """Several sources one after the other."""

    def __init__(self, sources: Sequence[RecordSource], sha256: str):
        self.sources, self.sha256 = tuple(sources), sha256
        self.ends = tuple(accumulate(map(len, sources)))

    def __len__(self) -> int:
        return self.ends[-1]

    def read(self, start: int, stop: int) -> Iterator[Record | RecordError]:
        """See `RecordSource.read`."""
        for source, low, high in self._parts(start, stop):
            yield from source.read(low, high)

    def ids(self, start: int, stop: int) -> Iterator[str | None]:
        """See `RecordSource.ids`."""
        for source, low, high in self._parts(start, stop):
            yield from source.ids(low, high)

    def origin(self, place: int) -> str:
        """See `RecordSource.origin`."""
        ((source, low, _),) = self._parts(place, place + 1)
        return source.origin(low)

    def _parts(self, start: int, stop: int) -> Iterator[tuple[RecordSource, int, int]]:
        """The sources that hold places start..stop-1, each with its own range of places."""
        check_range(self, start, stop)
        first = int(np.searchsorted(self.ends, start, side="right"))
        for source, end in zip(self.sources[first:], self.ends[first:], strict=True):
            begin = end - len(source)
            if begin >= stop:
                return
            low, high = max(start, begin), min(stop, end)
            if low < high:
                yield source, low - begin, high - begin


def ids_of(items: Iterable[Record | RecordError]) -> Iterator[str | None]:
    """The id of each record, None for a bad one."""
    return (None if isinstance(item, RecordError) else item.id for item in items)


def check_range(source: RecordSource, start: int, stop: int) -> None:
    """Raise IndexError unless 0 <= start <= stop <= len(source)."""
    if not 0 <= start <= stop <= len(source):
        raise IndexError(f"records {start}..{stop} of {len(source)}")
