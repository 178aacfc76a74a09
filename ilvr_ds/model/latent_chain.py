"""The student's forward of stage 2: every latent's input is the student's own previous hidden state.

    e[t] = h[t - 1] at latent pads, token embedding or image feature elsewhere;   h = decoder(e), after the final norm

h[t - 1] must exist before e[t], so the latents of a span are run one after the other, but nothing is run twice.
Every sample is cut at its spans; round r runs

    1. the text up to and including the r-th `<|latent_start|>` (or to the end) of all samples that have it, packed;
    2. K calls of one token, the latents of the r-th span of all samples that have one, side by side.

Each call sees the keys and values of the earlier ones through `KeyValues`, with gradient through all of it.

The calls of a packed batch depend on its spans. Where parameters are partitioned, a call is a collective, so
every rank must make the same number: the caller says how many rounds, and a call without a token of its own runs
a dummy token, whose output enters the result times zero and so takes part in backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ilvr_ds.contracts import PackedBatch, StudentOutput
from ilvr_ds.model.backbone import Backbone, packed_position_ids, run_packed
from ilvr_ds.model.placement import place_image_features
from ilvr_ds.model.sequence_attention import Bounds


# ------------------------------------------------------------------------------------------- plan
@dataclass(frozen=True)
class Call:
    """One call of the decoder; n queries and m keys of C samples. n = 0: a dummy token is run."""

    tokens: Tensor  # (n,) int64: places of the queries in the packed batch
    rows: Tensor | None  # (m,) int64: rows of [kept keys, this call's keys] the queries see; None: all, in order
    bounds: Bounds

    @property
    def size(self) -> int:
        """n."""
        return self.tokens.shape[0]

    def to(self, device: torch.device) -> Call:
        """The same call with its tensors on `device`."""
        move = lambda x: None if x is None else x.to(device, non_blocking=True)  # noqa: E731
        bounds = Bounds(move(self.bounds.q), move(self.bounds.k), self.bounds.max_q, self.bounds.max_k)
        return Call(move(self.tokens), move(self.rows), bounds)


@dataclass(frozen=True)
class Round:
    """Text of the samples that have an r-th segment, then K latents of those of them that have an r-th span."""

    text: Call
    kept_keys: int  # of the text call's keys, the first ones: those of samples with an r-th span
    last_text: Tensor  # (C,) int64: rows of the text call's output that hold h at `<|latent_start|>`
    latents: tuple[Call, ...]  # K calls; none after the last round


@dataclass(frozen=True)
class ChainPlan:
    """All calls of a packed batch."""

    rounds: tuple[Round, ...]
    order: Tensor  # (T,) int64: row of [outputs of all calls in turn] that holds each token's hidden state

    def to(self, device: torch.device) -> ChainPlan:
        """The same plan with its tensors on `device`."""
        rounds = tuple(
            Round(
                r.text.to(device),
                r.kept_keys,
                r.last_text.to(device, non_blocking=True),
                tuple(call.to(device) for call in r.latents),
            )
            for r in self.rounds
        )
        return ChainPlan(rounds, self.order.to(device, non_blocking=True))


def rounds_needed(batch: PackedBatch) -> int:
    """Rounds of a batch on the CPU: the most spans of one sample, and the text after the last."""
    return 1 + max(torch.bincount(batch.span_sample, minlength=1).tolist())


def plan_chain(batch: PackedBatch, rounds: int) -> ChainPlan:
    """The calls of `batch` (on the CPU) in `rounds` rounds, at least `rounds_needed(batch)`.

    Samples are ordered by their number of spans, most first: those that go on are always the first ones, so that
    finished samples are dropped from the keys by a slice.
    """
    size, needed = batch.latent_size, rounds_needed(batch)
    if rounds < needed:
        raise ValueError(f"{rounds} rounds, the batch needs {needed}")
    segments = _text_segments(batch)
    samples = sorted(range(len(segments)), key=lambda b: -len(segments[b]))
    planned: list[Round] = []
    kept: dict[int, range] = {}  # sample -> rows of its kept keys
    kept_rows = 0
    for number in range(rounds):
        active = [b for b in samples if len(segments[b]) > number]
        going_on = [b for b in active if len(segments[b]) > number + 1]
        text = _call({b: segments[b][number] for b in active}, kept, kept_rows, first=number == 0)
        lengths = {b: len(kept.get(b, ())) + len(segments[b][number]) for b in active}
        ends = torch.tensor([len(segments[b][number]) for b in going_on]).cumsum(0) - 1
        kept, kept_rows = {}, 0
        for b in going_on:
            kept[b] = range(kept_rows, kept_rows + lengths[b])
            kept_rows += lengths[b]
        kept_keys, latents = kept_rows, []
        for k in range(size if number + 1 < rounds else 0):
            position = {b: range(segments[b][number].stop + k, segments[b][number].stop + k + 1) for b in going_on}
            latents.append(_call(position, kept, kept_rows, first=False))
            for row, b in enumerate(going_on, kept_rows):
                kept[b] = [*kept[b], row]
            kept_rows += len(going_on)
        planned.append(Round(text, kept_keys, ends.to(torch.int64), tuple(latents)))
    calls = [call for r in planned for call in (r.text, *r.latents)]
    return ChainPlan(tuple(planned), torch.argsort(torch.cat([call.tokens for call in calls])))


def _text_segments(batch: PackedBatch) -> list[list[range]]:
    """Per sample, its text before, between and after its spans: one more than spans, as ranges of packed tokens."""
    segments = [[start] for start in batch.cu_seqlens[:-1].tolist()]  # per sample: start, span, span, ..., end
    for sample, start in zip(batch.span_sample.tolist(), batch.span_starts.tolist(), strict=True):
        segments[sample] += [start, start + batch.latent_size]
    return [
        [range(low, high) for low, high in list(pairwise([*cuts, end]))[::2]]
        for cuts, end in zip(segments, batch.cu_seqlens[1:].tolist(), strict=True)
    ]


def _call(tokens: dict[int, range], kept: dict, kept_rows: int, first: bool) -> Call:
    """The call for `tokens` of each sample, which see the sample's kept keys and then their own."""
    new = [len(own) for own in tokens.values()]
    rows: list[int] = []
    start, keys = kept_rows, []
    for sample, own in tokens.items():
        before = kept.get(sample, ())
        rows += [*before, *range(start, start + len(own))]
        start += len(own)
        keys.append(len(before) + len(own))
    q = torch.tensor([0, *new]).cumsum(0).to(torch.int32)
    bounds = Bounds(q, q if first else torch.tensor([0, *keys]).cumsum(0).to(torch.int32), max(new, default=1),
                    max(keys, default=1))  # fmt: skip
    flat = torch.tensor([t for own in tokens.values() for t in own], dtype=torch.int64)
    return Call(flat, None if first else torch.tensor(rows, dtype=torch.int64), bounds)


# ------------------------------------------------------------------------------------------ cache
Layers = list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]  # per layer: pieces of keys, of values, each (m, H_kv, d)


class KeyValues:
    """Keys and values of earlier calls, for one call of the decoder (a `PackedCache`).

    Changes nothing it was given: a call takes pieces and leaves new ones in `keys_seen` or `keys_new`. So
    activation checkpointing may run a layer again in backward and get the same keys, and gradients flow.
    """

    def __init__(self, pieces: Layers, rows: Tensor | None, keep_all: bool):
        """`rows` as in `Call`; `keep_all`: leave all keys the queries saw, else those of this call only."""
        self._pieces, self._rows, self._keep_all = pieces, rows, keep_all
        self._left: list[tuple[Tensor, Tensor] | None] | None = [None] * len(pieces)

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """(n, H_kv, d) twice -> (m, H_kv, d) twice, sequence by sequence."""
        keys, values = self._pieces[layer]
        seen_keys, seen_values = self._seen(keys, key), self._seen(values, value)
        if self._left is not None:  # not when a layer is run again in backward
            self._left[layer] = (seen_keys, seen_values) if self._keep_all else (key, value)
        return seen_keys, seen_values

    def _seen(self, pieces: tuple[Tensor, ...], new: Tensor) -> Tensor:
        if self._rows is None:
            return new
        return torch.cat([*pieces, new]).index_select(0, self._rows)

    def take(self) -> list[tuple[Tensor, Tensor]]:
        """What each layer left, once, after the call."""
        left, self._left = self._left, None
        assert left is not None
        return left


# -------------------------------------------------------------------------------------------- run
def forward_with_chain(student: Backbone, batch: PackedBatch, input_features: Tensor, plan: ChainPlan) -> StudentOutput:
    """Hidden states of a packed batch whose latents are the student's own.

    The same modules are called, in the same order, for every batch with the same number of planned rounds.

    Args:
        batch: on the student's device.
        input_features: (N, D) of the input images, in the order of `batch.image_positions`.
        plan: of `batch`, on the student's device.
    """
    embeddings = student.embed(batch.input_ids)  # (T, D)
    embeddings = place_image_features(embeddings, batch.image_positions, input_features)
    runner = _Runner(student.language_model, embeddings[:1], packed_position_ids(batch))
    texts = embeddings.index_select(0, torch.cat([r.text.tokens for r in plan.rounds]))
    for number, (part, r) in enumerate(zip(texts.split([r.text.size for r in plan.rounds]), plan.rounds, strict=True)):
        hidden = runner.run(part, r.text, keep_all=True)
        if number + 1 == len(plan.rounds):
            break
        runner.keep(r.kept_keys)
        state = hidden.index_select(0, r.last_text)  # (C, D): h at each span's `<|latent_start|>`
        for call in r.latents:
            state = runner.run(state, call, keep_all=False)
    hidden = torch.cat(runner.outputs).index_select(0, plan.order)  # (T, D)
    return StudentOutput(hidden=hidden + 0 * torch.stack(runner.idle).sum() if runner.idle else hidden)


class _Runner:
    """Calls the decoder and keeps what later calls need."""

    def __init__(self, language_model: nn.Module, dummy: Tensor, position_ids: Tensor):
        self.language_model = language_model
        self.dummy = dummy  # (1, D)
        self.position_ids = position_ids  # (4, T)
        self.layers = len(language_model.layers)
        self.pieces: Layers = [((), ())] * self.layers
        self.outputs: list[Tensor] = []  # (n, D) of each call that ran tokens
        self.idle: list[Tensor] = []  # () of each call that ran a dummy

    def run(self, embeddings: Tensor, call: Call, keep_all: bool) -> Tensor:
        """(n, D) -> hidden states (n, D); their keys and values are there for the next call."""
        if call.size == 0:
            bounds = torch.tensor([0, 1], dtype=torch.int32, device=self.dummy.device)
            output = run_packed(
                self.language_model,
                self.dummy,
                torch.zeros_like(self.position_ids[:, :1]),
                Bounds(bounds, bounds, 1, 1),
            )
            self.idle.append(output.sum())
            return embeddings
        cache = KeyValues(self.pieces, call.rows, keep_all)
        output = run_packed(
            self.language_model, embeddings, self.position_ids.index_select(1, call.tokens), call.bounds, cache
        )
        self.outputs.append(output)
        left = cache.take()
        if keep_all:
            self.pieces = [((k,), (v,)) for k, v in left]
        else:
            self.pieces = [((*keys, k), (*values, v)) for (keys, values), (k, v) in zip(self.pieces, left, strict=True)]
        return output

    def keep(self, rows: int) -> None:
        """Drop the keys of finished samples: only the first `rows` go on."""
        self.pieces = [tuple(tuple(x[:rows] for x in kind) for kind in layer) for layer in self.pieces]
