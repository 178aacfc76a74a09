"""Make FrozenLake planning puzzles: ILVR's JSONL plus PNG pictures, from a seed.

    python data_tools/make_frozenlake.py --out data/frozenlake --count 1000 --sizes 3 4 5 6 --seed 0
    python data_tools/make_frozenlake.py --out data/official --maps vsp_planning_test/test.jsonl

Writes OUT/records.jsonl, OUT/images/ and OUT/settings.json. The folder appears under its name only when
it is complete. The same settings give the same bytes; a larger --count only adds records at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from tqdm import tqdm

from ilvr_ds.data.finished_folder import is_finished, write_folder
from ilvr_ds.data.frozenlake import MapDesc, MapSpec, make_maps, read_maps
from ilvr_ds.data.frozenlake_records import Wording, puzzle_record
from ilvr_ds.data.frozenlake_render import CELL, encode_png, render, sprite_folder
from ilvr_ds.errors import IlvrError, PuzzleError

GENERATOR_VERSION = 2  # raise it when the same settings would give other records


@dataclass(frozen=True)
class PuzzleStyle:
    """How a map becomes a record. Raises `PuzzleError` naming the field that is impossible."""

    seed: int = 0  # of the phrasings; part of the ids
    moves_per_helper: int = 2
    wording: Wording = "sentences"
    cell: int = CELL  # side of a cell in pixels

    def __post_init__(self) -> None:
        for name in ("moves_per_helper", "cell"):
            if getattr(self, name) < 1:
                raise PuzzleError(f"{name}: got {getattr(self, name)}; allowed: 1 or more")


def make_puzzles(
    out: Path, spec: MapSpec, count: int, style: PuzzleStyle, exclude: frozenset[MapDesc] = frozenset()
) -> dict[str, int]:
    """Write a folder of `count` new maps; returns how many records, helper pictures and moves it holds.

    A folder made earlier with the same settings is left as it is (and {} is returned). Raises `PuzzleError`
    for impossible settings or missing sprites, `ConfigError` if `out` holds something else.
    """
    if count < 1:
        raise PuzzleError(f"count: got {count}; allowed: 1 or more")
    settings = {
        "count": count,
        "sizes": list(spec.sizes),
        "hole_rate": list(spec.hole_rate),
        "map_seed": spec.seed,
        "excluded_maps": len(exclude),
        "excluded_maps_sha256": _digest(sorted(exclude)),
    }
    return _write_puzzles(out, settings, make_maps(spec, count, exclude), count, style)


def make_puzzles_of(out: Path, maps: Sequence[MapDesc], style: PuzzleStyle) -> dict[str, int]:
    """Write a folder of puzzles on the maps given, in their order; returns and raises as `make_puzzles`."""
    if not maps:
        raise PuzzleError("maps: the file holds no map")
    settings = {"maps": len(maps), "maps_sha256": _digest(maps)}
    return _write_puzzles(out, settings, maps, len(maps), style)


def _write_puzzles(
    out: Path, settings: dict, maps: Iterable[MapDesc], count: int, style: PuzzleStyle
) -> dict[str, int]:
    settings = {"made_by": "make_frozenlake", "version": GENERATOR_VERSION, **settings, **asdict(style)}
    if is_finished(out, settings):
        return {}
    sprite_folder()  # a missing gymnasium is reported before any work
    totals = {"records": 0, "helper_images": 0, "moves": 0}
    with write_folder(out, settings) as folder, (folder / "records.jsonl").open("wb") as lines:
        for index, map_desc in enumerate(tqdm(maps, total=count, unit="puzzle", desc="make puzzles")):
            record = puzzle_record(map_desc, style.seed, index, style.moves_per_helper, style.wording)
            for frame in record.frames:
                path = folder / frame.path
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encode_png(render(map_desc, frame.position, frame.last_move, style.cell)))
            lines.write(json.dumps(record.fields).encode() + b"\n")
            totals["records"] += 1
            totals["helper_images"] += len(record.frames) - 1
            totals["moves"] += len(record.fields["original_final_answer"].split(","))
    return totals


def _digest(maps: Sequence[MapDesc]) -> str:
    return hashlib.sha256(json.dumps(maps).encode()).hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist yet (or be empty)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--count", type=int, help="number of puzzles, on new maps")
    source.add_argument(
        "--maps", type=Path, metavar="FILE.jsonl", help="puzzles on the map_desc of every line of this file instead"
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[3, 4, 5, 6], metavar="N",
        help="map sides in cells, taken in turn: puzzle i has side sizes[i %% number of sizes] (default: 3 4 5 6)",
    )  # fmt: skip
    parser.add_argument(
        "--hole-rate", type=float, nargs=2, default=[0.2, 0.35], metavar=("LOW", "HIGH"),
        help="share of hole cells, drawn per map between LOW and HIGH (default: 0.2 0.35)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="another seed, other puzzles (default: 0)")
    parser.add_argument(
        "--moves-per-helper", type=int, default=2, metavar="M",
        help="a helper picture after every M moves and after the last one (default: 2)",
    )  # fmt: skip
    parser.add_argument(
        "--wording", choices=get_args(Wording), default="sentences",
        help="sentences, or brief: no rules and half the tokens, for a tiny model (default: sentences)",
    )  # fmt: skip
    parser.add_argument(
        "--cell", type=int, default=CELL, metavar="PIXELS",
        help=f"side of a cell (default: {CELL}, as in the official pictures; 28 makes a cell one visual token)",
    )  # fmt: skip
    parser.add_argument(
        "--exclude", type=Path, nargs="+", default=[], metavar="FILE.jsonl",
        help="never make a map that is the map_desc of a line of these files: held-out sets stay held out",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        exclude = frozenset(map_desc for path in options.exclude for map_desc in read_maps(path))
        style = PuzzleStyle(options.seed, options.moves_per_helper, options.wording, options.cell)
        if options.maps is not None:
            totals = make_puzzles_of(options.out, read_maps(options.maps), style)
        else:
            spec = MapSpec(tuple(options.sizes), tuple(options.hole_rate), options.seed)
            totals = make_puzzles(options.out, spec, options.count, style, exclude)
    except IlvrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if totals:
        print(
            f"{options.out}: {totals['records']} puzzles, {totals['helper_images']} helper pictures, "
            f"{totals['moves'] / totals['records']:.2f} moves each; {len(exclude)} maps excluded"
        )
    else:
        print(f"{options.out}: already there, made with the same settings; nothing to do")
    return 0


if __name__ == "__main__":
    sys.exit(main())
