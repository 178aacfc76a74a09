"""The student's forward of stage 1: teacher-forced latents in, hidden states out."""

from __future__ import annotations

from torch import Tensor

from ilvr_ds.contracts import PackedBatch, StudentOutput
from ilvr_ds.model.backbone import Backbone
from ilvr_ds.model.placement import place_image_features, place_targets


def forward_with_targets(
    student: Backbone, batch: PackedBatch, input_features: Tensor, values: Tensor, counts: Tensor
) -> StudentOutput:
    """Token embeddings, input image features at the image tokens, targets z_1..z_K* at the first pads of each span.

    Args:
        input_features: (N, D) of the input images, in the order of `batch.image_positions`.
        values: (S, K, D) targets of the spans of `batch`, ignored beyond `counts` (S,) int64, K*.
    """
    embeddings = student.embed(batch.input_ids)  # (T, D)
    embeddings = place_image_features(embeddings, batch.image_positions, input_features)
    embeddings = place_targets(embeddings, batch.span_starts, values, counts)
    return StudentOutput(hidden=student.decode(embeddings, batch))
