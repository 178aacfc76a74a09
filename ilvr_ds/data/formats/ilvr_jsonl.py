"""ILVR's JSONL: one object per line.

    {"id": "a", "text_input": "question", "image_input": "a.png" or ["a.png", ...],
     "sequence_plan": [{"type": "text", "content": "..."}, {"type": "latent", "helper_image": "h.png"}, ...],
     "original_final_answer": "B", "map_desc": [[1, 0], [-1, 2]]}

`id` and `map_desc` are optional, other fields are ignored. Images come before the question, unless `text_input`
marks their places with `<image>`, once per image.
"""

from __future__ import annotations

from ilvr_ds.contracts import ImageRef, Record
from ilvr_ds.data.formats.jsonl import Fields, Line, parse_object
from ilvr_ds.data.formats.markers import fill_markers

IMAGE_MARKER = "<image>"


def parse_fields(fields: Fields) -> Record:
    """One object as a `Record`. Raises RecordError (reasons of `jsonl`, and empty_steps, unknown_step_type,
    missing_helper_image, marker_count)."""
    prompt = parse_prompt(fields)
    answer = fields.take("original_final_answer")
    return Record(
        id=fields.record_id,
        prompt=prompt,
        steps=_steps(fields),
        answer=None if answer is None else fields.as_text("original_final_answer", answer),
        map_desc=fields.take_map(),
        origin=fields.origin,
    )


def parse_line(line: Line) -> Record:
    """One line as a `Record`. Raises what `parse_object` and `parse_fields` raise."""
    return parse_fields(parse_object(line))


def parse_prompt(fields: Fields) -> tuple[str | ImageRef, ...]:
    """The user turn of one object, whose other fields may be missing: `text_input` and `image_input`.

    Raises RecordError missing_field, wrong_type, missing_image, marker_count.
    """
    text = fields.take_text("text_input")
    images = fields.take_images("image_input")
    if IMAGE_MARKER in text:
        return fill_markers(fields, "text_input", text, IMAGE_MARKER, images)
    return (*images, text)


def _steps(fields: Fields) -> tuple[str | ImageRef, ...]:
    plan = fields.take("sequence_plan")
    if not isinstance(plan, list):
        raise fields.error("wrong_type", "sequence_plan", "expected a list of steps")
    steps: list[str | ImageRef] = []
    for number, step in enumerate(plan):
        where = f"sequence_plan[{number}]"
        if not isinstance(step, dict):
            raise fields.error("wrong_type", where, f"expected an object with a type, got {step!r:.80}")
        kind = step.get("type")
        if kind == "text":
            if "content" not in step:
                raise fields.error("missing_field", f"{where}.content", "a text step needs its content")
            steps.append(fields.as_text(f"{where}.content", step["content"]))
        elif kind == "latent":
            if step.get("helper_image") in (None, ""):
                message = "a latent step needs the path of its helper image"
                raise fields.error("missing_helper_image", f"{where}.helper_image", message)
            steps.append(fields.as_image(f"{where}.helper_image", step["helper_image"]))
        else:
            message = f"unknown step type {kind!r:.80}; allowed: 'text', 'latent'"
            raise fields.error("unknown_step_type", f"{where}.type", message)
    if not any(steps):  # no step, or empty texts only
        raise fields.error("empty_steps", "sequence_plan", "there is nothing in the plan to learn")
    return tuple(steps)
