"""What goes into the embedding slots that are not text. Out of place, so that gradients are right.

Gradient of a token embedding that was replaced is zero; image features and targets are placed as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor


def place_image_features(embeddings: Tensor, image_positions: Tensor, features: Tensor) -> Tensor:
    """Embeddings (T, D) with `features` (N, D) at `image_positions` (N,); N may be 0."""
    return embeddings.index_copy(0, image_positions, features.to(embeddings.dtype))


def latent_positions(span_starts: Tensor, latent_size: int) -> Tensor:
    """(S,) first pad of each span -> (S, K) positions of all its pads."""
    return span_starts[:, None] + torch.arange(latent_size, device=span_starts.device)


def filled_slots(counts: Tensor, latent_size: int) -> Tensor:
    """(S,) K* -> (S, K) bool: slot k of span s carries a target."""
    return torch.arange(latent_size, device=counts.device) < counts[:, None]


def place_targets(embeddings: Tensor, span_starts: Tensor, values: Tensor, counts: Tensor) -> Tensor:
    """Teacher forcing: the first K* pads of each span become the targets, the rest keep their embedding.

    Args:
        embeddings: (T, D).
        span_starts: (S,) int64; S may be 0.
        values: (S, K, D) targets, ignored beyond `counts`.
        counts: (S,) int64, K*.
    """
    spans, size = values.shape[:2]
    positions = latent_positions(span_starts, size).flatten()  # (S * K,)
    filled = filled_slots(counts, size).reshape(spans * size, 1)
    slots = torch.where(filled, values.flatten(0, 1).to(embeddings.dtype), embeddings[positions])
    return embeddings.index_copy(0, positions, slots)
