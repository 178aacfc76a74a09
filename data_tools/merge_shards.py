"""Finish a folder of shards that several jobs of build_shards built.

    python -m data_tools.merge_shards --out OUT                   all jobs wrote into OUT
    python -m data_tools.merge_shards --out OUT PART0 PART1 ...   each job wrote into a folder of its own

Every shard is read again and must be what its job wrote. Missing shards, a shard in two parts, other settings or
another input are refused, and nothing is finished then. The output has the bytes of a build by one job. PARTs are left
as they are (OUT shares their files by hard links where the file system has them).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from data_tools.build_shards import report
from ilvr_ds.data.build import check_reject_fraction
from ilvr_ds.data.build_merge import merge
from ilvr_ds.errors import IlvrError


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_tools.merge_shards", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("parts", type=Path, nargs="*", metavar="PART", help="a job's own folder")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to finish")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="threads (default: one per CPU)")
    add("--max-reject-fraction", type=float, default=1.0, metavar="F",
        help="stop with an error above this share of the records (default: 1.0)")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error("--workers: 1 or more")

    def check_rejects(reasons: Counter[str], records: int) -> None:
        check_reject_fraction(reasons, records, options.max_reject_fraction, {})

    try:
        with tqdm(unit="shard", desc="merge_shards", file=sys.stderr) as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            manifest = merge(options.out, options.parts, options.workers, show, check_rejects)
    except IlvrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return report(options.out, manifest)


if __name__ == "__main__":
    sys.exit(main())
