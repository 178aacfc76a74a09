"""Puzzle records: what the text claims is what happens on the map and what the pictures show."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilvr_ds.data.frozenlake import MapSpec, Outcome, make_maps, parse_map, shortest_plan, shortest_plans, simulate
from ilvr_ds.data.frozenlake_records import example_texts, puzzle_record
from ilvr_ds.errors import PuzzleError

WORDS = {"left": "L", "right": "R", "up": "U", "down": "D"}


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(2, 7), st.integers(1, 5))
def test_a_record_is_true_to_its_map(seed, size, moves_per_helper):
    map_desc = next(make_maps(MapSpec((size,), (0.1, 0.3), seed), 1))
    record = puzzle_record(map_desc, seed, 0, moves_per_helper)
    fields = record.fields
    assert parse_map(fields["map_desc"]) == map_desc
    plan = "".join(fields["original_final_answer"].split(","))
    assert plan in set(shortest_plans(map_desc))
    assert simulate(map_desc, plan).outcome is Outcome.SUCCESS
    assert fields["text_input"].count("<image>") == 1
    assert fields["image_input"] == [record.frames[0].path]
    assert record.frames[0].last_move is None

    steps = fields["sequence_plan"]
    assert [step["type"] for step in steps] == ["text", "latent"] * (len(steps) // 2) + ["text"]
    assert steps[-1]["content"] == f"The final answer is: \\boxed{{{','.join(plan)}}}"
    helpers = [step["helper_image"] for step in steps if step["type"] == "latent"]
    assert helpers == [frame.path for frame in record.frames[1:]]
    assert len(helpers) == -(-len(plan) // moves_per_helper)
    assert len({frame.path for frame in record.frames}) == len(record.frames)

    # read the reasoning back: the moves it names, played on the map, lead where text and pictures say
    walked = ""
    for step, frame in zip(steps[:-1:2], record.frames[1:], strict=True):
        named = "".join(WORDS[word] for word in re.findall(r"\b(left|right|up|down)\b", step["content"]))
        assert 1 <= len(named) <= moves_per_helper
        walked += named
        position = simulate(map_desc, walked).positions[-1]
        assert frame.position == position
        assert frame.last_move == named[-1]
        row, column = re.findall(r"row (\d+), column (\d+)", step["content"])[-1]
        assert (int(row) - 1, int(column) - 1) == position
    assert walked == plan


def test_records_are_a_pure_function_with_varied_wording():
    map_desc = parse_map([[1, 0, 0, 2]] + [[0] * 4] * 3)
    assert puzzle_record(map_desc, 3, 7, 2) == puzzle_record(map_desc, 3, 7, 2)
    openings = {puzzle_record(map_desc, 3, i, 2).fields["sequence_plan"][0]["content"] for i in range(40)}
    assert len(openings) == 9  # three openings times three sentences


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(2, 7), st.integers(1, 5))
def test_the_brief_wording_names_the_same_walk(seed, size, moves_per_helper):
    map_desc = next(make_maps(MapSpec((size,), (0.1, 0.3), seed), 1))
    full, brief = (puzzle_record(map_desc, seed, 0, moves_per_helper, w) for w in ("sentences", "brief"))
    assert brief.frames == full.frames
    assert brief.fields["original_final_answer"] == full.fields["original_final_answer"]
    positions = simulate(map_desc, shortest_plan(map_desc)).positions
    text = " ".join(step["content"] for step in brief.fields["sequence_plan"][:-1] if step["type"] == "text")
    squares = [(int(row) - 1, ord(column) - ord("a")) for column, row in re.findall(r"\b([a-z])(\d)\b", text)]
    assert squares[:2] == [positions[0], positions[-1]]
    assert squares[2:] == list(positions[1:])
    assert "".join(re.findall(r"\b[LRUD]\b", text)) == shortest_plan(map_desc)


def test_impossible_records():
    with pytest.raises(PuzzleError, match="moves_per_helper"):
        puzzle_record(parse_map([[1, 2], [0, 0]]), 0, 0, 0)
    with pytest.raises(PuzzleError, match="no safe way"):
        puzzle_record(parse_map([[1, -1], [-1, 2]]), 0, 0, 2)


def test_example_texts_agree_on_the_common_prefix_and_need_no_sprites(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gymnasium", None)  # importing it now fails
    texts = example_texts(5)
    assert example_texts(9)[: len(texts)] == texts
    assert sum("<image>" in text for text in texts) == 10  # five puzzles in two wordings


def test_answers_are_the_documented_choice():
    for map_desc in make_maps(MapSpec((4, 5), (0.2, 0.3), 1), 20):
        answer = puzzle_record(map_desc, 1, 0, 2).fields["original_final_answer"]
        assert answer == ",".join(shortest_plan(map_desc))
