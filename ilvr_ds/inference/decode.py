"""Interleaved generation for many sequences at once: text, latent spans, text.

    prompts ─prefill (packed, no padding)─▶ hidden (n, D) ─▶ each sequence's next token ─▶ inputs (n, D)
                                              ▲                                              │
                                              └────────── one token per sequence ◀───────────┘

After `<|latent_start|>` the next K inputs are the model's own last hidden states (after the final norm), then
`<|latent_end|>` is forced and text resumes. Each sequence has its own mode; a finished one leaves at once and the
next prompt takes its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ilvr_ds.data.tokens import Vocabulary
from ilvr_ds.errors import BatchError
from ilvr_ds.inference.cache import DecodeCache
from ilvr_ds.inference.one_token import run_one_token
from ilvr_ds.inference.prompt import EncodedPrompt
from ilvr_ds.inference.sampling import choose
from ilvr_ds.inference.sequence import DecodeSettings, End, SequenceState
from ilvr_ds.model.backbone import Backbone, run_packed
from ilvr_ds.model.placement import place_image_features
from ilvr_ds.model.varlen_attention import Bounds


class Tokens(Protocol):
    """The part of `ChatTokenizer` that decoding needs."""

    vocabulary: Vocabulary

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of ids."""
        ...


@dataclass(frozen=True)
class Generation:
    """What one sequence became."""

    id: str  # of the prompt
    tokens: tuple[int, ...]  # every new token: spans with their markers and pads, the stop token if there is one
    text: str  # without spans and control tokens
    display: str  # the same with each span as ⟦8 latents⟧
    latents: Tensor  # (n_latents, D) in CPU memory: the inputs at the spans' pads, in order
    span_lengths: tuple[int, ...]  # latents of each span; their sum is n_latents
    spans_skipped: int  # times the model would have opened a span past max_spans
    end: End  # "stop": a stop token; "length", "length_in_span": max_new_tokens came first

    @property
    def spans_opened(self) -> int:
        """Number of spans."""
        return len(self.span_lengths)

    @property
    def unterminated(self) -> bool:
        """max_new_tokens was reached without a stop token, or inside a span."""
        return self.end != "stop"


class Decoder:
    """Generates with a `Backbone`, which is used as it is; nothing of it is changed between calls."""

    def __init__(self, backbone: Backbone, tokens: Tokens, *, prefill_tokens: int = 16384):
        """`prefill_tokens`: prompts are run packed, at most this many tokens at once (one prompt may be longer)."""
        self.backbone, self.tokens, self.prefill_tokens = backbone, tokens, prefill_tokens

    def generate(
        self, prompts: Sequence[EncodedPrompt], settings: DecodeSettings, batch_size: int | None = None
    ) -> list[Generation]:
        """One generation per prompt, in order; at most `batch_size` (default: all) run at once."""
        results: list[Generation | None] = [None] * len(prompts)
        for number, generation in self.stream(prompts, settings, batch_size or max(1, len(prompts))):
            results[number] = generation
        return results

    @torch.no_grad()
    def stream(
        self, prompts: Iterable[EncodedPrompt], settings: DecodeSettings, batch_size: int
    ) -> Iterator[tuple[int, Generation]]:
        """Generations as they finish, each with its prompt's number; prompts are taken as places become free.

        A sequence's tokens do not depend on what else is in the batch, up to rounding: its random numbers are
        its own (`EncodedPrompt.seed`), and no sequence sees another.

        Raises:
            BatchError: image tokens of a prompt that do not fit its images, or an empty prompt.
            ConfigError: a stop token that is a latent token.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}")
        waiting = enumerate(prompts)
        with _evaluation_mode(self.backbone):
            yield from _Batch(self, settings).run(waiting, batch_size)

    def prefill(self, prompts: Sequence[EncodedPrompt], cache: DecodeCache) -> Tensor:
        """Run whole prompts, packed; their keys go into new rows of `cache`. Returns (n, D): h of each last token."""
        device, image_pad = self.backbone.device, self.tokens.vocabulary.image_pad
        lengths = [len(prompt.input_ids) for prompt in prompts]
        ids = np.concatenate([prompt.input_ids for prompt in prompts])  # (T,)
        positions = np.concatenate([prompt.position_ids for prompt in prompts], axis=1)  # (3, T)
        in_sample = np.concatenate([np.arange(length) for length in lengths])
        ends = np.cumsum(lengths)
        places = np.flatnonzero(ids == image_pad)
        embeddings = self.backbone.embed(torch.from_numpy(ids).to(device))  # (T, D)
        if len(places):
            pixels = np.concatenate([prompt.pixels for prompt in prompts if len(prompt.pixels)])
            grids = tuple(grid for prompt in prompts for grid in prompt.grids)
            features = self.backbone.encode_images(torch.from_numpy(pixels).to(device), grids)
            if len(features) != len(places):
                named = ", ".join(prompt.id for prompt in prompts)
                raise BatchError(f"{len(places)} image tokens for {len(features)} image features in prompts {named}")
            embeddings = place_image_features(embeddings, torch.from_numpy(places).to(device), features)
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        hidden = run_packed(
            self.backbone.language_model,
            embeddings,
            torch.from_numpy(np.concatenate([in_sample[None], positions])).to(device),
            Bounds(cu_seqlens, cu_seqlens, max(lengths), max(lengths)),
            cache.prefill(lengths),
        )
        return hidden.index_select(0, torch.from_numpy(ends - 1).to(device))


class _Batch:
    """The sequences that are running; row r of the cache and of `hidden` belongs to `active[r]`."""

    def __init__(self, decoder: Decoder, settings: DecodeSettings):
        self.decoder, self.settings = decoder, settings
        self.backbone, self.vocabulary = decoder.backbone, decoder.tokens.vocabulary
        self.cache = DecodeCache(len(decoder.backbone.language_model.layers))
        self.active: list[tuple[int, EncodedPrompt, SequenceState]] = []
        self.hidden: Tensor | None = None  # (n, D): h of each sequence's last token
        pads = self._on_device([self.vocabulary.latent_pad], torch.int64) if settings.pause else None
        self.pad = None if pads is None else self.backbone.embed(pads)[0]  # (D,): what a span is fed without latents

    def run(self, waiting: Iterator[tuple[int, EncodedPrompt]], batch_size: int) -> Iterator[tuple[int, Generation]]:
        exhausted = False
        while True:
            free = batch_size - len(self.active)
            # A prefill holds everyone up: wait until a quarter of the places are free.
            if not exhausted and (not self.active or 4 * free >= batch_size):
                arrived = list(islice(waiting, free))
                exhausted = len(arrived) < free
                self._admit(arrived)
            if not self.active:
                return
            is_latent = self._next_tokens()
            finished = [row for row, (_, _, state) in enumerate(self.active) if state.end is not None]
            done = [self._generation(row) for row in finished]
            if finished:
                order = self.cache.drop(finished)
                self.active = [self.active[row] for row in order]
                is_latent = [is_latent[row] for row in order]
                self.hidden = self.hidden.index_select(0, self._on_device(order, torch.int64))
            if self.active:
                self._step(is_latent)
            yield from done

    def _admit(self, arrived: list[tuple[int, EncodedPrompt]]) -> None:
        for group in _groups(arrived, self.decoder.prefill_tokens):
            hidden = self.decoder.prefill([prompt for _, prompt in group], self.cache)
            self.hidden = hidden if not self.active else torch.cat([self.hidden, hidden])
            self.active += [
                (number, prompt, SequenceState(prompt.seed, prompt.next_position, self.settings, self.vocabulary))
                for number, prompt in group
            ]

    def _next_tokens(self) -> list[bool]:
        """Advance every sequence by one token. Returns, by row, whether it is a latent."""
        states = [state for _, _, state in self.active]
        rows = [row for row, state in enumerate(states) if state.wants_choice]
        choices = dict(zip(rows, self._choose(rows), strict=True)) if rows else {}
        is_latent = [state.advance(choices.get(row)) for row, state in enumerate(states)]
        for row, latent in enumerate(is_latent):
            if latent:
                states[row].latents.append(self.hidden[row] if self.pad is None else self.pad)
        return is_latent

    def _choose(self, rows: list[int]) -> list[int]:
        states = [self.active[row][2] for row in rows]
        hidden = self.hidden
        if len(rows) < len(self.active):
            hidden = hidden.index_select(0, self._on_device(rows, torch.int64))
        logits = self.backbone.head.logits(hidden).float()  # (n, V)
        logits[:, self.vocabulary.size :] = -torch.inf  # rows of the embedding that no token has
        sampling = self.settings.sampling
        uniforms = self._on_device([0.0 if sampling.greedy else state.uniform for state in states], torch.float32)
        choices = choose(logits, sampling, uniforms).tolist()
        start = self.vocabulary.latent_start
        refused = [i for i, state in enumerate(states) if choices[i] == start and not state.may_open_span]
        if refused:
            again = self._on_device(refused, torch.int64)
            logits = logits.index_select(0, again)
            logits[:, start] = -torch.inf
            for i, choice in zip(refused, choose(logits, sampling, uniforms[again]).tolist(), strict=True):
                choices[i] = choice
                states[i].spans_skipped += 1
        return choices

    def _step(self, is_latent: list[bool]) -> None:
        """Run every sequence's last token."""
        states = [state for _, _, state in self.active]
        inputs = self.backbone.embed(self._on_device([state.tokens[-1] for state in states], torch.int64))  # (n, D)
        if any(is_latent) and not self.settings.pause:
            inputs = torch.where(self._on_device(is_latent, torch.bool)[:, None], self.hidden, inputs)
        positions = self._on_device([state.position for state in states], torch.int64)
        self.hidden = run_one_token(self.backbone.language_model, inputs, positions, self.cache)

    def _generation(self, row: int) -> tuple[int, Generation]:
        number, prompt, state = self.active[row]
        text, display = texts_of(state.tokens, state.span_lengths, self.decoder.tokens)
        latents = torch.stack(state.latents) if state.latents else self.hidden[:0]
        return number, Generation(
            id=prompt.id,
            tokens=tuple(state.tokens),
            text=text,
            display=display,
            latents=latents.cpu(),
            span_lengths=tuple(state.span_lengths),
            spans_skipped=state.spans_skipped,
            end=state.end,
        )

    def _on_device(self, values: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self.backbone.device, non_blocking=True)


def texts_of(tokens: Sequence[int], span_lengths: Sequence[int], tokenizer: Tokens) -> tuple[str, str]:
    """(text, display) of generated tokens whose spans have these numbers of latents; the last may not be closed."""
    v = tokenizer.vocabulary
    pieces: list[str] = []
    start = 0
    for length in span_lengths:
        opened = tokens.index(v.latent_start, start)
        pieces.append(tokenizer.decode(tokens[start:opened], skip_special_tokens=True))
        start = opened + 1 + length
        start += tokens[start : start + 1] == [v.latent_end]
    pieces.append(tokenizer.decode(tokens[start:], skip_special_tokens=True))
    shown = [f"⟦{length} latents⟧" for length in span_lengths]
    display = "".join(piece + span for piece, span in zip(pieces, [*shown, ""], strict=True))
    return "".join(pieces), display


def _groups(arrived: list[tuple[int, EncodedPrompt]], budget: int) -> Iterator[list[tuple[int, EncodedPrompt]]]:
    """Cut in order into runs of at most `budget` tokens, or of one prompt."""
    group: list[tuple[int, EncodedPrompt]] = []
    tokens = 0
    for entry in arrived:
        length = len(entry[1].input_ids)
        if length == 0:
            raise BatchError(f"prompt {entry[1].id!r} is empty")
        if group and tokens + length > budget:
            yield group
            group, tokens = [], 0
        group.append(entry)
        tokens += length
    if group:
        yield group


@contextmanager
def _evaluation_mode(backbone: Backbone) -> Iterator[None]:
    training = backbone.training
    backbone.eval()
    try:
        yield
    finally:
        backbone.train(training)
