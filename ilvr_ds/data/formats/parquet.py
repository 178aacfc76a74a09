"""Rows of a parquet file as records; nothing but the rows asked for is held in memory.

Images in columns of bytes, or of {bytes, path} as the `datasets` library writes them, become `ImageRef`s with
their bytes. A null stays a null: for a format it is the same as an absent image.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ilvr_ds.contracts import Record
from ilvr_ds.data.formats import FormatName, record_parser
from ilvr_ds.data.formats.jsonl import identify, record_stem
from ilvr_ds.data.formats.source import check_range
from ilvr_ds.errors import ConfigError, RecordError

try:
    import pyarrow
    import pyarrow.parquet
except ImportError as _error:
    raise ConfigError("reading .parquet needs a library: pip install 'ilvr_ds[formats]'") from _error

ROWS_AT_ONCE = 16  # rows with pictures of a megabyte each must fit into memory

# What pyarrow raises on damaged files; ArrowInvalid is a ValueError, ArrowIOError an OSError.
_ROW_ERRORS = (pyarrow.ArrowException, OSError, ValueError, OverflowError)


class ParquetSource:
    """Rows of one parquet file. Origins are FILE:ROW, the first row being 1."""

    def __init__(self, path: Path, format_name: FormatName, sha256: str):
        self.path, self.format_name, self.sha256 = path, format_name, sha256
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
                names = file.schema_arrow.names
        except _ROW_ERRORS as error:
            raise ConfigError(f"--input {path}: not a readable parquet file ({error}); fetch it again") from error
        if len(set(names)) != len(names):
            raise ConfigError(f"--input {path}: two columns have the same name; the columns are {names}")
        self.groups = groups  # rows per row group
        self.size = path.stat().st_size

    def __len__(self) -> int:
        return sum(self.groups)

    def read(self, start: int, stop: int) -> Iterator[Record | RecordError]:
        """See `RecordSource.read`. A row group that cannot be decoded costs its own rows only."""
        check_range(self, start, stop)
        if start == stop:
            return
        parse = record_parser(self.format_name)
        if self.path.stat().st_size != self.size:
            raise ConfigError(f"{self.path}: changed since it was opened; start again when it is finished")
        with pyarrow.parquet.ParquetFile(self.path) as file:
            first = 0
            for group, rows in enumerate(self.groups):
                low, high = max(start, first), min(stop, first + rows)
                if low < high:
                    trees = _rows(file, group, low - first, high - first)
                    for place, tree in zip(range(low, high), trees, strict=True):
                        yield self._record(parse, place, tree)
                first += rows

    def _record(self, parse: Any, place: int, tree: dict[str, Any] | Exception) -> Record | RecordError:
        origin = f"{self.path}:{place + 1}"
        if isinstance(tree, Exception):
            message = f"the row cannot be decoded ({type(tree).__name__}: {tree}); fetch the file again"
            return RecordError("unreadable_row", message, origin=origin)
        try:
            return parse(identify(tree, origin, f"{record_stem(self.path)}-{place + 1}"))
        except RecordError as error:
            return error


def _rows(file: pyarrow.parquet.ParquetFile, group: int, start: int, stop: int) -> Iterator[dict[str, Any] | Exception]:
    """Rows start..stop-1 of a row group: exactly stop - start items, the error in the place of what is unreadable."""
    place = 0
    try:
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=[group]):
            for row in range(max(start - place, 0), min(stop - place, batch.num_rows)):
                yield _row(batch.slice(row, 1))
                start = place + row + 1
            place += batch.num_rows
            if place >= stop:
                return
        failure: Exception = EOFError("the row group holds fewer rows than the file says")
    except _ROW_ERRORS as error:
        failure = error
    for _ in range(start, stop):
        yield failure


def _row(batch: pyarrow.RecordBatch) -> dict[str, Any] | Exception:
    try:
        return batch.to_pylist()[0]
    except _ROW_ERRORS as error:  # text that is not UTF-8, a date outside Python's range
        return error
