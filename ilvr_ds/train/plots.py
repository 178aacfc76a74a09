"""Pictures of runs: loss terms, teacher drift, and learning rate or accuracy."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ilvr_ds.errors import IlvrError
from ilvr_ds.train.metrics import read_metrics

Share = tuple[float, float, float]  # accuracy and the ends of its 95 % interval, 0 to 1


def plot_runs(runs: Mapping[str, Path], out: Path, accuracy: Mapping[str, Mapping[str, Share]] | None = None) -> None:
    """Draw loss terms and teacher drift over steps of one or more runs (label -> run folder) into a PNG.

    `accuracy`: label -> group -> share; drawn as bars with their intervals in the place of the learning rate. The
    first label is drawn in front of all eyes, the others as what it is to be compared with.
    Raises IlvrError if matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise IlvrError("drawing needs matplotlib: pip install 'ilvr_ds[report]'")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        ("ce", "cross-entropy"),
        ("align", "alignment  1 − mean cos"),
        ("teacher_drift", "teacher drift  ‖t − s‖ / ‖s‖"),
        ("lr", "learning rate"),
    ]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained")
    for (key, title), ax in zip(panels[: 3 if accuracy else 4], axes.flat, strict=False):
        _draw_curves(ax, runs, key)
        ax.set_title(title)
    axes.flat[0].set_yscale("log")  # falls by a hundred, the interesting part at the end
    axes.flat[0].legend()
    if accuracy:
        _draw_bars(axes.flat[3], accuracy)
    temporary = out.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    temporary.replace(out)
    plt.close(figure)


def _draw_curves(ax: Any, runs: Mapping[str, Path], key: str) -> None:
    styles = ["-", "--", ":", "-."]
    for number, (label, run) in enumerate(runs.items()):
        lines = read_metrics(run)
        values = [line[key] for line in lines]
        if not any(values):  # a term that this run does not have
            continue
        ax.plot(
            [line["step"] for line in lines],
            values,
            styles[number % len(styles)],
            label=label,
            linewidth=1.6,
        )
    ax.set_xlabel("optimizer step")
    ax.grid(alpha=0.3)


def _draw_bars(ax: Any, accuracy: Mapping[str, Mapping[str, Share]]) -> None:
    groups = list(dict.fromkeys(group for shares in accuracy.values() for group in shares))
    width = 0.8 / len(accuracy)
    greys = ["0.45", "0.7", "0.85"]
    for number, (label, shares) in enumerate(accuracy.items()):
        places = [groups.index(group) + (number - (len(accuracy) - 1) / 2) * width for group in shares]
        tops = [100 * share for share, _, _ in shares.values()]
        errors = [
            [100 * (share - low) for share, low, _ in shares.values()],
            [100 * (high - share) for share, _, high in shares.values()],
        ]
        colour = "C0" if number == 0 else greys[(number - 1) % len(greys)]
        ax.bar(places, tops, width, yerr=errors, label=label, color=colour, error_kw={"elinewidth": 1, "capsize": 2})
    ax.set_xticks(range(len(groups)), groups)
    ax.set_ylim(0, 100)
    ax.set_ylabel("solved, %  (95 % interval)")
    ax.set_title("unseen maps")
    ax.grid(alpha=0.3, axis="y")
    ax.legend()
