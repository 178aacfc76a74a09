"""What a run would be, without starting it: the schedule, and how the first epoch packs on a number of ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

from ilvr_ds.config import Recipe
from ilvr_ds.data.blended_shards import open_shards
from ilvr_ds.data.plan import Planner, imbalances
from ilvr_ds.objective.build import reads_helpers
from ilvr_ds.train.cost import cost_model
from ilvr_ds.train.loop import Schedule

_STEPS = 2000  # planned at most; numbers of an epoch with more are those of its first part


def describe(recipe: Recipe, world: int) -> dict[str, Any]:
    """Schedule and plan of a recipe on `world` ranks, as plain values.

    Raises:
        ConfigError, ShardError, PlanError: as a run would, before anything is trained.
    """
    shards = open_shards(recipe.data)
    planner = Planner(
        shards.plan_sources(helpers=reads_helpers(recipe)), window=recipe.data.shuffle_window, seed=recipe.run.seed,
        samples_per_step=recipe.data.samples_per_step,
        token_budget=recipe.data.token_budget, world=world, cost=cost_model(recipe), sample_id=shards.sample_id,
    )  # fmt: skip
    plans = [planner.step(step) for step in range(min(_STEPS, planner.steps_per_epoch))]
    micro_batches = sum(plan.n_micro for plan in plans)
    tokens, samples, spans = (
        sum(getattr(plan.totals, name) for plan in plans) for name in ("tokens", "samples", "spans")
    )
    balance = imbalances(plans)
    return {
        "recipe": recipe.name,
        "samples": len(shards),
        **dataclasses.asdict(Schedule.of(recipe, len(shards))),
        "world": world,
        "steps_planned": len(plans),
        "tokens_per_epoch": round(tokens * planner.steps_per_epoch / len(plans)),
        "longest_sample_tokens": planner.longest,
        "spans_per_sample": spans / samples,
        "micro_batches_per_step": micro_batches / len(plans),
        "steps_at_lower_bound": sum(plan.n_micro == plan.lower_bound for plan in plans) / len(plans),
        "fill": tokens / (micro_batches * world * recipe.data.token_budget),
        "imbalance": balance.total,
        "imbalance_text": balance.text,
        "imbalance_vision": balance.vision,
    }
