"""Masters and Adam moments as named pieces, so that they can be saved, and restored at any world size or stage.

DeepSpeed's own checkpoint stores the flat buffers of one world size; a load at another ends in a size error,
and its universal format drops frozen parameters. Written as pieces, like the moving average, the same
state fits every partition, bit for bit.
"""

from __future__ import annotations

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import Tensor

from ilvr_ds.engine.build import Engine
from ilvr_ds.engine.masters import Slot, find_slots, torch_optimizer
from ilvr_ds.engine.partition import Piece, drop_secondary_shards, full_shape, release_copies
from ilvr_ds.engine.shards import ShardReader

MOMENTS = ("exp_avg", "exp_avg_sq")


class OptimizerState:
    """View of an engine's optimizer: pieces of the trainable parameters, their masters, moments and step count."""

    def __init__(self, engine: Engine):
        named = [(n, p) for n, p in engine.deepspeed.module.named_parameters() if p.requires_grad]
        self._engine = engine.deepspeed
        self._optimizer = torch_optimizer(engine.deepspeed)
        self._parameters = [p for _, p in named]
        self._slots: list[Slot] = find_slots(engine.deepspeed, self._parameters)
        self.pieces = [
            (name, Piece(name, name, full_shape(p), slot.start, slot.numel))
            for (name, p), slot in zip(named, self._slots, strict=True)
        ]

    def step_count(self) -> int:
        """Applied optimizer steps (Adam's bias correction depends on it)."""
        for slot in self._slots:
            state = self._optimizer.state.get(slot.flat)
            if state:
                return int(state["step"])
        return 0

    def tensors(self) -> dict[str, list[Tensor]]:
        """Flat fp32 views per kind ("master", "exp_avg", "exp_avg_sq"), one per piece; zeros before the first step."""
        values = {"master": [slot.view() for slot in self._slots]}
        for moment in MOMENTS:
            values[moment] = [
                slot.view(self._optimizer.state[slot.flat][moment])
                if self._optimizer.state.get(slot.flat)
                else torch.zeros(slot.numel)
                for slot in self._slots
            ]
        return values

    @torch.no_grad()
    def load(self, reader: ShardReader, step: int) -> None:
        """Read masters and moments; `write_weights` must follow on every rank.

        Raises:
            CheckpointError: see `ShardReader.read`.
        """
        for slot in self._slots:
            if slot.flat is not None:
                self._allocate(slot.flat, step)
        for kind, tensors in self.tensors().items():
            for (name, piece), tensor in zip(self.pieces, tensors, strict=True):
                reader.read(kind, name, piece, tensor)

    def _allocate(self, flat: Tensor, step: int) -> None:
        """Moments of a flat buffer (they appear at the first step otherwise), and its step count."""
        state = self._optimizer.state[flat]
        for moment in MOMENTS:
            if moment not in state:
                state[moment] = torch.zeros_like(flat)
        if isinstance(self._optimizer, DeepSpeedCPUAdam):
            state["step"] = step
        else:
            fused = any(group["fused"] for group in self._optimizer.param_groups)
            device = flat.device if fused else "cpu"
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)

    @torch.no_grad()
    def write_weights(self) -> None:
        """Cast the masters into the model's weights, on every rank (stages 1 and 2: with DeepSpeed's all-gather)."""
        stage = self._engine.zero_optimization_stage()
        if stage in (1, 2):
            self._engine.optimizer.update_lp_params()
        elif stage == 3:
            for parameter, slot in zip(self._parameters, self._slots, strict=True):
                parameter.ds_tensor.narrow(0, 0, slot.numel).copy_(slot.view())
            release_copies(self._parameters)
            for parameter in self._parameters:
                parameter.ds_secondary_tensor = None
            drop_secondary_shards(self._engine)
        else:
            for parameter, slot in zip(self._parameters, self._slots, strict=True):
                if slot.flat is not parameter:
                    parameter.copy_(slot.flat)
