"""The best plan for a model that does not look, against trying every plan."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilvr_ds.data.frozenlake import MOVES, MapSpec, make_maps, parse_map
from ilvr_ds.errors import PuzzleError
from ilvr_ds.inference.scoring.blind import best_blind_plan
from ilvr_ds.inference.scoring.intervals import t_interval
from ilvr_ds.inference.scoring.vsp import score_plan


@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 1000), size=st.sampled_from([2, 3, 4]), count=st.integers(1, 5), longest=st.integers(1, 4),
    rule=st.sampled_from(["mirage", "original"]),
)  # fmt: skip
def test_equals_trying_every_plan(seed, size, count, longest, rule):
    maps = list(make_maps(MapSpec((size,), (0.2, 0.35), seed), count))
    plans = ["".join(p) for n in range(1, longest + 1) for p in product(sorted(MOVES), repeat=n)]
    solved = {plan: sum(score_plan(lake, plan, rule).correct for lake in maps) for plan in plans}
    best = max(solved.values())
    found = best_blind_plan(maps, longest, rule)
    assert found.solved == best == solved[found.plan]
    assert found.plan == next(plan for plan in plans if solved[plan] == best)  # shortest, then alphabetical


def test_walking_over_the_goal_counts_by_the_rule():
    first, second = parse_map([[1, 2, 0], [0] * 3, [0] * 3]), parse_map([[1, 0, 2], [0] * 3, [0] * 3])
    assert best_blind_plan([first, second], 4, "original").plan == "RR"
    assert best_blind_plan([first, second], 4, "original").solved == 2
    assert best_blind_plan([first, second], 4, "mirage").solved == 1  # RR walks over the first map's goal


@pytest.mark.parametrize("rule", ["mirage", "original"])
def test_no_plan_leads_through_a_hole(rule):
    maps = [parse_map([[1, -1, 2], [0] * 3, [0] * 3])] * 3
    assert best_blind_plan(maps, 4, rule).plan == "DRRU"  # RR would be shorter
    assert best_blind_plan(maps, 3, rule).solved == 0


@pytest.mark.parametrize(
    ("maps", "moves", "message"),
    [
        ([], 3, "no maps"),
        ([parse_map([[1, 2], [0, 0]]), parse_map([[1, 2, 0], [0] * 3, [0] * 3])], 3, r"\[2, 3\]"),
        ([parse_map([[1, 2], [0, 0]])], 0, "max_moves: got 0"),
    ],
)
def test_impossible_questions(maps, moves, message):
    with pytest.raises(PuzzleError, match=message):
        best_blind_plan(maps, moves)


def test_t_interval():
    assert t_interval([0.5]) == (0.5, None)
    mean, half = t_interval([0.1, 0.2, 0.3])
    assert mean == pytest.approx(0.2)
    assert half == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-4)
    assert t_interval([0.4] * 5) == (pytest.approx(0.4), pytest.approx(0.0, abs=1e-12))
    mean, half = t_interval([float(i) for i in range(31)])
    assert half == pytest.approx(2.042272 * 9.0921211 / 31**0.5, rel=1e-4)
    with pytest.raises(ValueError, match="no values"):
        t_interval([])
    with pytest.raises(ValueError, match="at most"):
        t_interval([0.0] * 32)
