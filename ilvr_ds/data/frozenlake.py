"""FrozenLake maps: making them, their shortest safe plans, and what a plan does on a map.

A map is a square tuple of rows; a cell is `START` (1), `GOAL` (2), `SAFE` (0) or `HOLE` (-1), the
convention of the `map_desc` field of the VSP spatial-planning test set. A position is (row, column)
from the top left. A plan is a string or sequence of the letters in `MOVES`.

Map number i of a `MapSpec` depends on nothing but the spec, the excluded maps and i: asking for more
maps never changes the first ones. Only `random.Random(str).random()` is used, whose values Python
guarantees to keep across versions.
"""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from ilvr_ds.errors import PuzzleError, RecordError

START, GOAL, SAFE, HOLE = 1, 2, 0, -1
MOVES = {"D": (1, 0), "L": (0, -1), "R": (0, 1), "U": (-1, 0)}  # alphabetical: the order of shortest_plans
MAX_TRIES = 2000  # candidates drawn for one map before giving up

MapDesc = tuple[tuple[int, ...], ...]
Position = tuple[int, int]


class Outcome(StrEnum):
    """What became of the player."""

    SUCCESS = "success"
    HOLE = "hole"
    NOT_REACHED = "not_reached"


@dataclass(frozen=True)
class Simulation:
    """A plan played on a map."""

    outcome: Outcome
    positions: tuple[Position, ...]  # the start, then one per move played; at most len(plan) + 1


@dataclass(frozen=True)
class MapSpec:
    """Which maps to make. Raises `PuzzleError` naming the field that is impossible."""

    sizes: tuple[int, ...]  # map i has side sizes[i % len(sizes)]
    hole_rate: tuple[float, float]  # share of hole cells, drawn uniformly between the two per map
    seed: int

    def __post_init__(self) -> None:
        if not self.sizes:
            raise PuzzleError("sizes: give at least one map size")
        for size in self.sizes:
            if size < 2:
                raise PuzzleError(f"sizes: {size} is too small; a map needs a side of 2 or more cells")
        low, high = self.hole_rate
        if not 0 <= low <= high < 1:
            raise PuzzleError(f"hole_rate: got {low} to {high}; allowed: 0 <= low <= high < 1")
        for size in self.sizes:
            if round(low * size * size) > size * size - 2:
                raise PuzzleError(
                    f"hole_rate: {low} of a {size}x{size} map is {round(low * size * size)} holes, but start and goal "
                    f"leave {size * size - 2} cells; lower the hole rate or drop size {size}"
                )


def parse_map(value: Any) -> MapDesc:
    """A nested list as a checked map: square, side 2 or more, one start, one goal, known cell values.

    Raises `PuzzleError` saying what is wrong.
    """
    if not isinstance(value, (list, tuple)) or not all(isinstance(row, (list, tuple)) for row in value):
        raise PuzzleError(f"a map is a list of rows, got {value!r}")
    size = len(value)
    if size < 2 or any(len(row) != size for row in value):
        raise PuzzleError(f"a map is square with a side of 2 or more, got rows of {[len(row) for row in value]} cells")
    cells = [cell for row in value for cell in row]
    for cell in cells:
        if type(cell) is not int or cell not in (START, GOAL, SAFE, HOLE):
            raise PuzzleError(f"unknown cell {cell!r} in a map; allowed: 1 start, 2 goal, 0 safe, -1 hole")
    for name, wanted in (("start (1)", START), ("goal (2)", GOAL)):
        if cells.count(wanted) != 1:
            raise PuzzleError(f"a map has exactly one {name}, got {cells.count(wanted)}")
    return tuple(tuple(row) for row in value)


def find_cell(map_desc: MapDesc, wanted: int) -> Position:
    """Position of the first cell with value `wanted`; `PuzzleError` if there is none."""
    for row, cells in enumerate(map_desc):
        if wanted in cells:
            return row, cells.index(wanted)
    raise PuzzleError(f"the map has no cell of value {wanted}")


def simulate(map_desc: MapDesc, moves: Sequence[str], *, stop_at_goal: bool = True) -> Simulation:
    """Play `moves` from the start.

    A move over the edge leaves the player where it is. A hole ends the play at once. With `stop_at_goal`
    (the environment's own rule) so does the goal; without, the player walks on and must end on the goal.
    Raises `PuzzleError` on a letter that is no move, whether or not the play would get that far.
    """
    for move in moves:
        if move not in MOVES:
            raise PuzzleError(f"unknown move {move!r}; allowed: {', '.join(MOVES)}")
    size = len(map_desc)
    row, column = find_cell(map_desc, START)
    positions = [(row, column)]
    for move in moves:
        down, right = MOVES[move]
        row, column = min(max(row + down, 0), size - 1), min(max(column + right, 0), size - 1)
        positions.append((row, column))
        if map_desc[row][column] == HOLE:
            return Simulation(Outcome.HOLE, tuple(positions))
        if stop_at_goal and map_desc[row][column] == GOAL:
            break
    reached = map_desc[row][column] == GOAL
    return Simulation(Outcome.SUCCESS if reached else Outcome.NOT_REACHED, tuple(positions))


def distances_to_goal(map_desc: MapDesc) -> dict[Position, int]:
    """Fewest safe moves to the goal, for every cell from which it can be reached (breadth-first search)."""
    goal = find_cell(map_desc, GOAL)
    distances = {goal: 0}
    queue = deque([goal])
    while queue:
        here = queue.popleft()
        for _, there in _neighbours(map_desc, here):
            if there not in distances:
                distances[there] = distances[here] + 1
                queue.append(there)
    return distances


def shortest_plans(map_desc: MapDesc) -> Iterator[str]:
    """All shortest safe plans from start to goal, lazily, in alphabetical order; nothing if there is none."""
    distances = distances_to_goal(map_desc)

    def walk(here: Position, plan: str) -> Iterator[str]:
        if distances[here] == 0:
            yield plan
            return
        for move, there in _neighbours(map_desc, here):
            if distances.get(there) == distances[here] - 1:
                yield from walk(there, plan + move)

    start = find_cell(map_desc, START)
    if start in distances:
        yield from walk(start, "")


def shortest_plan(map_desc: MapDesc) -> str:
    """The alphabetically first shortest safe plan: one fixed choice per map, so that equal maps never teach
    different answers. Raises `PuzzleError` if the goal cannot be reached."""
    for plan in shortest_plans(map_desc):
        return plan
    raise PuzzleError(f"no safe way from start to goal on map {[list(row) for row in map_desc]}")


def draw_map(spec: MapSpec, index: int, attempt: int) -> MapDesc:
    """Candidate number `attempt` for map number `index`: a pure function of its arguments.

    Start, goal and holes are uniform over the cells; the goal may be out of reach.
    """
    size = spec.sizes[index % len(spec.sizes)]
    low, high = spec.hole_rate
    rng = random.Random(f"frozenlake {spec.seed} {index} {attempt} {size} {low!r} {high!r}")
    holes = min(round((low + (high - low) * rng.random()) * size * size), size * size - 2)
    cells = list(range(size * size))
    values = [SAFE] * (size * size)
    for i, value in enumerate([START, GOAL] + [HOLE] * holes):  # Fisher-Yates, stopped when all are placed
        j = i + int(rng.random() * (len(cells) - i))
        cells[i], cells[j] = cells[j], cells[i]
        values[cells[i]] = value
    return tuple(tuple(values[row * size : (row + 1) * size]) for row in range(size))


def make_maps(spec: MapSpec, count: int, exclude: Collection[MapDesc] = ()) -> Iterator[MapDesc]:
    """The first `count` maps of a spec: all solvable, all different, none in `exclude`.

    For map i the first acceptable of the candidates `draw_map(spec, i, 0), draw_map(spec, i, 1), ...` is
    taken. Raises `PuzzleError` when `MAX_TRIES` candidates in a row were unsolvable, excluded or made before
    (small sizes have few maps).
    """
    taken = set(exclude)
    for index in range(count):
        for attempt in range(MAX_TRIES):
            candidate = draw_map(spec, index, attempt)
            if candidate not in taken and find_cell(candidate, START) in distances_to_goal(candidate):
                break
        else:
            size = spec.sizes[index % len(spec.sizes)]
            raise PuzzleError(
                f"no new solvable {size}x{size} map with hole rate {spec.hole_rate[0]} to {spec.hole_rate[1]} in "
                f"{MAX_TRIES} tries for map number {index} (counted from 0); ask for fewer maps, larger sizes or "
                f"another hole rate"
            )
        taken.add(candidate)
        yield candidate


def read_maps(path: str | Path) -> list[MapDesc]:
    """The `map_desc` of every line of a JSONL file, e.g. a test set that must stay unseen.

    Raises `RecordError` naming the line that is not JSON, has no `map_desc` or has an impossible one, and
    `PuzzleError` if the file cannot be opened.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PuzzleError(f"{path}: cannot read the file of maps: {error.strerror}") from error
    maps = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        origin = f"{path}:{number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RecordError(
                "not_utf8", f"not UTF-8 ({error.reason}); save the file as UTF-8", origin=origin
            ) from error
        except json.JSONDecodeError as error:
            raise RecordError("broken_json", f"not a JSON line: {error}", origin=origin) from error
        if not isinstance(record, dict) or "map_desc" not in record:
            raise RecordError(
                "missing_field", "every line needs the map it stands for", origin=origin, field="map_desc"
            )
        try:
            maps.append(parse_map(record["map_desc"]))
        except PuzzleError as error:
            raise RecordError("bad_map", str(error), origin=origin, field="map_desc") from error
    return maps


def _neighbours(map_desc: MapDesc, here: Position) -> Iterator[tuple[str, Position]]:
    size = len(map_desc)
    for move, (down, right) in MOVES.items():
        row, column = here[0] + down, here[1] + right
        if 0 <= row < size and 0 <= column < size and map_desc[row][column] != HOLE:
            yield move, (row, column)
