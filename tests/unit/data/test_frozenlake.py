"""Maps, plans, simulator: against a brute-force oracle and the properties users rely on."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilvr_ds.data.frozenlake import (
    GOAL,
    HOLE,
    MOVES,
    SAFE,
    START,
    MapSpec,
    Outcome,
    draw_map,
    find_cell,
    make_maps,
    parse_map,
    read_maps,
    shortest_plan,
    shortest_plans,
    simulate,
)
from ilvr_ds.errors import PuzzleError, RecordError

LAKE = parse_map([[1, 0, 0], [-1, 0, -1], [0, 0, 2]])


@st.composite
def maps(draw, max_size: int = 4):
    """Any map, solvable or not."""
    size = draw(st.integers(2, max_size))
    cells = draw(st.lists(st.sampled_from([SAFE, HOLE]), min_size=size * size, max_size=size * size))
    start, goal = draw(st.lists(st.integers(0, size * size - 1), min_size=2, max_size=2, unique=True))
    cells[start], cells[goal] = START, GOAL
    return tuple(tuple(cells[row * size : (row + 1) * size]) for row in range(size))


def all_successes(map_desc, length: int) -> list[str]:
    """Every plan of `length` moves that succeeds, by trying all 4^length, with its own tiny rules."""
    found = []
    start = next((r, c) for r, row in enumerate(map_desc) for c, cell in enumerate(row) if cell == 1)
    for plan in itertools.product("DLRU", repeat=length):
        row, column = start
        for move in plan:
            row2 = row + {"D": 1, "U": -1}.get(move, 0)
            column2 = column + {"R": 1, "L": -1}.get(move, 0)
            if 0 <= row2 < len(map_desc) and 0 <= column2 < len(map_desc):
                row, column = row2, column2
            if map_desc[row][column] == -1:
                break
        else:
            if map_desc[row][column] == 2:
                found.append("".join(plan))
    return found


@settings(deadline=None, max_examples=40)
@given(maps(max_size=3))
def test_shortest_plans_are_all_and_only_the_shortest(map_desc):
    plans = list(shortest_plans(map_desc))
    assert plans == sorted(set(plans))
    by_force = next((found for length in range(1, 8) if (found := all_successes(map_desc, length))), [])
    assert plans == by_force  # a 3x3 map's longest shortest plan has 6 moves (7 tried)


@settings(deadline=None, max_examples=60)
@given(maps(max_size=6))
def test_the_chosen_plan_is_the_first_and_succeeds_under_both_goal_rules(map_desc):
    first = next(shortest_plans(map_desc), None)
    if first is None:
        with pytest.raises(PuzzleError, match="no safe way"):
            shortest_plan(map_desc)
        return
    assert shortest_plan(map_desc) == first
    for stop_at_goal in (True, False):
        played = simulate(map_desc, first, stop_at_goal=stop_at_goal)
        assert played.outcome is Outcome.SUCCESS
        assert len(played.positions) == len(first) + 1
        assert played.positions[-1] == find_cell(map_desc, GOAL)


def test_choosing_a_plan_is_lazy():
    """An open 30x30 lake has C(58, 29), about 3e16, shortest plans."""
    size = 30
    rows = [[0] * size for _ in range(size)]
    rows[0][0], rows[-1][-1] = START, GOAL
    assert shortest_plan(parse_map(rows)) == "D" * 29 + "R" * 29


@pytest.mark.parametrize(
    ("moves", "outcome", "last"),
    [
        ("RDDR", Outcome.SUCCESS, (2, 2)),
        ("D", Outcome.HOLE, (1, 0)),
        ("DRRD", Outcome.HOLE, (1, 0)),  # a hole ends it: what follows is not played
        ("RD", Outcome.NOT_REACHED, (1, 1)),
        ("", Outcome.NOT_REACHED, (0, 0)),
        (["R", "D", "D", "R"], Outcome.SUCCESS, (2, 2)),
    ],
)
def test_simulate(moves, outcome, last):
    played = simulate(LAKE, moves)
    assert (played.outcome, played.positions[-1], played.positions[0]) == (outcome, last, (0, 0))


def test_moving_off_the_edge_has_no_effect():
    """All four edges, on a map where coming back in on the other side would be seen."""
    lake = parse_map([[0, 0, 0], [0, 1, 0], [0, 0, 2]])
    for moves, corner in (("UULLUL", (0, 0)), ("UURRUR", (0, 2)), ("DDLLDL", (2, 0))):
        played = simulate(lake, moves)
        assert played.positions[-3:] == (corner,) * 3
        assert played.outcome is Outcome.NOT_REACHED
    assert simulate(lake, "DDRRDR", stop_at_goal=False).positions[-3:] == ((2, 2),) * 3


def test_passing_the_goal_counts_only_when_the_play_stops_there():
    assert simulate(LAKE, "RDDRL").outcome is Outcome.SUCCESS
    assert simulate(LAKE, "RDDRL").positions[-1] == (2, 2)
    assert simulate(LAKE, "RDDRL", stop_at_goal=False).outcome is Outcome.NOT_REACHED
    assert simulate(LAKE, "RDDRU").outcome is Outcome.SUCCESS
    assert simulate(LAKE, "RDDRU", stop_at_goal=False).outcome is Outcome.HOLE


def test_an_unknown_move_is_an_error_even_behind_a_hole():
    with pytest.raises(PuzzleError, match="'X'"):
        simulate(LAKE, "DX")


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**40), st.lists(st.integers(2, 7), min_size=1, max_size=4), st.integers(0, 12))
def test_more_maps_never_change_the_first_ones(seed, sizes, count):
    spec = MapSpec(tuple(sizes), (0.0, 0.3), seed)
    long = list(make_maps(spec, 14))
    assert list(make_maps(spec, count)) == long[:count]
    assert len(set(long)) == len(long)
    for index, map_desc in enumerate(long):
        assert len(map_desc) == sizes[index % len(sizes)]
        assert parse_map(map_desc) == map_desc
        assert simulate(map_desc, shortest_plan(map_desc)).outcome is Outcome.SUCCESS


def test_maps_are_frozen_across_versions():
    """The first maps of seed 0, written down: a change here changes everyone's data set."""
    assert list(make_maps(MapSpec((3, 4), (0.2, 0.35), 0), 2)) == [
        ((0, 2, -1), (1, 0, 0), (0, -1, -1)),
        ((-1, 2, -1, 0), (0, 0, 1, -1), (0, 0, -1, -1), (0, 0, 0, 0)),
    ]


def test_no_duplicates_until_a_small_size_runs_out():
    """There are 4 * 3 * 2 = 24 maps of 2x2 with one hole, all solvable (one corner is always free to pass)."""
    spec = MapSpec((2,), (0.25, 0.25), 3)
    made = list(make_maps(spec, 24))
    assert len(set(made)) == 24
    with pytest.raises(PuzzleError, match=r"2x2 map with hole rate 0.25 to 0.25 in 2000 tries.*number 24"):
        list(make_maps(spec, 25))


def test_excluded_maps_are_never_made():
    spec = MapSpec((3,), (0.2, 0.3), 5)
    free = list(make_maps(spec, 60))
    held_out = set(free[::2])
    kept = list(make_maps(spec, 60, held_out))
    assert not held_out & set(kept)
    assert len(set(kept)) == 60
    assert kept[1] == free[1]  # an index whose map is not held out keeps it


def test_hole_rate_is_respected():
    for index in range(50):
        map_desc = draw_map(MapSpec((10,), (0.2, 0.35), 1), index, 0)
        assert 20 <= sum(row.count(HOLE) for row in map_desc) <= 35
    assert sum(row.count(HOLE) for row in draw_map(MapSpec((4,), (0.0, 0.0), 1), 0, 0)) == 0
    for index in range(20):  # never so many holes that start or goal has no cell
        crowded = draw_map(MapSpec((2,), (0.4, 0.99), 1), index, 0)
        assert sum(row.count(HOLE) for row in crowded) == 2
        assert parse_map(crowded) == crowded


def test_start_goal_and_holes_are_spread_over_all_cells():
    spec = MapSpec((3,), (0.3, 0.3), 0)
    seen = {wanted: set() for wanted in (START, GOAL, HOLE)}
    for index in range(300):
        for row, cells in enumerate(draw_map(spec, index, 0)):
            for column, cell in enumerate(cells):
                seen.get(cell, set()).add((row, column))
    assert all(len(cells) == 9 for cells in seen.values())


@pytest.mark.parametrize(
    ("sizes", "rate", "message"),
    [
        ((), (0.1, 0.2), "sizes"),
        ((4, 1), (0.1, 0.2), "sizes: 1"),
        ((4,), (0.3, 0.2), "hole_rate"),
        ((4,), (-0.1, 0.2), "hole_rate"),
        ((4,), (0.1, 1.0), "hole_rate"),
        ((4,), (float("nan"), 0.5), "hole_rate"),
        ((3,), (0.9, 0.95), "hole_rate: 0.9 of a 3x3 map is 8 holes"),
    ],
)
def test_impossible_settings_name_the_field(sizes, rate, message):
    with pytest.raises(PuzzleError, match=message):
        MapSpec(sizes, rate, 0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "list of rows"),
        ([1, 2], "list of rows"),
        ([], "square"),
        ([[1, 2]], "square"),
        ([[1, 0], [2]], "square"),
        ([[1, 0], [2, 7]], "unknown cell 7"),
        ([[1, 0], [2, True]], "unknown cell True"),
        ([[1, 1], [2, 0]], r"start \(1\), got 2"),
        ([[1, 0], [0, 0]], r"goal \(2\), got 0"),
    ],
)
def test_parse_map_says_what_is_wrong(value, message):
    with pytest.raises(PuzzleError, match=message):
        parse_map(value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"map_desc": [[1,2]', "broken_json"),
        (b'{"id": 3}', "missing_field"),
        (b"[1]", "missing_field"),
        (b'{"map_desc": [[1,2],[0,5]]}', "bad_map"),
        (b'{"map_desc": "\xff"}', "not_utf8"),
    ],
)
def test_read_maps_names_file_and_line(tmp_path, line, reason):
    path = tmp_path / "held_out.jsonl"
    path.write_bytes(b'{"map_desc": [[1, 2], [0, 0]]}\n\n' + line + b"\n")
    with pytest.raises(RecordError, match=r"held_out\.jsonl:3") as caught:
        read_maps(path)
    assert caught.value.reason == reason


def test_read_maps_reads_every_line(tmp_path):
    path = tmp_path / "maps.jsonl"
    path.write_text("".join(json.dumps({"map_desc": m}) + "\n" for m in (LAKE, [[1, 2], [0, -1]])))
    assert read_maps(path) == [LAKE, ((1, 2), (0, -1))]
    with pytest.raises(PuzzleError, match=r"absent\.jsonl"):
        read_maps(tmp_path / "absent.jsonl")


def test_every_test_set_map_parses_and_can_be_solved(realdata):
    maps_there = read_maps(realdata / "vsp_planning_test" / "test.jsonl")
    assert len(maps_there) == 400
    for map_desc in maps_there:
        assert simulate(map_desc, shortest_plan(map_desc)).outcome is Outcome.SUCCESS


def test_moves_are_listed_alphabetically():
    """`shortest_plans` walks MOVES in order and promises alphabetical plans."""
    assert list(MOVES) == sorted(MOVES)
