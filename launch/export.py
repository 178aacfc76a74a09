#!/usr/bin/env python
"""Write the model of a training checkpoint as a folder that stock transformers loads.

  python launch/export.py --run runs/a --out models/a                          the newest checkpoint
  python launch/export.py --checkpoint runs/a/checkpoints/step-00000500 --out models/a-500 --dtype float32
  python launch/export.py --run runs/a --out models/a-teacher --teacher        the moving average

    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained("models/a", dtype="auto")

(`AutoProcessor` works too where torchvision is installed: transformers needs it for its video part.) One process, no
GPU, memory of a few chunks; the checkpoint may come from any number of ranks. The folder appears under its name only
when it is complete. It says how large the run's input images were, so that generation needs no --max-pixels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="a checkpoint: .../step-NUMBER")
    where.add_argument("--run", type=Path, metavar="FOLDER", help="a run folder: its newest complete checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist yet (or be empty)")
    parser.add_argument("--teacher", action="store_true", help="the moving average in place of the student's decoder")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: as trained")
    parser.add_argument("--model", type=Path, help="the model folder the run started from (default: its recipe's)")
    options = parser.parse_args(arguments)

    import torch

    from ilvr_ds.engine.checkpoint import latest_checkpoint
    from ilvr_ds.engine.export import export_checkpoint
    from ilvr_ds.errors import CheckpointError, IlvrError

    try:
        checkpoint = options.checkpoint or latest_checkpoint(options.run / "checkpoints")
        if checkpoint is None:
            raise CheckpointError(f"{options.run / 'checkpoints'}: no complete checkpoint there")
        written = export_checkpoint(
            checkpoint,
            options.out,
            teacher=options.teacher,
            dtype=None if options.dtype is None else getattr(torch, options.dtype),
            model=options.model,
        )
    except (IlvrError, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    what = "the teacher" if options.teacher else "the student"
    print(f"{options.out}: {what} of {checkpoint}" if written else f"{options.out}: already there; nothing to do")
    return 0


if __name__ == "__main__":
    sys.exit(main())
