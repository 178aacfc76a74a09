"""Read samples from a folder of shards, each by its place in the index, without scanning a tar.

    shards = ShardSet.open("data/frozenlake")           # or "https://host/frozenlake", "s3://bucket/frozenlake"
    shards.require(tokenizer, latent_size=8)
    sample = shards.load_sample(17, tokenizer)

What a sample is inside a tar: `ilvr_ds.data.sample_format`.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ilvr_ds.config import DataConfig
from ilvr_ds.contracts import Sample
from ilvr_ds.data.byte_ranges import ByteRange
from ilvr_ds.data.images import merged_tokens
from ilvr_ds.data.index import Manifest, read_index, read_manifest
from ilvr_ds.data.lengths import IndexColumns
from ilvr_ds.data.local_files import LocalFiles
from ilvr_ds.data.order import PlanSource
from ilvr_ds.data.pixels import SampleRows, sample_rows
from ilvr_ds.data.remote_files import RemoteFiles, is_url
from ilvr_ds.data.remote_folder import RemoteSettings, fetch_folder
from ilvr_ds.data.sample_format import RawSample, count_tokens, key_of, parse_sample
from ilvr_ds.data.stored_images import decode_pixels
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.errors import BatchError, ShardError


class ShardSet:
    """A finished shard folder, local or behind a URL. Picklable, and safe in forked, spawned and threaded workers."""

    def __init__(
        self,
        folder: Path | str,
        manifest: Manifest,
        index: np.ndarray,
        files: LocalFiles | RemoteFiles,
        remote: RemoteSettings,
        here: Path,
    ):
        self.folder = folder  # as given; a str is a URL
        self.manifest = manifest
        self.index = index  # (samples,) INDEX_DTYPE, memory-mapped, read-only
        self.files = files
        self._remote = remote
        self._here = here  # where index.npy and manifest.json lie on this machine

    @classmethod
    def open(cls, folder: str | Path, remote: RemoteSettings | None = None, verify: bool = True) -> ShardSet:
        """Open a folder written by `data_tools/build_shards.py`, by its path or by a URL fsspec knows.

        Checks the manifest's version, the index's hash and length, and every local shard's size (not its bytes: each
        read checks its own, and `data_tools/check_shards.py` all). Raises ShardError naming the file and the command
        to run, and for a URL ReadError and ConfigError. `verify` as in `read_index`.
        """
        remote = remote or RemoteSettings()
        if is_url(folder):
            files = RemoteFiles(str(folder), remote.retry)
            return cls._behind(str(folder), fetch_folder(files, remote), remote)
        folder = Path(folder)
        manifest = read_manifest(folder)
        index = read_index(folder, manifest, verify)
        for entry in manifest.shards:
            path = folder / entry.name
            size = path.stat().st_size if path.is_file() else None
            if size != entry.bytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise ShardError(
                    f"{path}: the shard {found}, manifest.json says {entry.bytes} bytes; copy it again, or remove it "
                    f"and repeat the build command (finished shards are kept)"
                )
        return cls(folder, manifest, index, LocalFiles(folder), remote, folder)

    @classmethod
    def from_config(cls, data: DataConfig) -> ShardSet:
        """The shards a recipe names; raises as `open`."""
        return cls.open(data.shards, RemoteSettings(data.cache_dir, int(data.cache_gib * 2**30)))

    @classmethod
    def _behind(cls, url: str, here: Path, remote: RemoteSettings, verify: bool = True) -> ShardSet:
        """A remote folder whose index is at `here` already."""
        manifest = read_manifest(here)
        files = RemoteFiles(url, remote.retry, remote.samples(), {e.name: e.sha256 for e in manifest.shards})
        return cls(url, manifest, read_index(here, manifest, verify), files, remote, here)

    def __reduce__(self) -> tuple:  # a memory map does not pickle as one; a worker maps the index itself
        return _again, (self.folder, self._here, self._remote, self.manifest.index_sha256)

    def __len__(self) -> int:
        return len(self.index)

    def require(self, tokenizer: ChatTokenizer, latent_size: int) -> None:
        """Raise ShardError unless the index was counted with this tokenizer and number of latents per span."""
        command = f"run `python -m data_tools.reindex_shards {self.folder} --tokenizer DIR --latent-size {latent_size}`"
        ours, theirs = self.manifest.tokenizer_fingerprint, tokenizer.vocabulary.fingerprint
        if ours != theirs:
            raise ShardError(
                f"{self.folder}: the index was counted with tokenizer {ours[:16]}, this tokenizer is {theirs[:16]}; "
                f"use the tokenizer the shards were built with, or {command} with the new one"
            )
        if self.manifest.latent_size != latent_size:
            raise ShardError(
                f"{self.folder}: the shards were counted with {self.manifest.latent_size} latents per span, "
                f"the recipe's latent.size is {latent_size}; change latent.size, or {command}"
            )

    @property
    def fingerprint(self) -> str:
        """Of what is trained on: the hash of the index."""
        return self.manifest.index_sha256

    def plan_sources(self, helpers: bool = True) -> list[PlanSource]:
        """What the planner needs: the lengths, not read yet, and the samples of each shard.

        Args:
            helpers: whether helper images cost anything; not where nobody encodes them.
        """
        return [PlanSource(IndexColumns(self.index, helpers), tuple(entry.samples for entry in self.manifest.shards))]

    def row(self, number: int) -> np.void:
        """A row of the index, () INDEX_DTYPE."""
        return self.index[number]

    def sample_id(self, number: int) -> str:
        """The record id of a sample, read from its tar."""
        return self.read(number).record.id

    def read(self, number: int) -> RawSample:
        """The undecoded sample at row `number` of the index; raises as `read_bytes` and `parse`."""
        return self.parse(number, self.read_bytes([number])[0])

    def read_bytes(self, numbers: Sequence[int]) -> list[bytes]:
        """The tar members of samples as they are stored, in the order asked for; neighbours are read together.

        Raises IndexError outside 0..len-1, ShardError for a row of the index that points nowhere, and ReadError when
        a shard cannot be reached. What the bytes are is for `parse` to check.
        """
        return self.files.read([self._range(number) for number in numbers])

    def parse(self, number: int, blob: bytes) -> RawSample:
        """Take the bytes of a sample apart.

        Raises ShardError naming the shard and the offset when they are not the bytes the index was written for.
        """
        r = self._range(number)
        try:
            if len(blob) != r.size:
                raise ShardError(f"{len(blob)} of {r.size} bytes are there")
            if zlib.crc32(blob) != r.crc32:
                raise ShardError(f"the bytes have crc32 {zlib.crc32(blob)}, index.npy says {r.crc32}")
            return parse_sample(blob)
        except ShardError as error:
            raise ShardError(
                f"{self.folder}/{r.file}: sample {number} at byte {r.offset} ({key_of(blob)}): {error}; the "
                f"index does not match the tar, run `python -m data_tools.check_shards {self.folder}`"
            ) from error

    def _range(self, number: int) -> ByteRange:
        if not 0 <= number < len(self.index):
            raise IndexError(f"sample {number} of {len(self.index)}")
        row = self.index[number]
        if row["shard"] >= len(self.manifest.shards):
            raise ShardError(
                f"{self.folder}/index.npy: row {number}: field 'shard' is {row['shard']}, past the last one"
            )
        name = self.manifest.shards[row["shard"]].name
        return ByteRange(name, int(row["offset"]), int(row["size"]), int(row["crc32"]))

    def load_sample(
        self,
        number: int,
        tokenizer: ChatTokenizer,
        *,
        blob: bytes | None = None,
        decode_helpers: bool = True,
        into: SampleRows | None = None,
    ) -> Sample:
        """Decode and tokenise one sample.

        Args:
            blob: its bytes, where `read_bytes` has read them already.
            decode_helpers: False leaves the helper images out, for an objective that does not look at them.
            into: where its pixels go (`lay_out`); new memory, if not said.

        Raises BatchError naming its id when the tokens, images or spans are not what the index says, and what
        `read` raises.
        """
        raw = self.read(number) if blob is None else self.parse(number, blob)
        members = (*raw.input_members, *raw.helper_members)
        grids = tuple(raw.grids[member] for member in members)
        inputs = len(raw.input_members)
        image_counts = [merged_tokens(grid) for grid in grids[:inputs]]
        latent_size = self.manifest.latent_size
        input_ids, labels = tokenizer.encode_sample(raw.record.prompt, raw.record.steps, image_counts, latent_size)
        row = self.index[number]
        for name, value in count_tokens(input_ids, labels, grids, inputs).items():
            if row[name] != value:
                raise BatchError(
                    f"sample {raw.record.id!r} ({self.folder}, number {number}): {name} is {value}, the index says "
                    f"{row[name]}; run `python -m data_tools.check_shards {self.folder} --tokenizer DIR`"
                )
        if into is None:
            into = sample_rows(row, helpers=decode_helpers)
        try:
            decode_pixels(raw.images, raw.grids, members[:inputs], members[inputs:] if decode_helpers else (), into)
        except BatchError as error:
            raise BatchError(f"sample {raw.record.id!r} ({self.folder}, {raw.key}.{error})") from error
        return Sample(
            number=number,
            id=raw.record.id,
            input_ids=input_ids,
            labels=labels,
            grids=grids if decode_helpers else grids[:inputs],
            num_input_images=inputs,
            input_pixels=into.inputs,
            helper_pixels=into.helpers,
            helpers_decoded=decode_helpers,
        )


def _again(folder: Path | str, here: Path, remote: RemoteSettings, index_sha256: str) -> ShardSet:
    """A shard set in another process: the same one, or ShardError."""
    # The process this one works for has read the index from end to end; the manifest must still be the same.
    shards = (
        ShardSet._behind(str(folder), here, remote, verify=False)
        if is_url(folder)
        else ShardSet.open(folder, remote, verify=False)
    )
    if shards.manifest.index_sha256 != index_sha256:
        raise ShardError(f"{folder}: the shards were built again while they are in use; start the run again")
    return shards
