"""Readers: a line of somebody's file to a `Record`.

A format is a module with `parse_line(Line) -> Record` that raises RecordError; see `ilvr_jsonl` for an example.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from ilvr_ds.contracts import Record
from ilvr_ds.data.formats import ilvr_jsonl, mirage_jsonl
from ilvr_ds.data.formats.jsonl import Line

FormatName = Literal["ilvr", "mirage"]


def line_parser(name: FormatName) -> Callable[[Line], Record]:
    """The `parse_line` of a format."""
    match name:
        case "ilvr":
            return ilvr_jsonl.parse_line
        case "mirage":
            return mirage_jsonl.parse_line
