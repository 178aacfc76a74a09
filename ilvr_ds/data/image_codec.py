"""How a prepared image is stored: PNG, or JPEG where a PNG would waste space (photographs).

PNG is lossless and the rule. JPEG (4:4:4) is taken only where all of this holds:

1. `jpeg_quality` is set;
2. the PNG would be more than `jpeg_saving` times as large. Its size is estimated on about eight bands of rows, as
   compressing a whole photograph as PNG takes longer than everything else together;
3. decoded again, the JPEG is off by at most `jpeg_max_error` (mean absolute difference, of 255).

Measured at the defaults (97, 1.5, 1.0): photographs need 2.1 to 2.5 times the space as PNG and are off by 0.7 to 0.96;
drawings (grids, mazes, diagrams) are smaller as PNG, and JPEG would be off by more than 1.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageChops, ImageStat

from ilvr_ds.data.images import ImageSettings, encode_png

BAND = 32  # rows of a band
BANDS = 8  # bands the estimate takes, spread evenly from top to bottom


def encode_image(image: Image.Image, settings: ImageSettings) -> tuple[str, bytes]:
    """(member ending, file bytes) of an RGB image: ("png", ...) or ("jpg", ...).

    The same pixels and settings give the same bytes with one version of Pillow.
    """
    if settings.jpeg_quality is not None:
        jpeg = _encode_jpeg(image, settings.jpeg_quality)
        if _png_size(image) > settings.jpeg_saving * len(jpeg) and _error(image, jpeg) <= settings.jpeg_max_error:
            return "jpg", jpeg
    return "png", encode_png(image)


def _encode_jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    # 4:4:4: colour at half the resolution would blur the coloured lines that reasoning pictures point with
    image.save(buffer, format="JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def _png_size(image: Image.Image) -> float:
    """Bytes the image would take as PNG, estimated from some of its rows at the fastest level."""
    rows = np.asarray(image)
    step = max(1, image.height // BAND // BANDS)
    sample = np.concatenate([rows[top : top + BAND] for top in range(0, image.height, BAND * step)])
    buffer = io.BytesIO()
    Image.fromarray(sample).save(buffer, format="PNG", compress_level=1)
    return len(buffer.getvalue()) * (image.height / len(sample))


def _error(image: Image.Image, jpeg: bytes) -> float:
    """Mean absolute difference of the decoded JPEG, over pixels and channels, 0 to 255."""
    with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as decoded:
        means = ImageStat.Stat(ImageChops.difference(image, decoded)).mean
    return sum(means) / len(means)
