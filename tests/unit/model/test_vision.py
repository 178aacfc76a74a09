"""Patches are normalised as Qwen's processor does it, and the tower uses the layout made on the CPU."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessor

from ilvr_ds.data.images import image_to_patches
from ilvr_ds.errors import BatchError
from ilvr_ds.model.vision import cut_patches, merged_tokens, patches_of, vision_layout

GRIDS = ((1, 4, 6), (1, 2, 2), (1, 10, 4))


@pytest.mark.parametrize("shape", [(84, 112), (28, 28), (56, 140)])
def test_pixels_become_what_qwens_processor_makes_of_the_image(shape):
    """Several images of several sizes: cut, in merge-block order, normalised, doubled in time."""
    rng = np.random.default_rng(0)
    shapes = [shape, shape, (56, 28), shape, (28, 84)]
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in shapes]
    processed = Qwen2VLImageProcessor(min_pixels=28 * 28)(images=images, return_tensors="pt")
    grids = tuple((1, h // 14, w // 14) for h, w in shapes)
    assert [tuple(grid) for grid in processed["image_grid_thw"].tolist()] == list(grids)
    pixels = torch.from_numpy(np.concatenate([np.asarray(image).reshape(-1, 588) for image in images]))
    patches = cut_patches(pixels, grids)
    assert (patches.numpy() == np.concatenate([image_to_patches(np.asarray(image))[0] for image in images])).all()
    torch.testing.assert_close(patches_of(pixels, grids), processed["pixel_values"], rtol=0, atol=2e-6)


def test_float_patches_pass_through():
    patches = torch.randn(4, 1176)
    assert patches_of(patches, ((1, 2, 2),)) is patches


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(4, 588),
        torch.zeros(4, 1176, dtype=torch.uint8),
        torch.zeros(588, dtype=torch.uint8),
        torch.zeros(4, 7),
    ],
)
def test_other_pixels_are_an_error(pixels):
    with pytest.raises(BatchError, match="expected"):
        patches_of(pixels, ((1, 2, 2),))


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
