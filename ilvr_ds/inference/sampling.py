"""From logits to a token: greedy, or temperature and top-p with each sequence's own random numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ilvr_ds.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. top_p keeps the smallest set of likeliest tokens with this much mass."""

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and self.temperature < float("inf")):
            raise ConfigError(f"temperature={self.temperature}: must be 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: must be above 0 and at most 1")

    @property
    def greedy(self) -> bool:
        """No random number is used."""
        return self.temperature == 0


def choose(logits: Tensor, sampling: Sampling, uniforms: Tensor) -> Tensor:
    """One token per row.

    Sampling inverts the distribution function: the token is the first whose cumulated mass exceeds u times the
    whole mass. With top_p < 1 the tokens are first sorted from the likeliest down and cut at the smallest prefix
    of mass >= top_p. So a row's token depends on its own logits and u only.

    Args:
        logits: (n, V) float32; -inf forbids a token.
        uniforms: (n,) float32 in [0, 1); not read when greedy.

    Returns:
        (n,) int64.
    """
    if sampling.greedy:
        return logits.argmax(1)
    p = torch.softmax(logits / sampling.temperature, 1)  # (n, V)
    if sampling.top_p == 1:
        return _invert(p, uniforms)
    p, tokens = p.sort(dim=1, descending=True, stable=True)
    before = p.cumsum(1) - p  # mass of likelier tokens; 0 for the first, which is therefore always kept
    rank = _invert(torch.where(before < sampling.top_p, p, 0), uniforms)
    return tokens.gather(1, rank[:, None])[:, 0]


def _invert(p: Tensor, uniforms: Tensor) -> Tensor:
    """(n, V) masses, (n,) u -> (n,) the first index whose cumulated mass exceeds u times the row's sum."""
    mass = p.cumsum(1)
    # float32 u is at most 1 - 2**-24, so that u * sum stays below the sum: there always is such an index
    return (mass <= uniforms[:, None] * mass[:, -1:]).sum(1)


class Uniforms:
    """A sequence's random numbers by token number: a function of its seed alone."""

    def __init__(self, seed: int, block: int = 256):
        self._generator = np.random.Generator(np.random.Philox(seed))
        self._block = block
        self._numbers = np.zeros(0, np.float32)

    def __getitem__(self, number: int) -> float:
        """The number for the sequence's token `number`, in [0, 1)."""
        while number >= len(self._numbers):
            self._numbers = np.append(self._numbers, self._generator.random(self._block, dtype=np.float32))
        return float(self._numbers[number])
