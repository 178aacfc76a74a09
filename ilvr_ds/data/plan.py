"""Which samples an optimizer step trains on, and which rank runs which of them when.

Everything is a pure function of (index, seed, samples per step, shuffle window, weights) for the samples of a step,
and of (token budget, world) besides for the bins: nothing is carried from step to step. So resuming needs a step
number only, a change of the world size keeps the samples of every step, every loss denominator is known before the
forward pass, and the number of steps is exact.

    planner = Planner([PlanSource(lengths, shards)], seed=0, samples_per_step=64, token_budget=8192, world=8)
    for step in range(start, total):
        plan = planner.step(step, rank)
        for numbers in plan.of_rank(rank):      # one micro-batch after the other
            ...

Parts: `order` (which sample comes when), `blend` (how many of each source), `balance` (bins under the budget),
`groups` (bins of a few ranks each, alike in cost), `level` (bins of a group alike in cost).

Every rank puts all samples into bins, so all know the number of micro-steps; then the ranks are cut into small groups,
alike in text and vision, and a rank levels its own only: two milliseconds for 16,384 samples, and no message.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ilvr_ds.data.balance import ascending, bin_sums, fit_step
from ilvr_ds.data.blend import Blend
from ilvr_ds.data.cost import CostModel
from ilvr_ds.data.groups import alike, group_size
from ilvr_ds.data.lengths import Lengths, check_fits
from ilvr_ds.data.level import level_group
from ilvr_ds.data.order import WINDOW, PlanSource, SourceOrder

# Raised with every change of which samples a step holds: a run resumed under another number would see some samples
# twice and others not at all. Version 1 shuffled whole epochs.
PLAN_VERSION = 2
_ROUNDS = 24  # of levelling
_NONE = np.iinfo(np.int64).max  # behind every sample number
_TIGHT = 0.97  # share of the budget in use from which few exchanges are possible, and it takes longer to find them


@dataclass(frozen=True)
class StepTotals:
    """Sums over all samples of one optimizer step: the denominators of its loss."""

    samples: int
    supervised: int
    spans: int
    tokens: int


@dataclass(frozen=True)
class Costs:
    """Costs in units of 1000 FLOPs, or ratios of them."""

    total: float  # of text and vision together
    text: float
    vision: float


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step, for all ranks or for a group of them."""

    step: int  # 0-based, over all epochs
    epoch: int  # 0-based
    ranks: range  # the ranks whose bins are here
    bins: tuple[tuple[tuple[int, ...], ...], ...]  # [micro-step][rank of `ranks`] -> ascending numbers, maybe none
    costs: tuple[tuple[int, ...], ...]  # [micro-step][rank of `ranks`], in units of 1000 FLOPs
    totals: StepTotals  # of all ranks
    lower_bound: int  # micro-batches per rank nobody can go below: ceil(tokens / (world * budget))
    dearest: Costs  # sums over micro-steps of the dearest of `ranks`
    mean: Costs  # sums over micro-steps of the mean of `ranks`

    @property
    def n_micro(self) -> int:
        """Micro-batches of every rank."""
        return len(self.bins)

    @property
    def imbalance(self) -> float:
        """Dearest over mean of the total cost: 1 is perfect, 1.05 means ranks idle 5 % of the time."""
        return run_imbalance([self])

    def of_rank(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """The bins of one of `ranks`, in the order it runs them."""
        return tuple(micro[self.ranks.index(rank)] for micro in self.bins)

    def costs_of_rank(self, rank: int) -> tuple[int, ...]:
        """The costs of these bins."""
        return tuple(micro[self.ranks.index(rank)] for micro in self.costs)


def steps_per_epoch(samples: int, samples_per_step: int) -> int:
    """ceil(samples / samples_per_step), samples of all sources together.

    With one source the last step of an epoch takes what is left. With several, steps are always whole: an epoch is
    then as many steps as the sources have samples for, of which each gives its share by weight, going through its own
    epochs: a source with twice its share by size is seen twice.
    """
    return -(-samples // samples_per_step)


class Planner:
    """Plans any step of a run. Picklable; keeps nothing but the shuffle windows it was last asked for.

    Sample numbers count through all sources: the first source's rows, then the second's.

    Args:
        sources: what is blended, one or more; plain `Lengths` stand for one source in memory.
        seed: of the order, 0 to 2**63 - 1.
        samples_per_step: over all ranks.
        token_budget: tokens per rank and micro-batch, at most.
        window: samples shuffled together (`order`).
        sample_id: names a sample number in error messages (`ShardSet.sample_id`).

    Raises:
        PlanError: on creation, if a sample exceeds the budget (see `check_fits`) or a weight is not above 0.
    """

    def __init__(
        self,
        sources: Lengths | Sequence[PlanSource],
        *,
        seed: int,
        samples_per_step: int,
        token_budget: int,
        world: int,
        window: int = WINDOW,
        cost: CostModel | None = None,
        sample_id: Callable[[int], str] = str,
    ):
        if min(samples_per_step, world, token_budget) < 1:
            raise ValueError("samples_per_step, world and token_budget are 1 or more")
        if isinstance(sources, Lengths):
            sources = [PlanSource(sources)]
        self.samples = sum(len(source.lengths) for source in sources)
        self.samples_per_step = samples_per_step
        self.token_budget = token_budget
        self.world = world
        self.steps_per_epoch = steps_per_epoch(self.samples, samples_per_step)
        self._blend = Blend([source.weight for source in sources])
        self._cost = cost or CostModel()
        self._orders, self._starts, start, self.longest = [], [], 0, 0  # longest: tokens
        for number, source in enumerate(sources):
            self.longest = max(self.longest, check_fits(source.lengths, token_budget, _shifted(sample_id, start)))
            self._orders.append(SourceOrder(source, number=number, seed=seed, window=window))
            self._starts.append(start)
            start += len(source.lengths)

    def samples_of(self, step: int) -> tuple[np.ndarray, Lengths]:
        """Sample numbers (s,) int64, ascending, and lengths of a step, 1 <= s <= samples_per_step; for any world.

        A number occurs twice where a source's epoch ends within the step or its share is more than it holds.
        """
        numbers, lengths = self._unsorted(step)
        ascend = ascending(numbers)
        return numbers[ascend], lengths.take(ascend)

    def _unsorted(self, step: int) -> tuple[np.ndarray, Lengths]:
        """`samples_of` in the order of the windows: bins do not need another."""
        numbers, lengths = [], []
        for order, start, (position, count) in zip(self._orders, self._starts, self._taken(step), strict=True):
            if count:
                rows, of_rows = order.take(position, count)
                numbers.append(rows + start)
                lengths.append(of_rows)
        if len(numbers) == 1:
            return numbers[0], lengths[0]
        return np.concatenate(numbers), Lengths.join(lengths)

    def _taken(self, step: int) -> list[tuple[int, int]]:
        """Of every source: the position in its endless order where the step begins, and how many it takes."""
        if len(self._orders) == 1:
            epoch, within = divmod(step, self.steps_per_epoch)
            begin = within * self.samples_per_step
            return [(epoch * self.samples + begin, min(self.samples_per_step, self.samples - begin))]
        before = self._blend.taken(step * self.samples_per_step)
        after = self._blend.taken((step + 1) * self.samples_per_step)
        return [(a, b - a) for a, b in zip(before, after, strict=True)]

    def step(self, step: int, rank: int | None = None) -> StepPlan:
        """The plan of a step (0-based, over all epochs); the same however one got there.

        Args:
            rank: plan for this rank and its group only: the same bins, in a fraction of the time.
        """
        numbers, lengths = self._unsorted(step)
        return plan_step(
            numbers,
            lengths,
            self._cost,
            token_budget=self.token_budget,
            world=self.world,
            rank=rank,
            step=step,
            epoch=step // self.steps_per_epoch,
        )


def _shifted(sample_id: Callable[[int], str], start: int) -> Callable[[int], str]:
    return lambda row: sample_id(start + row)


def plan_step(
    numbers: np.ndarray,
    lengths: Lengths,
    cost: CostModel,
    *,
    token_budget: int,
    world: int,
    rank: int | None = None,
    step: int = 0,
    epoch: int = 0,
) -> StepPlan:
    """Plan one step.

    Args:
        numbers: (s,) int64: the step's samples.
        lengths: of these samples.
        rank: whose group to plan for; None: all ranks.

    Raises:
        PlanError: a sample longer than the budget.
    """
    slots, lower_bound = fit_step(lengths, token_budget, world)  # (n_micro * world, width)
    n_micro = len(slots) // world
    text, vision = cost.text(lengths), cost.vision(lengths)  # (n,)
    tokens = int(lengths.tokens.sum())
    rounds = _ROUNDS if tokens < _TIGHT * len(slots) * token_budget else 3 * _ROUNDS
    if world == 1:
        rounds = 0  # one rank waits for nobody
    size = group_size(world, n_micro)
    asked = range(world // size) if rank is None else range(rank // size, rank // size + 1)
    groups = alike(bin_sums(text, slots), bin_sums(vision, slots), world // size, asked)  # (asked, n_micro * size)
    bins: list[list[tuple[int, ...]]] = [[] for _ in range(n_micro)]
    paid = np.zeros((3, n_micro, len(asked) * size), np.int64)
    for place, group in enumerate(groups):
        rows, own, loads = level_group(slots[group], lengths.tokens, text, vision, token_budget, rounds)
        order = ascending(loads[0]).reshape(n_micro, size)  # neighbours in cost run together
        order[1::2] = order[1::2, ::-1].copy()  # the dearest of one micro-step is the cheapest of the next
        paid[:, :, place * size : (place + 1) * size] = loads[:, order]
        samples = np.sort(np.append(numbers[rows], _NONE)[own], axis=1)[order].tolist()
        for micro, members in zip(bins, samples, strict=True):
            micro += [tuple(row[: bisect_left(row, _NONE)]) for row in members]
    return StepPlan(
        step=step,
        epoch=epoch,
        ranks=range(asked.start * size, asked.stop * size),
        bins=tuple(tuple(micro) for micro in bins),
        costs=tuple(tuple(micro) for micro in paid[0].tolist()),
        totals=StepTotals(
            samples=len(numbers),
            supervised=int(lengths.supervised.sum()),
            spans=int(lengths.spans.sum()),
            tokens=tokens,
        ),
        lower_bound=lower_bound,
        dearest=Costs(*map(int, paid.max(axis=2).sum(axis=1))),
        mean=Costs(*map(float, paid.mean(axis=2).sum(axis=1))),
    )


def imbalances(plans: Sequence[StepPlan]) -> Costs:
    """Imbalance of many steps together: sum of the dearest ranks' costs / sum of the mean costs, of each kind."""

    def ratio(kind: str) -> float:
        mean = sum(getattr(plan.mean, kind) for plan in plans)
        return sum(getattr(plan.dearest, kind) for plan in plans) / mean if mean else 1.0

    return Costs(total=ratio("total"), text=ratio("text"), vision=ratio("vision"))


def run_imbalance(plans: Sequence[StepPlan]) -> float:
    """`imbalances` of text and vision together."""
    return imbalances(plans).total
