"""VSP spatial planning: a picture of a frozen lake, a plan as the answer, played on the map.

    {"text_input": "... <image> ...", "image_input": "imgs_test/level3/img/31.png", "map_id": "31",
     "map_desc": [[2, -1, 1], [0, 0, 0], [0, 0, 0]]}

Records made by `data_tools/make_frozenlake.py` have the same fields and can be evaluated too. The group is the
level, the side of the map. Records without `id` are named after level and `map_id`.
"""

from __future__ import annotations

from pathlib import Path

from ilvr_ds.data.formats.ilvr_jsonl import parse_prompt
from ilvr_ds.data.formats.jsonl import Line, parse_object
from ilvr_ds.data.frozenlake import parse_map
from ilvr_ds.errors import PuzzleError
from ilvr_ds.inference.scoring.extract import extract
from ilvr_ds.inference.scoring.paths import parse_path
from ilvr_ds.inference.scoring.published import published_path
from ilvr_ds.inference.scoring.vsp import score_plan
from ilvr_ds.inference.tasks.task import Example, Rules, Verdict, read_examples


class VspPlanning:
    """See the module."""

    def read(self, path: Path, image_root: Path) -> list[Example]:
        """Raises RecordError: reasons of `read_examples` and `jsonl`, marker_count, bad_map."""
        return read_examples(path, _parse)

    def judge(self, example: Example, output: str, rules: Rules) -> Verdict:
        """Outcomes: success, hole, not_reached, no_plan."""
        assert example.map_desc is not None  # set by _parse
        if rules.published:
            plan, rule = published_path(output), "published"
        else:
            found = extract(output)
            plan, rule = (None if found.value is None else parse_path(found.value)), found.rule.value
        verdict = score_plan(example.map_desc, plan, rules.goal)
        return Verdict(verdict.correct, verdict.outcome, plan or None, rule)


def _parse(line: Line) -> Example:
    fields = parse_object(line)
    try:
        map_desc = parse_map(fields.take("map_desc"))
    except PuzzleError as error:
        raise fields.error("bad_map", "map_desc", str(error)) from error
    level = f"level {len(map_desc)}"
    number = fields.tree.get("map_id")
    named = fields.tree.get("id") is not None or number is None
    record_id = fields.record_id if named else f"{level.replace(' ', '')}/{number}"
    return Example(id=record_id, prompt=parse_prompt(fields), group=level, origin=line.origin, map_desc=map_desc)
