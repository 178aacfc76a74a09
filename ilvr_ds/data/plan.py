"""Which samples an optimizer step trains on, and which rank runs which of them when.

Everything is a pure function of (index, seed, epoch, samples per step, token budget, world): nothing is
carried from step to step. So resuming needs a step number only, a change of the world size keeps the samples
of every step, every loss denominator is known before the forward pass, and the number of steps is exact.

    planner = Planner(lengths, seed=0, samples_per_step=64, token_budget=8192, world=8)
    for step in range(start, total):
        plan = planner.step(step)
        for bins in plan.bins:          # micro-steps; bins[rank] are sample numbers
            ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ilvr_ds.data.balance import partition
from ilvr_ds.errors import PlanError

PATCHES_PER_TOKEN = 4  # 2x2 patches become one visual token


# ------------------------------------------------------------------------------------------- lengths
@dataclass(frozen=True)
class Lengths:
    """The columns of the shard index that planning needs, one entry per sample."""

    tokens: np.ndarray  # (n,) int64: length of the sequence, input images and latent pads included
    patches: np.ndarray  # (n,) int64: vision patches of input and helper images
    supervised: np.ndarray  # (n,) int64: tokens with a label
    spans: np.ndarray  # (n,) int64: latent spans

    @classmethod
    def from_index(cls, index: np.ndarray) -> Lengths:
        """From the structured array of a shard set (`ilvr_ds.data.index`)."""
        column = {name: np.asarray(index[name], dtype=np.int64) for name in index.dtype.names}
        return cls(
            tokens=column["text_tokens"] + column["image_tokens"],
            patches=PATCHES_PER_TOKEN * (column["image_tokens"] + column["helper_tokens"]),
            supervised=column["supervised"],
            spans=column["spans"],
        )

    def __len__(self) -> int:
        return len(self.tokens)


# -------------------------------------------------------------------------------------------- cost
@dataclass(frozen=True)
class CostModel:
    """FLOPs a sample costs in one step, as integers so that every rank finds the same bins.

    cost = per_token * L + per_token_squared * L^2 + per_patch * P + per_supervised * N, in units of 1000 FLOPs.

    The default is Qwen2.5-VL-7B with a frozen vision tower, a teacher and gradient checkpointing.
    """

    per_token: int = 65_252_884_480  # FLOPs; see from_dims
    per_token_squared: int = 1_003_520
    per_patch: int = 1_270_415_360
    per_supervised: int = 3_269_984_256

    @classmethod
    def from_dims(
        cls,
        *,
        hidden: int,
        layers: int,
        intermediate: int,
        kv_width: int,
        vocabulary: int,
        vision_hidden: int,
        vision_layers: int,
        vision_intermediate: int,
        recompute: bool = True,
        train_vision: bool = False,
    ) -> CostModel:
        """From the model's dimensions; one multiplication and one addition are two FLOPs.

        A decoder layer has 2h^2 (query, output) + 2h*kv (key, value) + 3h*m (MLP) weights, two FLOPs each per
        token, and causal attention costs 2 L^2 h. The student runs it forward, backward (twice the forward)
        and, with gradient checkpointing (`recompute`), forward again; the teacher once. The vision tower runs
        forward once, for both. Its attention windows are 64 patches; the few layers with full attention are
        counted as windows too, since the index does not keep the size of each image (an error of a few %).

        Args:
            kv_width: key-value heads x head size.
        """
        passes = 3 + int(recompute) + 1
        weights = 2 * hidden * hidden + 2 * hidden * kv_width + 3 * hidden * intermediate
        vision_passes = 3 + int(recompute) if train_vision else 1
        vision_weights = 4 * vision_hidden * vision_hidden + 3 * vision_hidden * vision_intermediate
        return cls(
            per_token=2 * weights * layers * passes,
            per_token_squared=2 * hidden * layers * passes,
            per_patch=vision_passes * vision_layers * (2 * vision_weights + 4 * 64 * vision_hidden),
            per_supervised=2 * hidden * vocabulary * 3,
        )

    def __call__(self, lengths: Lengths) -> np.ndarray:
        """(n,) int64 cost of every sample, in units of 1000 FLOPs."""
        flops = self.per_token * lengths.tokens + self.per_token_squared * lengths.tokens**2
        flops = flops + self.per_patch * lengths.patches + self.per_supervised * lengths.supervised
        return flops // 1000


# -------------------------------------------------------------------------------------------- plan
@dataclass(frozen=True)
class StepTotals:
    """Sums over all samples of one optimizer step: the denominators of its loss."""

    samples: int
    supervised: int
    spans: int
    tokens: int


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step."""

    step: int  # 0-based, over all epochs
    epoch: int  # 0-based
    bins: tuple[tuple[tuple[int, ...], ...], ...]  # [micro-step][rank] -> ascending sample numbers, maybe none
    totals: StepTotals
    lower_bound: int  # micro-batches per rank nobody can go below: ceil(tokens / (world * budget))
    dearest: int  # sum over micro-steps of the dearest rank's cost
    mean: float  # sum over micro-steps of the ranks' mean cost

    @property
    def n_micro(self) -> int:
        """Micro-batches of every rank."""
        return len(self.bins)

    @property
    def imbalance(self) -> float:
        """Dearest over mean: 1 is perfect, 1.05 means ranks idle 5 % of the time."""
        return self.dearest / self.mean if self.mean else 1.0

    def of_rank(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """The bins of one rank, in the order it runs them."""
        return tuple(bins[rank] for bins in self.bins)


def epoch_order(samples: int, seed: int, epoch: int) -> np.ndarray:
    """(samples,) int64: the order of an epoch. Philox keyed by (seed, epoch), so any epoch stands alone."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(samples)


def steps_per_epoch(samples: int, samples_per_step: int) -> int:
    """ceil(samples / samples_per_step): the last step of an epoch takes what is left."""
    return -(-samples // samples_per_step)


def step_samples(order: np.ndarray, step_in_epoch: int, samples_per_step: int) -> np.ndarray:
    """(s,) int64, ascending: the samples of one step, 1 <= s <= samples_per_step. Knows nothing of ranks."""
    begin = step_in_epoch * samples_per_step
    if not 0 <= begin < len(order):
        raise ValueError(f"step {step_in_epoch} of an epoch of {steps_per_epoch(len(order), samples_per_step)} steps")
    return np.sort(order[begin : begin + samples_per_step])


def check_fits(lengths: Lengths, token_budget: int, sample_id: Callable[[int], str] = str) -> None:
    """Raise PlanError if there is nothing to plan or a sample is longer than a micro-batch may be.

    Args:
        sample_id: names a sample number in the message (`ShardSet.sample_id`).
    """
    if len(lengths) == 0:
        raise PlanError("the shard index is empty; see rejects.jsonl beside the shards for why records were refused")
    long = np.flatnonzero(lengths.tokens > token_budget)
    if len(long):
        named = ", ".join(f"{sample_id(int(n))!r} ({lengths.tokens[n]} tokens)" for n in long[:5])
        raise PlanError(
            f"{len(long)} of {len(lengths)} samples are longer than data.token_budget={token_budget}: {named}"
            f"{', ...' if len(long) > 5 else ''}. Raise data.token_budget to {int(lengths.tokens.max())} or more, "
            "or rebuild the shards with --max-tokens"
        )


def split_step(
    numbers: np.ndarray, lengths: Lengths, costs: np.ndarray, token_budget: int, world: int
) -> tuple[list[list[np.ndarray]], int]:
    """Split one step's samples into `[micro-step][rank]` arrays; also returns the lower bound.

    Starts at the lower bound ceil(tokens / (world * budget)) and takes one micro-step more where
    `balance.partition` finds no way.
    """
    tokens = lengths.tokens[numbers]
    lower_bound = max(1, -(-int(tokens.sum()) // (world * token_budget)))
    # With one bin per sample every bin fits, so the search ends.
    for n_micro in range(lower_bound, max(lower_bound, len(numbers)) + 1):
        bins = partition(tokens, costs[numbers], n_micro * world, token_budget, world)
        if bins is not None:
            return [[numbers[b] for b in bins[m * world : (m + 1) * world]] for m in range(n_micro)], lower_bound
    raise PlanError(
        f"no bins of {token_budget} tokens for samples {numbers.tolist()}; check_fits() names those too long"
    )


class Planner:
    """Plans any step of a run. Picklable; keeps nothing but the order of the epoch it was last asked for.

    Args:
        seed: of the epochs' order, 0 to 2**63 - 1.
        samples_per_step: over all ranks.
        token_budget: tokens per rank and micro-batch, at most.
        sample_id: names a sample number in error messages (`ShardSet.sample_id`).

    Raises:
        PlanError: on creation, if a sample exceeds the budget (see `check_fits`).
    """

    def __init__(
        self,
        lengths: Lengths,
        *,
        seed: int,
        samples_per_step: int,
        token_budget: int,
        world: int,
        cost: CostModel | None = None,
        sample_id: Callable[[int], str] = str,
    ):
        if min(samples_per_step, world, token_budget) < 1:
            raise ValueError("samples_per_step, world and token_budget are 1 or more")
        check_fits(lengths, token_budget, sample_id)
        self.lengths = lengths
        self.seed = seed
        self.samples_per_step = samples_per_step
        self.token_budget = token_budget
        self.world = world
        self.steps_per_epoch = steps_per_epoch(len(lengths), samples_per_step)
        self._costs = (cost or CostModel())(lengths)  # (n,)
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def step(self, step: int) -> StepPlan:
        """The plan of a step (0-based, over all epochs); the same however one got there."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._epoch != epoch:
            self._epoch, self._order = epoch, epoch_order(len(self.lengths), self.seed, epoch)
        return plan_step(
            step_samples(self._order, within, self.samples_per_step),
            self.lengths,
            self._costs,
            token_budget=self.token_budget,
            world=self.world,
            step=step,
            epoch=epoch,
        )


def plan_step(
    numbers: np.ndarray,
    lengths: Lengths,
    costs: np.ndarray,
    *,
    token_budget: int,
    world: int,
    step: int = 0,
    epoch: int = 0,
) -> StepPlan:
    """Plan one step.

    Args:
        numbers: (s,) int64, ascending: the step's samples.
        costs: (n,) int64: cost of every sample of the index (`CostModel`).

    Raises:
        PlanError: a sample longer than the budget.
    """
    bins, lower_bound = split_step(numbers, lengths, costs, token_budget, world)
    paid = np.array([[int(costs[b].sum()) for b in micro] for micro in bins])  # (n_micro, world)
    return StepPlan(
        step=step,
        epoch=epoch,
        bins=tuple(tuple(tuple(b.tolist()) for b in micro) for micro in bins),
        totals=StepTotals(
            samples=len(numbers),
            supervised=int(lengths.supervised[numbers].sum()),
            spans=int(lengths.spans[numbers].sum()),
            tokens=int(lengths.tokens[numbers].sum()),
        ),
        lower_bound=lower_bound,
        dearest=int(paid.max(axis=1).sum()),
        mean=float(paid.mean(axis=1).sum()),
    )


def run_imbalance(plans: Sequence[StepPlan]) -> float:
    """Imbalance of many steps together: sum of the dearest ranks' costs over the sum of the mean costs."""
    mean = sum(plan.mean for plan in plans)
    return sum(plan.dearest for plan in plans) / mean if mean else 1.0
