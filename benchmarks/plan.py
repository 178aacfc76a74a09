"""How good and how fast the plan is, on lengths like CoMT's. Needs no data, no GPU, a few seconds.

    python benchmarks/plan.py [--worlds 2 4 8 16 32 64] [--budgets 4096 8192 16384 32768] [--out FILE.json]

Lengths: 1-6 spans, 200-1,500 text tokens and 100-1,300 visual tokens per image, all uniform; one input image,
one helper image per span (helpers cost vision patches, not sequence tokens); 16 samples per rank and step.
Cost: Qwen2.5-VL-7B (`CostModel()`).

Per (world, budget), over all steps:
    at_lower_bound   share of steps with ceil(tokens / (world * budget)) micro-batches
    micro_batches    run / lower bound, summed over the run
    imbalance        sum of the dearest rank's cost / sum of the mean cost, over all micro-steps of the run
    fill             tokens / (micro-batches * world * budget)
    padding_tokens   always 0: bins are packed end to end
    ms_per_step      time to plan one step on this machine
    fixed_count      what is common today: samples shuffled, dealt to the ranks in equal numbers, micro-batches
                     of as many samples as are sure to fit (budget / longest); `padding` is the padding to the
                     longest sample of each micro-batch that such batches bring, as a share of all tokens run
    next_fit         shuffled, dealt to the ranks in equal numbers, each rank fills bins one after the other;
                     ranks with fewer bins wait
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np

from ilvr_ds.data.plan import CostModel, Lengths, Planner, epoch_order, run_imbalance, step_samples

PER_RANK = 16


def comt_like(n: int, seed: int) -> Lengths:
    """Columns of an index with CoMT-like lengths."""
    rng = np.random.default_rng(seed)
    spans, text, image = rng.integers(1, 7, n), rng.integers(200, 1501, n), rng.integers(100, 1301, n)
    helpers = np.array([rng.integers(100, 1301, s).sum() for s in spans])
    return Lengths(tokens=text + image, patches=4 * (image + helpers), supervised=text // 2, spans=spans)


def measure(world: int, budget: int, steps: int, seed: int) -> dict:
    """One row: `steps` planned steps of `PER_RANK` samples per rank, and the two baselines on the same steps."""
    per_step = PER_RANK * world
    lengths = comt_like(steps * per_step, seed)
    planner = Planner(lengths, seed=seed, samples_per_step=per_step, token_budget=budget, world=world)
    begin = time.perf_counter()
    plans = [planner.step(step) for step in range(steps)]
    seconds = time.perf_counter() - begin
    run = sum(plan.n_micro for plan in plans)
    order, costs = epoch_order(len(lengths), seed, 0), CostModel()(lengths)
    sets = [order[np.isin(order, step_samples(order, s, per_step))] for s in range(steps)]  # shuffled, same steps
    return {
        "world": world,
        "budget": budget,
        "steps": steps,
        "samples_per_step": per_step,
        "at_lower_bound": sum(plan.n_micro == plan.lower_bound for plan in plans) / steps,
        "micro_batches": run / sum(plan.lower_bound for plan in plans),
        "imbalance": run_imbalance(plans),
        "fill": sum(plan.totals.tokens for plan in plans) / (run * world * budget),
        "padding_tokens": 0,
        "ms_per_step": 1e3 * seconds / steps,
        "fixed_count": fixed_count(sets, lengths, costs, world, budget),
        "next_fit": next_fit(sets, lengths, costs, world, budget),
    }


def fixed_count(sets: list[np.ndarray], lengths: Lengths, costs: np.ndarray, world: int, budget: int) -> dict:
    """Micro-batches of equal numbers of samples, every one sure to fit after padding."""
    size = max(1, budget // int(lengths.tokens.max()))
    dearest = mean = tokens = padded = micro = 0
    for numbers in sets:
        for chunk in np.split(numbers.reshape(world, -1), range(size, PER_RANK, size), axis=1):  # (world, size)
            paid = costs[chunk].sum(axis=1)
            dearest, mean, micro = dearest + paid.max(), mean + paid.mean(), micro + 1
            tokens += lengths.tokens[chunk].sum()
            padded += (lengths.tokens[chunk].max(axis=1) * chunk.shape[1]).sum()
    return {
        "samples_per_micro_batch": size,
        "micro_batches": micro / _lower_bound(sets, lengths, world, budget),
        "imbalance": float(dearest / mean),
        "padding": float(1 - tokens / padded),
    }


def next_fit(sets: list[np.ndarray], lengths: Lengths, costs: np.ndarray, world: int, budget: int) -> dict:
    """Greedy packing in the order samples come, as streaming packers do."""
    dearest = mean = micro = 0
    for numbers in sets:
        ranks = []
        for own in numbers.reshape(world, -1):
            bins, room = [], 0
            for n in own:
                if lengths.tokens[n] > room:
                    bins.append(0)
                    room = budget
                bins[-1] += int(costs[n])
                room -= lengths.tokens[n]
            ranks.append(bins)
        longest = max(map(len, ranks))
        paid = np.array([bins + [0] * (longest - len(bins)) for bins in ranks])  # (world, n_micro)
        dearest, mean, micro = dearest + paid.max(axis=0).sum(), mean + paid.mean(axis=0).sum(), micro + longest
    return {"micro_batches": micro / _lower_bound(sets, lengths, world, budget), "imbalance": float(dearest / mean)}


def _lower_bound(sets: list[np.ndarray], lengths: Lengths, world: int, budget: int) -> int:
    return sum(-(-int(lengths.tokens[numbers].sum()) // (world * budget)) for numbers in sets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--budgets", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--samples", type=int, default=25_600, help="samples per row, at least 25 steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    rows = []
    for budget in args.budgets:
        for world in args.worlds:
            steps = min(400, max(25, args.samples // (PER_RANK * world)))
            rows.append(measure(world, budget, steps, args.seed))
            print(json.dumps(rows[-1]), flush=True)
    if args.out:
        about = {"date": time.strftime("%Y-%m-%d"), "machine": platform.processor() or platform.machine()}
        args.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
