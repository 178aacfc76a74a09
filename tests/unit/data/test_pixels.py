"""A step's pixels lie without gaps, input images first."""

import numpy as np
import pytest

from ilvr_ds.data.index import INDEX_DTYPE
from ilvr_ds.data.pixels import lay_out
from ilvr_ds.data.step_memory import StepMemory


def index_row(images: int, helpers: int) -> np.void:
    row = np.zeros((), INDEX_DTYPE)
    row["image_tokens"], row["helper_tokens"] = images, helpers
    return row[()]


@pytest.mark.parametrize("helpers", [True, False])
def test_a_step_is_laid_out_without_gaps_inputs_first(helpers):
    bins = [[index_row(3, 5), index_row(0, 2), index_row(4, 0)], [], [index_row(1, 1)]]
    piece, laid = lay_out(bins, helpers=helpers, memory=StepMemory(2, shared=False))
    assert len(piece) >= sum(len(own.rows) for own in laid) * 588
    used = piece.numpy()
    used[:-1] = 0
    value = 0
    for own, own_bin in zip(laid, bins, strict=True):
        assert len(own.samples) == len(own_bin)
        for part in [s.inputs for s in own.samples] + [s.helpers for s in own.samples]:
            value += 1
            part[:] = value
        expected = [4 * int(r["image_tokens"]) for r in own_bin]
        expected += [4 * int(r["helper_tokens"]) if helpers else 0 for r in own_bin]
        numbers = np.repeat(np.arange(value - len(expected) + 1, value + 1), expected)
        assert own.rows.shape == (sum(expected), 588) and (own.rows == numbers[:, None]).all()
    size = sum(own.rows.size for own in laid)
    assert (used[:size] > 0).all() and (used[size:-1] == 0).all()
