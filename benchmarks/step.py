#!/usr/bin/env python
"""Samples per second of the packed step against the published schedule, in one process, alternating.

Baseline "published": the same code, model, engine and samples, but one sample per micro-batch and the
teacher run once per span plus once on the same inputs, as the published training code does. "one_sample":
the same without the repeated teacher, so that the gain of packing and of the single teacher show apart.
Batches are decoded beforehand in all three: the claim is about the step, not about decoding.

    python benchmarks/step.py --model DIR --shards DIR [--recipe launch/recipes/tiny_frozenlake.yaml]
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from published_schedule import one_each, repeated_teacher

from ilvr_ds.config import load_recipe
from ilvr_ds.data.packing import pack
from ilvr_ds.data.plan import Lengths, Planner
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.engine.build import build_engine
from ilvr_ds.engine.distributed import init_distributed
from ilvr_ds.engine.step import train_step
from ilvr_ds.objective.alignment import AlignmentObjective


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="launch/recipes/tiny_frozenlake.yaml", help="default: the tiny recipe")
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--shards", required=True, help="shards folder")
    parser.add_argument(
        "--steps", type=int, default=8, help="measured steps of each kind (after one warm-up step each)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load_recipe(args.recipe, [f"model.path={args.model}", f"data.shards={args.shards}", *args.overrides])
    _, world, device = init_distributed()
    shards, tokenizer = ShardSet.open(Path(args.shards)), ChatTokenizer.from_folder(Path(args.model))
    planner = Planner(
        Lengths.from_index(shards.index), seed=recipe.run.seed, samples_per_step=recipe.data.samples_per_step,
        token_budget=recipe.data.token_budget, world=world,
    )  # fmt: skip
    objective = AlignmentObjective.from_recipe(recipe, tokenizer.vocabulary, device)
    engine = build_engine(objective, recipe)

    seconds: dict[str, list[float]] = {"packed": [], "one_sample": [], "published": []}
    padding = micro_batches = samples = tokens = spans = 0
    for step in range(args.steps + 1):
        plan = planner.step(step % planner.steps_per_epoch)
        numbers = [[n for n in bins[0]] for bins in plan.bins]
        loaded = {n: shards.load_sample(n, tokenizer) for micro in numbers for n in micro}

        def packed(group, plan=plan, loaded=loaded):
            return pack(
                [loaded[n] for n in group], tokenizer.vocabulary, recipe.latent.size,
                totals=plan.totals, reduction=recipe.loss.reduction,
            )  # fmt: skip

        whole = [packed(micro) for micro in numbers]
        single = [packed(group) for group in one_each(numbers)]
        padding += sum(len(b.input_ids) for b in whole) - sum(len(s.input_ids) for s in loaded.values())
        samples, tokens = samples + plan.totals.samples, tokens + plan.totals.tokens
        spans, micro_batches = spans + plan.totals.spans, micro_batches + plan.n_micro

        begin = time.perf_counter()
        train_step(engine, whole, lr=1e-5, noise_seed=step)
        seconds["packed"].append((time.perf_counter() - begin) / len(loaded))

        begin = time.perf_counter()
        train_step(engine, single, lr=1e-5, noise_seed=step)
        seconds["one_sample"].append((time.perf_counter() - begin) / len(loaded))

        begin = time.perf_counter()
        with repeated_teacher(objective.teacher):
            train_step(engine, single, lr=1e-5, noise_seed=step)
        seconds["published"].append((time.perf_counter() - begin) / len(loaded))

    median = {kind: statistics.median(values[1:]) for kind, values in seconds.items()}
    print(
        json.dumps(
            {
                "benchmark": "step",
                "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
                "torch": torch.__version__,
                "device": str(device), "world": world, "zero_stage": engine.stage, "dtype": recipe.model.dtype,
                "samples": samples, "tokens": tokens, "spans_per_sample": spans / samples,
                "token_budget": recipe.data.token_budget, "micro_batches_per_step": micro_batches / (args.steps + 1),
                "padding_tokens": padding,
                "samples_per_s": {kind: 1 / value for kind, value in median.items()},
                "packed_over_published": median["published"] / median["packed"],
                "packed_over_one_sample": median["one_sample"] / median["packed"],
            },
            indent=1,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
