"""VSP spatial planning: a FrozenLake map and its picture, no reasoning.

    {"text_input": "... Here is the map: <image> ...", "image_input": "img/31.png", "map_id": "31",
     "map_desc": [[2, -1, 1], [0, 0, 0], [0, 0, 0]]}           1 start, 2 goal, 0 safe, -1 hole

The assistant turn is made from the map: a shortest plan, walked two moves at a time, with a picture of the lake after
each (`frozenlake_records`; gymnasium's sprites, of which the published pictures are made), and the plan in a box.
Without `image_input` the map's own picture is drawn. The phrasing depends on the map alone.
The published file of this shape (400 maps) is a TEST set: build it to look at it, never train on it.
"""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass

from PIL import Image

from ilvr_ds.contracts import ImageRef, Record
from ilvr_ds.data.formats.ilvr_jsonl import IMAGE_MARKER
from ilvr_ds.data.formats.jsonl import Fields
from ilvr_ds.data.formats.markers import fill_markers
from ilvr_ds.data.frozenlake import MapDesc, parse_map, shortest_plan
from ilvr_ds.data.frozenlake_records import Frame, PuzzleRecord, puzzle_record
from ilvr_ds.data.frozenlake_render import render
from ilvr_ds.errors import PuzzleError

MOVES_PER_HELPER = 2


def parse_fields(fields: Fields) -> Record:
    """One object as a `Record`. Raises RecordError (reasons of `jsonl`, and bad_map, no_safe_plan, marker_count).

    The pictures are drawn when their bytes are asked for; PuzzleError then, if the sprites are not installed.
    """
    fields.take("map_desc")
    fields.take_map()  # the types
    puzzle, map_desc = _puzzle(fields)
    pictures = {frame.path: ImageRef(frame.path, _Drawing(map_desc, frame)) for frame in puzzle.frames}
    text = fields.take_text("text_input")
    own = fields.take_images("image_input") if "image_input" in fields.tree else (pictures[puzzle.frames[0].path],)
    prompt = fill_markers(fields, "text_input", text, IMAGE_MARKER, own) if IMAGE_MARKER in text else (*own, text)
    steps = (
        step["content"] if step["type"] == "text" else pictures[step["helper_image"]]
        for step in puzzle.fields["sequence_plan"]
    )
    return Record(
        id=fields.record_id,
        prompt=prompt,
        steps=tuple(steps),
        answer=puzzle.fields["original_final_answer"],
        map_desc=map_desc,
        origin=fields.origin,
    )


@dataclass(frozen=True)
class _Drawing:
    """A picture of the lake that is not drawn yet."""

    map_desc: MapDesc
    frame: Frame

    def __call__(self) -> bytes:
        """The picture as PPM: it is on its way to a resize, compressing it now would take longer than drawing it."""
        buffer = io.BytesIO()
        Image.fromarray(render(self.map_desc, self.frame.position, self.frame.last_move)).save(buffer, format="PPM")
        return buffer.getvalue()


def _puzzle(fields: Fields) -> tuple[PuzzleRecord, MapDesc]:
    try:
        map_desc = parse_map(fields.tree["map_desc"])
    except PuzzleError as error:
        raise fields.error("bad_map", "map_desc", str(error)) from error
    try:
        shortest_plan(map_desc)
    except PuzzleError as error:
        raise fields.error("no_safe_plan", "map_desc", str(error)) from error
    return puzzle_record(map_desc, 0, zlib.crc32(repr(map_desc).encode()), MOVES_PER_HELPER), map_desc
