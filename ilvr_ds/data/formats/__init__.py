"""Readers: a record of somebody's file to a `Record`.

A format is a module with `parse_fields(Fields) -> Record` that raises RecordError; see `ilvr_jsonl` for an example.
How the file is laid out (JSONL, JSON, parquet, compressed) is no concern of a format: see `source`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from ilvr_ds.contracts import Record
from ilvr_ds.data.formats import comt, ilvr_jsonl, m3cot, mirage_jsonl, scienceqa, vsp_maps, zebra_cot
from ilvr_ds.data.formats.jsonl import Fields, Line, parse_object

FormatName = Literal["ilvr", "mirage", "comt", "zebra", "vsp", "m3cot", "scienceqa"]
FORMAT_NAMES: tuple[FormatName, ...] = get_args(FormatName)


def record_parser(name: FormatName) -> Callable[[Fields], Record]:
    """The `parse_fields` of a format."""
    match name:
        case "ilvr":
            return ilvr_jsonl.parse_fields
        case "mirage":
            return mirage_jsonl.parse_fields
        case "comt":
            return comt.parse_fields
        case "zebra":
            return zebra_cot.parse_fields
        case "vsp":
            return vsp_maps.parse_fields
        case "m3cot":
            return m3cot.parse_fields
        case "scienceqa":
            return scienceqa.parse_fields


def line_parser(name: FormatName) -> Callable[[Line], Record]:
    """The same for lines of a JSONL file."""
    parse = record_parser(name)
    return lambda line: parse(parse_object(line))
