"""Packed attention by `scaled_dot_product_attention`, sequence by sequence: the backend of CPUs and of checks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ilvr_ds.errors import AttentionError

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Bounds:
    """Where sequences lie among packed queries and among packed keys."""

    q: Tensor  # (B + 1,) int32
    k: Tensor  # (B + 1,) int32; the same object as `q` without a cache
    max_q: int
    max_k: int


def per_sequence(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, causal: bool, scale: float) -> Tensor:
    """softmax(q k^T scale [+ causal mask]) v inside each sequence; neighbours of one length share a call.

    A decoder's sequences are slices, without a copy. The vision tower's windows are hundreds of sequences of few
    lengths that alternate, so where that saves calls, all sequences of one length are gathered into one. On CPUs
    bfloat16 is computed in float32: the backward of torch's half-precision CPU kernel is twice as slow
    (1.96 against 1.10 ms for 230 tokens, 4 heads of 32). On CUDA reading the bounds waits for the device; this
    backend is for CPUs and for checks.
    """
    spans = _spans(q.shape[0], k.shape[0], bounds, causal)
    dtype = q.dtype
    if q.device.type == "cpu" and dtype in HALF:
        q, k, v = q.float(), k.float(), v.float()
    runs = _runs(spans)
    shapes = {(span.queries, span.keys) for span in spans}

    def attend(batch: list[Tensor], count: int, queries: int, keys: int) -> Tensor:  # -> (count * queries, H, d)
        lengths = (queries, keys, keys)
        split = [x.unflatten(0, (count, n)).transpose(1, 2) for x, n in zip(batch, lengths, strict=True)]
        mask = _lower_right(queries, keys, q.device) if causal and 1 < queries < keys else None
        out = F.scaled_dot_product_attention(
            *split, mask, is_causal=causal and queries == keys, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )  # (count, H, queries, d)
        return out.transpose(1, 2).flatten(0, 1)

    if len(runs) <= 2 * len(shapes):  # slices
        queries_of = _cut(q, [(first.q_start, count * first.queries) for first, count in runs])
        keys_at = [(first.k_start, count * first.keys) for first, count in runs]
        parts = zip(queries_of, _cut(k, keys_at), _cut(v, keys_at), strict=True)
        outputs = [
            attend(list(part), count, first.queries, first.keys)
            for part, (first, count) in zip(parts, runs, strict=True)
        ]
        return torch.cat(outputs).to(dtype)
    rows, outputs = [], []
    for queries, keys in sorted(shapes):
        own = [span for span in spans if (span.queries, span.keys) == (queries, keys)]
        row = _rows([span.q_start for span in own], queries).to(q.device)
        key_row = row if bounds.q is bounds.k else _rows([span.k_start for span in own], keys).to(q.device)
        parts = [q.index_select(0, row), k.index_select(0, key_row), v.index_select(0, key_row)]
        outputs.append(attend(parts, len(own), queries, keys))
        rows.append(row)
    return torch.cat(outputs).index_select(0, torch.argsort(torch.cat(rows))).to(dtype)


@dataclass(frozen=True)
class _Span:
    """One sequence among packed queries and keys."""

    q_start: int
    queries: int
    k_start: int
    keys: int


def _spans(queries: int, keys: int, bounds: Bounds, causal: bool) -> list[_Span]:
    """Sequences that have queries. Raises AttentionError if the bounds do not fit the tensors, or each other."""
    q_bounds = bounds.q.tolist()
    k_bounds = q_bounds if bounds.k is bounds.q else bounds.k.tolist()
    if len(q_bounds) != len(k_bounds) or q_bounds[-1] != queries or k_bounds[-1] != keys:
        raise AttentionError(
            f"cu_seqlens of {len(q_bounds) - 1} and {len(k_bounds) - 1} sequences end at {q_bounds[-1]} queries and "
            f"{k_bounds[-1]} keys, there are {queries} packed tokens and {keys} keys"
        )
    spans = [
        _Span(q_start, q_end - q_start, k_start, k_end - k_start)
        for (q_start, q_end), (k_start, k_end) in zip(pairwise(q_bounds), pairwise(k_bounds), strict=True)
        if q_end > q_start
    ]
    for span in spans:
        if span.keys < (span.queries if causal else 1):
            raise AttentionError(f"a sequence of {span.queries} queries has {span.keys} keys; causal needs as many")
    return spans


def _cut(x: Tensor, stretches: list[tuple[int, int]]) -> list[Tensor]:
    """Rows [start, start + length) of `x` for each (start, length), ascending and apart.

    By one split: a slice of its own for each would fill and add a tensor as large as `x` in each one's backward.
    """
    sizes, wanted, position = [], [], 0
    for start, length in stretches:
        if start > position:
            sizes.append(start - position)
        wanted.append(len(sizes))
        sizes.append(length)
        position = start + length
    sizes.append(x.shape[0] - position)
    parts = x.split(sizes)
    return [parts[index] for index in wanted]


def _rows(starts: list[int], length: int) -> Tensor:
    """Row numbers of stretches of one length, (len(starts) * length,)."""
    return (torch.tensor(starts)[:, None] + torch.arange(length)).flatten()


def _lower_right(queries: int, keys: int, device: torch.device) -> Tensor:
    """(queries, keys) bool: query i sees keys 0 .. keys - queries + i."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _runs(spans: list[_Span]) -> list[tuple[_Span, int]]:
    """Sequences end to end -> (first, how many neighbours of this shape)."""
    runs: list[tuple[_Span, int]] = []
    for span in spans:
        first, count = runs[-1] if runs else (span, 0)
        if count and (first.queries, first.keys, first.k_start + count * first.keys) == (
            span.queries, span.keys, span.k_start,
        ):  # fmt: skip
            runs[-1] = (first, count + 1)
        else:
            runs.append((span, 1))
    return runs
