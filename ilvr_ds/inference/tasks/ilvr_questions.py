"""Questions in ILVR's JSONL (CoMT and Zebra-CoT as published for ILVR among them).

    {"id": "a", "text_input": "Where?\\nA. left\\nB. right", "image_input": ["a.png"], "original_final_answer": "left"}

Options are read from the question's own lines. The reference is an option's letter or text, or a short answer.
`sequence_plan` is not needed here. The group is the field `type` or `category` if there, else none.
"""

from __future__ import annotations

from pathlib import Path

from ilvr_ds.data.formats.ilvr_jsonl import parse_prompt
from ilvr_ds.data.formats.jsonl import Line, parse_object
from ilvr_ds.inference.scoring.choices import parse_options
from ilvr_ds.inference.tasks.questions import judge_question
from ilvr_ds.inference.tasks.task import Example, Rules, Verdict, read_examples, take_answer, take_group


class IlvrQuestions:
    """See the module."""

    def read(self, path: Path, image_root: Path) -> list[Example]:
        """Raises RecordError: reasons of `read_examples` and `jsonl`, marker_count, missing_answer."""
        return read_examples(path, _parse)

    def judge(self, example: Example, output: str, rules: Rules) -> Verdict:
        """See `judge_question`."""
        return judge_question(example, output, rules)


def _parse(line: Line) -> Example:
    fields = parse_object(line)
    prompt = parse_prompt(fields)
    return Example(
        id=fields.record_id,
        prompt=prompt,
        group=take_group(fields),
        origin=line.origin,
        answer=take_answer(fields, "original_final_answer"),
        options=parse_options("".join(part for part in prompt if isinstance(part, str))),
    )
