"""A student-teacher pair of a few thousand parameters with the interface the engine asks of an objective.

Small on purpose, and awkward on purpose: a tied head, sizes that no world size divides, a parameter with fewer
elements than ranks, an adapter that can be the only trained part.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ilvr_ds.config import Recipe, parse_recipe
from ilvr_ds.contracts import LossTerms

# What can go wrong in a step: a NaN loss (and gradient); an infinite loss whose gradient is finite; a finite
# loss whose gradient is not.
Fault = Literal["nan loss", "inf loss", "nan gradient"]

VOCABULARY, WIDTH, HIDDEN, DEPTH = 37, 12, 29, 1


@dataclass(frozen=True)
class ToyBatch:
    """One micro-batch: `weights` over all micro-batches and ranks of a step sum to 1."""

    input_ids: Tensor  # (T,) int64
    targets: Tensor  # (T,) int64
    weights: Tensor  # (T,) float32


class Gain(nn.Module):
    """Three scales shared by the whole width: fewer elements than four ranks."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.scale.repeat(hidden.shape[-1] // 3)


class Block(nn.Module):
    """Norm, two matrices, a gain, and a low-rank adapter beside the first matrix."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.adapter = nn.Sequential(nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, HIDDEN, bias=False))
        self.gain = Gain()

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        return hidden + self.gain(self.down(torch.nn.functional.gelu(self.up(normed) + self.adapter(normed))))


class ToyModel(nn.Module):
    """Token embedding, blocks, a head tied to the embedding. forward: (T,) ids -> (T, WIDTH), (T, VOCABULARY)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        nn.init.normal_(self.embed.weight, std=0.2)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden, self.head(hidden)


class ToyObjective(nn.Module):
    """Weighted cross-entropy plus squared distance to the teacher's hidden states, a sum over given weights.

    `frozen=True` trains the adapters only. `fault` makes the next forwards bad, see `Fault`.
    """

    def __init__(self, seed: int = 0, frozen: bool = False, teacher: bool = True):
        super().__init__()
        generator_state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        self.student = ToyModel()
        torch.random.set_rng_state(generator_state)
        if frozen:
            for name, parameter in self.student.named_parameters():
                parameter.requires_grad = "adapter" in name
        self.teacher = copy.deepcopy(self.student) if teacher else nn.Identity()
        self.teacher.requires_grad_(False)
        self.fault: Fault | None = None

    def ema_pairs(self) -> list[tuple[str, str]]:
        """(teacher, student) parameter names."""
        return [(name, "student" + name[len("teacher") :]) for name, _ in self.named_parameters() if name[0] == "t"]

    def forward(self, batch: ToyBatch, noise_seed: int) -> LossTerms:
        """Loss terms of one micro-batch."""
        hidden, logits = self.student(batch.input_ids)
        entropy = torch.nn.functional.cross_entropy(logits.float(), batch.targets, reduction="none")  # (T,)
        ce = (entropy * batch.weights).sum()
        align = torch.zeros_like(ce)
        if not isinstance(self.teacher, nn.Identity):
            with torch.no_grad():
                target, _ = self.teacher(batch.input_ids)
            align = ((hidden.float() - target.float()).square().mean(-1) * batch.weights).sum()
        count = torch.tensor(batch.input_ids.numel())
        zero = torch.zeros_like(count)
        loss = ce + align
        if self.fault == "nan loss":
            loss = loss * float("nan")
        elif self.fault == "inf loss":
            loss = loss + float("inf")
        elif self.fault == "nan gradient":
            loss = loss + (hidden.float().sum() * 0).sqrt()  # 0, with gradient 0 * inf
        return LossTerms(loss, ce.detach(), align.detach(), entropy.detach(), zero, count, zero, zero)


def make_batches(sizes: list[int], seed: int) -> list[ToyBatch]:
    """Micro-batches of the given token counts; the tokens depend on `seed` and the sum of `sizes`, not on the cut."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    tokens = torch.randint(0, VOCABULARY, (2, total), generator=generator)
    weights = torch.rand(total, generator=generator)
    weights /= weights.sum()
    parts = zip(tokens[0].split(sizes), tokens[1].split(sizes), weights.split(sizes), strict=True)
    return [ToyBatch(*part) for part in parts]


def toy_recipe(dtype: str = "bfloat16", lr: float = 1e-2, decay: float = 0.99, grad_clip: float = 1.0) -> Recipe:
    """A recipe with what the engine reads; its data and model paths lead nowhere."""
    tree = {
        "name": "toy",
        "run": {"dir": "runs/toy"},
        "data": {"shards": "none"},
        "model": {"path": "none", "dtype": dtype},
        "optimizer": {"lr": lr, "grad_clip": grad_clip},
        "teacher": {"decay": decay},
    }
    return parse_recipe(tree, "toy_recipe")
