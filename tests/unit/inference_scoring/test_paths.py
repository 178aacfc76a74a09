"""Plans: read from end to end or not at all, and played by two rules."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilvr_ds.data.frozenlake import MOVES, MapSpec, make_maps, parse_map, shortest_plan
from ilvr_ds.errors import PuzzleError
from ilvr_ds.inference.scoring.paths import extract_path, parse_path
from ilvr_ds.inference.scoring.published import published_path
from ilvr_ds.inference.scoring.vsp import score_plan


@pytest.mark.parametrize(
    "text",
    ["DLLU", "D, L, L, U", "D L L U", "D,L,L,U.", "D -> L → L - U", "down left left up", "Down, LEFT, left and Up",
     "['DOWN', 'LEFT', 'LEFT', 'UP']", "[D][L][L][U]", "d, l, l, u", "\\text{D L L U}", "$D \\rightarrow L \\to L, U$",
     "DL, LU", "down\nleft\nleft\nup", "down, then left, then left, then up", "D|L|L|U"],
)  # fmt: skip
def test_ways_to_write_a_plan(text):
    assert parse_path(text) == "DLLU"
    assert extract_path(f"I tried R, R first.\n\\boxed{{{text}}}") == "DLLU"


@pytest.mark.parametrize(
    "text",
    ["", " ", ".", "DLLUX", "D JUMP L", "dllu", "dull", "Lull", "2 x down", "D2", "go down", "DownLeft",
     "The route goes down and left.",
     "Up to you", "All right, down we go", "L is left, R is right, U is up, D is down", "Dr. U", "D+L"],
)  # fmt: skip
def test_what_is_no_plan(text):
    assert parse_path(text) is None
    assert extract_path(text) is None
    assert extract_path(f"\\boxed{{{text}}}") is None


PROSE = [
    "the", "route", "goes", "A", "I", "player", "Left-handed", "uplift", "downtown", "Right?", "hole", "moves",
    "U-turn", "Drop", "step", "Lake", "goal", "elf", "must", "look",
]  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.sampled_from([*PROSE, "down", "left", "up", "right", "L", "D,"]), min_size=1, max_size=12), st.data()
)
def test_prose_is_no_plan(words, data):
    """One word that is no move, anywhere, and the text is no plan, whatever moves stand around it."""
    words = list(words)
    words.insert(data.draw(st.integers(0, len(words))), data.draw(st.sampled_from(PROSE)))
    text = " ".join(words)
    assert parse_path(text) is None
    assert extract_path(text + ".") is None


@settings(deadline=None, max_examples=200)
@given(st.text("DLRU", min_size=1, max_size=30), st.sampled_from([", ", " ", "", " -> ", "\n", ",", " and "]))
def test_any_plan_comes_back(plan, separator):
    words = {"D": "down", "L": "Left", "R": "RIGHT", "U": "up"}
    assert parse_path(separator.join(plan)) == plan
    if separator:
        assert parse_path(separator.join(words[move] for move in plan)) == plan
    assert published_path(f"\\boxed{{{separator.join(plan)}}}").replace(
        "D" * (separator == " and "), ""
    ) == plan.replace("D" * (separator == " and "), "")


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=40))
def test_any_text_gives_moves_or_nothing(text):
    plan = parse_path(text)
    assert plan is None or (plan and set(plan) <= MOVES.keys())
    assert set(published_path(text)) <= MOVES.keys()


def test_the_two_goal_rules():
    grid = parse_map([[2, -1, 1], [0, 0, 0], [0, 0, 0]])
    assert score_plan(grid, "DLLU").correct
    over_the_goal = score_plan(grid, "DLLUD"), score_plan(grid, "DLLUD", "original")
    assert [v.correct for v in over_the_goal] == [False, True]
    assert [v.outcome for v in over_the_goal] == ["not_reached", "success"]
    assert (score_plan(grid, "LD").outcome, score_plan(grid, "LD").moves_played) == ("hole", 1)
    assert score_plan(grid, None).outcome == score_plan(grid, "").outcome == "no_plan"
    with pytest.raises(PuzzleError, match="unknown move"):
        score_plan(grid, "DX")


def test_shortest_plans_are_right_by_both_rules():
    for grid in make_maps(MapSpec((3, 4, 5), (0.2, 0.3), seed=5), 12):
        plan = shortest_plan(grid)
        assert score_plan(grid, plan).correct
        assert score_plan(grid, plan, "original").correct
        assert not score_plan(grid, plan[:-1]).correct


def test_third_party_vectors(realdata):
    """Other people's test vectors: paths, simulation, maps that must be refused."""
    vectors = json.loads((realdata / "scoring/third_party_vectors.json").read_text(encoding="utf-8"))["vsp_answers"]
    grid = parse_map(vectors["grid"])
    assert {extract_path(text) for text in vectors["correct_as_DLLU"]} == {"DLLU"}
    assert {extract_path(text) for text in vectors["invalid"]} == {None}
    for plan, expected in vectors["simulate"].items():
        verdict = score_plan(grid, plan)
        assert verdict.correct == expected.startswith("success"), plan
        assert (verdict.outcome == "hole") == ("hole" in expected), plan
        if "stop at the goal = success" in expected:
            assert score_plan(grid, plan, "original").correct
    for text in vectors["bad_maps"]:
        with pytest.raises(PuzzleError):
            parse_map(json.loads(text))


def test_third_party_short_answers(realdata):
    from ilvr_ds.inference.scoring.matching import same_answer, short_answer
    from ilvr_ds.inference.scoring.published import published_extract, published_same

    vectors = json.loads((realdata / "scoring/third_party_vectors.json").read_text(encoding="utf-8"))
    for answer, output, expected in vectors["zebra_ilvr_rules"]["cases"]:
        ours = short_answer(output).value
        assert (ours is not None and same_answer(ours, answer)) is expected, (answer, output)
        theirs = published_extract(output).value
        assert (theirs is not None and published_same(theirs, answer)) is expected, (answer, output)
    assert published_same("true", "Yes")
    assert published_extract("A knife.").value == "A"  # the quirk of the published rules; ours take nothing
    assert short_answer("A knife.").value is None
