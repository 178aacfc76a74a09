"""Where this rank's part of the student and of the teacher lies, per ZeRO stage.

Every stage gives the same three things for the tracked parameters: this rank's *pieces* (a flat range of a
parameter each), the student's fp32 masters of these ranges, and the teacher's storage of these ranges.
An element-wise update then needs no knowledge of the stage. `publish` makes what was written into the
teacher's storage visible to its next forward.

| stage | piece of parameter p on rank r | publish |
|---|---|---|
| 0 | all of p, on every rank | nothing |
| 1, 2 | p's overlap with rank r's slice of the flat fp32 master (may be empty) | all-gather of the cast pieces |
| 3 | [r * n, (r + 1) * n) with n = ceil(numel / world), cut off at numel | nothing on the wire |
"""

from __future__ import annotations

from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import safe_get_local_fp32_param
from torch import Tensor, nn

from ilvr_ds.errors import ConfigError

GATHER_BUCKET = 2**24  # elements of each rank in one all-gather (stages 1, 2): 32 MiB per rank in bf16


@dataclass(frozen=True)
class Piece:
    """This rank's range of one tracked parameter."""

    name: str  # the teacher's parameter
    student: str  # the student's parameter
    shape: tuple[int, ...]  # of the whole parameter
    start: int  # first element of the range, in the flattened parameter
    numel: int  # elements in the range; 0 where this rank owns nothing of the parameter


@dataclass(frozen=True)
class Pair:
    """A teacher parameter and the student parameter it follows."""

    name: str
    student_name: str
    teacher: nn.Parameter
    student: nn.Parameter


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter, partitioned (ZeRO-3) or not."""
    return tuple(parameter.ds_shape if hasattr(parameter, "ds_id") else parameter.shape)


def resolve_pairs(module: nn.Module, names: list[tuple[str, str]]) -> list[Pair]:
    """Look parameters up by name and drop repetitions (tied weights are one parameter with two names).

    Raises:
        ConfigError: an unknown name, shapes that differ, a teacher parameter that is trainable, or one that
            is asked to follow two students.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    pairs: dict[int, Pair] = {}
    for teacher_name, student_name in names:
        for name in (teacher_name, student_name):
            if name not in parameters:
                raise ConfigError(f"ema_pairs: the module has no parameter {name!r}")
        pair = Pair(teacher_name, student_name, parameters[teacher_name], parameters[student_name])
        if full_shape(pair.teacher) != full_shape(pair.student):
            raise ConfigError(
                f"ema_pairs: {teacher_name!r} has shape {full_shape(pair.teacher)}, "
                f"{student_name!r} has {full_shape(pair.student)}"
            )
        if pair.teacher.requires_grad:
            raise ConfigError(f"ema_pairs: teacher parameter {teacher_name!r} requires a gradient; freeze it")
        known = pairs.setdefault(id(pair.teacher), pair)
        if known.student is not pair.student:
            raise ConfigError(
                f"ema_pairs: teacher parameter {known.name!r} (also {teacher_name!r}) follows both "
                f"{known.student_name!r} and {student_name!r}"
            )
    return list(pairs.values())


class ReplicatedPartition:
    """Stage 0: every rank has everything, and computes the same update."""

    replicated = True

    def __init__(self, engine: deepspeed.DeepSpeedEngine, pairs: list[Pair]):
        self._engine = engine
        self._pairs = pairs
        self.pieces = [Piece(p.name, p.student_name, full_shape(p.student), 0, p.student.numel()) for p in pairs]

    def masters(self) -> list[Tensor]:
        """The student's fp32 masters, one flat view (numel,) per piece; read-only."""
        optimizer = self._engine.optimizer
        if isinstance(optimizer, FP16_UnfusedOptimizer):
            master_of = {
                id(low): high
                for lows, highs in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
                for low, high in zip(lows, highs, strict=True)
            }
            return [master_of[id(p.student)].detach().view(-1) for p in self._pairs]
        return [p.student.detach().view(-1) for p in self._pairs]  # fp32 training: the weights are the masters

    def students(self) -> list[Tensor]:
        """The student's stored weights of each piece, in the model's dtype."""
        return [p.student.detach().view(-1) for p in self._pairs]

    def teachers(self) -> list[Tensor]:
        """The teacher's storage of each piece, in the model's dtype; writing it moves the teacher."""
        return [p.teacher.detach().view(-1) for p in self._pairs]

    def publish(self) -> int:
        """Make the written teacher visible to its forward; returns the bytes this rank sent."""
        return 0


class FlatPartition:
    """Stages 1 and 2: weights are replicated, masters are slices of one flat buffer per parameter group.

    A piece is the overlap of a parameter with this rank's slice, so its borders follow from DeepSpeed's
    flattening order; they are read from `param._hp_mapping`, never computed here.
    """

    replicated = False

    def __init__(self, engine: deepspeed.DeepSpeedEngine, pairs: list[Pair]):
        self._pairs = pairs
        self.pieces = []
        for p in pairs:
            start, numel = 0, 0
            if p.student.requires_grad and p.student._hp_mapping is not None:
                address = p.student._hp_mapping.lp_fragment_address
                start, numel = address.start, address.numel
            elif not p.student.requires_grad:  # frozen: replicated, so every rank can look at all of it
                numel = p.student.numel()
            self.pieces.append(Piece(p.name, p.student_name, full_shape(p.student), start, numel))
        self._group = engine.optimizer.dp_process_group
        self._world = dist.get_world_size(self._group)
        self._rank = dist.get_rank(self._group)
        self._layout: list[list[Piece]] | None = None

    def masters(self) -> list[Tensor]:
        """The student's fp32 masters, one flat view (numel,) per piece; read-only."""
        views = []
        for pair, piece in zip(self._pairs, self.pieces, strict=True):
            if piece.numel == 0:
                views.append(torch.empty(0, device=pair.student.device))
            else:
                views.append(pair.student._hp_mapping.get_hp_fragment().detach())
        return views

    def students(self) -> list[Tensor]:
        """The student's stored weights of each piece, in the model's dtype."""
        return [
            pair.student.detach().view(-1).narrow(0, piece.start, piece.numel)
            for pair, piece in zip(self._pairs, self.pieces, strict=True)
        ]

    def teachers(self) -> list[Tensor]:
        """The teacher's storage of each piece, in the model's dtype; writing it moves the teacher."""
        return [
            pair.teacher.detach().view(-1).narrow(0, piece.start, piece.numel)
            for pair, piece in zip(self._pairs, self.pieces, strict=True)
        ]

    def publish(self) -> int:
        """All-gather the pieces into every rank's full teacher; returns the bytes this rank sent.

        Each rank's pieces, laid end to end, are a stream; streams are gathered `GATHER_BUCKET` elements at a
        time. Sent bytes are counted as in a ring: (world - 1) times the rank's own part.
        """
        if self._world == 1 or not self._pairs:
            return 0
        if self._layout is None:  # exchanged once: pieces never move during a run
            self._layout = [None] * self._world
            dist.all_gather_object(self._layout, self.pieces, group=self._group)
        stream = torch.cat(self.teachers())  # (own elements,)
        longest = max(sum(piece.numel for piece in pieces) for pieces in self._layout)
        sent = 0
        for offset in range(0, longest, GATHER_BUCKET):
            width = min(GATHER_BUCKET, longest - offset)
            own = stream.new_zeros(width)
            mine = stream[offset : offset + width]
            own[: mine.numel()] = mine
            gathered = stream.new_empty(self._world * width)
            dist.all_gather_into_tensor(gathered, own, group=self._group)
            sent += own.numel() * own.element_size() * (self._world - 1)
            for rank, pieces in enumerate(self._layout):
                if rank != self._rank:
                    self._scatter(gathered[rank * width : (rank + 1) * width], pieces, offset)
        return sent

    def _scatter(self, part: Tensor, pieces: list[Piece], offset: int) -> None:
        """Copy elements [offset, offset + len(part)) of another rank's stream to where they belong."""
        begin, end = offset, offset + part.numel()
        position = 0  # of the piece in the stream
        for pair, piece in zip(self._pairs, pieces, strict=True):
            low, high = max(begin, position), min(end, position + piece.numel)
            if low < high:
                target = pair.teacher.detach().view(-1)
                start = piece.start + low - position
                target[start : start + high - low] = part[low - begin : high - begin]
            position += piece.numel


class ShardedPartition:
    """Stage 3: student and teacher are cut alike, element for element, by the same engine."""

    replicated = False

    def __init__(self, engine: deepspeed.DeepSpeedEngine, pairs: list[Pair]):
        self._engine = engine
        self._pairs = pairs
        rank = dist.get_rank(engine.optimizer.dp_process_group)
        self.pieces = []
        for p in pairs:
            length = p.student.ds_tensor.numel()
            if p.teacher.ds_tensor.numel() != length:
                raise ConfigError(
                    f"ema_pairs: the local shard of {p.name!r} has {p.teacher.ds_tensor.numel()} elements, that of "
                    f"{p.student_name!r} {length}: the two are not partitioned alike"
                )
            # The last ranks' shards end in padding, which is uninitialised memory: not part of any piece.
            start = min(rank * length, p.student.ds_numel)
            numel = min(length, p.student.ds_numel - start)
            self.pieces.append(Piece(p.name, p.student_name, full_shape(p.student), start, numel))
        self._stop_persisting()

    def _stop_persisting(self) -> None:
        """Keep the optimizer from gathering the teacher's small parameters at the end of its step.

        Parameters under `stage3_param_persistence_threshold` stay gathered between forwards, and the
        optimizer refreshes them after a step, all modules included: for the teacher that is one gather of
        values that the update right after it makes stale. Left out of that list they are gathered by the
        next forward, which is also when they are first right.
        """
        teachers = {id(p.teacher) for p in self._pairs if p.student.requires_grad}
        persistent = self._engine.optimizer.persistent_parameters
        persistent[:] = [p for p in persistent if id(p) not in teachers]

    def masters(self) -> list[Tensor]:
        """The student's fp32 masters, one flat tensor (numel,) per piece: views, or copies when offloaded."""
        return [
            safe_get_local_fp32_param(pair.student).detach().narrow(0, 0, piece.numel)
            for pair, piece in zip(self._pairs, self.pieces, strict=True)
        ]

    def students(self) -> list[Tensor]:
        """The student's stored weights of each piece, in the model's dtype."""
        return [
            pair.student.ds_tensor.detach().narrow(0, 0, piece.numel)
            for pair, piece in zip(self._pairs, self.pieces, strict=True)
        ]

    def teachers(self) -> list[Tensor]:
        """The teacher's storage of each piece, in the model's dtype; writing it moves the teacher."""
        return [
            pair.teacher.ds_tensor.detach().narrow(0, 0, piece.numel)
            for pair, piece in zip(self._pairs, self.pieces, strict=True)
        ]

    def publish(self) -> int:
        """Drop every copy of the teacher made before the update; returns the bytes this rank sent: 0.

        Two kinds of copy would be read instead of the new shard: a gathered parameter that was kept
        (persistence threshold, or a forward that has not released it), and hpZ's secondary shard. The
        secondary shards of *all* frozen parameters go, because DeepSpeed gathers parameters in groups and
        takes the secondary shard for a whole group when its first member has one.
        """
        for pair in self._pairs:
            if pair.teacher.ds_status is ZeroParamStatus.INFLIGHT:
                raise RuntimeError(
                    f"{pair.name}: the teacher was updated while being gathered; finish the forward first"
                )
            if pair.teacher.ds_status is ZeroParamStatus.AVAILABLE:
                pair.teacher.partition([pair.teacher], has_been_updated=False)
        for parameter in self._engine.module.parameters():
            if not parameter.requires_grad:
                parameter.ds_secondary_tensor = None
        return 0


Partition = ReplicatedPartition | FlatPartition | ShardedPartition


def build_partition(engine: deepspeed.DeepSpeedEngine, pairs: list[Pair]) -> Partition:
    """The partition of `pairs` under the engine's ZeRO stage."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        return ShardedPartition(engine, pairs)
    return ReplicatedPartition(engine, pairs) if stage == 0 else FlatPartition(engine, pairs)


def check_alignment(partition: Partition, *, tracked: bool) -> None:
    """Prove on the values that pieces line up, before anything is trained.

    Tracked: the fp32 masters, cast to the model's dtype, are the student's stored weights, range by range.
    Frozen: teacher and student hold the same values.

    Raises:
        ConfigError: naming the first parameter where this is not so.
    """
    students = partition.students()
    others = partition.masters() if tracked else partition.teachers()
    for piece, student, other in zip(partition.pieces, students, others, strict=True):
        if student.numel() != other.numel() or not torch.equal(other.to(student), student):
            what = "its fp32 master" if tracked else f"the teacher's {piece.name!r}"
            raise ConfigError(
                f"{piece.student!r}: elements {piece.start} to {piece.start + piece.numel} on rank "
                f"{dist.get_rank()} differ from {what}: the pieces do not line up"
                + ("" if tracked else " (a frozen parameter's teacher must be an exact copy)")
            )
