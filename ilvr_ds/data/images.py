"""Image files to images of the size Qwen2.5-VL's vision tower takes.

    bytes ─read_image─▶ RGB, upright ─resize_image─▶ sides multiples of 28

This happens once, when shards are built; training only decodes. Cutting into patches and normalisation are left to the
device (`ilvr_ds.model.vision`); `image_to_patches` and `normalise_patches_numpy` are the references for them.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE as TIFF_BITS_PER_SAMPLE
from PIL.TiffImagePlugin import TiffImageFile

from ilvr_ds.data.jpeg_file import count_scans, is_jpeg
from ilvr_ds.errors import IlvrError

PATCH = 14  # pixels on a side of a patch
MERGE = 2  # patches on a side of a merged token
FACTOR = PATCH * MERGE  # 28: image sides are multiples of this
MEAN = (0.48145466, 0.4578275, 0.40821073)  # Qwen2.5-VL's preprocessor_config.json
STD = (0.26862954, 0.26130258, 0.27577711)
MIN_PIXELS = 56 * 56
MAX_PIXELS = 28 * 28 * 16384
MAX_ASPECT_RATIO = 200
LFS_PREFIX = b"version https://git-lfs.github.com/spec/"
MAX_FILE_BYTES = 1 << 30  # no image under Pillow's pixel limit needs more
# A progressive JPEG has about ten scans. Each goes over the whole image and may take 30 bytes of the file: one of a few
# megabytes can keep the decoder busy for hours. libtiff's limit for JPEG inside TIFF is the same.
MAX_JPEG_SCANS = 100
PNG_LEVEL = 4  # zlib's; Pillow's 6 takes up to twice the time of a whole PNG for 1 to 3 % of its size (docs/images.md)

# Kinds of files that are opened: those with a signature, decoded inside Pillow. Left out on purpose are kinds that
# start another program (EPS: Ghostscript) and kinds without a signature (TGA), as which damaged files would pass.
# JPEG includes MPO. What an older Pillow lacks (AVIF) is an image that cannot be identified.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PSD", "PPM")

# What Pillow's decoders raise on damaged bytes (each seen on real damaged files or in the decoders' sources).
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError,
                  AttributeError, ZeroDivisionError, AssertionError, RuntimeError, MemoryError,
                  struct.error, zlib.error)  # fmt: skip

# Pillow reports damaged files in its log too; whoever wants these lines adds a handler.
logging.getLogger("PIL").addHandler(logging.NullHandler())

Grid = tuple[int, int, int]


class ImageError(IlvrError):
    """An image file cannot be used. `reason` is the machine-readable word for `rejects.jsonl`:
    missing_image, ambiguous_image, unreadable_image, zero_size_image, git_lfs_pointer, undecodable_image,
    truncated_image, decompression_bomb, unsupported_pixels, extreme_aspect_ratio."""

    def __init__(self, reason: str, message: str):
        self.reason = reason
        super().__init__(message)


@dataclass(frozen=True)
class ImageSettings:
    """How images are prepared; part of the shard manifest. Pixel bounds are for the resized image."""

    input_min_pixels: int = MIN_PIXELS
    input_max_pixels: int = MAX_PIXELS
    helper_min_pixels: int = MIN_PIXELS
    helper_max_pixels: int = MAX_PIXELS
    patch: int = PATCH
    merge: int = MERGE
    resample: str = "bicubic"
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    # storage (`image_codec`): JPEG of this quality where a PNG is larger by this factor; null: PNG always
    jpeg_quality: int | None = 97
    jpeg_saving: float = 1.5
    jpeg_max_error: float = 1.0  # and only if its pixels are off by at most this, mean of 0..255

    def bounds(self, role: Literal["input", "helper"]) -> tuple[int, int]:
        """(min_pixels, max_pixels) of input or helper images."""
        if role == "input":
            return self.input_min_pixels, self.input_max_pixels
        return self.helper_min_pixels, self.helper_max_pixels


def read_image(source: bytes | Path) -> Image.Image:
    """Decode an image file: upright, RGB, 8 bits.

    EXIF orientation is applied. Transparency is composited on white. Grey of 9 to 16 bits is scaled to 8 (Pillow's
    own conversion would clip it to white). Of an animation the first frame is taken. docs/images.md lists the rest.
    Raises ImageError (its docstring lists the reasons).
    """
    content = source if isinstance(source, bytes) else read_image_bytes(source)
    if not content:
        raise ImageError("zero_size_image", "the image file is empty (0 bytes); fetch or export it again")
    if content.startswith(LFS_PREFIX):
        raise ImageError("git_lfs_pointer", "the file is a Git LFS pointer, not an image; run `git lfs pull`")
    if is_jpeg(content) and (scans := count_scans(content)) > MAX_JPEG_SCANS:
        raise ImageError(
            "decompression_bomb", f"a JPEG of {scans} scans, at most {MAX_JPEG_SCANS} are decoded; save it anew"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=_formats()) as image:
                if min(image.size) < 1:
                    raise ImageError("zero_size_image", f"the image is {image.size[0]}x{image.size[1]} pixels")
                with _quiet_libtiff() if image.format == "TIFF" else contextlib.nullcontext():
                    image.load()
                bits = _grey_bits(image)
                ImageOps.exif_transpose(image, in_place=True)  # most images stand upright: no copy
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError("decompression_bomb", f"{error}; scale the image down") from error
    except ImageError:
        raise
    except _DECODE_ERRORS as error:
        reason = "truncated_image" if "truncated" in str(error).lower() else "undecodable_image"
        raise ImageError(reason, f"the image cannot be decoded ({type(error).__name__}: {error})") from error
    return _to_rgb(image, bits)


def smart_resize(
    height: int, width: int, factor: int = FACTOR, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """Qwen2-VL's rule for the size of a resized image: (height, width) in pixels.

    Each side is rounded to a multiple of `factor`; when the area then leaves [min_pixels, max_pixels] both sides
    are scaled by sqrt(bound / area) and rounded inwards. A side shorter than `factor` grows to it.
    Raises ImageError zero_size_image, or extreme_aspect_ratio above 200 to 1 (as the upstream rule does).
    """
    if min(height, width) < 1:
        raise ImageError("zero_size_image", f"the image is {width}x{height} pixels")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ImageError(
            "extreme_aspect_ratio",
            f"{width}x{height} pixels: sides may differ by a factor of {MAX_ASPECT_RATIO} at most",
        )
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        new_height = math.floor(height / scale / factor) * factor
        new_width = math.floor(width / scale / factor) * factor
    elif new_height * new_width < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * scale / factor) * factor
        new_width = math.ceil(width * scale / factor) * factor
    return max(factor, new_height), max(factor, new_width)


def resize_image(image: Image.Image, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """`image` at the size `smart_resize` gives, with Pillow's bicubic filter. Raises what `smart_resize` raises."""
    height, width = smart_resize(image.height, image.width, FACTOR, min_pixels, max_pixels)
    if image.size == (width, height):
        return image  # as it is: Pillow would copy it
    return image.resize((width, height), Image.Resampling.BICUBIC)


def image_to_patches(pixels: np.ndarray) -> tuple[np.ndarray, Grid]:
    """Reference: cut an image (H, W, 3) uint8, H and W multiples of 28, into patches.

    Returns (P, 588) uint8, each row one patch as [channel, row, column], and the grid (1, H/14, W/14). Rows are in
    Qwen's merge-block order: the four patches of a merged token are neighbours, blocks run row by row.
    Raises ValueError on another shape or dtype.
    """
    height, width = pixels.shape[:2]
    if pixels.shape[2:] != (3,) or pixels.dtype != np.uint8 or height % FACTOR or width % FACTOR or not pixels.size:
        raise ValueError(f"expected (H, W, 3) uint8 with H, W multiples of {FACTOR}, got {pixels.shape} {pixels.dtype}")
    rows, columns = height // PATCH, width // PATCH
    blocks = pixels.reshape(rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3)
    patches = blocks.transpose(0, 3, 1, 4, 6, 2, 5)  # block row, block column, row, column, channel, y, x
    return np.ascontiguousarray(patches).reshape(rows * columns, 3 * PATCH * PATCH), (1, rows, columns)


def normalise_patches_numpy(patches: np.ndarray, settings: ImageSettings | None = None) -> np.ndarray:
    """Reference: (P, 588) uint8 to the (P, 1176) float32 that transformers' Qwen2-VL image processor gives.

    (x / 255 - mean) / std per channel, each channel's patch twice in a row (an image is two equal video frames):
    element order [channel, time, row, column].
    """
    settings = settings or ImageSettings()
    shape = (len(patches), 3, 1, PATCH * PATCH)
    mean = np.array(settings.mean, dtype=np.float32).reshape(1, 3, 1, 1)
    std = np.array(settings.std, dtype=np.float32).reshape(1, 3, 1, 1)
    # through float64 and back, as the published preprocessing does
    scaled = (patches.astype(np.float64) * (1 / 255)).astype(np.float32).reshape(shape)
    return np.repeat((scaled - mean) / std, 2, axis=2).reshape(len(patches), 2 * 3 * PATCH * PATCH)


def merged_tokens(grid: Grid) -> int:
    """Visual tokens of an image after the merger: t * h * w / 4 for a grid in patches."""
    return grid[0] * grid[1] * grid[2] // MERGE**2


def encode_png(image: Image.Image) -> bytes:
    """Lossless PNG bytes; the same pixels give the same bytes with one version of Pillow and zlib."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def read_image_bytes(path: Path) -> bytes:
    """The bytes of an image file. Raises ImageError missing_image, unreadable_image."""
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):  # a folder; a pipe or a device would never end
            raise ImageError("unreadable_image", f"{str(path)!r} is not a file")
        if facts.st_size > MAX_FILE_BYTES:
            raise ImageError("unreadable_image", f"{path} has {facts.st_size} bytes, at most {MAX_FILE_BYTES} are read")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError("missing_image", f"no such image: {path}; check the image root") from None
    except (OSError, ValueError) as error:  # no permission, a name with a NUL or too long
        raise ImageError("unreadable_image", f"cannot read image {str(path)!r}: {error}") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that the installed Pillow knows."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextlib.contextmanager
def _quiet_libtiff() -> Iterator[None]:
    """libtiff writes what it thinks of a damaged file to file descriptor 2 by itself, and Pillow has no switch for it.

    For the whole process, so other threads are silent for that long too; shards hold no TIFF: training is never here.
    """
    try:
        saved = os.dup(2)
    except OSError:  # the process has no stderr: nothing to silence
        yield
        return
    silent = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(silent, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(silent)


def _grey_bits(image: Image.Image) -> int:
    """Bits of a 16-bit grey image that are used: TIFF may hold 12."""
    if isinstance(image, TiffImageFile) and image.mode.startswith("I;16"):
        stored = image.tag_v2.get(TIFF_BITS_PER_SAMPLE, (16,))
        return min(16, max(stored)) if min(stored) > 8 else 16
    return 16


def _to_rgb(image: Image.Image, bits: int) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _grey_to_rgb(image, bits)
    if image.mode in ("I", "F"):
        raise ImageError(
            "unsupported_pixels", f"pixels of mode {image.mode!r} have no fixed range; save it with 8 bits"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    try:
        rgb = image if image.mode == "RGB" else image.convert("RGB")
    except ValueError as error:  # Lab, with older Pillow
        raise ImageError("unsupported_pixels", f"mode {image.mode!r} cannot become RGB: {error}") from error
    rgb.info = {}  # EXIF, ICC, text chunks: the file written later holds pixels only
    return rgb


def _grey_to_rgb(image: Image.Image, bits: int) -> Image.Image:
    """Grey of `bits` bits, rounded to 8; the value that PNG declares transparent is white."""
    values = np.asarray(image).astype(np.uint32)
    full = 2**bits - 1
    grey = np.minimum((values * 255 + full // 2) // full, 255).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
    return Image.fromarray(grey).convert("RGB")
