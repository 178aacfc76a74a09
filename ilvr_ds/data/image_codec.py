"""How a prepared image is stored: PNG, or JPEG where a PNG would waste space (photographs).

PNG is lossless and the rule. JPEG (4:4:4) is taken only where all of this holds:

1. `jpeg_quality` is set;
2. the PNG would be more than `jpeg_saving` times as large;
3. decoded again, the JPEG is off by at most `jpeg_max_error` (mean absolute difference, of 255).

Both are judged on a few bands of rows, whole JPEG blocks high, spread from top to bottom: encoding a photograph as PNG
takes ten times as long as everything else the build does with it. The PNG's size is estimated by the entropy of the
differences between neighbouring pixels, which is what PNG compresses: 5 % too much for photographs, more for pictures
that repeat themselves (such a one may be stored as JPEG with less saving than asked for).

Measured at the defaults (97, 1.5, 1.0): photographs need 2.1 to 2.5 times the space as PNG and are off by 0.7 to 0.96;
drawings (grids, mazes, diagrams) are smaller as PNG, and JPEG would be off by more than 1.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageChops

from ilvr_ds.data.images import ImageSettings, encode_png

BAND = 8  # rows of a band: the height of a JPEG block
BANDS = 4  # bands that are judged
SMALL = 0.7  # bytes per pixel; a JPEG of the qualities in question is not far below, so such a PNG needs no rival


def encode_image(image: Image.Image, settings: ImageSettings) -> tuple[str, bytes]:
    """(member ending, file bytes) of an RGB image: ("png", ...) or ("jpg", ...).

    The same pixels and settings give the same bytes with one version of Pillow.
    """
    if settings.jpeg_quality is not None:
        bands = _bands(image)
        png_size = _png_bytes_per_pixel(bands) * image.width * image.height
        if png_size > SMALL * image.width * image.height:
            jpeg = _encode_jpeg(image, settings.jpeg_quality)
            saves = png_size > settings.jpeg_saving * len(jpeg)
            if saves and _error(bands, settings.jpeg_quality) <= settings.jpeg_max_error:
                return "jpg", jpeg
    return "png", encode_png(image)


def _encode_jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    # 4:4:4: colour at half the resolution would blur the coloured lines that reasoning pictures point with
    image.save(buffer, format="JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def _bands(image: Image.Image) -> Image.Image:
    """The rows that are looked at: the same JPEG blocks as in the whole image."""
    blocks = image.height // BAND
    if blocks <= BANDS:
        return image
    first = [(2 * band + 1) * blocks // (2 * BANDS) * BAND for band in range(BANDS)]  # middles
    bands = Image.new("RGB", (image.width, BANDS * BAND))
    for number, top in enumerate(first):
        bands.paste(image.crop((0, top, image.width, top + BAND)), (0, number * BAND))
    return bands


def _png_bytes_per_pixel(bands: Image.Image) -> float:
    """Entropy of the differences to the left or the upper neighbour, whichever is less: 3 channels, bytes per pixel."""
    width, height = bands.size
    inner, neighbours = (0, 0, width - 1, height - 1), ((1, 0, width, height - 1), (0, 1, width - 1, height))
    if min(width, height) < 2:
        return 3.0
    # differences wrap around, as PNG's do
    pairs = ((bands.crop(inner), bands.crop(box)) for box in neighbours)
    return 3 / 8 * min(_entropy(ImageChops.subtract_modulo(here, there)) for here, there in pairs)


def _entropy(image: Image.Image) -> float:
    """Bits per byte of the values of an RGB image, all channels together."""
    counts = np.reshape(image.histogram(), (3, 256)).sum(axis=0)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def _error(bands: Image.Image, quality: int) -> float:
    """Mean absolute difference that JPEG makes, over pixels and channels, 0 to 255."""
    with Image.open(io.BytesIO(_encode_jpeg(bands, quality)), formats=["JPEG"]) as decoded:
        counts = np.reshape(ImageChops.difference(bands, decoded).histogram(), (3, 256)).sum(axis=0)
    return float(counts @ np.arange(256)) / counts.sum()
