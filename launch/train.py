#!/usr/bin/env python
"""Train ILVR, either stage, from a recipe.

  one rank        python launch/train.py --recipe launch/recipes/tiny_frozenlake.yaml
  one node        deepspeed --num_gpus 8 launch/train.py --recipe RECIPE.yaml
  several nodes   sbatch --nodes=4 launch/slurm/train.sbatch RECIPE.yaml     (or deepspeed --hostfile ...)

Any key of the recipe can be set behind it: optimizer.lr=5e-6 run.dir=runs/a. The same command again
resumes from the newest checkpoint in run.dir. Exit codes: 0 done, 1 something to mend (the message says
what), 75 stopped by a signal with a checkpoint written.
"""

import argparse
import json
import os
import sys
import warnings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, metavar="FILE.yaml", help="the run; see launch/recipes/")
    parser.add_argument(
        "--describe",
        type=int,
        metavar="RANKS",
        help="print schedule and packing on RANKS ranks as JSON; trains nothing",
    )
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; read from the environment")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides, values in YAML")
    args = parser.parse_args()

    # Imported here, not above: decoding workers import this file again and need none of it.
    import torch

    if not torch.cuda.is_available():  # DeepSpeed picks its device when it is first imported
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed calls collectives by names torch has renamed: one warning per call, nothing a user can do.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")

    from ilvr_ds.config import load_recipe
    from ilvr_ds.errors import IlvrError
    from ilvr_ds.train.describe import describe
    from ilvr_ds.train.loop import train

    try:
        recipe = load_recipe(args.recipe, args.overrides)
        if args.describe is not None:
            print(json.dumps(describe(recipe, max(1, args.describe)), indent=1))
            return 0
        return train(recipe)
    except IlvrError as error:
        rank = os.environ.get("RANK", "0")
        print(f"train: {error}" if rank == "0" else f"train (rank {rank}): {error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
