"""The best a model could do on frozen lakes without looking: one plan for every map of a size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ilvr_ds.data.frozenlake import GOAL, HOLE, MOVES, START, MapDesc, find_cell
from ilvr_ds.errors import PuzzleError
from ilvr_ds.inference.scoring.vsp import GoalRule, score_plan


@dataclass(frozen=True)
class BlindPlan:
    """A plan and how many of the maps it was chosen on it solves."""

    plan: str
    solved: int


def best_blind_plan(maps: Sequence[MapDesc], max_moves: int = 8, goal_rule: GoalRule = "mirage") -> BlindPlan:
    """The single plan of 1 to `max_moves` moves that solves the most of `maps`, which have one size.

    Exact: all plans are walked, a move at a time over all maps at once, and a beginning is given up when no more maps
    are still on safe ground than the best plan solves. Ties: the shorter plan, then the alphabetically first.
    Choose it on training maps and score it on test maps: choosing on the test maps would look at them.

    Raises PuzzleError for no maps, maps of several sizes, or max_moves below 1.
    """
    sizes = sorted({len(lake) for lake in maps})
    if len(sizes) != 1:
        raise PuzzleError(f"a blind plan is chosen for maps of one size, got sizes {sizes or 'of no maps'}")
    if max_moves < 1:
        raise PuzzleError(f"max_moves: got {max_moves}; allowed: 1 or more")
    search = _Search(np.array(maps, dtype=np.int8), goal_rule == "original", max_moves)
    search.walk(np.array([find_cell(lake, START) for lake in maps]), np.zeros(len(maps), bool), "")
    return BlindPlan(search.best, search.solved)


@dataclass(frozen=True)
class BlindScore:
    """What one level's blind plan, chosen on the training maps, solves."""

    plan: str
    training_share: float  # of the training maps of this level
    correct: int  # of the held-out maps of this level
    total: int


def score_blind(training: Sequence[MapDesc], held_out: Sequence[MapDesc]) -> dict[str, BlindScore]:
    """For each level of the held-out maps ("level 3", ...) the best blind plan of the training maps, scored (Mirage's
    rule). No model that does not see the picture, and was trained on these maps, does better by more than luck.

    Raises PuzzleError when training and held-out maps overlap, or a level was not trained on.
    """
    shared = len(set(training) & set(held_out))
    if shared:
        raise PuzzleError(f"{shared} held-out maps are training maps too; make the puzzles with --exclude TEST_FILE")
    scores = {}
    for size in sorted({len(lake) for lake in held_out}):
        known, asked = ([lake for lake in maps if len(lake) == size] for maps in (training, held_out))
        if not known:
            raise PuzzleError(f"held-out maps of {size}x{size} cells, no training map of that size: train on it too")
        found = best_blind_plan(known)
        solved = sum(score_plan(lake, found.plan).correct for lake in asked)
        scores[f"level {size}"] = BlindScore(found.plan, found.solved / len(known), solved, len(asked))
    return scores


class _Search:
    """Depth first over plans; `solved` is what `best` solves."""

    def __init__(self, cells: np.ndarray, stops_at_goal: bool, max_moves: int):
        self.cells = cells.reshape(len(cells), -1)  # (n, size * size)
        self.size = cells.shape[1]
        self.stops_at_goal, self.max_moves = stops_at_goal, max_moves
        self.best, self.solved = "", -1

    def walk(self, positions: np.ndarray, done: np.ndarray, plan: str) -> None:
        """`positions` (a, 2) of the maps that are still played, rows of `self.cells`; `done` (a,): goal was reached."""
        self._from(np.arange(len(positions)), positions, done, plan)

    def _from(self, rows: np.ndarray, positions: np.ndarray, done: np.ndarray, plan: str) -> None:
        for move, step in sorted(MOVES.items()):
            there = np.clip(positions + np.array(step), 0, self.size - 1)
            if self.stops_at_goal:
                there = np.where(done[:, None], positions, there)
            cells = self.cells[rows, there[:, 0] * self.size + there[:, 1]]
            reached = cells == GOAL
            alive = cells != HOLE
            longer = plan + move
            solved = int(reached.sum())
            if solved > self.solved or (solved == self.solved and (len(longer), longer) < (len(self.best), self.best)):
                self.best, self.solved = longer, solved
            # a plan that goes on solves at most what is alive; where that is a tie, only a shorter one would be better
            bound = (int(alive.sum()), len(self.best) > len(longer) + 1)
            if len(longer) < self.max_moves and bound > (self.solved, False):
                self._from(rows[alive], there[alive], reached[alive], longer)
