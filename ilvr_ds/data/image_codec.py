"""How a prepared image is stored: as the JPEG it came as, as PNG, or as a new JPEG where a PNG would waste space.

A JPEG that needs no change of its pixels (upright, three components, already of the size that Qwen's rule asks for) is
stored as it is, without its metadata: encoding it again would lose something and take longer than all else.

Otherwise PNG is lossless and the rule. JPEG (4:4:4) is taken only where all of this holds:

1. `jpeg_quality` is set (null keeps the first kind out too);
2. the PNG would be more than `jpeg_saving` times as large;
3. decoded again, the JPEG is off by at most `jpeg_max_error` (mean absolute difference, of 255).

Both are judged on a sample of whole JPEG blocks, spread over the image: encoding a photograph as PNG takes ten times as
long as everything else the build does with it. The PNG's size is estimated by the entropy of the differences between
neighbouring pixels, which is what PNG compresses: 5 % too much for photographs, more for pictures that repeat
themselves (such a one may be stored as JPEG with less saving than asked for).

Measured at the defaults (97, 1.5, 1.0): photographs need 2.1 to 2.5 times the space as PNG and are off by 0.7 to 0.96;
drawings (grids, mazes, diagrams) are smaller as PNG, and JPEG would be off by more than 1.
"""

from __future__ import annotations

import io
import math
import warnings

from PIL import ExifTags, Image, ImageChops

from ilvr_ds.data.images import ImageSettings, encode_png
from ilvr_ds.data.jpeg_file import pixels_only

STORAGE = 2  # counts the rules of this module: part of a build's identity, as other rules give other bytes
BLOCK = 8  # pixels on a side of a JPEG block
BANDS = 4  # rows of blocks that are judged, and in each of them
PIECES = 4  # runs of blocks,
PIECE = 8  # blocks long
SMALL = 0.7  # bytes per pixel; a JPEG of the qualities in question is not far below, so such a PNG needs no rival


def encode_image(image: Image.Image, settings: ImageSettings, original: bytes = b"") -> tuple[str, bytes]:
    """(member ending, file bytes) of an RGB image: ("png", ...) or ("jpg", ...).

    `original`: the file that `image` was read from, if its pixels are unchanged since. The same pixels, settings and
    original give the same bytes with one version of Pillow.
    """
    if settings.jpeg_quality is not None:
        jpeg = _without_metadata(original, image)
        if jpeg is None:
            jpeg = _new_jpeg(image, settings)
        if jpeg is not None:
            return "jpg", jpeg
    return "png", encode_png(image)


def _without_metadata(original: bytes, image: Image.Image) -> bytes | None:
    """The JPEG file `image` was read from, its pixels alone; None if it is no such file or was turned."""
    plain = pixels_only(original)
    if plain is None or (plain.width, plain.height) != image.size:
        return None
    if plain.exif:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on odd metadata
            with Image.open(io.BytesIO(original), formats=["JPEG"]) as file:
                orientation = file.getexif().get(ExifTags.Base.Orientation, 1)
        if orientation in range(2, 9):  # what `read_image` turns; it has read the same EXIF
            return None
    return plain.content


def _new_jpeg(image: Image.Image, settings: ImageSettings) -> bytes | None:
    """The JPEG that may stand for `image`; None where PNG has to."""
    pixels, sample = image.width * image.height, _sample(image)
    png_size = _png_bytes_per_pixel(sample, SMALL) * pixels
    if png_size <= SMALL * pixels:
        return None
    jpeg = _encode_jpeg(image, settings.jpeg_quality)
    saves = png_size > settings.jpeg_saving * len(jpeg)
    return jpeg if saves and _error(sample, settings.jpeg_quality) <= settings.jpeg_max_error else None


def _encode_jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    # 4:4:4: colour at half the resolution would blur the coloured lines that reasoning pictures point with
    image.save(buffer, format="JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def _sample(image: Image.Image) -> Image.Image:
    """What is looked at, of whole JPEG blocks: rows at four heights; in an image wider than 519 px four pieces of each.

    Pieces of different rows lie at different places, to meet what stands in columns. At most 519 x 32 pixels, unless
    the image is no higher than 39.
    """
    rows, columns = image.height // BLOCK, image.width // BLOCK
    if rows <= BANDS:
        return image
    pieces, width = (PIECES, PIECE * BLOCK) if columns > 2 * PIECES * PIECE else (1, image.width)
    sample = Image.new("RGB", (pieces * width, BANDS * BLOCK))
    room = columns // pieces - width // BLOCK  # blocks that a piece can be moved by
    for band in range(BANDS):
        top = (2 * band + 1) * rows // (2 * BANDS) * BLOCK  # middles
        for piece in range(pieces):
            shift = room * ((3 * band + 2 * piece) % BANDS) // (BANDS - 1) if pieces > 1 else 0
            left = (piece * (columns // pieces) + shift) * BLOCK
            box = (left, top, left + width, top + BLOCK)
            sample.paste(image.crop(box), (piece * width, band * BLOCK))
    return sample


def _png_bytes_per_pixel(sample: Image.Image, enough: float) -> float:
    """Entropy of the differences to the left or the upper neighbour, whichever is less: 3 channels, bytes per pixel.

    The upper one is left out where the left one's is `enough` or less.
    """
    width, height = sample.size
    if min(width, height) < 2:
        return 3.0
    inner = sample.crop((0, 0, width - 1, height - 1))
    least = 3.0
    for box in ((1, 0, width, height - 1), (0, 1, width - 1, height)):
        # differences wrap around, as PNG's do
        least = min(least, 3 / 8 * _entropy(ImageChops.subtract_modulo(inner, sample.crop(box))))
        if least <= enough:
            break
    return least


def _entropy(image: Image.Image) -> float:
    """Bits per byte of the values of an RGB image, all channels together."""
    counts, values = _value_counts(image), 3 * image.width * image.height
    # fsum: the same number with every version of Python
    return math.log2(values) - math.fsum(count * math.log2(count) for count in counts if count) / values


def _error(sample: Image.Image, quality: int) -> float:
    """Mean absolute difference that JPEG makes, over pixels and channels, 0 to 255."""
    jpeg = _encode_jpeg(sample, quality)
    decoded = Image.frombytes("RGB", sample.size, jpeg, "jpeg", "RGB", "")  # Pillow's decoder, less the file around it
    counts = _value_counts(ImageChops.difference(sample, decoded))
    return sum(value * count for value, count in enumerate(counts)) / (3 * sample.width * sample.height)


def _value_counts(image: Image.Image) -> list[int]:
    """How often each of the 256 values occurs in an RGB image, all channels together.

    Plain Python: handing these few numbers to numpy costs more than adding them.
    """
    counts = image.histogram()
    return list(map(sum, zip(counts[:256], counts[256:512], counts[512:], strict=True)))
