"""How long samples are: the columns of the shard index that planning needs, read a slice at a time.

An index of 100 million samples is 4 GB on disk. `IndexColumns` reads the rows of one shuffle window when they are
needed and keeps none, so a planner's memory does not grow with the data set.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np

from ilvr_ds.errors import PlanError

PATCHES_PER_TOKEN = 4  # 2x2 patches become one visual token
_PIECE = 1 << 20  # rows of the index in memory at a time while all are looked at: 42 MB


@dataclass(frozen=True)
class Lengths:
    """The columns of the shard index that planning needs, one entry per sample."""

    tokens: np.ndarray  # (n,) int64: length of the sequence, input images and latent pads included
    patches: np.ndarray  # (n,) int64: vision patches of the images that are encoded
    supervised: np.ndarray  # (n,) int64: tokens with a label
    spans: np.ndarray  # (n,) int64: latent spans

    @classmethod
    def from_index(cls, index: np.ndarray, helpers: bool = True) -> Lengths:
        """Of every row of the structured array of a shard set (`ilvr_ds.data.index`); copies: 32 bytes a row.

        Args:
            helpers: whether patches of helper images count: not for an objective that looks at none.
        """
        text, images, supervised, spans = (
            np.asarray(index[name], dtype=np.int64) for name in ("text_tokens", "image_tokens", "supervised", "spans")
        )
        encoded = images + index["helper_tokens"] if helpers else images
        return cls(text + images, PATCHES_PER_TOKEN * encoded, supervised, spans)

    @classmethod
    def join(cls, parts: list[Lengths]) -> Lengths:
        """Several, one after the other."""
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))

    def take(self, rows: np.ndarray | slice) -> Lengths:
        """Of the samples `rows` only, in that order."""
        columns = (self.tokens, self.patches, self.supervised, self.spans)
        if isinstance(rows, slice):
            return Lengths(*(column[rows] for column in columns))
        return Lengths(*(column.take(rows) for column in columns))

    def slices(self, slices: Sequence[slice]) -> Lengths:
        """Of the samples of several slices, one after the other."""
        return Lengths.join([self.take(rows) for rows in slices])

    def longest_pieces(self) -> Iterator[np.ndarray]:
        """The tokens of all samples, in pieces."""
        yield self.tokens

    def __len__(self) -> int:
        return len(self.tokens)


class IndexColumns:
    """`Lengths` of any slice of an index that may be memory-mapped and larger than memory.

    Picklable: a memory map travels as its file name, not as its bytes.

    Args:
        index: (samples,) INDEX_DTYPE, memory-mapped or not.
        helpers: whether patches of helper images count, as in `Lengths.from_index`.
    """

    def __init__(self, index: np.ndarray, helpers: bool = True):
        self._index, self._helpers = index, helpers
        # A part of a map carries the whole map's offset: it is taken for what it is, an array.
        self._is_file = isinstance(index, np.memmap) and isinstance(index.base, mmap.mmap)

    def __len__(self) -> int:
        return len(self._index)

    def slices(self, slices: Sequence[slice]) -> Lengths:
        """Of the samples of several slices, one after the other, read into memory.

        Columns, not rows: they are cut out of the rows while these lie in order, and the shuffled samples of a step
        are then gathered from 8 bytes each instead of 42.
        """
        bounds = [piece.indices(len(self))[:2] for piece in slices]
        counts = [max(0, end - begin) for begin, end in bounds]
        joined, at = np.empty(sum(counts), self._index.dtype), 0
        with self._reader() as read:
            for (begin, _), count in zip(bounds, counts, strict=True):
                read(begin, joined[at : at + count])
                at += count
        return Lengths.from_index(joined, self._helpers)

    def longest_pieces(self) -> Iterator[np.ndarray]:
        """The tokens of all samples, in pieces."""
        with self._reader() as read:
            for begin in range(0, len(self), _PIECE):
                rows = np.empty(min(_PIECE, len(self) - begin), self._index.dtype)
                read(begin, rows)
                yield rows["text_tokens"].astype(np.int64) + rows["image_tokens"]

    @contextlib.contextmanager
    def _reader(self) -> Iterator[Callable[[int, np.ndarray], None]]:
        """A function that fills an array with the rows from `begin` on.

        A mapped index is read as a file: pages of a map stay resident, with their neighbours, and would add up to the
        whole index.
        """
        index = self._index
        if not self._is_file:
            yield lambda begin, rows: np.copyto(rows, index[begin : begin + len(rows)])
            return
        with open(index.filename, "rb", buffering=0) as file:

            def read(begin: int, rows: np.ndarray) -> None:
                file.seek(index.offset + begin * index.dtype.itemsize)
                missing = memoryview(rows.view(np.uint8))
                while len(missing):
                    if not (count := file.readinto(missing)):
                        raise PlanError(
                            f"{index.filename}: ends within rows {begin} to {begin + len(rows) - 1}, it was cut while "
                            "in use; run `python -m data_tools.check_shards DIR` on its folder, then start again"
                        )
                    missing = missing[count:]

            yield read

    def __reduce__(self) -> tuple:
        if self._is_file:
            index = self._index
            return _reopen, (str(index.filename), index.dtype.descr, index.offset, len(index), self._helpers)
        return IndexColumns, (self._index, self._helpers)


def _reopen(path: str, descr: list, offset: int, rows: int, helpers: bool) -> IndexColumns:
    if rows == 0:  # an empty file cannot be mapped
        return IndexColumns(np.zeros(0, np.dtype(descr)), helpers)
    return IndexColumns(np.memmap(path, np.dtype(descr), "r", offset, (rows,)), helpers)


class LengthTable(Protocol):
    """What a planner asks of the lengths of a source: `Lengths` in memory, or `IndexColumns` on disk."""

    def __len__(self) -> int: ...

    def slices(self, slices: Sequence[slice]) -> Lengths:
        """Of the samples of several slices, one after the other, in memory."""
        ...

    def longest_pieces(self) -> Iterator[np.ndarray]:
        """The tokens of all samples, in pieces."""
        ...


def check_fits(lengths: LengthTable, token_budget: int, sample_id: Callable[[int], str] = str) -> int:
    """Tokens of the longest sample. One pass over the lengths, a piece at a time.

    Args:
        sample_id: names a sample number in the message (`ShardSet.sample_id`).

    Raises:
        PlanError: there is nothing to plan, or a sample is longer than a micro-batch may be.
    """
    if len(lengths) == 0:
        raise PlanError("the shard index is empty; see rejects.jsonl beside the shards for why records were refused")
    named: list[str] = []
    count = longest = begin = 0
    for tokens in lengths.longest_pieces():
        longest = max(longest, int(tokens.max()))
        if longest > token_budget:
            over = np.flatnonzero(tokens > token_budget)
            count += len(over)
            more = over[: 5 - len(named)].tolist()
            named += [f"{sample_id(begin + n)!r} ({tokens[n]} tokens)" for n in more]
        begin += len(tokens)
    if count:
        raise PlanError(
            f"{count} of {len(lengths)} samples are longer than data.token_budget={token_budget}: {', '.join(named)}"
            f"{', ...' if count > 5 else ''}. Raise data.token_budget to {longest} or more, "
            "or rebuild the shards with --max-tokens"
        )
    return longest
