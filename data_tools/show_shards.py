"""Look at samples as training sees them: an HTML page, and a PNG contact sheet.

    python -m data_tools.show_shards DIR --tokenizer MODEL_FOLDER --first 8 --html look.html --sheet look.png

Both show images, text, latent spans and tokens; supervised tokens are green, latent pads violet, image pads blue.
The page is one file without scripts. Hover over a token for its id. Exit code 1 on an error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_tools.arguments import add_shard_folder, positive
from ilvr_ds.data.preview import Preview, find_ids, read_preview
from ilvr_ds.data.preview_html import page_title, write_page
from ilvr_ds.data.preview_sheet import contact_sheet
from ilvr_ds.data.remote_folder import RemoteSettings
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.errors import ConfigError, IlvrError, ShardError

MOST_ON_A_SHEET = 100  # rows of a PNG; a page has no such limit


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.html is None and options.sheet is None:
        parser.error("nothing to write: give --html FILE.html, --sheet FILE.png or both")
    try:
        _run(options)
    except IlvrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    shards = ShardSet.open(options.folder, RemoteSettings(options.cache_dir))
    if len(shards) == 0:
        raise ShardError(f"{options.folder}: no samples; see {options.folder}/rejects.jsonl")
    tokenizer = ChatTokenizer.from_folder(options.tokenizer)
    shards.require(tokenizer, shards.manifest.latent_size)
    numbers = choose(shards, options.ids, options.sample, options.first, options.count)
    if options.sheet is not None and len(numbers) > MOST_ON_A_SHEET:
        raise ConfigError(
            f"--sheet: {len(numbers)} samples, at most {MOST_ON_A_SHEET} fit a sheet; use --html for more"
        )
    for path in (options.html, options.sheet):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{path}: the folder {path.parent} does not exist")
    title = page_title(options.folder, len(numbers))
    about = (
        f"of {len(shards):,} · {shards.manifest.latent_size} latents per span · "
        f"tokenizer {tokenizer.vocabulary.fingerprint[:8]} · built from {shards.manifest.source}"
    )
    if options.html is not None:
        temporary = options.html.with_name(f"{options.html.name}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(write_page(_previews(shards, numbers, tokenizer), title, about, options.image_side))
        temporary.replace(options.html)
        print(f"{options.html}: {len(numbers)} samples, {options.html.stat().st_size / 1e6:.1f} MB")
    if options.sheet is not None:
        sheet = contact_sheet(list(_previews(shards, numbers, tokenizer)), title, about)
        temporary = options.sheet.with_name(f"{options.sheet.name}.tmp")
        sheet.save(temporary, "PNG")
        temporary.replace(options.sheet)
        print(f"{options.sheet}: {len(numbers)} samples, {sheet.width}x{sheet.height} pixels")


def choose(shards: ShardSet, ids: list[str] | None, sample: int | None, first: int | None, count: int) -> list[int]:
    """Row numbers: of these ids, or `count` drawn with the seed `sample`, or the `first`, or the first `count`.

    Raises ShardError naming ids that are not there.
    """
    if ids is not None:
        bar = tqdm(range(len(shards)), unit="sample", desc="looking for ids", file=sys.stderr, leave=False)
        return find_ids(shards, ids, bar)
    if sample is not None:
        drawn = np.random.default_rng(sample).choice(len(shards), size=min(count, len(shards)), replace=False)
        return sorted(drawn.tolist())
    return list(range(min(first if first is not None else count, len(shards))))


def _previews(shards: ShardSet, numbers: list[int], tokenizer: ChatTokenizer) -> Iterator[Preview]:
    for number in tqdm(numbers, unit="sample", desc="show_shards", file=sys.stderr, leave=False):
        yield read_preview(shards, number, tokenizer)


def _seed(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text}: 0 or more")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_tools.show_shards", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add_shard_folder(parser)
    add("--tokenizer", type=Path, required=True, metavar="DIR", help="folder with the model's tokenizer.json")
    add("--html", type=Path, metavar="FILE.html", help="write a page here")
    add("--sheet", type=Path, metavar="FILE.png", help="write a contact sheet here")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--first", type=positive, metavar="N", help="the first N samples")
    which.add_argument("--sample", type=_seed, metavar="SEED", help="--count samples drawn with this seed")
    which.add_argument("--ids", nargs="+", metavar="ID", help="the samples with these ids (reads until all are found)")
    add("--count", type=positive, default=12, metavar="N", help="samples to draw (default: 12)")
    add("--image-side", type=positive, default=640, metavar="PIXELS", help="longest side on the page (default: 640)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
