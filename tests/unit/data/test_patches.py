"""The fast way to patches is the readable one, and a picture that is not of its grid's size is refused."""

import io

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image

from ilvr_ds.data import patches as module
from ilvr_ds.data.images import image_to_patches
from ilvr_ds.data.patches import cut_patches, decode_patches
from ilvr_ds.errors import BatchError


def noise(rows: int, columns: int, seed: int = 0) -> Image.Image:
    """An image of so many tokens by so many."""
    shape = (28 * rows, 28 * columns, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 9))
def test_cut_as_the_readable_form_does(rows, columns, seed):
    image = noise(rows, columns, seed)
    expected, (_, height, width) = image_to_patches(np.asarray(image))
    around = np.full((height * width + 2, 588), 77, np.uint8)
    cut_patches(image, around[1:-1])
    assert (around[1:-1] == expected).all()
    assert (around[[0, -1]] == 77).all()


def test_what_cannot_be_cut_is_refused():
    for image, rows in ((noise(1, 1), 5), (noise(1, 1).convert("L"), 4), (noise(2, 2).crop((0, 0, 56, 42)), 12)):
        with pytest.raises(ValueError, match="into"):
            cut_patches(image, np.zeros((rows, 588), np.uint8))


def test_members_in_order_each_decoded_once(monkeypatch):
    pictures = {"in0.png": noise(1, 2, 1), "in1.png": noise(2, 1, 2), "help1.png": noise(1, 1, 3)}
    grids = {name: (1, image.height // 14, image.width // 14) for name, image in pictures.items()}
    images = {name: encoded(image) for name, image in pictures.items()}
    calls = []
    read_image = module.read_image
    monkeypatch.setattr(
        module, "read_image", lambda content, own: calls.append(content) or read_image(content, own=own)
    )
    members = ["in1.png", "in0.png", "in1.png", "help1.png", "in1.png"]  # a helper image may be the input image
    expected = np.concatenate([image_to_patches(np.asarray(pictures[name]))[0] for name in members])
    found = decode_patches(images, members, grids)
    assert found.dtype == np.uint8 and (found == expected).all()
    assert len(calls) == 3
    assert decode_patches(images, [], grids).shape == (0, 588)


def test_a_picture_that_is_broken_or_of_another_size_is_named():
    images = {"in0.png": encoded(noise(1, 2)), "in1.png": b"no picture"}
    with pytest.raises(BatchError, match=r"in0.png: the image has 56x28 pixels, its grid \(1, 4, 2\).*28x56"):
        decode_patches(images, ["in0.png"], {"in0.png": (1, 4, 2)})
    with pytest.raises(BatchError, match=r"in1.png: the image cannot be decoded"):
        decode_patches(images, ["in0.png", "in1.png"], {"in0.png": (1, 2, 4), "in1.png": (1, 2, 2)})
