"""Make FrozenLake planning puzzles: ILVR's JSONL plus PNG pictures, from a seed.

    python data_tools/make_frozenlake.py --out data/frozenlake --count 1000 --sizes 3 4 5 6 --seed 0

Writes OUT/records.jsonl, OUT/images/ and OUT/settings.json. The folder appears under its name only when
it is complete. The same settings give the same bytes; a larger --count only adds records at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ilvr_ds.data.finished_folder import is_finished, write_folder
from ilvr_ds.data.frozenlake import MapDesc, MapSpec, make_maps, read_maps
from ilvr_ds.data.frozenlake_records import puzzle_record
from ilvr_ds.data.frozenlake_render import encode_png, render, sprite_folder
from ilvr_ds.errors import IlvrError, PuzzleError

GENERATOR_VERSION = 1  # raise it when the same settings would give other records


def make_puzzles(
    out: Path, spec: MapSpec, count: int, moves_per_helper: int, exclude: frozenset[MapDesc] = frozenset()
) -> dict[str, int]:
    """Write the folder; returns how many records, helper pictures and moves it holds.

    A folder made earlier with the same settings is left as it is (and {} is returned). Raises `PuzzleError`
    for impossible settings or missing sprites, `ConfigError` if `out` holds something else.
    """
    if count < 1:
        raise PuzzleError(f"count: got {count}; allowed: 1 or more")
    if moves_per_helper < 1:
        raise PuzzleError(f"moves_per_helper: got {moves_per_helper}; allowed: 1 or more")
    excluded = json.dumps(sorted(exclude)).encode()
    settings = {
        "made_by": "make_frozenlake",
        "version": GENERATOR_VERSION,
        "count": count,
        "sizes": list(spec.sizes),
        "hole_rate": list(spec.hole_rate),
        "seed": spec.seed,
        "moves_per_helper": moves_per_helper,
        "excluded_maps": len(exclude),
        "excluded_maps_sha256": hashlib.sha256(excluded).hexdigest(),
    }
    if is_finished(out, settings):
        return {}
    sprite_folder()  # a missing gymnasium is reported before any work
    totals = {"records": 0, "helper_images": 0, "moves": 0}
    with write_folder(out, settings) as folder, (folder / "records.jsonl").open("wb") as lines:
        maps = make_maps(spec, count, exclude)
        for index, map_desc in enumerate(tqdm(maps, total=count, unit="puzzle", desc="make puzzles")):
            record = puzzle_record(map_desc, spec.seed, index, moves_per_helper)
            for frame in record.frames:
                path = folder / frame.path
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encode_png(render(map_desc, frame.position, frame.last_move)))
            lines.write(json.dumps(record.fields).encode() + b"\n")
            totals["records"] += 1
            totals["helper_images"] += len(record.frames) - 1
            totals["moves"] += len(record.fields["original_final_answer"].split(","))
    return totals


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist yet (or be empty)")
    parser.add_argument("--count", type=int, required=True, help="number of puzzles")
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
        "--exclude", type=Path, nargs="+", default=[], metavar="FILE.jsonl",
        help="never make a map that is the map_desc of a line of these files: held-out sets stay held out",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        exclude = frozenset(map_desc for path in options.exclude for map_desc in read_maps(path))
        spec = MapSpec(tuple(options.sizes), tuple(options.hole_rate), options.seed)
        totals = make_puzzles(options.out, spec, options.count, options.moves_per_helper, exclude)
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
