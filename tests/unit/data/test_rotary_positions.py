"""Rotary positions against transformers' own and against recorded ones."""

import hashlib
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from ilvr_ds.data.rotary_positions import rotary_positions
from ilvr_ds.errors import BatchError

PAD = 300


@pytest.fixture(scope="module")
def oracle() -> Qwen2_5_VLModel:
    """Only `get_rope_index` is used: the weights stay on the meta device."""
    with torch.device("meta"):
        return Qwen2_5_VLModel(Qwen2_5_VLConfig())


def sequence(texts: list[int], sides: list[tuple[int, int]]) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """texts[i] text tokens before image i; at least one between images; texts[-1] at the end."""
    ids: list[int] = []
    for text, (h, w) in zip(texts, [*sides, (0, 0)], strict=True):
        ids += [1] * text + [PAD] * (h * w)
    return np.array(ids), [(1, 2 * h, 2 * w) for h, w in sides]


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_equals_transformers(oracle, data):
    sides = data.draw(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), max_size=4))
    texts = data.draw(st.lists(st.integers(1, 6), min_size=len(sides) + 1, max_size=len(sides) + 1))
    ids, grids = sequence(texts, sides)
    ours = rotary_positions(ids, grids, PAD)
    theirs, _ = oracle.get_rope_index(
        torch.tensor(ids[None]),
        torch.tensor((ids == PAD)[None].astype(np.int32)),
        image_grid_thw=torch.tensor(grids) if grids else None,
    )
    assert ours.dtype == np.int64
    np.testing.assert_array_equal(ours, theirs[:, 0].numpy())


def test_recorded_positions(realdata):
    """Positions transformers 4.51.3 gave to real records, by their hash."""
    lines = (realdata / "preprocessing" / "reference.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines
    for line in lines:
        case = json.loads(line)
        positions = rotary_positions(np.array(case["input_ids"]), [tuple(g) for g in case["image_grid_thw"]], 151655)
        assert positions[:, -1].tolist() == case["position_ids_last"], case["id"]
        digest = hashlib.sha256(np.ascontiguousarray(positions).tobytes()).hexdigest()
        assert digest == case["position_ids_sha256_int64"], case["id"]


def test_third_party_vector(realdata):
    case = json.loads((realdata / "scoring" / "third_party_vectors.json").read_text(encoding="utf-8"))["mrope"]
    grids = [tuple(g) for g in case["grid_thw"]]
    positions = rotary_positions(np.array(case["ids"]), grids, case["image_token"], case["merge"])
    assert positions.tolist() == [case["t"], case["h"], case["w"]]


def test_latents_count_like_text():
    ids, grids = sequence([2, 9], [(2, 3)])
    latents = ids.copy()
    latents[-5:] = 304
    np.testing.assert_array_equal(rotary_positions(ids, grids, PAD), rotary_positions(latents, grids, PAD))
    assert rotary_positions(ids, grids, PAD)[:, -1].tolist() == [2 + 3 + 8] * 3


@pytest.mark.parametrize(
    ("ids", "grids", "says"),
    [
        ([1, PAD, PAD, 1], [(1, 2, 2)], "lengths"),
        ([1, 1], [(1, 2, 2)], "lengths"),
        ([1, PAD, 1], [], "lengths"),
        ([PAD, PAD, 1], [(1, 2, 2), (1, 2, 2)], "lengths"),  # two images without a marker between them
        ([1, PAD], [(2, 2, 2)], "still image"),
        ([1, PAD], [(1, 3, 2)], "still image"),
        ([1, PAD], [(1, 2, 0)], "still image"),
    ],
)
def test_refuses(ids, grids, says):
    with pytest.raises(BatchError, match=says):
        rotary_positions(np.array(ids), grids, PAD)
