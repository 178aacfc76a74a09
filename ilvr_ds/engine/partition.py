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
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from ilvr_ds.engine.masters import Slot, find_slots
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
        self._pairs = pairs
        self._slots = find_slots(engine, [p.student for p in pairs])
        self.pieces = _pieces(pairs, self._slots)

    def masters(self) -> list[Tensor]:
        """The student's fp32 masters, one flat view (numel,) per piece; read-only. Host memory when offloaded."""
        return [slot.view() for slot in self._slots]

    def students(self) -> list[Tensor]:
        """The student's stored weights of each piece, one flat view (numel,) in the model's dtype."""
        return _ranges([p.student for p in self._pairs], self.pieces)

    def teachers(self) -> list[Tensor]:
        """The teacher's storage of each piece, in the model's dtype; writing it moves the teacher."""
        return _ranges([p.teacher for p in self._pairs], self.pieces)

    def publish(self) -> int:
        """Make the written teacher visible to its next forward; returns the bytes this rank sent."""
        return 0


class FlatPartition(ReplicatedPartition):
    """Stages 1 and 2: weights are replicated, masters are slices of one flat buffer per parameter group.

    A piece is the overlap of a parameter with this rank's slice, so its borders follow DeepSpeed's flattening.
    """

    replicated = False

    def __init__(self, engine: deepspeed.DeepSpeedEngine, pairs: list[Pair]):
        super().__init__(engine, pairs)
        self._group = engine.optimizer.dp_process_group
        self._world = dist.get_world_size(self._group)
        self._rank = dist.get_rank(self._group)
        self._layout: list[list[Piece]] = [[]] * self._world  # every rank's pieces; they never move during a run
        dist.all_gather_object(self._layout, self.pieces, group=self._group)

    def publish(self) -> int:
        """All-gather the pieces into every rank's full teacher; returns the bytes this rank sent.

        Each rank's pieces, laid end to end, are a stream; streams are gathered `GATHER_BUCKET` elements at a
        time. Sent bytes are counted as in a ring: (world - 1) times the rank's own part.
        """
        if self._world == 1 or not self._pairs:
            return 0
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
                start = piece.start + low - position
                pair.teacher.detach().view(-1)[start : start + high - low] = part[low - begin : high - begin]
            position += piece.numel


class ShardedPartition:
    """Stage 3: student and teacher are cut alike, element for element, by the same engine.

    hpZ's secondary shards are copies; the primary shards (`ds_tensor`) are cut over all ranks.
    """

    replicated = False

    def __init__(self, engine: deepspeed.DeepSpeedEngine, pairs: list[Pair]):
        for p in pairs:
            if p.teacher.ds_tensor.numel() != p.student.ds_tensor.numel():
                raise ConfigError(
                    f"ema_pairs: the local shard of {p.name!r} has {p.teacher.ds_tensor.numel()} elements, that of "
                    f"{p.student_name!r} {p.student.ds_tensor.numel()}: the two are not partitioned alike"
                )
        self._engine = engine
        self._pairs = pairs
        self._slots = find_slots(engine, [p.student for p in pairs])
        self.pieces = _pieces(pairs, self._slots)
        self._stop_persisting()

    def _stop_persisting(self) -> None:
        """Keep the optimizer from gathering the teacher's small parameters at the end of its step.

        Parameters under `stage3_param_persistence_threshold` stay gathered between forwards, and the
        optimizer refreshes them after a step, all modules included: for the teacher that is one gather of
        values that the update right after it makes stale. Left out of that list they are gathered by the
        next forward, which is also when they are first right.
        """
        teachers = {id(p.teacher) for p in self._pairs}
        persistent = self._engine.optimizer.persistent_parameters
        persistent[:] = [p for p in persistent if id(p) not in teachers]

    def masters(self) -> list[Tensor]:
        """The student's fp32 masters, one flat view (numel,) per piece; read-only. Host memory when offloaded."""
        return [slot.view() for slot in self._slots]

    def students(self) -> list[Tensor]:
        """The student's stored weights of each piece, one flat view (numel,) in the model's dtype."""
        return _shards([p.student for p in self._pairs], self.pieces)

    def teachers(self) -> list[Tensor]:
        """The teacher's storage of each piece, in the model's dtype; writing it moves the teacher."""
        return _shards([p.teacher for p in self._pairs], self.pieces)

    def publish(self) -> int:
        """Drop every copy of the teacher made before the update; returns the bytes this rank sent: 0."""
        release_copies([p.teacher for p in self._pairs])
        drop_secondary_shards(self._engine)
        return 0


def release_copies(parameters: list[nn.Parameter]) -> None:
    """ZeRO-3: free gathered copies (persistent ones, or a forward's that were not released); the next use gathers."""
    for parameter in parameters:
        if parameter.ds_status is ZeroParamStatus.INFLIGHT:
            raise RuntimeError(f"parameter {parameter.ds_id} is written while being gathered; finish the forward first")
        if parameter.ds_status is ZeroParamStatus.AVAILABLE:
            parameter.partition([parameter], has_been_updated=False)


def drop_secondary_shards(engine: deepspeed.DeepSpeedEngine) -> None:
    """ZeRO-3 with hpZ: forget the intra-node copies of all frozen parameters.

    All of them, not only the teacher's: DeepSpeed gathers parameters in groups and takes the secondary shards
    of a whole group when its first member has one, and the optimizer has just dropped the student's.
    """
    for parameter in engine.module.parameters():
        if not parameter.requires_grad:
            parameter.ds_secondary_tensor = None


def _pieces(pairs: list[Pair], slots: list[Slot]) -> list[Piece]:
    return [
        Piece(p.name, p.student_name, full_shape(p.student), slot.start, slot.numel)
        for p, slot in zip(pairs, slots, strict=True)
    ]


def _ranges(parameters: list[nn.Parameter], pieces: list[Piece]) -> list[Tensor]:
    return [
        p.detach().view(-1).narrow(0, piece.start, piece.numel) for p, piece in zip(parameters, pieces, strict=True)
    ]


def _shards(parameters: list[nn.Parameter], pieces: list[Piece]) -> list[Tensor]:
    return [p.ds_tensor.detach().narrow(0, 0, piece.numel) for p, piece in zip(parameters, pieces, strict=True)]


Partition = ReplicatedPartition | FlatPartition | ShardedPartition


def build_partition(engine: deepspeed.DeepSpeedEngine, pairs: list[Pair]) -> Partition:
    """The partition of `pairs` (whose students are all trainable) under the engine's ZeRO stage."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        return ShardedPartition(engine, pairs)
    return ReplicatedPartition(engine, pairs) if stage == 0 else FlatPartition(engine, pairs)


def check_alignment(partition: Partition) -> None:
    """Prove on the values that pieces line up: masters, cast to the model's dtype, are the student's weights.

    Raises:
        ConfigError: naming the first parameter where this is not so.
    """
    for piece, student, master in zip(partition.pieces, partition.students(), partition.masters(), strict=True):
        if student.numel() != master.numel() or not torch.equal(master.to(student), student):
            raise ConfigError(
                f"{piece.student!r}: elements {piece.start} to {piece.start + piece.numel} on rank {dist.get_rank()} "
                "differ from their fp32 master: the pieces do not line up"
            )


def check_frozen(pairs: list[Pair]) -> None:
    """A teacher parameter whose student is frozen must hold the student's values, because nothing moves it.

    Raises:
        ConfigError: naming the first pair that differs on this rank.
    """
    for pair in pairs:
        student, teacher = (p.ds_tensor if hasattr(p, "ds_id") else p for p in (pair.student, pair.teacher))
        valid = student.numel()
        if hasattr(pair.student, "ds_id"):  # leave out the padding of the last shards
            group = pair.student.ds_process_group
            valid = max(0, min(valid, pair.student.ds_numel - dist.get_rank(group) * valid))
        if not torch.equal(student.detach().view(-1)[:valid], teacher.detach().view(-1)[:valid]):
            raise ConfigError(
                f"ema_pairs: {pair.student_name!r} is frozen, so {pair.name!r} must be an exact copy, and it is not"
            )
