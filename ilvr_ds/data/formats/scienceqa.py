"""ScienceQA: multiple-choice questions with a lecture and a solution, about half of them with a picture.

    {"1": {"question": "...", "choices": ["...", "..."], "answer": 0, "hint": "", "image": "image.png",
           "split": "train", "lecture": "...", "solution": "..."}, ...}          problems.json, or parquet rows

A picture's name is the file `images/SPLIT/ID/NAME` under the image root; the hub's parquet holds its bytes. `image`
is null for a question without one. The assistant turn is lecture, solution and answer; empty ones are left out.
"""

from __future__ import annotations

from ilvr_ds.contracts import ImageRef, Record
from ilvr_ds.data.formats.choices import final_answer, listed, sentence_break
from ilvr_ds.data.formats.jsonl import Fields


def parse_fields(fields: Fields) -> Record:
    """One problem as a `Record`. Raises RecordError (reasons of `jsonl`, and bad_answer)."""
    options = fields.take_options("choices")
    place = fields.take("answer")
    if type(place) is not int or not 0 <= place < len(options):
        message = f"expected the place of an option, 0 to {len(options) - 1}, got {place!r:.40}"
        raise fields.error("bad_answer", "answer", message)
    answer = list(options.values())[place]
    hint = fields.as_text("hint", fields.tree.get("hint") or "")
    head = f"Context: {hint}\n" if hint else ""
    texts = [sentence_break(fields.as_text(name, fields.tree.get(name) or "")) for name in ("lecture", "solution")]
    return Record(
        id=fields.record_id,
        prompt=(*_image(fields), f"{head}{fields.take_text('question')}\n{listed(options)}"),
        steps=tuple(text for text in (*texts, final_answer(answer)) if text),
        answer=answer,
        map_desc=None,
        origin=fields.origin,
    )


def _image(fields: Fields) -> tuple[ImageRef, ...]:
    value = fields.take("image")
    if value is None:
        return ()
    image = fields.as_image("image", value)
    if image.content is None and isinstance(value, str) and "/" not in value:
        return (ImageRef(f"images/{fields.take_text('split')}/{fields.record_id}/{value}"),)
    return (image,)
