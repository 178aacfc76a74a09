"""The original CoMT release (not ILVR's version of it, which is the format `ilvr`).

    {"id": "creation-10003", "type": "creation", "question": "...", "option": ["20°", "70°"], "answer": "B",
     "rationale": "... <IMAGE1> ...", "image": {"IMAGE0": "10003", "IMAGE1": "10003-1"}}

`image` is an object, the same in Python's notation in a string, or a list (IMAGE0, IMAGE1, ... in order). IMAGE0 is
the question's picture; any image is a helper image where the rationale names it (IMAGE1, also in brackets of any kind),
IMAGE0 included. A name without folder or ending is the file `images/TYPE/NAME.*` under the image root.
The answer, and the last step, is the option's text.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from ilvr_ds.contracts import ImageRef, Record
from ilvr_ds.data.formats.choices import final_answer, letter_answer, listed, sentence_break
from ilvr_ds.data.formats.jsonl import Fields

_NAME = re.compile(r"IMAGE\d+")
_MARK = re.compile(r"[<\[({]?\b(IMAGE\d+)\b[>\])}]?")


def parse_fields(fields: Fields) -> Record:
    """One object as a `Record`. Raises RecordError (reasons of `jsonl`, and bad_answer, marker_count, empty_steps)."""
    kind = fields.take_text("type")
    images = _images(fields, kind)
    options = fields.take_options("option")
    answer = letter_answer(fields, "answer", options)
    return Record(
        id=fields.record_id,
        prompt=(images["IMAGE0"], f"{fields.take_text('question')}\n{listed(options)}"),
        steps=(*_rationale(fields, images), final_answer(answer)),
        answer=answer,
        map_desc=None,
        origin=fields.origin,
    )


def _rationale(fields: Fields, images: dict[str, ImageRef]) -> tuple[str | ImageRef, ...]:
    text = fields.take_text("rationale")
    if not text.strip():
        raise fields.error("empty_steps", "rationale", "there is nothing in the rationale to learn")
    pieces = _MARK.split(sentence_break(text))  # text, name, text, name, ..., text
    unknown = [name for name in pieces[1::2] if name not in images]
    unmarked = [name for name in images if name != "IMAGE0" and name not in pieces[1::2]]
    if unknown or unmarked:
        message = f"images named but not there: {unknown}, there but not named: {unmarked}"
        raise fields.error("marker_count", "rationale", message)
    parts = [images[piece] if i % 2 else piece for i, piece in enumerate(pieces)]
    return tuple(part for part in parts if part != "")


def _images(fields: Fields, kind: str) -> dict[str, ImageRef]:
    value: Any = fields.take("image")
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError) as error:
            message = f"expected an object or a list, or one of them in Python's notation, got {value!r:.80}"
            raise fields.error("wrong_type", "image", message) from error
    if isinstance(value, (list, tuple)):
        value = {f"IMAGE{i}": entry for i, entry in enumerate(value)}
    if not isinstance(value, dict) or not all(isinstance(name, str) and _NAME.fullmatch(name) for name in value):
        raise fields.error("wrong_type", "image", f"expected names IMAGE0, IMAGE1, ... of images, got {value!r:.80}")
    present = {name: entry for name, entry in value.items() if entry is not None}  # parquet: null where absent
    if "IMAGE0" not in present:
        raise fields.error("missing_image", "image", "the question's picture, IMAGE0, is missing")
    return {name: _image(fields, f"image.{name}", entry, kind) for name, entry in present.items()}


def _image(fields: Fields, field: str, value: Any, kind: str) -> ImageRef:
    if type(value) is int:
        value = str(value)
    image = fields.as_image(field, value)
    if image.content is None and re.fullmatch(r"[\w-]+", image.path):
        return ImageRef(f"images/{kind}/{image.path}.*")
    return image
