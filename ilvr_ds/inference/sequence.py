"""One sequence being generated: its mode (text or span), its spans and its end. No tensor is computed here.

text ── chosen `<|latent_start|>` ──▶ span: K x `<|latent_pad|>`, then `<|latent_end|>` ──▶ text
text ── a stop token, or max_new_tokens ──▶ end
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from ilvr_ds.data.tokens import Vocabulary
from ilvr_ds.errors import ConfigError
from ilvr_ds.inference.sampling import Sampling, Uniforms

End = Literal["stop", "length", "length_in_span"]


@dataclass(frozen=True)
class DecodeSettings:
    """How to generate; the same for all sequences of a call."""

    latent_size: int  # K
    max_new_tokens: int = 512  # latents and their markers counted
    max_spans: int | None = None  # after these `<|latent_start|>` is forbidden; None: no limit
    early_end: bool = False  # leave a span when the model would say `<|latent_end|>` (docs/method.md)
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: tuple[int, ...] | None = None  # None: `<|im_end|>`
    pause: bool = False  # a model trained with empty pads: inputs within a span are the pad's embedding, no latents

    def __post_init__(self) -> None:
        for name, least in (("latent_size", 1), ("max_new_tokens", 1), ("max_spans", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}={value}: must be at least {least}")


class SequenceState:
    """The host's side of one sequence. Each step: `wants_choice`, then `advance`."""

    def __init__(self, seed: int, next_position: int, settings: DecodeSettings, vocabulary: Vocabulary):
        """`next_position`: rotary position of the first new token."""
        stop = (vocabulary.im_end,) if settings.stop_tokens is None else settings.stop_tokens
        latent = {vocabulary.latent_pad, vocabulary.latent_start, vocabulary.latent_end}
        if latent & set(stop):
            raise ConfigError(f"stop_tokens={stop}: a latent token cannot stop a sequence")
        self.tokens: list[int] = []
        self.latents: list[Tensor] = []  # (D,) for each `<|latent_pad|>` of a span
        self.span_lengths: list[int] = []  # latents of each span opened
        self.spans_skipped = 0  # times the model would have opened a span past max_spans
        self.end: End | None = None
        self._next_position = next_position
        self._in_span = False
        self._settings, self._vocabulary, self._stop = settings, vocabulary, frozenset(stop)
        self._uniforms = Uniforms(seed)

    @property
    def wants_choice(self) -> bool:
        """The next token depends on the model's logits."""
        if not self._in_span:
            return True
        return self._settings.early_end and self.span_lengths[-1] < self._settings.latent_size

    @property
    def may_open_span(self) -> bool:
        """A choice of `<|latent_start|>` counts. Within a span, where choices other than its end do not, too."""
        limit = self._settings.max_spans
        return self._in_span or limit is None or len(self.span_lengths) < limit

    @property
    def uniform(self) -> float:
        """The random number of the next token."""
        return self._uniforms[len(self.tokens)]

    @property
    def position(self) -> int:
        """Rotary position of the last token: latents count like text."""
        return self._next_position + len(self.tokens) - 1

    def advance(self, choice: int | None) -> bool:
        """Add the next token; `choice` is the model's where `wants_choice`, else None.

        Returns:
            True if the token is a latent: its input is the last hidden state, not an embedding.
        """
        v = self._vocabulary
        assert self.end is None and (choice is not None) == self.wants_choice
        is_latent = False
        if not self._in_span:
            token = choice
            if token == v.latent_start:
                assert self.may_open_span
                self.span_lengths.append(0)
                self._in_span = True
        elif self.span_lengths[-1] == self._settings.latent_size or choice == v.latent_end:
            token, self._in_span = v.latent_end, False
        else:
            token, is_latent = v.latent_pad, True
            self.span_lengths[-1] += 1
        self.tokens.append(token)
        if token in self._stop:  # no latent token is one
            self.end = "stop"
        elif len(self.tokens) == self._settings.max_new_tokens:
            self.end = "length_in_span" if self._in_span else "length"
        return is_latent
