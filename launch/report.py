#!/usr/bin/env python
"""Did it learn? Accuracy per level of trained and untrained models and of the best plan without looking, and a picture.

    python launch/report.py --results trained=results/a untrained=results/b --training-maps puzzles/records.jsonl \
        --runs "stage 1"=runs/a/stage1 "stage 2"=runs/a/stage2 --plot report.png

--results are folders of launch/evaluate.py --task vsp on one file; the first is the one the others are compared with.
Exit code 0 if it solves more maps than each of them, 1 otherwise.
"""

import argparse
import json
import sys
from pathlib import Path

from ilvr_ds.data.frozenlake import read_maps
from ilvr_ds.errors import ConfigError, IlvrError
from ilvr_ds.inference.scoring.blind import score_blind
from ilvr_ds.inference.scoring.intervals import wilson
from ilvr_ds.train.plots import plot_runs

Counts = dict[str, tuple[int, int]]  # level -> (correct, total)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--results", nargs="+", required=True, type=_labelled, metavar="LABEL=DIR", help="folders with a results.json")
    add("--training-maps", type=Path, metavar="FILE.jsonl", help="choose the best plan without looking on these maps")
    add("--test-maps", type=Path, metavar="FILE.jsonl", help="and score it on these: the file that was evaluated")
    add("--runs", nargs="+", default=[], type=_labelled, metavar="LABEL=DIR", help="run folders whose curves to draw")
    add("--plot", type=Path, metavar="FILE.png", help="draw loss terms, teacher drift and accuracy per level")
    args = parser.parse_args(arguments)
    if (args.training_maps is None) != (args.test_maps is None):
        parser.error("--training-maps and --test-maps go together")
    for option, pairs in (("--results", args.results), ("--runs", args.runs)):
        if len(dict(pairs)) < len(pairs):
            parser.error(f"{option}: every label once")
    try:
        rows = {label: _counts(folder) for label, folder in args.results}
        if args.training_maps is not None:
            blind = score_blind(read_maps(args.training_maps), read_maps(args.test_maps))
            rows["best plan without looking"] = {level: (s.correct, s.total) for level, s in blind.items()}
        print(_table(rows))
        if args.plot is not None:
            shares = {label: {g: (c / t, *wilson(c, t)) for g, (c, t) in row.items()} for label, row in rows.items()}
            plot_runs(dict(args.runs), args.plot, shares)
            print(f"drawn: {args.plot}")
    except IlvrError as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    first, *others = (sum(correct for correct, _ in row.values()) for row in rows.values())
    return 0 if all(first > other for other in others) else 1


def _labelled(text: str) -> tuple[str, Path]:
    label, separator, folder = text.partition("=")
    if not separator or not label or not folder:
        raise argparse.ArgumentTypeError(f"{text!r}: write LABEL=DIR")
    return label, Path(folder)


def _counts(folder: Path) -> Counts:
    file = folder / "results.json"
    try:
        groups = json.loads(file.read_text(encoding="utf-8"))["summary"]["groups"]
        counts = {group: (row["correct"], row["total"]) for group, row in groups.items()}
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; `launch/evaluate.py --out {folder}` writes it") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: not results of launch/evaluate.py ({error!r})") from error
    if not counts:
        raise ConfigError(f"{file}: has no levels; only results of --task vsp can be compared here")
    return counts


def _table(rows: dict[str, Counts]) -> str:
    levels = list(dict.fromkeys(level for row in rows.values() for level in row))
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"  {level:>9}" for level in [*levels, "all"]) + "  95 % interval"]
    for label, row in rows.items():
        correct, total = (sum(pair[i] for pair in row.values()) for i in (0, 1))
        cells = [f"{100 * row[level][0] / row[level][1]:7.1f} %" if level in row else "        -" for level in levels]
        low, high = wilson(correct, total)
        cells.append(f"{100 * correct / total:7.1f} %")
        lines.append(f"{label:<{width}}  {'  '.join(cells)}  {100 * low:.1f} to {100 * high:.1f} %")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
