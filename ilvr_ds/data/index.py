"""The shard index and the manifest: what is in a shard folder, without opening a tar.

    DIR/shard-000000.tar ...  samples           DIR/index.npy      one row per sample (INDEX_DTYPE)
    DIR/rejects.jsonl         refused records   DIR/manifest.json  settings, hashes, counts; written last

A folder without a manifest is not finished.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ilvr_ds.data.images import ImageSettings
from ilvr_ds.errors import ShardError

FORMAT_VERSION = 3
INDEX_NAME = "index.npy"
MANIFEST_NAME = "manifest.json"
REJECTS_NAME = "rejects.jsonl"

INDEX_DTYPE = np.dtype(
    [
        ("shard", "<u4"),  # position in the manifest's list of shards
        ("offset", "<u8"),  # bytes: where the sample's first tar header starts
        ("size", "<u8"),  # bytes: from there to the end of its last member, tar padding included
        ("crc32", "<u4"),  # zlib.crc32 of these bytes: every read is checked, wherever it came from
        ("text_tokens", "<u4"),  # sequence tokens that are not input-image pads: text, markers, latents
        ("image_tokens", "<u4"),  # merged input-image tokens in the sequence; L = text_tokens + image_tokens
        ("helper_tokens", "<u4"),  # merged tokens of the helper images: seen by the vision tower, not in the sequence
        ("spans", "<u2"),  # latent spans = helper images
        ("supervised", "<u4"),  # labels that are not IGNORE_INDEX
    ]
)


@dataclass(frozen=True)
class ShardEntry:
    """One tar."""

    name: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True)
class Manifest:
    """What a shard folder was built from and with."""

    format_version: int
    latent_size: int  # K
    tokenizer_fingerprint: str  # `Vocabulary.fingerprint`
    images: ImageSettings
    shards: tuple[ShardEntry, ...]
    index_sha256: str
    built: int  # samples
    rejected: int  # records in rejects.jsonl
    reject_reasons: dict[str, int]
    source: str  # name of the input file
    source_sha256: str
    source_format: str
    assistant: str  # `ilvr_ds.data.assistant_view`: what of the assistant turn is in the samples

    def to_json(self) -> str:
        """Readable JSON, the same bytes for the same manifest."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read DIR/manifest.json. Raises ShardError when it is missing, damaged or of another version."""
    path = folder / MANIFEST_NAME
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ShardError(
            f"{path}: no such file: the folder holds no finished shards; build them with "
            f"`python -m data_tools.build_shards --out {folder} ...` (the same command finishes a build that stopped)"
        ) from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ShardError(f"{path}: not readable JSON ({error}); build the shards again") from error
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if version != FORMAT_VERSION:
        raise ShardError(
            f"{path}: field 'format_version' is {version!r}, this version of ilvr_ds reads {FORMAT_VERSION}; "
            f"build the shards again with data_tools.build_shards"
        )
    try:
        images = {key: tuple(v) if isinstance(v, list) else v for key, v in tree.pop("images").items()}
        shards = tuple(ShardEntry(**entry) for entry in tree.pop("shards"))
        return Manifest(images=ImageSettings(**images), shards=shards, **tree)
    except (KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{path}: fields missing or unknown ({error}); build the shards again") from error


def read_index(folder: Path, manifest: Manifest, verify: bool = True) -> np.ndarray:
    """Memory-map DIR/index.npy, (samples,) INDEX_DTYPE. Raises ShardError when it is not the manifest's index.

    Its bytes are hashed in pieces, which reads the file once and keeps nothing of it in memory.

    Args:
        verify: False leaves the hash out (size and columns are still checked): for worker processes of one that has
            looked.
    """
    path = folder / INDEX_NAME
    command = f"run `python -m data_tools.check_shards {folder}`, then build the shards again"
    try:
        digest = file_sha256(path) if verify else manifest.index_sha256
        index = np.load(path, mmap_mode="r", allow_pickle=False) if digest == manifest.index_sha256 else None
    except FileNotFoundError:
        raise ShardError(f"{path}: no such file, but {MANIFEST_NAME} is there; {command}") from None
    except ValueError as error:
        raise ShardError(f"{path}: not an index ({error}); {command}") from error
    if index is None:
        raise ShardError(f"{path}: sha256 is {digest}, {MANIFEST_NAME} says {manifest.index_sha256}; {command}")
    if index.dtype != INDEX_DTYPE or index.shape != (manifest.built,):
        raise ShardError(
            f"{path}: {index.shape} rows of {index.dtype}, expected ({manifest.built},) of {INDEX_DTYPE}; {command}"
        )
    return index


def write_index(folder: Path, rows: np.ndarray) -> str:
    """Write DIR/index.npy whole or not at all; returns its sha256."""
    temporary = folder / f"{INDEX_NAME}.tmp"
    with temporary.open("wb") as file:
        np.save(file, np.asarray(rows, dtype=INDEX_DTYPE), allow_pickle=False)
    digest = file_sha256(temporary)
    os.replace(temporary, folder / INDEX_NAME)
    return digest


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def file_sha256(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
