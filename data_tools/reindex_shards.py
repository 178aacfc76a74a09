"""Count the tokens of existing shards again, for another tokenizer or another number of latents per span.

    python -m data_tools.reindex_shards DIR --tokenizer MODEL_FOLDER [--latent-size K] [--workers 8]

Only index.npy and manifest.json change; the tars hold text and images, no token ids. They are replaced when everything
is counted: stopped before, the folder is as it was; stopped in between, the same command finishes. --workers processes
count one shard each. Exit code 1 on an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ilvr_ds.data.build import PROGRESS
from ilvr_ds.data.each_shard import each_shard
from ilvr_ds.data.index import INDEX_DTYPE, INDEX_NAME, MANIFEST_NAME, file_sha256
from ilvr_ds.data.recount import recount_shard
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.data.whole_file import TEMPORARY, whole_file, write_whole
from ilvr_ds.errors import IlvrError

NEW = ".reindexed"  # how the names of the new files end until they are put into place


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_tools.reindex_shards", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder written by build_shards")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="folder with tokenizer.json")
    parser.add_argument("--latent-size", type=int, metavar="K", help="latents per helper image (default: as it is)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help=f"processes (default: {cores}, cores)")
    options = parser.parse_args(arguments)
    if options.latent_size is not None and options.latent_size < 1:
        parser.error("--latent-size: 1 or more")
    if options.workers < 1:
        parser.error(f"--workers {options.workers}: 1 or more")
    try:
        reindex(options.folder, options.tokenizer, options.latent_size, options.workers)
    except IlvrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def reindex(folder: Path, tokenizer_folder: Path, latent_size: int | None, workers: int = 1) -> None:
    """Rewrite the index and the manifest of a shard folder, in memory that does not depend on the number of samples.

    Raises ShardError when the folder is damaged or cannot be written, ConfigError without a tokenizer; then it is as
    it was.
    """
    new_index, new_manifest = folder / f"{INDEX_NAME}{NEW}", folder / f"{MANIFEST_NAME}{NEW}"
    if new_manifest.exists() and not new_index.exists():  # an earlier command was stopped between the two renames
        os.replace(new_manifest, folder / MANIFEST_NAME)
    shards = ShardSet.open(folder)
    fingerprint = ChatTokenizer.from_folder(tokenizer_folder).vocabulary.fingerprint
    latent_size = shards.manifest.latent_size if latent_size is None else latent_size
    _write_index(new_index, shards, (tokenizer_folder, fingerprint, latent_size), workers)
    manifest = dataclasses.replace(
        shards.manifest,
        latent_size=latent_size,
        tokenizer_fingerprint=fingerprint,
        index_sha256=file_sha256(new_index),
    )
    write_whole(new_manifest, manifest.to_json().encode())
    # The progress files describe the old count: a build must not take them up again.
    if (folder / PROGRESS).exists():
        shutil.rmtree(folder / PROGRESS)
    os.replace(new_index, folder / INDEX_NAME)
    os.replace(new_manifest, folder / MANIFEST_NAME)
    print(f"{folder}: {len(shards)} samples counted with tokenizer {fingerprint[:16]}, {latent_size} latents per span")


def _write_index(path: Path, shards: ShardSet, counting: tuple[Path, str, int], workers: int) -> None:
    for left in path.parent.glob(f"{path.name}.*{TEMPORARY}"):  # of a command that was killed
        left.unlink()
    entries = shards.manifest.shards
    ends = np.cumsum([entry.samples for entry in entries], dtype=np.int64)

    def arguments(number: int) -> tuple:
        begin, end = int(ends[number]) - entries[number].samples, int(ends[number])
        return shards.folder, shards.manifest.index_sha256, begin, end, *counting

    with whole_file(path) as file, tqdm(total=len(shards), unit="sample", desc="reindex_shards") as bar:
        shape = {"descr": np.lib.format.dtype_to_descr(INDEX_DTYPE), "fortran_order": False, "shape": (len(shards),)}
        np.lib.format.write_array_header_1_0(file, shape)
        header = file.tell()
        for number, rows in each_shard([entry.name for entry in entries], recount_shard, arguments, workers):
            begin = int(ends[number]) - entries[number].samples  # shards get ready in any order
            file.seek(header + begin * INDEX_DTYPE.itemsize)
            file.write(rows.tobytes())
            bar.update(len(rows))


if __name__ == "__main__":
    sys.exit(main())
