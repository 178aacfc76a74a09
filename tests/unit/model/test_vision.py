"""Patches are normalised as Qwen's processor does it, and the tower uses the layout made on the CPU."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessor

from ilvr_ds.errors import BatchError
from ilvr_ds.model.vision import IMAGE_MEAN, IMAGE_STD, merged_tokens, normalise_patches, vision_layout

GRIDS = ((1, 4, 6), (1, 2, 2), (1, 10, 4))


def test_normalised_as_by_qwens_processor():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (84, 112, 3), dtype=np.uint8))
    expected = Qwen2VLImageProcessor()(images=image, return_tensors="pt")["pixel_values"]  # (P, 1176)
    frames = expected.unflatten(1, (3, 2, 196))
    assert torch.equal(frames[:, :, 0], frames[:, :, 1])
    mean, std = (torch.tensor(x)[:, None] for x in (IMAGE_MEAN, IMAGE_STD))
    bytes_ = ((frames[:, :, 0] * std + mean) * 255).round().to(torch.uint8).flatten(1)  # (P, 588)
    assert bytes_.float().std() > 50  # the picture is there
    torch.testing.assert_close(normalise_patches(bytes_), expected, rtol=0, atol=2e-6)


def test_float_patches_pass_through():
    patches = torch.randn(3, 1176)
    assert normalise_patches(patches) is patches


@pytest.mark.parametrize(
    "patches",
    [
        torch.zeros(3, 588),
        torch.zeros(3, 1176, dtype=torch.uint8),
        torch.zeros(588, dtype=torch.uint8),
        torch.zeros(3, 7),
    ],
)
def test_other_patches_are_an_error(patches):
    with pytest.raises(BatchError, match="expected"):
        normalise_patches(patches)


def test_merged_tokens():
    assert [merged_tokens(grid) for grid in GRIDS] == [6, 1, 10]


def test_the_tower_computes_the_same_from_the_layout(small):
    """Also with a wrong `grid_thw`: so nothing in the tower reads it, hence nothing asks the device for it."""
    visual = small.network(0).model.visual
    patches = torch.randn(sum(t * h * w for t, h, w in GRIDS), 1176)
    layout = vision_layout(GRIDS, 2, visual.window_size, visual.patch_size)
    assert layout.max_seqlen == 40
    with torch.no_grad():
        expected = visual(patches, grid_thw=torch.tensor(GRIDS)).pooler_output
        got = visual(patches, grid_thw=torch.tensor([[1, 2, 2]]), **layout.kwargs(torch.device("cpu"))).pooler_output
    assert torch.equal(got, expected)


def test_windows_differ_from_full_attention_in_the_test_model(small):
    """Otherwise the test above would not see a wrong window layout."""
    visual = small.network(0).model.visual
    layout = vision_layout(GRIDS, 2, visual.window_size, visual.patch_size)
    assert len(layout.cu_window_seqlens) > len(layout.cu_seqlens)
