"""What is built and with what, and how a folder remembers it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL
from PIL import features

from ilvr_ds.data.assistant_view import AssistantView
from ilvr_ds.data.formats import FormatName
from ilvr_ds.data.formats.input_files import input_name
from ilvr_ds.data.image_codec import STORAGE
from ilvr_ds.data.images import FACTOR, ImageSettings
from ilvr_ds.data.index import FORMAT_VERSION, MANIFEST_NAME
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.data.whole_file import cannot_write, write_whole
from ilvr_ds.errors import ConfigError, ShardError

PROGRESS = "progress"  # folder inside OUT: build.json (what is being built), the survey, one JSON per finished shard
IDENTITY = "build.json"


@dataclass(frozen=True)
class BuildSettings:
    """Everything that decides the bytes of the shards, but the tokenizer. Raises ConfigError when impossible."""

    inputs: tuple[Path, ...]  # files of records, in this order
    source_format: FormatName
    image_root: Path
    out: Path
    latent_size: int = 8
    samples_per_shard: int = 1000
    max_tokens: int | None = None
    assistant: AssistantView = "interleaved"
    images: ImageSettings = field(default_factory=ImageSettings)

    def __post_init__(self) -> None:
        for path in self.inputs:
            if not path.is_file():
                raise ConfigError(f"--input {path}: no such file")
        if not self.inputs:
            raise ConfigError("--input: no files of records")
        if not self.image_root.is_dir():
            raise ConfigError(f"--image-root {self.image_root}: no such folder")
        for name in ("latent_size", "samples_per_shard"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: allowed: 1 or more")
        quality = self.images.jpeg_quality
        if quality is not None and not 1 <= quality <= 100:
            raise ConfigError(f"--jpeg-quality {quality}: allowed: 1 to 100, or 0 for PNG always")
        for name, low in (("jpeg_saving", 1.0), ("jpeg_max_error", 0.0)):
            if not low <= getattr(self.images, name) < float("inf"):
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self.images, name)}: allowed: {low} or more")
        for role in ("input", "helper"):
            low, high = self.images.bounds(role)
            if not (1 <= low <= high and high >= FACTOR**2):
                raise ConfigError(
                    f"--{role}-min-pixels {low}, --{role}-max-pixels {high}: the smaller must come first, "
                    f"and the larger must be {FACTOR**2} (one token) or more"
                )


@dataclass(frozen=True)
class Job:
    """One of `count` jobs that build one folder together: shard n belongs to job n mod count."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise ConfigError(
                f"--job-index {self.index}, --job-count {self.count}: the index runs from 0 to the count less one"
            )

    def shards(self, total: int) -> range:
        """The shards of this job out of `total`."""
        return range(self.index, total, self.count)


def shard_count(records: int, samples_per_shard: int) -> int:
    """Number of shards, those that may turn out empty included."""
    return -(-records // samples_per_shard)


def build_identity(settings: BuildSettings, sha256: str, records: int, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """What two builds must share to share shards, as JSON values (the image files are taken as unchanged).

    `sha256`, `records`: of the input. The libraries that write the bytes of an image are part of it.
    """
    return {
        "format_version": FORMAT_VERSION,
        "input": input_name(settings.inputs),
        "input sha256": sha256,
        "records": records,
        "format": settings.source_format,
        "image root": str(settings.image_root.resolve()),
        "tokenizer": tokenizer.vocabulary.fingerprint,
        "latent size": settings.latent_size,
        "samples per shard": settings.samples_per_shard,
        "max tokens": settings.max_tokens,
        "assistant": settings.assistant,
        "images": json.loads(json.dumps(dataclasses.asdict(settings.images))),  # tuples become lists
        "image storage": STORAGE,
        "pillow": PIL.__version__,
        "image codecs": {name: features.version(name) for name in ("zlib", "jpg")},
    }


def image_settings(identity: dict[str, Any]) -> ImageSettings:
    """The `ImageSettings` of an identity."""
    return ImageSettings(**{k: tuple(v) if isinstance(v, list) else v for k, v in identity["images"].items()})


def prepare_folder(out: Path) -> None:
    """Make OUT and OUT/progress, unless they are there.

    Raises ShardError when OUT cannot be written, or holds shards of which nobody knows how they were built.
    """
    if (out / MANIFEST_NAME).exists() and not (out / PROGRESS / IDENTITY).is_file():
        raise ShardError(f"{out} holds finished shards of unknown settings; remove it or give another --out")
    try:
        (out / PROGRESS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out / PROGRESS, error) from error


def claim_folder(out: Path, identity: dict[str, Any]) -> None:
    """Write down what OUT is for, or accept it as the same build begun earlier, or begun by another job.

    Raises ShardError naming what differs, or that OUT cannot be written.
    """
    path = out / PROGRESS / IDENTITY
    if path.is_file():
        require_identity(out, identity)
    else:
        write_whole(path, (json.dumps(identity, indent=1) + "\n").encode())


def require_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Raises ShardError unless `folder` holds shards of exactly this build; names every field that differs."""
    known = read_identity(folder)
    changed = [
        f"{key}: {known.get(key)!r} there, {identity.get(key)!r} now"
        for key in {**identity, **known}
        if known.get(key) != identity.get(key)
    ]
    if changed:
        raise ShardError(f"{folder} holds another build; remove it or give another --out. {'; '.join(changed)}")


def read_identity(folder: Path) -> dict[str, Any]:
    """FOLDER/progress/build.json. Raises ShardError when it is missing or not readable."""
    path = folder / PROGRESS / IDENTITY
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ShardError(f"{path}: no such file: {folder} holds no shards begun by data_tools.build_shards") from None
    except ValueError as error:
        raise ShardError(f"{path}: not readable ({error}); remove {folder} or give another --out") from error
    if not isinstance(known, dict):
        raise ShardError(f"{path}: not readable (no JSON object); remove {folder} or give another --out")
    return known
