"""Questions in Zebra-CoT's fields, its images saved as files.

    {"Question": "... <image_start>[problem_image_1]<image_end> ...", "problem_image_1": "a.png",
     "Final Answer": "12/02", "category": "2D Visual Reasoning - Visual Jigsaw"}

`problem_image_N` is a path (or an object with `path`). Images without a mark come before the question. The
reasoning and its images are the reference and not shown. The group is `category`, if there.
"""

from __future__ import annotations

import re
from pathlib import Path

from ilvr_ds.contracts import ImageRef
from ilvr_ds.data.formats.jsonl import Fields, Line, parse_object
from ilvr_ds.inference.scoring.choices import parse_options
from ilvr_ds.inference.tasks.questions import judge_question
from ilvr_ds.inference.tasks.task import Example, Rules, Verdict, read_examples, take_answer, take_group

_MARK = re.compile(r"<image_start>\[(\w+)\]<image_end>")
_PROBLEM_IMAGE = re.compile(r"problem_image_(\d+)")


class ZebraQuestions:
    """See the module."""

    def read(self, path: Path, image_root: Path) -> list[Example]:
        """Raises RecordError: reasons of `read_examples` and `jsonl`, missing_answer, marker_count."""
        return read_examples(path, _parse)

    def judge(self, example: Example, output: str, rules: Rules) -> Verdict:
        """See `judge_question`."""
        return judge_question(example, output, rules)


def _parse(line: Line) -> Example:
    fields = parse_object(line)
    question = fields.take_text("Question")
    return Example(
        id=fields.record_id,
        prompt=_prompt(fields, question),
        group=take_group(fields),
        origin=line.origin,
        answer=take_answer(fields, "Final Answer"),
        options=parse_options(question),
    )


def _prompt(fields: Fields, question: str) -> tuple[str | ImageRef, ...]:
    present = [name for name in fields.tree if _PROBLEM_IMAGE.fullmatch(name) and fields.tree[name] is not None]
    images = {name: _path(fields, name) for name in sorted(present, key=lambda name: int(name.rsplit("_", 1)[1]))}
    parts: list[str | ImageRef] = []
    marked = set()
    for number, text in enumerate(_MARK.split(question)):  # text, name, text, name, ..., text
        if number % 2 == 0:
            parts.append(text)
        elif text in images:
            parts.append(ImageRef(images[text]))
            marked.add(text)
        else:
            raise fields.error("marker_count", "Question", f"it shows {text!r:.60}, which the record does not have")
    unmarked = [ImageRef(path) for name, path in images.items() if name not in marked]
    return tuple(part for part in (*unmarked, *parts) if part != "")


def _path(fields: Fields, name: str) -> str:
    value = fields.tree[name]
    if isinstance(value, dict):
        return fields.as_path(f"{name}.path", value.get("path"))
    return fields.as_path(name, value)
