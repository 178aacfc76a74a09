"""Rows of a parquet file as records; nothing but the rows asked for is held in memory.

Images in columns of bytes, or of {bytes, path} as the `datasets` library writes them, become `ImageRef`s with
their bytes. A null stays a null: for a format it is the same as an absent image. Ids are read without the bytes of
{bytes, path} columns: most of the file is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ilvr_ds.contracts import Record
from ilvr_ds.data.formats import FormatName, record_parser
from ilvr_ds.data.formats.jsonl import identify
from ilvr_ds.data.formats.source import check_range, ids_of
from ilvr_ds.errors import ConfigError, RecordError

try:
    import pyarrow
    import pyarrow.parquet
except ImportError as _error:
    raise ConfigError("reading .parquet needs a library: pip install 'ilvr_ds[formats]'") from _error

ROWS_AT_ONCE = 16  # rows with pictures of a megabyte each must fit into memory
_BYTES = ".bytes"

# What pyarrow raises on damaged files; ArrowInvalid is a ValueError, ArrowIOError an OSError.
_ROW_ERRORS = (pyarrow.ArrowException, OSError, ValueError, OverflowError)


class ParquetSource:
    """Rows of one parquet file. Origins are FILE:ROW, the first row being 1."""

    def __init__(self, path: Path, stem: str, format_name: FormatName, sha256: str):
        self.path, self.stem, self.format_name, self.sha256 = path, stem, format_name, sha256
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
                names = file.schema_arrow.names
                leaves = [file.schema.column(i).path for i in range(len(file.schema))]
        except _ROW_ERRORS as error:
            raise ConfigError(f"--input {path}: not a readable parquet file ({error}); fetch it again") from error
        if len(set(names)) != len(names):
            raise ConfigError(f"--input {path}: two columns have the same name; the columns are {names}")
        self.groups = groups  # rows per row group
        self.light = [leaf for leaf in leaves if not (leaf.endswith(_BYTES) and _path_beside(leaf) in leaves)]
        self.size = path.stat().st_size

    def __len__(self) -> int:
        return sum(self.groups)

    def read(self, start: int, stop: int) -> Iterator[Record | RecordError]:
        """See `RecordSource.read`. A row group that cannot be decoded costs its own rows only."""
        return self._read(start, stop, None)

    def ids(self, start: int, stop: int) -> Iterator[str | None]:
        """See `RecordSource.ids`."""
        return ids_of(self._read(start, stop, self.light))

    def origin(self, place: int) -> str:
        """See `RecordSource.origin`."""
        return f"{self.path}:{place + 1}"

    def _read(self, start: int, stop: int, columns: list[str] | None) -> Iterator[Record | RecordError]:
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
                    trees = _rows(file, group, low - first, high - first, columns)
                    for place, tree in zip(range(low, high), trees, strict=True):
                        yield self._record(parse, place, tree if columns is None else _named(tree))
                first += rows

    def _record(self, parse: Any, place: int, tree: dict[str, Any] | Exception) -> Record | RecordError:
        origin = self.origin(place)
        if isinstance(tree, Exception):
            message = f"the row cannot be decoded ({type(tree).__name__}: {tree}); fetch the file again"
            return RecordError("unreadable_row", message, origin=origin)
        try:
            return parse(identify(tree, origin, f"{self.stem}-{place + 1}"))
        except RecordError as error:
            return error


def _path_beside(leaf: str) -> str:
    return f"{leaf.removesuffix(_BYTES)}.path"


def _named(value: Any) -> Any:
    """A row that was read without the bytes of its images: an image without a path gets one, as it is not absent."""
    if isinstance(value, dict):
        return {"path": "?"} if value == {"path": None} else {name: _named(field) for name, field in value.items()}
    return [_named(entry) for entry in value] if isinstance(value, list) else value


def _rows(
    file: pyarrow.parquet.ParquetFile, group: int, start: int, stop: int, columns: list[str] | None
) -> Iterator[dict[str, Any] | Exception]:
    """Rows start..stop-1 of a row group: exactly stop - start items, the error in the place of what is unreadable.
    `columns`: the leaves to read, None: all."""
    place = 0
    try:
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=[group], columns=columns):
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
