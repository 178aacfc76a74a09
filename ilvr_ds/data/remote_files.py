"""Read runs of bytes from a shard folder behind a URL: range requests, repeated when they fail, cached on disk.

http://, https://   any server that answers range requests with 206 (nginx as it comes)
s3://, gs://, ...   whatever fsspec has a file system for; `pip install 'ilvr_ds[remote]'` brings http and S3
"""

from __future__ import annotations

import importlib.util
import os
import random
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ilvr_ds.data.byte_ranges import ByteRange, Run, coalesce
from ilvr_ds.data.disk_cache import DiskCache
from ilvr_ds.errors import ConfigError, ReadError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

GAP = 256 << 10  # bytes fetched for nothing rather than by another request: a few ms at 1 Gbit/s
LONGEST = 16 << 20  # bytes of one request, so that a repetition loses little
TRUST = 3  # fetches of a sample whose checksum is wrong before the fault is taken to be the file's
TOGETHER = 16  # requests at once, per process
_CONNECT_S, _SILENCE_S = 20.0, 60.0  # give up a connection that does not come, or says nothing for so long
_TRY_AGAIN = {408, 425, 429}  # of the 4xx: timeout, too early, too many requests; other 4xx will not change


@dataclass(frozen=True)
class RetryPolicy:
    """How often a request is made, and the pauses in between: `first_wait_s` doubled each time, at most
    `longest_wait_s`, times a random number in 0.5..1 so that a thousand ranks do not come back at once.

    The default waits for two to four minutes in all.
    """

    attempts: int = 12
    first_wait_s: float = 0.5
    longest_wait_s: float = 30.0

    def wait_s(self, failures: int) -> float:
        """Seconds to wait after `failures` (1 or more) attempts."""
        longest = min(self.longest_wait_s, self.first_wait_s * 2.0 ** (failures - 1))
        return longest * random.SystemRandom().uniform(0.5, 1.0)  # the global generator belongs to the training


class RemoteFiles:
    """The files of a folder behind a URL.

    Args:
        url: of the folder, as `https://host/shards` or `s3://bucket/shards`.
        cache: keeps samples that were fetched; None for none.
        identities: file -> hash of its content, which a cache entry is named after (a shard that was built again
            is another one).

    Raises:
        ConfigError: fsspec has no file system for the URL, or a package for it is missing.
    """

    def __init__(self, url: str, retry: RetryPolicy, cache: DiskCache | None = None, identities: dict | None = None):
        self.url = url.rstrip("/")
        self.retry = retry
        self.cache = cache
        self.identities = identities or {}
        self.requests = 0  # made by this process, repetitions included
        self._transient = _transient_errors()
        self._pid = os.getpid()
        self._system, self._root = _file_system(self.url)

    def read(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """The bytes of every range, from the cache or fetched; what does not fit its checksum is fetched again.

        After `TRUST` fetches wrong bytes are handed over as they came: the reader checks them too and names the
        sample. Raises ReadError naming URL, range and attempts when the server does not deliver.
        """
        found = [self._cached(r) for r in ranges]
        for _ in range(TRUST):
            missing = [i for i, content in enumerate(found) if content is None or not _fits(content, ranges[i])]
            if not missing:
                break
            wanted = [ranges[i] for i in missing]
            runs = coalesce(wanted, gap=GAP, longest=LONGEST)
            for run, blob in zip(runs, self.fetch(runs), strict=True):
                for member in run.members:
                    content = run.cut(blob, wanted[member])
                    found[missing[member]] = content
                    if self.cache is not None and _fits(content, wanted[member]):
                        self.cache.put(self._key(wanted[member]), content)
        return [content or b"" for content in found]

    def fetch(self, runs: Sequence[Run]) -> list[bytes]:
        """The bytes of every run from the server, each exactly as long as asked for, several requests at once."""
        asked = [(run.file, run.offset, run.stop) for run in runs]
        return self._all(asked)

    def fetch_whole(self, file: str) -> bytes:
        """A whole small file. Raises ReadError."""
        return self._all([(file, None, None)])[0]

    def _all(self, asked: list[tuple[str, int | None, int | None]]) -> list[bytes]:
        self._after_fork()
        found: dict[int, bytes] = {}
        for attempt in range(1, self.retry.attempts + 1):
            pending = [i for i in range(len(asked)) if i not in found]
            self.requests += len(pending)
            answers: list[Any] = []
            for begin in range(0, len(pending), TOGETHER):
                group = [asked[i] for i in pending[begin : begin + TOGETHER]]
                paths = [f"{self._root}/{file}" for file, _, _ in group]
                starts, stops = [start for _, start, _ in group], [stop for _, _, stop in group]
                answers += self._system.cat_ranges(paths, starts, stops, on_error="return")
            fault: tuple[int, Any] | None = None
            for i, answer in zip(pending, answers, strict=True):
                if not isinstance(answer, BaseException) and self._is_whole(asked[i], answer):
                    found[i] = bytes(answer)
                elif self._is_final(answer):
                    raise ReadError(f"{self._name(asked[i])}: {_in_words(answer)}") from _cause(answer)
                else:
                    fault = i, answer
            if fault is None:
                return [found[i] for i in range(len(asked))]
            if attempt < self.retry.attempts:
                time.sleep(self.retry.wait_s(attempt))
        i, answer = fault
        raise ReadError(
            f"{self._name(asked[i])}: {self.retry.attempts} attempts failed, the last one so: {_in_words(answer)}; "
            f"is the server there, and reachable from this machine?"
        ) from _cause(answer)

    def _is_whole(self, asked: tuple[str, int | None, int | None], answer: bytes) -> bool:
        """False: the connection was cut. Raises ReadError when more came than was asked for."""
        _, start, stop = asked
        if start is None or stop is None:
            return True
        if len(answer) > stop - start:
            raise ReadError(
                f"{self._name(asked)}: the server sent {len(answer)} bytes; it does not answer range requests, serve "
                f"the shards with one that does (nginx, S3)"
            )
        return len(answer) == stop - start

    def _is_final(self, answer: BaseException | bytes) -> bool:
        """Whether asking again is no use. A bug is raised as it is."""
        if not isinstance(answer, BaseException):
            return False
        if not isinstance(answer, self._transient):
            raise answer
        status = _status(answer)
        refused = status is not None and 400 <= status < 500 and status not in _TRY_AGAIN
        return refused or isinstance(answer, (FileNotFoundError, PermissionError, IsADirectoryError))

    def _cached(self, r: ByteRange) -> bytes | None:
        if self.cache is None:
            return None
        content = self.cache.get(self._key(r))
        if content is not None and not _fits(content, r):  # a crash of the machine, or a bad disk
            self.cache.drop(self._key(r))
            return None
        return content

    def _key(self, r: ByteRange) -> str:
        return f"{self.identities[r.file][:32]}-{r.offset}-{r.size}"

    def _after_fork(self) -> None:
        if self._pid != os.getpid():  # connections and fsspec's thread stayed with the parent
            self._pid = os.getpid()
            self._system, self._root = _file_system(self.url)

    def _name(self, asked: tuple[str, int | None, int | None]) -> str:
        file, start, stop = asked
        return f"{self.url}/{file}" + ("" if start is None else f", bytes {start} to {stop}")


def is_url(folder: object) -> bool:
    """Whether a shard folder is behind a URL."""
    return isinstance(folder, str) and "://" in folder


def _fits(content: bytes, r: ByteRange) -> bool:
    return len(content) == r.size and zlib.crc32(content) == r.crc32


def _file_system(url: str) -> tuple[AbstractFileSystem, str]:
    """fsspec's file system for a URL, made for this process alone, and the folder's path in it."""
    protocol = url.partition("://")[0]
    options: dict[str, Any] = {"skip_instance_cache": True}
    try:
        from fsspec.core import url_to_fs

        if protocol in ("http", "https"):
            from aiohttp import ClientTimeout

            quiet = ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_SILENCE_S)
            options["client_kwargs"] = {"timeout": quiet}
        system, root = url_to_fs(url, **options)
    except (ImportError, ValueError) as error:  # ValueError: fsspec does not know the protocol
        raise ConfigError(
            f"data.shards={url!r}: {error}; `pip install 'ilvr_ds[remote]'` (fsspec[http] and s3fs) reads http(s):// "
            f"and s3://, others need the fsspec package of their storage"
        ) from error
    return system, root.rstrip("/")


def _transient_errors() -> tuple[type[BaseException], ...]:
    """What a network may raise. Packages that are not there cannot raise anything."""
    kinds: list[type[BaseException]] = [OSError, EOFError]  # TimeoutError and fsspec's own are OSErrors
    if importlib.util.find_spec("aiohttp") is not None:
        import aiohttp

        kinds.append(aiohttp.ClientError)
    if importlib.util.find_spec("botocore") is not None:
        from botocore.exceptions import BotoCoreError, ClientError

        kinds += [BotoCoreError, ClientError]
    return tuple(kinds)


def _status(error: BaseException) -> int | None:
    """The HTTP status of an error, where it has one."""
    if importlib.util.find_spec("aiohttp") is not None:
        import aiohttp

        if isinstance(error, aiohttp.ClientResponseError):
            return error.status
    return None


def _in_words(answer: BaseException | bytes) -> str:
    if isinstance(answer, FileNotFoundError):
        return "no such file"
    return repr(answer) if isinstance(answer, BaseException) else f"only {len(answer)} bytes came"


def _cause(answer: BaseException | bytes) -> BaseException | None:
    return answer if isinstance(answer, BaseException) else None
