"""Build a folder of shards from a JSONL file of records.

    python -m data_tools.build_shards --input train.jsonl --format ilvr --tokenizer MODEL_FOLDER --out data/train

Records that cannot be used go to OUT/rejects.jsonl with the reason; the others are built. Run the same command
again after an interruption: finished shards are kept. Exit code 1 when nothing was built, when more than
--max-reject-fraction of the records were refused, or on an error (the message says which).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from ilvr_ds.data.assistant_view import ASSISTANT_VIEWS
from ilvr_ds.data.build import BuildSettings, build
from ilvr_ds.data.formats.jsonl import read_lines
from ilvr_ds.data.images import MAX_PIXELS, MIN_PIXELS, ImageSettings
from ilvr_ds.data.index import REJECTS_NAME
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.errors import IlvrError


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except IlvrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    settings = BuildSettings(
        source=options.input,
        source_format=options.format,
        image_root=options.image_root or options.input.parent,
        out=options.out,
        latent_size=options.latent_size,
        samples_per_shard=options.samples_per_shard,
        max_tokens=options.max_tokens,
        assistant=options.assistant,
        images=ImageSettings(
            input_min_pixels=options.input_min_pixels,
            input_max_pixels=options.input_max_pixels,
            helper_min_pixels=options.helper_min_pixels,
            helper_max_pixels=options.helper_max_pixels,
        ),
    )
    tokenizer = ChatTokenizer.from_folder(options.tokenizer)
    total = sum(1 for _ in read_lines(settings.source))
    with tqdm(total=total, unit="record", desc="build_shards", file=sys.stderr) as bar:
        manifest = build(settings, tokenizer, bar.update)
    megabytes = sum(entry.bytes for entry in manifest.shards) / 1e6
    print(f"{settings.out}: {manifest.built} samples in {len(manifest.shards)} shards, {megabytes:.1f} MB")
    print(f"{manifest.rejected} of {total} records rejected")
    for reason, count in manifest.reject_reasons.items():
        print(f"  {reason}: {count}")
    if manifest.rejected:
        print(f"  each with its reason in {settings.out / REJECTS_NAME}")
    if manifest.built == 0:
        print("error: nothing was built", file=sys.stderr)
        return 1
    if manifest.rejected > options.max_reject_fraction * total:
        share = manifest.rejected / total
        print(
            f"error: {share:.2%} rejected, --max-reject-fraction is {options.max_reject_fraction:.2%}", file=sys.stderr
        )
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_tools.build_shards", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--input", type=Path, required=True, metavar="FILE.jsonl", help="one record per line")
    add("--format", choices=("ilvr", "mirage"), default="ilvr", help="schema of the records (default: ilvr)")
    add("--image-root", type=Path, metavar="DIR", help="where relative image paths start (default: the input's folder)")
    add("--tokenizer", type=Path, required=True, metavar="DIR", help="folder with the model's tokenizer.json")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--latent-size", type=int, default=8, metavar="K", help="latents per helper image (default: 8)")
    add("--samples-per-shard", type=int, default=1000, metavar="N", help="input records per shard (default: 1000)")
    add(
        "--assistant", choices=ASSISTANT_VIEWS, default="interleaved",
        help="what of the assistant turn is kept: all, its text only, its final answer only (default: interleaved)",
    )  # fmt: skip
    add("--max-tokens", type=int, metavar="N", help="refuse records with a longer sequence (default: no limit)")
    for role in ("input", "helper"):
        add(f"--{role}-min-pixels", type=int, default=MIN_PIXELS, metavar="N", help=f"smaller {role} images grow")
        add(f"--{role}-max-pixels", type=int, default=MAX_PIXELS, metavar="N", help=f"larger {role} images shrink")
    add("--max-reject-fraction", type=float, default=1.0, metavar="F", help="exit 1 above this share (default: 1.0)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
