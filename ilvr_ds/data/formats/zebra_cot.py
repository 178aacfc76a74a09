"""Zebra-CoT as on its hub page: parquet (or JSON) with one column per image.

    Question               "... <image_start>[problem_image_1]<image_end> ..."
    Text Reasoning Trace   "THOUGHT 0: ... <image_start>[reasoning_image_1]<image_end> ..."
    Final Answer           "C"
    problem_image_1, ..., reasoning_image_1, ...    images; null where a record has fewer

Images of the question that it does not mark come before it. Every reasoning image must be marked in the trace; the
trace may mark problem images too. Text stays as it is, `THOUGHT 0:` included.
"""

from __future__ import annotations

import re

from ilvr_ds.contracts import ImageRef, Record
from ilvr_ds.data.formats.choices import final_answer, sentence_break
from ilvr_ds.data.formats.jsonl import Fields

_MARK = re.compile(r"<image_start>\s*\[(\w+)\]\s*<image_end>|\[((?:problem|reasoning)_image_\d+)\]")
_COLUMN = re.compile(r"(problem|reasoning)_image_(\d+)")


def parse_fields(fields: Fields) -> Record:
    """One row as a `Record`. Raises RecordError (reasons of `jsonl`, and marker_count, empty_steps)."""
    images = _images(fields)
    question, shown = _fill(fields, "Question", fields.take_text("Question"), images)
    unmarked = [image for name, image in images.items() if name.startswith("problem") and name not in shown]
    trace = fields.take_text("Text Reasoning Trace")
    if not trace.strip():
        raise fields.error("empty_steps", "Text Reasoning Trace", "there is nothing in the trace to learn")
    steps, drawn = _fill(fields, "Text Reasoning Trace", sentence_break(trace), images)
    lost = [name for name in images if name.startswith("reasoning") and name not in drawn | shown]
    if lost:
        raise fields.error("marker_count", "Text Reasoning Trace", f"it has no marks for the images {lost}")
    answer = fields.take_text("Final Answer").strip()
    if not answer:
        raise fields.error("missing_field", "Final Answer", "the answer is empty")
    return Record(
        id=fields.record_id,
        prompt=(*unmarked, *question),
        steps=(*steps, final_answer(answer)),
        answer=answer,
        map_desc=fields.take_map(),
        origin=fields.origin,
    )


def _images(fields: Fields) -> dict[str, ImageRef]:
    """Column to image, problem images first, each kind by number."""
    found = [(m[1], int(m[2]), m[0]) for name in fields.tree if (m := _COLUMN.fullmatch(name))]
    return {
        name: fields.as_image(name, fields.tree[name]) for _, _, name in sorted(found) if fields.tree[name] is not None
    }


def _fill(
    fields: Fields, field: str, text: str, images: dict[str, ImageRef]
) -> tuple[tuple[str | ImageRef, ...], set[str]]:
    """`text` with images in the places of their marks, and the names marked."""
    parts: list[str | ImageRef] = []
    names = set()
    end = 0
    for mark in _MARK.finditer(text):
        name = mark[1] or mark[2]
        if name not in images:
            raise fields.error("marker_count", field, f"it marks {name!r:.60}, which the record does not have")
        parts += [text[end : mark.start()], images[name]]
        names.add(name)
        end = mark.end()
    return tuple(part for part in (*parts, text[end:]) if part != ""), names
