"""Qwen2.5-VL's 3-D rotary positions of one sample, in numpy.

Every token gets three positions: temporal, height, width. Text counts up by one in all three. The tokens of
an image with h x w merged tokens share the temporal position `p` of the image's beginning and sit at height
`p + row`, width `p + column`; the text after it goes on at `p + max(h, w)`. Latent pads are text here: they
continue the text's count, and the helper images they stand for take no position at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ilvr_ds.errors import BatchError


def rotary_positions(
    input_ids: np.ndarray, grids: Sequence[tuple[int, int, int]], image_pad: int, merge: int = 2
) -> np.ndarray:
    """Positions of one sample's tokens, starting at 0.

    Args:
        input_ids: (L,) int64.
        grids: (t, h, w) in patches of the *input* images in reading order; t is 1 for a still image.
        image_pad: id of `<|image_pad|>`.
        merge: patches per side that become one token.

    Returns:
        (3, L) int64: temporal, height, width.

    Raises:
        BatchError: a grid that is not a still image or not a multiple of `merge`, or runs of `<|image_pad|>`
            that do not have the grids' lengths.
    """
    length = len(input_ids)
    is_image = np.asarray(input_ids) == image_pad  # (L,)
    for number, (t, h, w) in enumerate(grids):
        if t != 1 or h < merge or w < merge or h % merge or w % merge:
            raise BatchError(
                f"input image {number}: grid {(t, h, w)} is not a still image of {merge}x{merge} blocks of patches; "
                "rebuild the shards with data_tools/build_shards.py"
            )
    bounded = np.zeros(length + 2, dtype=bool)
    bounded[1:-1] = is_image
    edges = np.flatnonzero(bounded[1:] != bounded[:-1])  # start, end, start, end, ...
    starts, ends = edges[0::2], edges[1::2]
    sides = [(h // merge, w // merge) for _, h, w in grids]
    expected = [h * w for h, w in sides]
    if (ends - starts).tolist() != expected:
        raise BatchError(
            f"runs of image tokens have lengths {(ends - starts).tolist()}, the image grids ask for {expected}; "
            "rebuild the shards with data_tools/build_shards.py"
        )
    advance = (~is_image).astype(np.int64)  # (L,) how far the count moves after each token
    if sides:  # an image moves it once, at its last token
        advance[ends - 1] = [max(side) for side in sides]
    before = np.cumsum(advance) - advance  # (L,) count before each token
    positions = np.empty((3, length), dtype=np.int64)
    positions[:] = before
    for start, end, (h, w) in zip(starts.tolist(), ends.tolist(), sides, strict=True):
        positions[1, start:end].reshape(h, w)[:] += np.arange(h)[:, None]
        positions[2, start:end].reshape(h, w)[:] += np.arange(w)
    return positions
