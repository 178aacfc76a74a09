"""Command-line arguments that several tools share."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """An argument's type: a whole number of 1 or more."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: 1 or more")
    return value


def add_shard_folder(parser: argparse.ArgumentParser) -> None:
    """The shard folder to look at, and where to keep what comes over the network."""
    parser.add_argument("folder", metavar="DIR", help="folder written by build_shards, or its URL")
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="for a URL: local folder to keep what was fetched (a recipe's data.cache_dir)",
    )
