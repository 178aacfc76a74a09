"""Analytic FLOPs of the model, for MFU (model FLOPs utilisation).

Counted: every matrix product of the vision tower, the decoder layers and the LM head; attention as
2 * 2 * (pairs attended) * (heads * head dimension), where a causal sequence of length L attends
L * (L + 1) / 2 pairs, and the vision tower attends whole images in its full-attention blocks and
windows elsewhere. Not counted: norms, rotary, softmax, activations, recomputation (gradient
checkpointing), the optimizer. A backward pass costs twice its forward; a frozen vision tower has none.
The teacher's forward is reported apart: the published method needs it, a plain fine-tuning does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from transformers import Qwen2_5_VLConfig

from ilvr_ds.contracts import PackedBatch

# Dense bf16 peak, FLOP/s, by a part of the device name, from the vendor's datasheets.
PEAK_BF16_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


@dataclass(frozen=True)
class BatchFlops:
    """FLOPs of one micro-batch: the student's forward and backward, and the teacher's forward."""

    student: float
    teacher: float


class FlopsModel:
    """FLOPs of a Qwen2.5-VL model, from its configuration alone."""

    def __init__(
        self, config: Qwen2_5_VLConfig, train_vision: bool, has_teacher: bool = True, reads_helpers: bool = True
    ):
        text, vision = config.text_config, config.vision_config
        self.train_vision = train_vision
        self.has_teacher = has_teacher
        self.reads_helpers = reads_helpers  # helper images are encoded
        self.layers = text.num_hidden_layers
        head_dim = text.hidden_size // text.num_attention_heads
        kv_width = text.num_key_value_heads * head_dim
        self.layer_weights = (
            2 * text.hidden_size * text.hidden_size  # q and o
            + 2 * text.hidden_size * kv_width  # k and v
            + 3 * text.hidden_size * text.intermediate_size  # gate, up, down
        )
        self.attention_width = text.hidden_size
        self.head_weights = text.hidden_size * text.vocab_size
        self.vision_depth = vision.depth
        self.vision_full_blocks = len(vision.fullatt_block_indexes)
        self.vision_width = vision.hidden_size
        self.vision_layer_weights = 4 * vision.hidden_size**2 + 3 * vision.hidden_size * vision.intermediate_size
        patch_values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        self.patch_weights = patch_values * vision.hidden_size
        merged = vision.hidden_size * vision.spatial_merge_size**2
        self.merge_unit = vision.spatial_merge_size**2
        self.merger_weights = merged * merged + merged * vision.out_hidden_size
        self.window_side = vision.window_size // vision.patch_size  # patches on a window's side

    def language_forward(self, lengths: Sequence[int]) -> float:
        """FLOPs of one forward through the decoder layers over packed sequences of these lengths."""
        tokens = sum(lengths)
        pairs = sum(length * (length + 1) / 2 for length in lengths)
        return self.layers * (2 * tokens * self.layer_weights + 4 * pairs * self.attention_width)

    def head_forward(self, supervised: int) -> float:
        """FLOPs of the LM head over `supervised` positions."""
        return 2 * supervised * self.head_weights

    def vision_forward(self, grids: Sequence[tuple[int, int, int]]) -> float:
        """FLOPs of the vision tower and merger over images of these patch grids (t, h, w)."""
        patches = sum(t * h * w for t, h, w in grids)
        full_pairs = sum(t * (h * w) ** 2 for t, h, w in grids)
        window_pairs = sum(t * self._squares(h) * self._squares(w) for t, h, w in grids)
        blocks = 2 * patches * self.vision_layer_weights * self.vision_depth
        attention = (
            4
            * self.vision_width
            * (self.vision_full_blocks * full_pairs + (self.vision_depth - self.vision_full_blocks) * window_pairs)
        )
        return (
            2 * patches * self.patch_weights
            + blocks
            + attention
            + 2 * (patches // self.merge_unit) * self.merger_weights
        )

    def _squares(self, side: int) -> int:
        """Sum of squared window sides along one axis: (sum a^2)(sum b^2) = pairs inside all windows."""
        full, rest = divmod(side, self.window_side)
        return full * self.window_side**2 + rest**2

    def of_batch(self, batch: PackedBatch) -> BatchFlops:
        """FLOPs of a micro-batch. A filler batch counts as nothing: it is no useful work."""
        if batch.is_filler:
            return BatchFlops(0.0, 0.0)
        lengths = [end - start for start, end in pairwise(batch.cu_seqlens.tolist())]
        language = self.language_forward(lengths)
        vision = self.vision_forward(batch.grids if self.reads_helpers else batch.grids[: batch.num_input_images])
        student = 3 * (language + self.head_forward(len(batch.targets))) + (3 if self.train_vision else 1) * vision
        return BatchFlops(student, language if self.has_teacher else 0.0)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a device by its name, FLOP/s; None where the datasheet is not listed (CPUs)."""
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in device_name), None)
