"""Count the tokens of existing shards again, for another tokenizer or another number of latents per span.

    python -m data_tools.reindex_shards DIR --tokenizer MODEL_FOLDER [--latent-size K]

Only index.npy and manifest.json change; the tars hold text and images, no token ids. Exit code 1 on an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ilvr_ds.data.build import PROGRESS
from ilvr_ds.data.images import merged_tokens
from ilvr_ds.data.index import MANIFEST_NAME, write_index, write_text
from ilvr_ds.data.sample_format import count_tokens
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.errors import IlvrError


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_tools.reindex_shards", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder written by build_shards")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="folder with tokenizer.json")
    parser.add_argument("--latent-size", type=int, metavar="K", help="latents per helper image (default: as it is)")
    options = parser.parse_args(arguments)
    if options.latent_size is not None and options.latent_size < 1:
        parser.error("--latent-size: 1 or more")
    try:
        reindex(options.folder, ChatTokenizer.from_folder(options.tokenizer), options.latent_size)
    except IlvrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def reindex(folder: Path, tokenizer: ChatTokenizer, latent_size: int | None) -> None:
    """Rewrite the index and the manifest of a shard folder. Raises ShardError when the folder is damaged."""
    shards = ShardSet.open(folder)
    latent_size = shards.manifest.latent_size if latent_size is None else latent_size
    index = np.array(shards.index)
    for number in tqdm(range(len(shards)), unit="sample", desc="reindex_shards", file=sys.stderr):
        raw = shards.read(number)
        members = (*raw.input_members, *raw.helper_members)
        grids = tuple(raw.grids[name] for name in members)
        inputs = len(raw.input_members)
        image_counts = [merged_tokens(grid) for grid in grids[:inputs]]
        ids, labels = tokenizer.encode_sample(raw.record.prompt, raw.record.steps, image_counts, latent_size)
        for name, value in count_tokens(ids, labels, grids, inputs).items():
            index[number][name] = value
    # The progress files describe the old count: a build must not take them up again. No manifest, no finished
    # folder: an interruption between the two writes below is seen as such.
    if (folder / PROGRESS).exists():
        shutil.rmtree(folder / PROGRESS)
    (folder / MANIFEST_NAME).rename(folder / f"{MANIFEST_NAME}.old")
    manifest = dataclasses.replace(
        shards.manifest,
        latent_size=latent_size,
        tokenizer_fingerprint=tokenizer.vocabulary.fingerprint,
        index_sha256=write_index(folder, index),
    )
    write_text(folder / MANIFEST_NAME, manifest.to_json())
    (folder / f"{MANIFEST_NAME}.old").unlink()
    fingerprint = manifest.tokenizer_fingerprint[:16]
    print(f"{folder}: {len(index)} samples counted with tokenizer {fingerprint}, {latent_size} latents per span")


if __name__ == "__main__":
    sys.exit(main())
