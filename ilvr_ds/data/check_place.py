"""Where the shards that are checked lie: in a local folder, or behind a URL, a copy of one shard at a time."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ilvr_ds.data.byte_ranges import Run
from ilvr_ds.data.check import ID_DTYPE, ShardReport, check_shard
from ilvr_ds.data.index import REJECTS_NAME, Manifest, ShardEntry
from ilvr_ds.data.remote_files import RemoteFiles, RetryPolicy
from ilvr_ds.data.remote_folder import RemoteSettings, fetch_folder
from ilvr_ds.errors import ReadError

_PIECE = 32 << 20  # bytes fetched at a time


@dataclass(frozen=True)
class LocalFolder:
    """A folder on this machine."""

    folder: Path  # of manifest, index, rejects and shards

    @property
    def name(self) -> str:
        """What to call it."""
        return str(self.folder)

    @contextmanager
    def shard(self, entry: ShardEntry) -> Iterator[Path]:
        """The path of a shard."""
        yield self.folder / entry.name

    def check_shard(self, manifest: Manifest, number: int, rows: np.ndarray | None, tokenizer: Path | None):
        """See `ilvr_ds.data.check.check_shard`."""
        return check_shard(self.folder, manifest, number, rows, tokenizer)

    def surplus(self, manifest: Manifest) -> list[Path]:
        """Shards that the manifest does not know."""
        known = {entry.name for entry in manifest.shards}
        return [path for path in sorted(self.folder.glob("*.tar")) if path.name not in known]


@dataclass(frozen=True)
class RemoteFolder:
    """A folder behind a URL. Picklable."""

    url: str
    folder: Path  # here: of manifest, index and rejects
    scratch: Path  # for one shard per worker
    retry: RetryPolicy

    @classmethod
    def fetch(cls, url: str, settings: RemoteSettings) -> RemoteFolder:
        """Bring everything but the shards here. Raises as `fetch_folder`, and ReadError without rejects."""
        files = RemoteFiles(url, settings.retry)
        folder = fetch_folder(files, settings)
        (folder / REJECTS_NAME).write_bytes(files.fetch_whole(REJECTS_NAME))
        return cls(files.url, folder, settings.folders(), settings.retry)

    @property
    def name(self) -> str:
        """What to call it."""
        return self.url

    @contextmanager
    def shard(self, entry: ShardEntry) -> Iterator[Path]:
        """The path of a copy, as many bytes as the manifest says; gone afterwards. Raises ReadError."""
        files = RemoteFiles(self.url, self.retry)
        with tempfile.TemporaryDirectory(dir=self.scratch, prefix="shard-") as place:
            path = Path(place) / entry.name
            with path.open("wb") as file:
                for begin in range(0, entry.bytes, _PIECE):
                    size = min(_PIECE, entry.bytes - begin)
                    file.write(files.fetch([Run(entry.name, begin, size, ())])[0])
            yield path

    def check_shard(self, manifest: Manifest, number: int, rows: np.ndarray | None, tokenizer: Path | None):
        """As of a local folder; problems name the URL, and a shard that cannot be fetched is one."""
        try:
            with self.shard(manifest.shards[number]) as path:
                report = check_shard(path.parent, manifest, number, rows, tokenizer)
        except ReadError as error:
            return ShardReport([str(error)], 0, 0, np.zeros(0, ID_DTYPE))
        problems = [problem.replace(f"{path.parent}/", f"{self.url}/") for problem in report.problems]
        return dataclasses.replace(report, problems=problems)

    def surplus(self, manifest: Manifest) -> list[Path]:
        """Unknown: a web server does not list its files."""
        return []
