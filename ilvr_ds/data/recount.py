"""The token counts of one shard, counted again for another tokenizer or another number of latents per span."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from ilvr_ds.data.images import merged_tokens
from ilvr_ds.data.sample_format import RawSample, count_tokens
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.errors import ConfigError, ShardError

_TOGETHER = 64  # samples read at a time


def recount_shard(
    folder: Path, index_sha256: str, begin: int, end: int, tokenizer_folder: Path, fingerprint: str, latent_size: int
) -> np.ndarray:
    """Rows `begin` to `end` of the index, (end - begin,) INDEX_DTYPE, with new token counts; places and checksums stay.

    Every sample is read and checked against its checksum. Raises ShardError naming the first that does not fit.
    `index_sha256` and `fingerprint` say which index and which tokenizer are meant: a process keeps both open.
    """
    shards, tokenizer = _open(folder, index_sha256), _load_tokenizer(tokenizer_folder, fingerprint)
    rows = np.array(shards.index[begin:end])
    for first in range(begin, end, _TOGETHER):
        numbers = range(first, min(first + _TOGETHER, end))
        for number, blob in zip(numbers, shards.read_bytes(numbers), strict=True):
            for name, value in _counts(shards.parse(number, blob), tokenizer, latent_size).items():
                rows[number - begin][name] = value
    return rows


def _counts(raw: RawSample, tokenizer: ChatTokenizer, latent_size: int) -> dict[str, int]:
    grids = tuple(raw.grids[name] for name in (*raw.input_members, *raw.helper_members))
    inputs = len(raw.input_members)
    image_counts = [merged_tokens(grid) for grid in grids[:inputs]]
    ids, labels = tokenizer.encode_sample(raw.record.prompt, raw.record.steps, image_counts, latent_size)
    return count_tokens(ids, labels, grids, inputs)


# Once in a process, whatever the number of its shards.
@functools.lru_cache(maxsize=1)
def _open(folder: Path, index_sha256: str) -> ShardSet:
    shards = ShardSet.open(folder, verify=False)  # the process that hands out the work has verified
    if shards.manifest.index_sha256 != index_sha256:
        raise ShardError(f"{folder}: the shards were built or counted again meanwhile; run the command again")
    return shards


@functools.lru_cache(maxsize=1)
def _load_tokenizer(folder: Path, fingerprint: str) -> ChatTokenizer:
    tokenizer = ChatTokenizer.from_folder(folder)
    if tokenizer.vocabulary.fingerprint != fingerprint:
        raise ConfigError(f"{folder}/tokenizer.json: changed while it was in use; run the command again")
    return tokenizer
