"""Keys and values of all active sequences: one row per sequence, rows of unequal length.

A step appends one token to every row and attends, in one call per layer, over the longest row's length with a
mask for the shorter ones. Rows of finished sequences are given back by moving the last row into the hole, and
the tensors grow by halves, so that no step copies the cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROUND_TO = 64  # row lengths in memory are multiples of this (kernels want aligned masks)


class DecodeCache:
    """Rows 0 .. len(lengths) - 1 are in use; row r holds lengths[r] tokens."""

    def __init__(self, layers: int):
        self.lengths: list[int] = []
        self._keys: list[Tensor | None] = [None] * layers  # each (R, H_kv, C, d)
        self._values: list[Tensor | None] = [None] * layers

    # ---------------------------------------------------------------------------------- prompts
    def prefill(self, lengths: list[int]) -> PrefillKeys:
        """Add a row for each new sequence; hand the result down as `packed_cache` of one packed call."""
        first = len(self.lengths)
        self.lengths += lengths
        return PrefillKeys(self, first, lengths)

    def store(self, layer: int, first: int, lengths: list[int], key: Tensor, value: Tensor) -> None:
        """Put packed keys and values (sum of lengths, H_kv, d) into rows first, first + 1, ..."""
        self._reserve(layer, first + len(lengths), max(lengths), like=key)
        keys, values = self._keys[layer], self._values[layer]
        parts = zip(key.split(lengths), value.split(lengths), strict=True)
        for row, (k, v) in enumerate(parts, first):
            keys[row, :, : len(k)] = k.transpose(0, 1)
            values[row, :, : len(v)] = v.transpose(0, 1)

    # ------------------------------------------------------------------------------------ steps
    def step(self, device: torch.device) -> StepKeys:
        """Every row gets one token; hand the result down as `step_keys` of one call."""
        at = torch.tensor(self.lengths).to(device, non_blocking=True)  # (n,)
        self.lengths = [length + 1 for length in self.lengths]
        return StepKeys(self, at, max(self.lengths), ragged=min(self.lengths) < max(self.lengths))

    def append(self, layer: int, rows: Tensor, at: Tensor, longest: int, key: Tensor, value: Tensor):
        """Keys and values (n, H_kv, d) to place `at` (n,) of rows (n,); returns both up to `longest`."""
        count = key.shape[0]
        self._reserve(layer, count, longest, like=key)
        keys, values = self._keys[layer], self._values[layer]
        keys[rows, :, at] = key
        values[rows, :, at] = value
        return keys[:count, :, :longest], values[:count, :, :longest]

    # ------------------------------------------------------------------------------------- rows
    def drop(self, rows: list[int]) -> list[int]:
        """Give back `rows`; the last rows move into the holes.

        Returns:
            for each row now in use, the row it was before.
        """
        order = list(range(len(self.lengths)))
        for row in sorted(rows, reverse=True):
            last = len(order) - 1
            if row != last:
                length = self.lengths[last]
                for x in (*self._keys, *self._values):
                    x[row, :, :length] = x[last, :, :length]
                order[row], self.lengths[row] = order[last], length
            order.pop()
            self.lengths.pop()
        return order

    def _reserve(self, layer: int, rows: int, length: int, like: Tensor) -> None:
        """Grow a layer's tensors to at least `rows` rows of `length` tokens."""
        old = self._keys[layer]
        if old is not None and old.shape[0] >= rows and old.shape[2] >= length:
            return
        heads, width = like.shape[1:]
        if old is not None:
            rows = max(rows, old.shape[0])
            # grow by half as long as tokens come one by one
            length = max(length, old.shape[2] * 3 // 2) if length > old.shape[2] else old.shape[2]
        length = -(-length // ROUND_TO) * ROUND_TO
        for kind in (self._keys, self._values):
            # zeros: masked places are multiplied by a weight of 0, which a NaN from empty memory would survive
            new = like.new_zeros(rows, heads, length, width)
            if kind[layer] is not None:
                before = kind[layer]
                new[: before.shape[0], :, : before.shape[2]] = before
            kind[layer] = new


class PrefillKeys:
    """A `PackedCache` for whole prompts: each sees its own keys, and they are kept."""

    def __init__(self, cache: DecodeCache, first: int, lengths: list[int]):
        self._cache, self._first, self._lengths = cache, first, lengths

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """(T, H_kv, d) twice, kept and given back as they are."""
        self._cache.store(layer, self._first, self._lengths, key, value)
        return key, value


class StepKeys:
    """One step of every row."""

    def __init__(self, cache: DecodeCache, at: Tensor, longest: int, ragged: bool):
        self._cache, self._at, self._longest = cache, at, longest
        self._rows = torch.arange(len(at), device=at.device)
        self._ragged = ragged
        self._mask: Tensor | None = None  # (n, 1, 1, longest): 0 where a row has a token, else -inf

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """softmax(q k^T scale) v of one new token per row over all of its row, itself included.

        The query heads that share a key head stand in the place of the queries, so that keys and values are
        read once and never repeated.

        Args:
            query: (n, H, d); head h belongs to key head h // (H / H_kv).
            key, value: (n, H_kv, d).

        Returns:
            (n, H, d).
        """
        count, heads, width = query.shape
        keys, values = self._cache.append(layer, self._rows, self._at, self._longest, key, value)
        grouped = query.view(count, keys.shape[1], heads // keys.shape[1], width)  # (n, H_kv, group, d)
        if self._ragged and self._mask is None:  # once for all layers
            absent = torch.arange(self._longest, device=query.device) > self._at[:, None]
            mask = torch.zeros(absent.shape, dtype=query.dtype, device=query.device)
            self._mask = mask.masked_fill_(absent, -torch.inf)[:, None, None]
        mask = None if self._mask is None else self._mask.expand(-1, -1, grouped.shape[2], -1)
        out = F.scaled_dot_product_attention(grouped, keys, values, mask, scale=scale)
        return out.reshape(count, heads, width)
