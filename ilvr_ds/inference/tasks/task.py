"""What a task is: how its file is read, and how an output is judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ilvr_ds.contracts import ImageRef
from ilvr_ds.data.formats.jsonl import Fields, Line, read_lines
from ilvr_ds.data.frozenlake import MapDesc
from ilvr_ds.errors import RecordError
from ilvr_ds.inference.scoring.vsp import GoalRule


@dataclass(frozen=True)
class Example:
    """One line of a task file."""

    id: str
    prompt: tuple[str | ImageRef, ...]  # the user turn in reading order, as in training records
    group: str  # what accuracies are also given for: the level of a map, the kind of a question; "" for none
    origin: str  # "FILE:LINE"
    answer: str | None = None  # reference answer of a question
    options: Mapping[str, str] = field(default_factory=dict)  # letter -> text; {} for a short answer
    map_desc: MapDesc | None = None  # FrozenLake map

    @property
    def images(self) -> tuple[str, ...]:
        """Paths of the prompt's images, in order."""
        return tuple(part.path for part in self.prompt if isinstance(part, ImageRef))


@dataclass(frozen=True)
class Rules:
    """How to judge. The defaults are strict."""

    published: bool = False  # the published ILVR scripts' laxer extraction and comparison
    goal: GoalRule = "mirage"  # VSP: see `scoring.vsp`


@dataclass(frozen=True)
class Verdict:
    """The judgement on one output."""

    correct: bool
    outcome: str  # a short word that is counted: "correct", "wrong", "no_answer", "hole", ...
    extraction: str | None  # what was read as the answer, a stretch of the output (a plan: its letters)
    rule: str  # how it was found (`scoring.extract.Rule`)


class Task(Protocol):
    """A kind of task file."""

    def read(self, path: Path, image_root: Path) -> list[Example]:
        """Every example of the file, in order. Raises RecordError naming the first line that is wrong."""
        ...

    def judge(self, example: Example, output: str, rules: Rules) -> Verdict:
        """The verdict on an output; never raises on any text."""
        ...


def read_examples(path: Path, parse: Callable[[Line], Example]) -> list[Example]:
    """`parse` over the lines of a file: a test file with one bad line is refused, not scored without it.

    Raises RecordError: empty_file, duplicate_id, unreadable, and those of `parse`.
    """
    examples = []
    first_line: dict[str, str] = {}
    for line in _lines(path):
        example = parse(line)
        if example.id in first_line:
            message = f"the id was used before, at {first_line[example.id]}; ids must be unique"
            raise RecordError("duplicate_id", message, origin=line.origin, record_id=example.id, field="id")
        first_line[example.id] = line.origin
        examples.append(example)
    if not examples:
        raise RecordError("empty_file", "the task file has no record; nothing to evaluate", origin=str(path))
    return examples


def take_answer(fields: Fields, field: str) -> str:
    """The reference answer: a text, not empty, or a number. Raises RecordError: reasons of `jsonl`, missing_answer."""
    value = fields.take(field)
    answer = str(value) if type(value) in (int, float) else fields.as_text(field, value)
    if not answer.strip():
        raise fields.error("missing_answer", field, "the reference answer is empty; the record cannot be scored")
    return answer


def take_group(fields: Fields) -> str:
    """The kind of a question: its `type` or `category`, "" if the record does not say."""
    for name in ("type", "category"):
        if name in fields.tree:
            return fields.take_text(name)
    return ""


def _lines(path: Path) -> Iterator[Line]:
    try:
        yield from read_lines(path)
    except OSError as error:
        raise RecordError("unreadable", f"cannot read the task file: {error.strerror}", origin=str(path)) from error
