"""Stored pictures are decoded as Pillow decodes them, into the rows they are given; others are refused."""

import io

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image

from ilvr_ds.data import stored_images as module
from ilvr_ds.data.image_codec import encode_image
from ilvr_ds.data.images import ImageSettings, image_to_patches
from ilvr_ds.data.pixels import SampleRows, image_pixels
from ilvr_ds.data.stored_images import decode_pixels
from ilvr_ds.errors import BatchError


def noise(rows: int, columns: int, seed: int = 0, smooth: bool = False) -> Image.Image:
    """An image of so many tokens by so many."""
    shape = (28 * rows, 28 * columns, 3)
    rng = np.random.default_rng(seed)
    if not smooth:
        return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
    small = Image.fromarray(rng.integers(0, 256, (rows + 1, columns + 1, 3), dtype=np.uint8))
    return small.resize((shape[1], shape[0]), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rows_for(*images: Image.Image) -> np.ndarray:
    return np.full((sum(i.width * i.height // 196 for i in images), 588), 77, np.uint8)


def decoded(name: str, content: bytes, grid: tuple[int, int, int]) -> np.ndarray:
    out = np.full((grid[1] * grid[2] + 2, 588), 77, np.uint8)
    decode_pixels({name: content}, {name: grid}, [name], [], SampleRows(out[1:-1], out[:0]))
    assert (out[[0, -1]] == 77).all()  # what lies beside is left alone
    return out[1:-1]


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 9),
    st.booleans(),
    st.sampled_from(
        [
            ("PNG", {}),
            ("PNG", {"optimize": True}),
            ("PNG", {"compress_level": 0}),
            *[("JPEG", {"quality": q, "subsampling": s}) for q in (40, 92, 97, 100) for s in (0, 1, 2)],
            ("JPEG", {"quality": 90, "optimize": True}),
            ("JPEG", {"quality": 90, "restart_marker_blocks": 3}),
            ("JPEG", {"quality": 90, "progressive": True}),
        ]
    ),
)
def test_every_pixel_is_pillows(rows, columns, seed, smooth, how):
    kind, options = how
    content = encoded(noise(rows, columns, seed, smooth), kind, **options)
    name = "in0.png" if kind == "PNG" else "in0.jpg"
    with Image.open(io.BytesIO(content)) as image:
        expected = np.asarray(image)
    found = decoded(name, content, (1, 2 * rows, 2 * columns))
    assert (found.reshape(expected.shape) == expected).all()


@pytest.mark.parametrize("smooth", [False, True])
def test_what_the_build_writes_is_read(smooth):
    image = noise(8, 6, 3, smooth)
    ending, content = encode_image(image, ImageSettings(jpeg_max_error=10.0))
    with Image.open(io.BytesIO(content)) as again:
        expected = np.asarray(again)
    assert (decoded(f"in0.{ending}", content, (1, 16, 12)).reshape(expected.shape) == expected).all()


def test_pixels_of_a_prompt_are_those_of_a_sample():
    image = noise(2, 3, 5)
    pixels, grid = image_pixels(image)
    assert grid == (1, 4, 6) and grid == image_to_patches(np.asarray(image))[1]
    assert (pixels == decoded("in0.png", encoded(image), grid)).all()
    for other in (noise(1, 1).convert("L"), noise(2, 2).crop((0, 0, 56, 42)), noise(2, 2).crop((0, 0, 42, 56))):
        with pytest.raises(ValueError, match="image of"):
            image_pixels(other)


def test_members_in_order_each_decoded_once(monkeypatch):
    pictures = {"in0.png": noise(1, 2, 1), "in1.png": noise(2, 1, 2), "help1.png": noise(1, 1, 3)}
    grids = {name: (1, image.height // 14, image.width // 14) for name, image in pictures.items()}
    images = {name: encoded(image) for name, image in pictures.items()}
    calls = []
    decode = module.imagecodecs.spng_decode
    monkeypatch.setattr(
        module.imagecodecs, "spng_decode", lambda content, out: calls.append(content) or decode(content, out=out)
    )
    inputs, helpers = ["in1.png", "in0.png", "in1.png"], ["help1.png", "in1.png"]  # a helper may be the input image
    into = SampleRows(*(rows_for(*(pictures[name] for name in names)) for names in (inputs, helpers)))
    decode_pixels(images, grids, inputs, helpers, into)
    for names, found in ((inputs, into.inputs), (helpers, into.helpers)):
        assert (found == np.concatenate([image_pixels(pictures[name])[0] for name in names])).all()
    assert len(calls) == 3
    decode_pixels(images, grids, [], [], SampleRows(rows_for(), rows_for()))


def test_a_picture_that_is_broken_or_of_another_size_is_named():
    whole = encoded(noise(4, 4), "JPEG", quality=97)
    bad = [
        ("in0.png", encoded(noise(1, 2)), (1, 4, 2), r"56x28 pixels and is RGB, its grid \(1, 4, 2\).*28x56 and RGB"),
        ("in0.png", encoded(noise(1, 2).convert("L")), (1, 2, 4), r"56x28 pixels and is L, its grid"),
        ("in0.jpg", encoded(noise(1, 2), "JPEG"), (1, 4, 2), r"56x28 pixels and is RGB, its grid \(1, 4, 2\)"),
        ("in0.jpg", encoded(noise(1, 2).convert("L"), "JPEG"), (1, 2, 4), r"56x28 pixels and is L, its grid"),
        ("in0.png", b"no picture", (1, 2, 2), r"cannot be decoded \(SpngError"),
        ("in0.png", b"", (1, 2, 2), r"cannot be decoded \(SpngError"),
        ("in0.png", encoded(noise(4, 4))[:2000], (1, 8, 8), r"cannot be decoded \(SpngError"),
        ("in0.jpg", b"no picture\xff\xd9", (1, 2, 2), r"cannot be decoded \(Jpeg8Error"),
        ("in0.jpg", b"", (1, 2, 2), "has no end"),
        ("in0.jpg", whole[: len(whole) // 2], (1, 8, 8), "has no end"),
    ]
    for name, content, grid, message in bad:
        with pytest.raises(BatchError, match=rf"^{name}: .*{message}"):
            decoded(name, content, grid)
