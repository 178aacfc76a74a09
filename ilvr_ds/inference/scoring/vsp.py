"""Verdict on a plan for a FrozenLake map (VSP spatial planning).

Two rules are in use, and they differ on plans that walk over the goal and on:

* `mirage` (Mirage's and ILVR's scripts, our default): the plan is played to its end and must end on the goal;
* `original` (VSP's environment): the play stops at the goal, what comes after does not count.

In both a move over the edge does nothing, a hole ends the play, and a plan need not be the shortest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ilvr_ds.data.frozenlake import MapDesc, Outcome, simulate

GoalRule = Literal["mirage", "original"]
NO_PLAN = "no_plan"


@dataclass(frozen=True)
class PlanVerdict:
    """What became of a plan."""

    correct: bool
    outcome: str  # a value of `Outcome`, or NO_PLAN
    moves_played: int  # moves until the play ended, the one into a hole or onto the goal included


def score_plan(map_desc: MapDesc, plan: str | None, goal_rule: GoalRule = "mirage") -> PlanVerdict:
    """Play `plan` (letters of `MOVES`; None or empty: no plan, wrong) on `map_desc`.

    Raises PuzzleError on a letter that is no move.
    """
    if not plan:
        return PlanVerdict(False, NO_PLAN, 0)
    play = simulate(map_desc, plan, stop_at_goal=goal_rule == "original")
    return PlanVerdict(play.outcome is Outcome.SUCCESS, play.outcome.value, len(play.positions) - 1)
