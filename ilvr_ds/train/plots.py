"""Pictures of a run: loss terms, teacher drift, learning rate."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ilvr_ds.errors import IlvrError
from ilvr_ds.train.metrics import read_metrics


def plot_runs(runs: dict[str, Path], out: Path) -> None:
    """Draw loss terms and teacher drift over steps of one or more runs (label -> run folder) into a PNG.

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
    styles = ["-", "--", ":", "-."]
    for (key, title), ax in zip(panels, axes.flat, strict=True):
        for (label, run), style in zip(runs.items(), styles, strict=False):
            lines = read_metrics(run)
            ax.plot([line["step"] for line in lines], [line[key] for line in lines], style, label=label, linewidth=1.6)
        ax.set_title(title)
        ax.set_xlabel("optimizer step")
        ax.grid(alpha=0.3)
    axes.flat[0].legend()
    temporary = out.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    temporary.replace(out)
    plt.close(figure)
