#!/usr/bin/env python
"""Say whether two runs are the same, whether the loss fell and the teacher moved, and draw both."""

import argparse
import sys
from pathlib import Path

from ilvr_ds.errors import IlvrError
from ilvr_ds.train.compare import first_difference, summarise
from ilvr_ds.train.plots import plot_runs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders; with two, they must be equal step by step")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw loss terms and teacher drift")
    args = parser.parse_args()
    failed = False
    for run in args.runs:
        s = summarise(run)
        speed = f"{s.samples_per_s:.1f} samples/s, {s.tokens_per_s:.0f} tokens/s"
        print(f"{run}: {s.steps} steps, {s.step_s:.2f} s/step, {speed}")
        for term in ("loss", "ce", "align"):
            fell = s.last[term] < s.first[term]
            failed |= not fell
            print(f"  {term:<6} {s.first[term]:8.4f} -> {s.last[term]:8.4f}  {'fell' if fell else 'DID NOT FALL'}")
        moved = s.teacher_drift > 0
        failed |= not moved
        print(
            f"  teacher drift {s.teacher_drift:.3e}  {'the teacher follows' if moved else 'THE TEACHER DID NOT MOVE'}"
        )
    for other in args.runs[1:]:
        difference = first_difference(args.runs[0], other)
        failed |= difference is not None
        print(f"{args.runs[0]} and {other}: {'equal in every step, bit for bit' if difference is None else difference}")
    if args.plot:
        plot_runs({run.name: run for run in args.runs}, args.plot)
        print(f"drawn: {args.plot}")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except IlvrError as error:
        sys.exit(f"compare_runs: {error}")
