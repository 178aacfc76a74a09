"""Index and manifest of a shard folder behind a URL, on the local disk.

CACHE/folders/HASH/manifest.json, index.npy     one folder per version of a remote folder; not cleared by itself
CACHE/samples/                                  the bounded cache of samples
"""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ilvr_ds.data.byte_ranges import Run
from ilvr_ds.data.disk_cache import DiskCache, locked
from ilvr_ds.data.index import INDEX_DTYPE, INDEX_NAME, MANIFEST_NAME, Manifest, read_manifest
from ilvr_ds.data.remote_files import RemoteFiles, RetryPolicy
from ilvr_ds.errors import ConfigError, ShardError

_PIECE = 32 << 20  # bytes of the index fetched at a time


@dataclass(frozen=True)
class RemoteSettings:
    """Where remote shards are kept, and how patiently they are fetched."""

    cache_dir: str | None = None  # on a local disk; needed for a URL
    cache_bytes: int = 20 << 30  # of samples; the index comes on top
    retry: RetryPolicy = field(default_factory=RetryPolicy)

    def samples(self) -> DiskCache:
        """The cache of samples."""
        return DiskCache(self._folder() / "samples", self.cache_bytes)

    def folders(self) -> Path:
        """Where indices are kept."""
        return self._folder() / "folders"

    def _folder(self) -> Path:
        if self.cache_dir is None:
            raise ConfigError(
                "data.cache_dir=None: shards behind a URL need a folder on a local disk, for their index and the "
                "samples read last"
            )
        return Path(self.cache_dir).expanduser().absolute()


def fetch_folder(files: RemoteFiles, settings: RemoteSettings) -> Path:
    """Bring manifest and index of a remote shard folder here; returns the local folder that holds them.

    The manifest is fetched each time (the shards may have been built again), the index once for each manifest,
    however many processes ask. Raises ReadError, and ShardError naming the URL when the two do not belong together.
    """
    home = settings.folders()  # first of all: without a place for it nothing needs to be fetched
    text = files.fetch_whole(MANIFEST_NAME)
    folder = home / hashlib.sha256(text).hexdigest()[:32]
    with locked(home / "lock"):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{MANIFEST_NAME}.tmp"
        temporary.write_bytes(text)
        os.replace(temporary, folder / MANIFEST_NAME)
        manifest = read_manifest(folder)
        if not (folder / INDEX_NAME).exists():
            _fetch_index(files, folder, manifest)
    return folder


def _fetch_index(files: RemoteFiles, folder: Path, manifest: Manifest) -> None:
    # More than asked for is how a server without range requests is found out, before a whole shard comes.
    files.fetch([Run(INDEX_NAME, 0, 1, ())])
    size, digest = index_bytes(manifest.built), hashlib.sha256()
    temporary = folder / f"{INDEX_NAME}.tmp"
    with temporary.open("wb") as file:
        for begin in range(0, size, _PIECE):
            (piece,) = files.fetch([Run(INDEX_NAME, begin, min(_PIECE, size - begin), ())])
            digest.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != manifest.index_sha256:
        temporary.unlink()
        raise ShardError(
            f"{files.url}/{INDEX_NAME}: sha256 is {digest.hexdigest()}, {MANIFEST_NAME} says {manifest.index_sha256}; "
            f"are the shards being copied at this moment? Otherwise copy the folder again"
        )
    os.replace(temporary, folder / INDEX_NAME)


def index_bytes(samples: int) -> int:
    """Size of index.npy: numpy's header and the rows. (HTTP servers need not tell a file's size.)"""
    header = io.BytesIO()
    shape = {"descr": np.lib.format.dtype_to_descr(INDEX_DTYPE), "fortran_order": False, "shape": (samples,)}
    np.lib.format.write_array_header_1_0(header, shape)
    return header.tell() + samples * INDEX_DTYPE.itemsize
