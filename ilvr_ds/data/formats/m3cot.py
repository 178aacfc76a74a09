"""M3CoT: multiple-choice questions on one picture, with a reasoning text and no helper images.

    {"id": "physics-1399", "question": "...", "choices": ["salty", "fuzzy"], "context": "", "answer": "B",
     "rationale": "...", "image": ..., "image_id": "1399", "domain": "...", "topic": "..."}

`image` (bytes on the hub) may be null for a question without a picture. Where the record has no such field the
picture is `images/ID.*` under the image root, and there is none when `image_id` is null or empty. Without
`rationale` the answer alone is the assistant turn. `messages` of released predictions are never read: they are
models' answers.
"""

from __future__ import annotations

from ilvr_ds.contracts import ImageRef, Record
from ilvr_ds.data.formats.choices import final_answer, letter_answer, listed, sentence_break
from ilvr_ds.data.formats.jsonl import Fields


def parse_fields(fields: Fields) -> Record:
    """One object as a `Record`. Raises RecordError (reasons of `jsonl`, and bad_answer)."""
    options = fields.take_options("choices")
    answer = letter_answer(fields, "answer", options)
    context = fields.tree.get("context") or ""
    head = f"[Context]\n{fields.as_text('context', context)}\n" if context else ""
    question = f"{head}[Question]\n{fields.take_text('question')}\n[Choices]\n{listed(options)}"
    rationale = sentence_break(fields.as_text("rationale", fields.tree.get("rationale") or ""))
    steps = (rationale, final_answer(answer)) if rationale else (final_answer(answer),)
    return Record(
        id=fields.record_id,
        prompt=(*_image(fields), question),
        steps=steps,
        answer=answer,
        map_desc=None,
        origin=fields.origin,
    )


def _image(fields: Fields) -> tuple[ImageRef, ...]:
    if "image" in fields.tree:
        return () if fields.tree["image"] is None else (fields.as_image("image", fields.tree["image"]),)
    if fields.take("image_id") in (None, ""):
        return ()
    if "id" not in fields.tree:
        raise fields.error("missing_field", "id", "without a field 'image', the id names the picture")
    return (ImageRef(f"images/{fields.record_id}.*"),)
