"""Text with markers where images go, to text and image parts."""

from __future__ import annotations

from collections.abc import Sequence

from ilvr_ds.contracts import ImageRef
from ilvr_ds.data.formats.jsonl import Fields


def fill_markers(
    fields: Fields, field: str, text: str, marker: str, images: Sequence[ImageRef]
) -> tuple[str | ImageRef, ...]:
    """`text` cut at each `marker`, the n-th image in the place of the n-th marker; empty texts are left out.

    Raises RecordError marker_count when markers and images differ in number.
    """
    texts = text.split(marker)
    if len(texts) - 1 != len(images):
        raise fields.error("marker_count", field, f"{len(texts) - 1} {marker} markers for {len(images)} images")
    parts: list[str | ImageRef] = [texts[0]]
    for image, following in zip(images, texts[1:], strict=True):
        parts += [image, following]
    return tuple(part for part in parts if part != "")
