"""Make the tiny model folder: Qwen2.5-VL's architecture with about a million random parameters.

    python launch/make_tiny_model.py --out models/tiny --seed 0

Writes weights (float32 safetensors), config, tokenizer, chat template and image settings. The folder
appears under its name only when it is complete; the same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ilvr_ds.errors import IlvrError
from ilvr_ds.model.tiny import build_tiny_model


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist yet (or be empty)")
    parser.add_argument("--seed", type=int, default=0, help="draws the weights (default: 0)")
    options = parser.parse_args(arguments)
    try:
        written = build_tiny_model(options.out, options.seed)
    except IlvrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if written:
        print(f"{options.out}: tiny model written")
    else:
        print(f"{options.out}: already there, made with the same settings; nothing to do")
    return 0


if __name__ == "__main__":
    sys.exit(main())
