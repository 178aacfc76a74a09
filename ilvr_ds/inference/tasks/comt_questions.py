"""Questions in the original CoMT release.

    {"id": "creation-10003", "type": "creation", "question": "...", "option": ["20°", "70°"], "answer": "B",
     "image": {"IMAGE0": "10003"}}

`image` is an object, or its Python notation in a string; `IMAGE0` is the question's picture, the others belong to
the reference reasoning and are not shown. Its file is `images/TYPE/NAME.png` or `.jpg` under the image root. The
prompt is the picture, the question, one option a line, and where to put the answer. The group is the type.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from ilvr_ds.contracts import ImageRef
from ilvr_ds.data.formats.jsonl import Fields, Line, parse_object
from ilvr_ds.inference.tasks.questions import judge_question
from ilvr_ds.inference.tasks.task import Example, Rules, Verdict, read_examples

QUESTION_IMAGE = "IMAGE0"
INSTRUCTION = "Put the letter of the correct option in \\boxed{}."


class ComtQuestions:
    """See the module."""

    def read(self, path: Path, image_root: Path) -> list[Example]:
        """Raises RecordError: reasons of `read_examples` and `jsonl`, wrong_type, bad_answer, missing_image."""
        return read_examples(path, lambda line: _parse(line, image_root))

    def judge(self, example: Example, output: str, rules: Rules) -> Verdict:
        """See `judge_question`."""
        return judge_question(example, output, rules)


def _parse(line: Line, image_root: Path) -> Example:
    fields = parse_object(line)
    kind = fields.take_text("type")
    options = _options(fields)
    answer = fields.take_text("answer").strip()
    if answer not in options:
        raise fields.error("bad_answer", "answer", f"{answer!r:.40} is no option; the options are {', '.join(options)}")
    listed = "\n".join(f"{letter}. {text}" for letter, text in options.items())
    question = f"\n{fields.take_text('question')}\n{listed}\n{INSTRUCTION}"
    image = ImageRef(_image_path(fields, kind, image_root))
    return Example(
        id=fields.record_id,
        prompt=(image, question),
        group=kind,
        origin=line.origin,
        answer=answer,
        options=options,
    )


def _options(fields: Fields) -> dict[str, str]:
    texts = fields.take("option")
    if not isinstance(texts, list) or not 2 <= len(texts) <= 26:
        raise fields.error("wrong_type", "option", "expected a list of 2 to 26 texts")
    return {chr(ord("A") + i): fields.as_text(f"option[{i}]", text) for i, text in enumerate(texts)}


def _image_path(fields: Fields, kind: str, image_root: Path) -> str:
    images: Any = fields.take("image")
    if isinstance(images, str):
        try:
            images = ast.literal_eval(images)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise fields.error("wrong_type", "image", "the text is not an object in Python notation") from error
    if not isinstance(images, dict) or QUESTION_IMAGE not in images:
        raise fields.error("missing_image", "image", f"expected an object with {QUESTION_IMAGE!r}")
    name = images[QUESTION_IMAGE]
    name = str(name) if type(name) is int else fields.as_path(f"image.{QUESTION_IMAGE}", name)
    candidates = [f"images/{kind}/{name}{suffix}" for suffix in (".png", ".jpg")]
    return next((path for path in candidates if (image_root / path).is_file()), candidates[0])
