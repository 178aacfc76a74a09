"""Histograms of a shard folder as a PNG."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

from ilvr_ds.data.stats import COLUMNS, IndexStats
from ilvr_ds.errors import IlvrError

INK, SOFT, PAPER = "#20242c", "#737a86", "#f6f5f1"
COLOURS = {
    "tokens": "#4b5563", "supervised": "#2f8f52", "image_tokens": "#2f7fd3", "helper_tokens": "#7c4dff",
    "spans": "#7c4dff", "candidates": "#7c4dff",
}  # fmt: skip


def plot_stats(report: dict[str, Any], stats: IndexStats, out: Path) -> None:
    """Draw the columns and, where there are plans, micro-batches and imbalance over the number of ranks.

    Raises IlvrError if matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise IlvrError("--png needs matplotlib: pip install 'ilvr_ds[report]'")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plans = [plan for plan in report["plans"] if not plan["too_long"]]
    rows = 3 if plans else 2
    figure, axes = plt.subplots(rows, 3, figsize=(13, 3.4 * rows), layout="constrained", facecolor=PAPER)
    figure.get_layout_engine().set(w_pad=0.14, h_pad=0.14)
    for name, ax in zip(COLOURS, axes.flat, strict=False):
        _histogram(ax, stats, name)
    if plans:
        for key, title, ax in (
            ("micro_batches_per_step", "micro-batches per step and rank", axes[2, 0]),
            ("imbalance", "imbalance: dearest rank / mean", axes[2, 1]),
            ("fill", "fill: share of the token budget used", axes[2, 2]),
        ):
            _over_world(ax, plans, key, title)
    figure.suptitle(
        f"{report['folder']}   {report['samples']:,} samples   {report['bytes'] / 1e9:.2f} GB   "
        f"{report['spans']:,} spans", fontsize=14, fontweight="bold", color=INK, x=0.01, ha="left",
    )  # fmt: skip
    temporary = out.with_name(f"{out.name}.tmp")
    figure.savefig(temporary, format="png", dpi=110)
    temporary.replace(out)
    plt.close(figure)


def _style(ax: Any, title: str) -> None:
    ax.set_title(title, fontsize=10.5, color=INK, loc="left")
    ax.set_facecolor("white")
    ax.tick_params(colors=SOFT, labelsize=8.5)
    for side, spine in ax.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#d9dce1")
    ax.grid(axis="y", color="#eceef1")
    ax.set_axisbelow(True)


def _histogram(ax: Any, stats: IndexStats, name: str) -> None:
    counts = stats.columns[name]
    _style(ax, COLUMNS[name])
    if counts.samples == 0:
        ax.text(0.5, 0.5, "none", ha="center", color=SOFT, transform=ax.transAxes)
        ax.set_yticks([])
        return
    edges, bins = counts.bins(48)
    widths = [b - a for a, b in itertools.pairwise(edges)]
    left = [edge - 0.5 for edge in edges[:-1]]  # whole numbers stand in the middle of their bars
    ax.bar(left, bins, widths, align="edge", color=COLOURS[name], edgecolor="white", linewidth=0.5)
    for share, text in ((0.5, "half"), (0.99, "99 %")):
        value = counts.quantile(share)
        ax.axvline(value, color=INK, linewidth=0.9, linestyle=":")
        ax.annotate(
            f"{text}: {value:,}", (value, 1), (3, -4), xycoords=("data", "axes fraction"),
            textcoords="offset points", fontsize=8, color=INK, va="top", rotation=90,
        )  # fmt: skip
    ax.set_ylim(0, max(bins) * 1.35)
    ax.xaxis.get_major_locator().set_params(integer=True)


def _over_world(ax: Any, plans: list[dict[str, Any]], key: str, title: str) -> None:
    _style(ax, title)
    for budget in sorted({plan["token_budget"] for plan in plans}):
        chosen = sorted((plan["world"], plan[key]) for plan in plans if plan["token_budget"] == budget)
        ax.plot(*zip(*chosen, strict=True), "o-", linewidth=1.6, markersize=5, label=f"budget {budget:,}")
    ax.set_xscale("log", base=2)
    worlds = sorted({plan["world"] for plan in plans})
    ax.set_xticks(worlds, [str(world) for world in worlds])
    ax.minorticks_off()
    ax.set_xlabel("ranks", fontsize=9, color=SOFT)
    ax.legend(fontsize=8.5, frameon=False)
