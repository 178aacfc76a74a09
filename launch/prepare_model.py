#!/usr/bin/env python
"""Make a published model ready for training: its three latent tokens, and one layout for everything after it.

  python launch/prepare_model.py --model Qwen2.5-VL-7B-Instruct --out models/qwen2_5_vl_7b
  python launch/prepare_model.py --model ILVR-checkpoint --out models/ilvr --rows 152064

`--model` is a folder in Hugging Face's layout (config.json, model*.safetensors, tokenizer.json): a published
Qwen2.5-VL model, whose latent rows are made (mean of the trained rows plus small noise from --seed; see
ilvr_ds/model/latent_rows.py), or a published ILVR checkpoint (names of transformers 4.50, 151,668 rows), whose latent
rows are kept as trained. Tables are never made shorter. Memory of a few chunks, weights keep their dtype.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="the published model folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist yet (or be empty)")
    parser.add_argument("--latent-size", type=int, default=8, metavar="K", help="latents in a span (default: 8)")
    parser.add_argument("--rows", type=int, help="make embedding and head this long (default: as they are)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise in new rows (default: 0)")
    options = parser.parse_args(arguments)

    from ilvr_ds.errors import IlvrError
    from ilvr_ds.model.latent_rows import prepare_folder

    try:
        written = prepare_folder(
            options.model, options.out, latent_size=options.latent_size, seed=options.seed, rows=options.rows
        )
    except (IlvrError, OSError) as error:
        print(f"prepare_model: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: written" if written else f"{options.out}: already there, made with the same settings")
    return 0


if __name__ == "__main__":
    sys.exit(main())
