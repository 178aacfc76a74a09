"""Mirage's JSONL: one object per line.

    {"text_input": "... <image> ...", "image_input": "a.png" or [...],
     "text_output": "... <output_image> ...", "image_output": "h.png" or [...]}

`<image>` marks where an input image goes, `<output_image>` where a helper image (a latent span) goes, once per
image. `id` and `map_desc` are optional, other fields are ignored; the answer is part of `text_output`.
"""

from __future__ import annotations

from ilvr_ds.contracts import Record
from ilvr_ds.data.formats.jsonl import Fields
from ilvr_ds.data.formats.markers import fill_markers

INPUT_MARKER = "<image>"
OUTPUT_MARKER = "<output_image>"


def parse_fields(fields: Fields) -> Record:
    """One object as a `Record`. Raises RecordError (reasons of `jsonl`, and empty_steps, marker_count)."""
    prompt = fill_markers(
        fields, "text_input", fields.take_text("text_input"), INPUT_MARKER, fields.take_images("image_input")
    )
    steps = fill_markers(
        fields, "text_output", fields.take_text("text_output"), OUTPUT_MARKER, fields.take_images("image_output")
    )
    if not steps:
        raise fields.error("empty_steps", "text_output", "there is nothing in the output to learn")
    return Record(
        id=fields.record_id,
        prompt=prompt,
        steps=steps,
        answer=None,
        map_desc=fields.take_map(),
        origin=fields.origin,
    )
