"""Runs of benchmarks/frozenlake.py -> means over seeds with intervals -> a Markdown table. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ilvr_ds.inference.scoring.intervals import t_interval, wilson

REFERENCE = "ilvr"  # differences are taken against it, seed by seed


def summarise(runs: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> dict[str, Any]:
    """Per method: mean accuracy over seeds with the half width of its t interval, over all and per level; the mean
    difference to `REFERENCE` over the seeds both have; tokens, samples and steps of a run; what was decoded.

    Shares are of 1. A half width is None with one seed.
    """
    by_method = {name: {run["seed"]: run for run in runs if run["method"] == name} for name in methods}
    reference = by_method.get(REFERENCE, {})
    summary = {}
    for name, seeds in by_method.items():
        if not seeds:
            continue
        own = list(seeds.values())
        paired = [run["accuracy"] - reference[s]["accuracy"] for s, run in seeds.items() if s in reference]
        stages = [[stage[key] for stage in run["stages"]] for run in own for key in ("tokens", "samples", "steps")]
        totals = [sum(stage) for stage in stages]
        questions = sum(run["total"] for run in own)
        summary[name] = {
            "seeds": sorted(seeds),
            "accuracy": _pair(t_interval([run["accuracy"] for run in own])),
            "groups": {
                group: _pair(t_interval([run["groups"][group]["accuracy"] for run in own]))
                for group in own[0]["groups"]
            },
            "minus_reference": _pair(t_interval(paired)) if paired and name != REFERENCE else None,
            "tokens": sum(totals[0::3]) / len(own),
            "samples": sum(totals[1::3]) / len(own),
            "steps": sum(totals[2::3]) / len(own),
            "training_s": sum(run["training_s"] for run in own) / len(own),
            "spans_per_answer": sum(run["details"].get("spans", 0) for run in own) / questions,
            "unterminated": sum(run["details"].get("unterminated", 0) for run in own) / questions,
        }
    return summary


def markdown(tree: Mapping[str, Any]) -> str:
    """The table, the blind row first, and what is equal between its rows."""
    groups = sorted(tree["blind"])
    head = [
        "method",
        "all",
        *groups,
        "minus ILVR",
        "spans an answer",
        "unterminated",
        "M tokens",
        "samples",
        "steps",
        "s",
    ]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    correct, total = (sum(row[key] for row in tree["blind"].values()) for key in ("correct", "total"))
    cells = [_share(correct, total), *(_share(tree["blind"][g]["correct"], tree["blind"][g]["total"]) for g in groups)]
    plans = ", ".join(f"{group}: {tree['blind'][group]['plan']}" for group in groups)
    lines.append(f"| best blind plan ({plans}) | {' | '.join(cells)} | {' | '.join([''] * 7)} |")
    for name, row in tree["summary"].items():
        cells = [
            tree["methods"][name],
            _mean(row["accuracy"]),
            *(_mean(row["groups"][group]) if group in row["groups"] else "" for group in groups),
            "" if row["minus_reference"] is None else _mean(row["minus_reference"], sign=True),
            f"{row['spans_per_answer']:.2f}",
            f"{100 * row['unterminated']:.1f} %",
            f"{row['tokens'] / 1e6:.2f}",
            f"{row['samples']:.0f}",
            f"{row['steps']:.0f}",
            f"{row['training_s']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Mean over {len(tree['seeds'])} seed(s) ± half width of the 95 % t interval, in per cent of the test maps; "
        "differences are paired by seed. The blind plan's interval is Wilson's.",
        "",
        "Single runs (Wilson):",
        "",
    ]
    for run in tree["runs"]:
        found = ", ".join(
            f"{g} {_share(run['groups'][g]['correct'], run['groups'][g]['total'])}" for g in run["groups"]
        )
        lines.append(f"- {run['method']}, seed {run['seed']}: {_share(run['correct'], run['total'])}; {found}")
    lines += [f"- failed: {failure}" for failure in tree["failed"]]
    return "\n".join(lines) + "\n"


def _pair(interval: tuple[float, float | None]) -> dict[str, float | None]:
    return {"mean": interval[0], "half_width_95": interval[1]}


def _mean(pair: Mapping[str, float | None], sign: bool = False) -> str:
    mean = f"{100 * pair['mean']:+.1f}" if sign else f"{100 * pair['mean']:.1f}"
    return mean if pair["half_width_95"] is None else f"{mean} ± {100 * pair['half_width_95']:.1f}"


def _share(correct: int, total: int) -> str:
    low, high = wilson(correct, total)
    return f"{100 * correct / total:.1f} ({100 * low:.1f} to {100 * high:.1f})"
