"""Pictures for the benchmarks of building and loading shards: photographs made of noise, and drawings."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw


def photograph(rng: np.random.Generator) -> bytes:
    """A 1008x756 JPEG: noise at five scales, as natural pictures have detail at all of them."""
    pixels = np.zeros((756, 1008, 3), np.float32)
    for size, weight in ((3, 90), (12, 45), (50, 22), (200, 11), (756, 5)):
        layer = rng.normal(0, weight, (size, size * 4 // 3, 3)).astype(np.float32)
        for channel in range(3):
            small = Image.fromarray(layer[..., channel])
            pixels[..., channel] += np.asarray(small.resize((1008, 756), Image.Resampling.BICUBIC))
    return file_bytes(Image.fromarray(np.clip(pixels + 128, 0, 255).astype(np.uint8)), "JPEG", quality=92)


def photograph_resized(rng: np.random.Generator) -> bytes:
    """The same at 1000x750, which Qwen's rule makes 1008x756."""
    with Image.open(io.BytesIO(photograph(rng))) as image:
        return file_bytes(image.resize((1000, 750), Image.Resampling.BICUBIC), "JPEG", quality=92)


def photograph_progressive(rng: np.random.Generator) -> bytes:
    """The same as a progressive JPEG."""
    with Image.open(io.BytesIO(photograph(rng))) as image:
        return file_bytes(image, "JPEG", quality=92, progressive=True)


def drawing(rng: np.random.Generator) -> bytes:
    """A 384x384 PNG of lines, boxes, circles and text."""
    image = Image.new("RGB", (384, 384), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(30):
        (x, y), (w, h) = rng.integers(0, 340, 2).tolist(), rng.integers(8, 90, 2).tolist()
        colour = tuple(rng.integers(0, 256, 3).tolist())
        match int(rng.integers(4)):
            case 0:
                draw.line((x, y, x + 2 * w, y + h), fill=colour, width=3)
            case 1:
                draw.rectangle((x, y, x + w, y + h), outline=colour, width=2)
            case 2:
                draw.ellipse((x, y, x + w, y + h), fill=colour)
            case 3:
                draw.text((x, y), f"point {w}", fill=colour)
    return file_bytes(image, "PNG")


def photograph_12mp(rng: np.random.Generator) -> bytes:
    """A 4032x3024 JPEG: a photograph four times as wide, with a sensor's noise."""
    with Image.open(io.BytesIO(photograph(rng))) as image:
        pixels = np.asarray(image.resize((4032, 3024), Image.Resampling.BICUBIC)).astype(np.int16)
    pixels += rng.integers(-6, 7, pixels.shape, dtype=np.int16)
    return file_bytes(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), "JPEG", quality=92)


def file_bytes(image: Image.Image, file_format: str, **options: int) -> bytes:
    """An image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()
