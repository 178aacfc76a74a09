"""The momentum teacher: an exponential moving average that lives in fp32, sharded like the optimizer state.

    shadow <- decay * shadow + (1 - decay) * master          (fp32, this rank's pieces)
    teacher storage <- cast(shadow)                          (model dtype)

At decay 0.999 a bf16 average would not move at all: the update is below bf16's rounding. So the average is
kept in fp32 and fed from the optimizer's fp32 masters, and bf16 only ever sees its cast.
"""

from __future__ import annotations

from collections.abc import Iterator

import deepspeed
import torch
from torch import Tensor, nn

from ilvr_ds.engine.partition import Partition, build_partition, check_alignment, check_frozen, resolve_pairs

CHUNK = 2**25  # elements updated at a time: bounds the temporary to 128 MiB


class ShardedEma:
    """fp32 moving average of this rank's pieces of the student.

    Parameters the student does not train have no average: their teacher is their frozen value and stays.
    """

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, module: nn.Module, pairs: list[tuple[str, str]], decay: float
    ):
        """Start from the teacher's present weights.

        Args:
            engine: the initialised DeepSpeed engine that holds student and teacher.
            module: the objective; names in `pairs` are its `named_parameters()`.
            pairs: (teacher parameter, student parameter).
            decay: in [0, 1].

        Raises:
            ConfigError: a name, a shape or a piece does not fit (the parameter is named).
        """
        self.decay = decay
        resolved = resolve_pairs(module, pairs)
        self.frozen = [p for p in resolved if not p.student.requires_grad]
        check_frozen(self.frozen)
        self.partition: Partition = build_partition(engine, [p for p in resolved if p.student.requires_grad])
        check_alignment(self.partition)
        self.update_bytes = 0  # bytes this rank has sent in updates so far

        masters = self.partition.masters()
        total = sum(piece.numel for piece in self.partition.pieces)
        device = next((m.device for m in masters if m.numel()), torch.device("cpu"))  # beside the masters
        self._flat = torch.empty(total, dtype=torch.float32, device=device)
        self.shadows: list[Tensor] = list(self._flat.split([piece.numel for piece in self.partition.pieces]))
        for shadow, teacher in zip(self.shadows, self.partition.teachers(), strict=True):
            shadow.copy_(teacher)

    @property
    def pieces(self):
        """This rank's pieces, in the order of `shadows`."""
        return self.partition.pieces

    @torch.no_grad()
    def update(self) -> Tensor:
        """One step of the average. Call after an applied optimizer step, and only then.

        Returns:
            (2,) float64, this rank's part of [||teacher - student||^2, ||student||^2] over tracked parameters
            after the update; sum over ranks, then `drift`. With shadow' = shadow + w (master - shadow) the first
            is (1 - w)^2 ||master - shadow||^2, so it costs one norm and no second pass.
        """
        weight = 1.0 - self.decay
        masters, teachers = self.partition.masters(), self.partition.teachers()
        sums = torch.zeros(2, dtype=torch.float64, device=self._flat.device)
        for part in self._chunks():
            shadow, master, teacher = ([tensors[i] for i in part] for tensors in (self.shadows, masters, teachers))
            difference = torch._foreach_sub(master, shadow)
            torch._foreach_add_(shadow, difference, alpha=weight)
            sums[0] += (1.0 - weight) ** 2 * _square_sum(difference)
            sums[1] += _square_sum(master)
            torch._foreach_copy_(teacher, shadow)
        if self.partition.replicated:  # every rank holds everything: its share of the sum is 1 / world
            sums /= torch.distributed.get_world_size()
        self._publish()
        return sums

    @torch.no_grad()
    def write_teacher(self) -> None:
        """Write the cast of the shadow into the teacher's storage (after the shadow was loaded)."""
        for teacher, shadow in zip(self.partition.teachers(), self.shadows, strict=True):
            teacher.copy_(shadow)
        self._publish()

    def _publish(self) -> None:
        self.update_bytes += self.partition.publish()

    def _chunks(self) -> Iterator[list[int]]:
        """Indices of non-empty pieces, in runs of at most CHUNK elements (a longer piece is a run of its own)."""
        run, elements = [], 0
        for index, piece in enumerate(self.pieces):
            if run and elements + piece.numel > CHUNK:
                yield run
                run, elements = [], 0
            if piece.numel:
                run.append(index)
                elements += piece.numel
        if run:
            yield run


def drift(sums: Tensor) -> float:
    """||teacher - student|| / ||student|| from the sum over ranks of what `ShardedEma.update` returns."""
    distance, norm = sums.tolist()
    return (distance / norm) ** 0.5 if norm > 0 else 0.0


def _square_sum(tensors: list[Tensor]) -> Tensor:
    """() float64: sum of squares over a non-empty list of fp32 tensors."""
    return torch.stack(torch._foreach_norm(tensors)).double().square().sum()
