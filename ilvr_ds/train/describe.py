"""What a run would be, without starting it: the schedule, and how the first epoch packs on a number of ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

from ilvr_ds.config import Recipe
from ilvr_ds.data.plan import Lengths, Planner, run_imbalance
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.train.loop import Schedule, cost_model


def describe(recipe: Recipe, world: int) -> dict[str, Any]:
    """Schedule and plan of a recipe on `world` ranks, as plain values.

    Raises:
        ConfigError, ShardError, PlanError: as a run would, before anything is trained.
    """
    shards = ShardSet.from_config(recipe.data)
    lengths = Lengths.from_index(shards.index)
    planner = Planner(
        lengths, seed=recipe.run.seed, samples_per_step=recipe.data.samples_per_step,
        token_budget=recipe.data.token_budget, world=world, cost=cost_model(recipe), sample_id=shards.sample_id,
    )  # fmt: skip
    plans = [planner.step(step) for step in range(planner.steps_per_epoch)]
    micro_batches = sum(plan.n_micro for plan in plans)
    tokens = sum(plan.totals.tokens for plan in plans)
    return {
        "recipe": recipe.name,
        "samples": len(lengths),
        **dataclasses.asdict(Schedule.of(recipe, len(lengths))),
        "world": world,
        "tokens_per_epoch": tokens,
        "longest_sample_tokens": int(lengths.tokens.max()),
        "spans_per_sample": float(lengths.spans.mean()),
        "micro_batches_per_step": micro_batches / len(plans),
        "steps_at_lower_bound": sum(plan.n_micro == plan.lower_bound for plan in plans) / len(plans),
        "fill": tokens / (micro_batches * world * recipe.data.token_budget),
        "imbalance": run_imbalance(plans),
    }
