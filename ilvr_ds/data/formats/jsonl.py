"""JSONL files line by line, each line on its own: a bad one never costs its neighbours.

`read_lines` gives the bytes of every line, `parse_object` makes a JSON object of them, and the `take_*` functions
read one field each. Everything wrong raises `RecordError` with the line, the id (once known) and the field.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ilvr_ds.contracts import ImageRef
from ilvr_ds.data.formats.image_field import image_field
from ilvr_ds.data.formats.input_files import record_stem
from ilvr_ds.errors import RecordError

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Line:
    """One line of a JSONL file, not decoded."""

    path: Path
    number: int  # 1-based, blank lines counted: what an editor shows
    offset: int  # byte where it starts
    content: bytes
    stem: str = ""  # what a made-up id begins with; empty: the file's name without its endings

    @property
    def origin(self) -> str:
        """ "FILE:LINE", for messages."""
        return f"{self.path}:{self.number}"

    @property
    def default_id(self) -> str:
        """The id of a record that has none: FILESTEM-LINE, the same whether the file is compressed or not."""
        return f"{self.stem or record_stem(self.path)}-{self.number}"


@dataclass(frozen=True)
class Fields:
    """A JSON object and where it comes from."""

    tree: dict[str, Any]
    origin: str
    record_id: str

    def error(self, reason: str, field: str, message: str) -> RecordError:
        """A RecordError about one field of this record."""
        return RecordError(reason, message, origin=self.origin, record_id=self.record_id, field=field)

    def take(self, field: str) -> Any:
        """The value of a field that must be there."""
        if field not in self.tree:
            raise self.error("missing_field", field, f"the field is missing; the record has {sorted(self.tree)}")
        return self.tree[field]

    def take_text(self, field: str) -> str:
        """A string that must be there and can be encoded as UTF-8."""
        return self.as_text(field, self.take(field))

    def as_text(self, field: str, value: Any) -> str:
        """`value` if it is a string that can be encoded as UTF-8; `field` names it in errors."""
        if not isinstance(value, str):
            raise self.error("wrong_type", field, f"expected a string, got {_kind(value)}")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:  # "\ud800": half of a surrogate pair
            raise self.error("bad_unicode", field, f"the text is not Unicode ({error.reason})") from error
        return value

    def take_paths(self, field: str) -> tuple[str, ...]:
        """A path or a list of paths (maybe empty) that must be there."""
        value = self.take(field)
        if isinstance(value, str):
            return (self.as_path(field, value),)
        if not isinstance(value, list):
            raise self.error("wrong_type", field, f"expected a path or a list of paths, got {_kind(value)}")
        return tuple(self.as_path(f"{field}[{i}]", entry) for i, entry in enumerate(value))

    def as_path(self, field: str, value: Any) -> str:
        """`value` if it is a path: a string, not empty."""
        if self.as_text(field, value) == "":
            raise self.error("missing_image", field, "the image path is empty")
        return value

    def take_images(self, field: str) -> tuple[ImageRef, ...]:
        """An image or a list of images (maybe empty) that must be there; see `as_image`."""
        value = self.take(field)
        if not isinstance(value, list):
            return (self.as_image(field, value),)
        return tuple(self.as_image(f"{field}[{i}]", entry) for i, entry in enumerate(value))

    def as_image(self, field: str, value: Any) -> ImageRef:
        """`value` if it is an image in one of the ways of `image_field`; `field` names it in errors."""
        if isinstance(value, str):
            self.as_path(field, value)
        try:
            return image_field(value, field)
        except ValueError as error:
            raise self.error(*error.args[:1], field, error.args[1]) from error

    def take_options(self, field: str) -> dict[str, str]:
        """The options of a multiple-choice question by their letters: a list of 2 to 26 texts."""
        texts = self.take(field)
        if not isinstance(texts, list) or not 2 <= len(texts) <= 26:
            raise self.error("wrong_type", field, "expected a list of 2 to 26 texts")
        return {chr(ord("A") + i): self.as_text(f"{field}[{i}]", text) for i, text in enumerate(texts)}

    def take_map(self) -> tuple[tuple[int, ...], ...] | None:
        """The optional FrozenLake map `map_desc`: rows of equal length of 1 start, 2 goal, 0 safe, -1 hole."""
        rows = self.tree.get("map_desc")
        if rows is None:
            return None
        allowed = (-1, 0, 1, 2)
        good = isinstance(rows, list) and rows and all(isinstance(row, list) and row for row in rows)
        if not (good and all(type(cell) is int and cell in allowed for row in rows for cell in row)):
            raise self.error("wrong_type", "map_desc", f"expected rows of the numbers {allowed}, got {rows!r:.80}")
        if len({len(row) for row in rows}) != 1:
            raise self.error("wrong_type", "map_desc", "the rows differ in length")
        return tuple(tuple(row) for row in rows)


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a file, trailing blank lines left out; blank lines between records are kept (and refused later).

    Raises FileNotFoundError and other OSErrors of opening.
    """
    blank: list[Line] = []
    offset = 0
    with path.open("rb") as file:
        for number, content in enumerate(file, start=1):
            line = Line(path, number, offset, content)
            offset += len(content)
            if not line.content.removeprefix(_BOM).strip():
                blank.append(line)
                continue
            yield from blank
            blank.clear()
            yield line


def parse_object(line: Line) -> Fields:
    """The JSON object of a line, with its `id` (a string or an integer) or the line's default id.

    Raises RecordError not_utf8, broken_json, not_an_object, wrong_type.
    """
    try:
        content = line.content.removeprefix(_BOM) if line.number == 1 else line.content
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"the line is not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
        raise RecordError("not_utf8", message, origin=line.origin) from error
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        message = f"the line is not JSON: {error}" if text.strip() else "the line is blank; remove it"
        raise RecordError("broken_json", message, origin=line.origin) from error
    if not isinstance(tree, dict):
        raise RecordError("not_an_object", f"expected a JSON object, got {_kind(tree)}", origin=line.origin)
    return identify(tree, line.origin, line.default_id)


def identify(tree: dict[str, Any], origin: str, default_id: str) -> Fields:
    """`tree` with its `id` (a string or an integer) or the default one. Raises RecordError wrong_type, bad_unicode."""
    value = tree.get("id")
    if value is None:
        return Fields(tree, origin, default_id)
    if type(value) is int:
        value = str(value)
    fields = Fields(tree, origin, repr(value)[:200])
    record_id = fields.as_text("id", value)
    if record_id == "":
        raise fields.error("wrong_type", "id", "the id is empty; leave it out to have one made from the line number")
    return Fields(tree, origin, record_id)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")
