"""Images: Qwen's resize rule, patch order and normalisation, and every way a file can be bad."""

import collections
import hashlib
import io
import json
import os
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as upstream

from ilvr_ds.data.images import (
    FACTOR,
    ImageError,
    ImageSettings,
    encode_png,
    image_to_patches,
    merged_tokens,
    normalise_patches_numpy,
    read_image,
    resize_image,
    smart_resize,
)


def png(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format=options.pop("format", "PNG"), **options)
    return buffer.getvalue()


def reason(source) -> str:
    with pytest.raises(ImageError) as error:
        read_image(source)
    return error.value.reason


@settings(deadline=None, max_examples=300)
@given(
    height=st.integers(1, 6000),
    width=st.integers(1, 6000),
    low=st.integers(1, 2_000_000),
    high=st.integers(784, 13_000_000),
)
def test_smart_resize_is_upstreams(height, width, low, high):
    low = min(low, high)
    try:
        expected = upstream.smart_resize(height, width, 28, low, high)
    except ValueError:
        with pytest.raises(ImageError) as error:
            smart_resize(height, width, 28, low, high)
        assert error.value.reason == "extreme_aspect_ratio"
        return
    assert smart_resize(height, width, 28, low, high) == expected
    assert min(expected) >= FACTOR


@pytest.mark.parametrize(
    ("size", "expected"),
    [((20, 400), (28, 392)), ((5, 5), (56, 56)), ((13, 500), (28, 364)), ((1, 200), (28, 812)), ((42, 70), (56, 56))],
)
def test_sides_below_28_are_upscaled(size, expected):
    assert smart_resize(*size) == expected


def test_aspect_ratio_limit():
    smart_resize(10, 2000)
    with pytest.raises(ImageError, match="2001x10"):
        smart_resize(10, 2001)


@pytest.mark.parametrize("size", [(60, 90), (28, 140), (20, 300), (300, 200), (56, 56)])
def test_patches_equal_transformers(size):
    """Resize, cut and normalise: the image processor of transformers gives the same bytes."""
    array = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    processor = upstream.Qwen2VLImageProcessorPil(
        size={"shortest_edge": ImageSettings().input_min_pixels, "longest_edge": ImageSettings().input_max_pixels}
    )
    theirs = processor(images=[Image.fromarray(array)], return_tensors="np")
    patches, grid = image_to_patches(np.asarray(resize_image(Image.fromarray(array))))
    assert list(grid) == theirs["image_grid_thw"][0].tolist()
    assert patches.dtype == np.uint8 and patches.shape == (grid[1] * grid[2], 588)
    ours = normalise_patches_numpy(patches)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs["pixel_values"], atol=1e-6, rtol=0)
    assert merged_tokens(grid) == len(patches) // 4


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 5), columns=st.integers(1, 5))
def test_patch_order(rows, columns):
    """Every patch where the merge-block order says, by a loop over pixels."""
    height, width = rows * 28, columns * 28
    image = np.random.default_rng(rows * 7 + columns).integers(0, 256, (height, width, 3), dtype=np.uint8)
    patches, grid = image_to_patches(image)
    assert grid == (1, rows * 2, columns * 2)
    number = 0
    for block_row in range(rows):
        for block_column in range(columns):
            for dy in range(2):
                for dx in range(2):
                    y, x = (block_row * 2 + dy) * 14, (block_column * 2 + dx) * 14
                    assert (
                        patches[number].reshape(3, 14, 14) == image[y : y + 14, x : x + 14].transpose(2, 0, 1)
                    ).all()
                    number += 1


@pytest.mark.parametrize("array", [np.zeros((28, 30, 3), np.uint8), np.zeros((28, 28), np.uint8),
                                   np.zeros((28, 28, 3), np.float32), np.zeros((0, 28, 3), np.uint8)])  # fmt: skip
def test_patches_refuse_other_arrays(array):
    with pytest.raises(ValueError, match="multiples of 28"):
        image_to_patches(array)


def test_orientation_is_applied():
    array = np.zeros((20, 40, 3), np.uint8)
    array[:, 20:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    image = read_image(png(array, format="JPEG", exif=exif, quality=95))
    assert image.size == (20, 40)
    assert np.asarray(image)[35, 10].min() > 200 and np.asarray(image)[5, 10].max() < 50


def test_transparency_is_white_and_16_bits_are_scaled():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2, :, 3] = 255
    pixels = np.asarray(read_image(png(rgba)))
    assert (pixels[:2] == 0).all() and (pixels[2:] == 255).all()
    grey = np.array([[0, 257, 32768, 65535]], np.uint16)
    assert np.asarray(read_image(png(grey)))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_png_round_trip_is_exact_and_holds_pixels_only():
    array = np.random.default_rng(3).integers(0, 256, (28, 56, 3), dtype=np.uint8)
    options = {"icc_profile": b"a colour profile", "dpi": (72, 72)}
    with_metadata, without = read_image(png(array, **options)), read_image(png(array))
    assert encode_png(with_metadata) == encode_png(without)
    assert (np.asarray(read_image(encode_png(without))) == array).all()


def test_bad_files_have_a_reason(tmp_path, monkeypatch):
    good = png(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert reason(b"") == "zero_size_image"
    assert reason(b"not an image") == "undecodable_image"
    assert reason(good[: len(good) // 2]) == "truncated_image"
    assert reason(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n") == "git_lfs_pointer"
    assert reason(tmp_path / "none.png") == "missing_image"
    assert reason(tmp_path / "none.png\0") == "unreadable_image"
    assert reason(tmp_path) == "unreadable_image"
    buffer = io.BytesIO()
    Image.new("F", (8, 8)).save(buffer, format="TIFF")
    assert reason(buffer.getvalue()) == "unsupported_pixels"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # 4096 pixels: only a warning for Pillow
    assert reason(good) == "decompression_bomb"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert reason(good) == "decompression_bomb"


def test_zero_sized_gif():
    header = b"GIF89a" + b"\x00\x00\x00\x00" + b"\x00\x00\x00" + b","
    assert reason(header + b"\x00" * 9 + b"\x02\x00;") in ("zero_size_image", "undecodable_image")


TURNED = {"avif/rot1mir0.avif", "hopper_orientation_2.jpg", "hopper_orientation_5.jpg", "hopper_orientation_8.jpg"}
DEEP_GREY = {"gray-16-tRNS.png", "12bit.cropped.tif", "i_trns.png"}


def test_hard_images(realdata):
    """Other people's odd files: each ends as Pillow 13 says, or differs for a reason that docs/images.md gives."""
    folder = realdata / "hard_images"
    expected = json.loads((folder / "EXPECTED.json").read_text())["files"]
    ends = collections.Counter()
    for name, facts in expected.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                image = read_image(folder / name)
            except ImageError:
                assert "open_error" in facts or "load_error" in facts, name
                ends["refused"] += 1
                continue
        assert "open_error" not in facts and "load_error" not in facts, name
        assert image.mode == "RGB" and list(image.size) == facts["transposed_size"], name
        if hashlib.sha256(image.tobytes()).hexdigest() == facts["rgb_sha256"]:
            ends["equal"] += 1
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = Image.open(folder / name)
            plain.load()
            flat, clear = plain.convert("RGB"), plain.convert("RGBA")
        # the expected hash is of the file as stored: not turned, without alpha, grey clipped
        assert hashlib.sha256(flat.tobytes()).hexdigest() == facts["rgb_sha256"], name
        ours, short = np.asarray(image).astype(float), name.removeprefix("pillow/").rpartition("testpngs/")[2]
        if facts["exif_orientation"] in range(2, 9):
            assert short in TURNED
            assert image.tobytes() == ImageOps.exif_transpose(plain).convert("RGB").tobytes(), name
            ends["turned"] += 1
        elif facts["mode"] == "I;16":
            assert short in DEEP_GREY
            full = 4095 if short.startswith("12bit") else 65535
            scaled = np.asarray(plain).astype(float) * 255 / full
            scaled[np.asarray(plain) == plain.info.get("transparency")] = 255
            assert np.abs(ours - scaled[..., None]).max() <= 0.5, name
            ends["deep grey"] += 1
        else:
            rgba = np.asarray(clear).astype(float)
            alpha = rgba[..., 3:] / 255
            assert alpha.min() < 1, name
            assert np.abs(ours - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1, name
            ends["on white"] += 1
    assert ends == {"equal": 46, "refused": 15, "turned": 4, "deep grey": 3, "on white": 11}


def test_damaged_tiff_makes_no_noise(capfd):
    """libtiff writes to file descriptor 2 itself."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(buffer, format="TIFF", compression="jpeg")
    content = bytearray(buffer.getvalue())
    at = content.index(b"\xff\xda")
    content[at + 5 : at + 9] = b"YYYY"
    assert reason(bytes(content)) in ("undecodable_image", "truncated_image")
    os.write(2, b"still here")
    assert capfd.readouterr().err == "still here"


def test_kinds_that_start_programs_are_not_opened():
    eps = io.BytesIO()
    Image.new("RGB", (20, 20)).save(eps, format="EPS")
    tga = io.BytesIO()
    Image.new("RGB", (20, 20)).save(tga, format="TGA")
    assert reason(eps.getvalue()) == reason(tga.getvalue()) == "undecodable_image"


def test_modes_of_published_pictures():
    """Palette, CMYK, bilevel, palette with transparency and animations, each against its known colours."""
    red = Image.new("RGB", (30, 30), (200, 30, 40))
    for kind, mode in (("PNG", "P"), ("GIF", "P"), ("TIFF", "CMYK"), ("PNG", "RGBA"), ("WEBP", "RGB")):
        buffer = io.BytesIO()
        options = {"lossless": True} if kind == "WEBP" else {}
        red.convert(mode, palette=Image.Palette.ADAPTIVE).save(buffer, format=kind, **options)
        assert np.abs(np.asarray(read_image(buffer.getvalue())).astype(int) - (200, 30, 40)).max() <= 2, (kind, mode)
    animation = io.BytesIO()
    red.save(animation, format="GIF", save_all=True, append_images=[Image.new("RGB", (30, 30), "blue")], duration=50)
    assert np.abs(np.asarray(read_image(animation.getvalue())).astype(int) - (200, 30, 40)).max() <= 2
    progressive = io.BytesIO()
    red.save(progressive, format="JPEG", progressive=True, quality=95)
    assert np.abs(np.asarray(read_image(progressive.getvalue())).astype(int) - (200, 30, 40)).max() <= 3


@pytest.mark.parametrize(("scans", "allowed"), [(100, True), (101, False), (3000, False)])
def test_a_jpeg_of_very_many_scans_is_refused(scans, allowed):
    """Each scan of 30 bytes costs as much as the whole image: a small file could hold a worker for hours."""
    buffer = io.BytesIO()
    Image.new("L", (64, 64), 128).save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    before = content.count(b"\xff\xda")
    last = content[content.rindex(b"\xff\xda") : -2]  # without the end marker
    content = content[:-2] + last * (scans - before) + content[-2:]
    if allowed:
        assert read_image(content).size == (64, 64)
    else:
        with pytest.raises(ImageError, match=f"{scans} scans") as caught:
            read_image(content)
        assert caught.value.reason == "decompression_bomb"
