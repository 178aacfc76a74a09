"""Numbers about a folder of shards, and about the steps that training on it would take.

    python -m data_tools.shard_stats DIR --token-budget 8192 --samples-per-step 64 --world 8 64 --png stats.png

Reads the index alone (memory-mapped, any size). With --token-budget and --samples-per-step it plans --steps steps,
evenly spread over the first epoch, for every number of ranks in --world: those that training with this seed and shuffle
window takes, with the costs of Qwen2.5-VL-7B (a recipe's own: `python launch/train.py --recipe R --describe WORLD`).
Exit code 1 on an error.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_tools.arguments import add_shard_folder, positive
from data_tools.stats_plot import plot_stats
from ilvr_ds.data.index import write_text
from ilvr_ds.data.order import WINDOW, PlanSource
from ilvr_ds.data.plan import Planner, imbalances, steps_per_epoch
from ilvr_ds.data.remote_folder import RemoteSettings
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.data.stats import COLUMNS, IndexStats, ValueCounts, read_stats
from ilvr_ds.errors import ConfigError, IlvrError, ShardError

BARS = "▁▂▃▄▅▆▇█"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if (options.token_budget is None) != (options.samples_per_step is None):
        parser.error("--token-budget and --samples-per-step go together")
    try:
        _run(options)
    except IlvrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    for path in (options.json, options.png):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{path}: the folder {path.parent} does not exist")
    shards = ShardSet.open(options.folder, RemoteSettings(options.cache_dir))
    manifest, index = shards.manifest, shards.index
    if len(index) == 0:
        raise ShardError(f"{options.folder}: no samples; see {options.folder}/rejects.jsonl")
    with tqdm(total=len(index), unit="sample", desc="shard_stats", file=sys.stderr, leave=False) as bar:
        stats = read_stats(index, bar.update)
    report: dict[str, Any] = {
        "folder": options.folder,
        "samples": len(index),
        "shards": len(manifest.shards),
        "bytes": sum(entry.bytes for entry in manifest.shards),
        "rejected": manifest.rejected,
        "reject_reasons": manifest.reject_reasons,
        "latent_size": manifest.latent_size,
        "spans": stats.spans_total,
        "samples_without_spans": stats.without_spans,
        "columns": {name: counts.summary() for name, counts in stats.columns.items()},
        "plans": [],
    }
    print(_text(report, stats))
    if options.token_budget is not None:
        sources = shards.plan_sources(helpers=not options.no_helpers)
        for budget in options.token_budget:
            for world in options.world:
                report["plans"].append(plan_facts(sources, stats, budget, world, options))
        print(_plan_text(report["plans"], options.samples_per_step))
    if options.json is not None:
        write_text(options.json, json.dumps(report, indent=1) + "\n")
        print(options.json)
    if options.png is not None:
        plot_stats(report, stats, options.png)
        print(options.png)


def plan_facts(
    sources: list[PlanSource], stats: IndexStats, budget: int, world: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Plan up to `options.steps` steps, evenly spread over the first epoch; a sample over the budget: `too_long`."""
    samples_per_step = options.samples_per_step
    facts: dict[str, Any] = {"token_budget": budget, "world": world, "samples_per_step": samples_per_step}
    facts["steps_per_epoch"] = steps_per_epoch(sum(len(source.lengths) for source in sources), samples_per_step)
    facts["too_long"] = stats.columns["tokens"].above(budget)
    if facts["too_long"]:
        return facts
    planner = Planner(
        sources, seed=options.seed, samples_per_step=samples_per_step, token_budget=budget, world=world,
        window=options.shuffle_window,
    )  # fmt: skip
    chosen = np.unique(np.linspace(0, planner.steps_per_epoch - 1, options.steps).astype(np.int64))
    bar = tqdm(chosen.tolist(), unit="step", desc=f"world {world}", file=sys.stderr, leave=False)
    plans = [planner.step(step) for step in bar]
    micro = sum(plan.n_micro for plan in plans)
    tokens = sum(plan.totals.tokens for plan in plans)
    return {
        **facts,
        "steps_planned": len(plans),
        "micro_batches_per_step": micro / len(plans),
        "steps_at_lower_bound": sum(plan.n_micro == plan.lower_bound for plan in plans) / len(plans),
        "imbalance": imbalances(plans).total,
        "imbalance_text": imbalances(plans).text,
        "imbalance_vision": imbalances(plans).vision,
        "fill": tokens / (micro * world * budget),
        "tokens_per_step": tokens / len(plans),
    }


def _text(report: dict[str, Any], stats: IndexStats) -> str:
    lines = [
        f"{report['folder']}: {report['samples']:,} samples, {report['shards']:,} shards, "
        f"{report['bytes'] / 1e9:.3f} GB, {report['rejected']:,} records rejected",
        f"{report['spans']:,} spans of {report['latent_size']} latents, "
        f"{report['samples_without_spans']:,} samples without a span",
        "",
        f"{'':40}{'total':>16}{'mean':>10}{'least':>8}{'half':>8}{'90 %':>8}{'99 %':>8}{'99.9 %':>8}{'most':>9}",
    ]
    for name, title in COLUMNS.items():
        counts = stats.columns[name]
        if counts.samples:
            levels = "".join(f"{counts.quantile(share):>8}" for share in (0.5, 0.9, 0.99, 0.999))
            total = f"{counts.total:,}" if name != "candidates" else "–"
            row = f"{title:40}{total:>16}{counts.mean:>10.1f}{counts.least:>8}{levels}{counts.greatest:>9}"
            lines.append(f"{row}  {_bars(counts)}")
    return "\n".join(lines)


def _bars(counts: ValueCounts) -> str:
    """The histogram in a line of text."""
    _, bins = counts.bins(24)
    most = max(bins)
    return "".join(" " if n == 0 else BARS[(len(BARS) - 1) * n // most] for n in bins)


def _plan_text(plans: list[dict[str, Any]], samples_per_step: int) -> str:
    lines = [
        "",
        f"Steps of {samples_per_step} samples:",
        f"{'budget':>8}{'world':>7}{'steps/epoch':>13}{'micro-batches':>15}{'at the bound':>14}{'fill':>8}"
        f"{'imbalance':>11}{'text':>8}{'vision':>8}",
    ]
    for plan in plans:
        row = f"{plan['token_budget']:>8}{plan['world']:>7}{plan['steps_per_epoch']:>13,}"
        if plan["too_long"]:
            lines.append(f"{row}  cannot be planned: {plan['too_long']:,} samples are longer than the budget")
        else:
            lines.append(
                f"{row}{plan['micro_batches_per_step']:>15.2f}{plan['steps_at_lower_bound']:>14.1%}"
                f"{plan['fill']:>8.1%}{plan['imbalance']:>11.4f}"
                f"{plan['imbalance_text']:>8.4f}{plan['imbalance_vision']:>8.4f}"
            )
    lines.append("fill: tokens of the budget used; imbalance: the dearest rank's cost over the mean (1 is perfect)")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_tools.shard_stats", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add_shard_folder(parser)
    add("--token-budget", type=positive, nargs="+", metavar="N", help="data.token_budget: tokens of a micro-batch")
    add("--samples-per-step", type=positive, metavar="N", help="data.samples_per_step: over all ranks")
    add("--world", type=positive, nargs="+", default=[1, 8], metavar="N", help="numbers of ranks (default: 1 8)")
    add("--steps", type=positive, default=100, metavar="N", help="steps to plan (default: 100)")
    add("--seed", type=int, default=0, help="run.seed (default: 0)")
    window = f"data.shuffle_window (default: {WINDOW})"
    add("--shuffle-window", type=positive, default=WINDOW, metavar="N", help=window)
    add("--no-helpers", action="store_true", help="helper images cost nothing: a stage that does not look at them")
    add("--json", type=Path, metavar="FILE.json", help="write everything here")
    add("--png", type=Path, metavar="FILE.png", help="draw histograms here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
