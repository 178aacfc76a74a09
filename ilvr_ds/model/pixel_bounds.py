"""Pixel bounds of input images in a model folder's preprocessor_config.json.

A model has to be asked with images of the sizes it was trained with: those its shards were built with. An exported
folder says so in the file that stock image processors read, so that ours and theirs agree without an option.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ilvr_ds.data.images import FACTOR, MAX_PIXELS, MEAN, MERGE, MIN_PIXELS, PATCH, STD
from ilvr_ds.errors import ConfigError

PREPROCESSOR_FILE = "preprocessor_config.json"
PUBLISHED = {  # Qwen2.5-VL's preprocessor_config.json
    "min_pixels": MIN_PIXELS,
    "max_pixels": MAX_PIXELS,
    "patch_size": PATCH,
    "temporal_patch_size": 2,
    "merge_size": MERGE,
    "image_mean": list(MEAN),
    "image_std": list(STD),
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}


def read_pixel_bounds(folder: Path) -> tuple[Any, Any]:
    """(min_pixels, max_pixels) as the folder's file has them, Qwen's where it is silent; not judged.

    Raises ConfigError for a file that is there and cannot be read.
    """
    tree = _tree(folder)
    size = tree.get("size") or {}  # transformers 5 writes the bounds as edges
    if not isinstance(size, dict):
        raise ConfigError(f"{folder / PREPROCESSOR_FILE}: field 'size': expected an object, got {size!r}")
    low = tree.get("min_pixels") or size.get("shortest_edge") or MIN_PIXELS
    high = tree.get("max_pixels") or size.get("longest_edge") or MAX_PIXELS
    return low, high


def check_pixel_bounds(low: Any, high: Any, origin: str) -> None:
    """Raises ConfigError for bounds that no image can meet; `origin` names where they were found."""
    if not (type(low) is int and type(high) is int and 0 < low <= high and high >= FACTOR**2):
        raise ConfigError(
            f"{origin}: min_pixels={low}, max_pixels={high}: expected whole numbers, 0 < min <= max, max >= {FACTOR**2}"
        )


def preprocessor_with_bounds(folder: Path, low: int, high: int) -> str:
    """Content of the folder's preprocessor_config.json (Qwen's, if it has none) with other bounds.

    Both spellings that transformers reads are set: where a file has both, `min_pixels` and `max_pixels` win.
    Raises ConfigError for a file that cannot be read, or impossible bounds.
    """
    check_pixel_bounds(low, high, str(folder / PREPROCESSOR_FILE))
    tree = _tree(folder) or PUBLISHED
    changed = {**tree, "min_pixels": low, "max_pixels": high}
    if tree.get("size") is not None:
        changed["size"] = {"shortest_edge": low, "longest_edge": high}
    return json.dumps(changed, indent=2) + "\n"


def _tree(folder: Path) -> dict[str, Any]:
    file = folder / PREPROCESSOR_FILE
    if not file.is_file():
        return {}
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{file}: not a readable JSON object: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: not a readable JSON object: it is a {type(tree).__name__}")
    return tree
