"""Any text input as plain JSONL that can be read from any line on: decompressed, JSON arrays unrolled.

Compressed files and JSON arrays are turned into JSONL once, inside a scratch folder, under a temporary name that
is renamed when the file is whole; the name holds the input's sha256, so that a build begun again finds it.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ilvr_ds.data.formats.jsonl import read_lines
from ilvr_ds.data.whole_file import whole_file
from ilvr_ds.errors import ConfigError

CHUNK = 1 << 20  # bytes read at a time
LINES = 1 << 12  # lines noted at a time
OFFSET = np.dtype("<i8")


def plain_jsonl(path: Path, is_array: bool, digest: str, scratch: Path) -> Path:
    """`path` (maybe .gz or .zst; a JSON array or object of records if `is_array`) as a JSONL file in `scratch`.

    Raises ConfigError when the input cannot be decompressed or is no JSON array, ShardError when `scratch` cannot be
    written.
    """
    target = scratch / f"input-{digest[:16]}.jsonl"
    if not target.is_file():
        scratch.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as file:  # reading has its own errors below: an OSError here is the disk's
            pieces = _unpacked(path)
            for piece in _array_lines(pieces, path) if is_array else pieces:
                file.write(piece)
    return target


def line_offsets(plain: Path, digest: str, scratch: Path) -> Path:
    """A file in `scratch` of where each line of `plain` starts: OFFSET each, (lines,); blank lines at the end left out.

    Raises ShardError when `scratch` cannot be written.
    """
    target = scratch / f"lines-{digest[:16]}"
    if not target.is_file():
        scratch.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as file:
            offsets = (line.offset for line in read_lines(plain))
            while (some := np.fromiter(islice(offsets, LINES), OFFSET)).size:
                file.write(some.tobytes())
    return target


def input_sha256(path: Path) -> str:
    """sha256 of the input's bytes as they are. Raises ConfigError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"--input {path}: cannot be read: {error}") from error


def _unpacked(path: Path) -> Iterator[bytes]:
    """The bytes of a file, decompressed, in pieces."""
    try:
        with path.open("rb") as file:
            if path.suffix == ".gz":
                with gzip.open(file) as unpacked:
                    while piece := unpacked.read(CHUNK):
                        yield piece
            elif path.suffix == ".zst":
                yield from _zstd_pieces(file, path)
            else:
                while piece := file.read(CHUNK):
                    yield piece
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(f"--input {path}: cannot be decompressed ({error}); fetch or compress it again") from error
    except OSError as error:
        raise ConfigError(f"--input {path}: cannot be read: {error}") from error


def _zstd_pieces(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Frames one after the other. The library's stream reader ends quietly in the middle of a frame; this does not."""
    try:
        import zstandard
    except ImportError as error:
        message = f"--input {path}: reading .zst needs a library: pip install 'ilvr_ds[formats]'"
        raise ConfigError(message) from error
    frame = None
    try:
        while packed := file.read(CHUNK >> 4):  # small, as one piece may unpack to a thousand times its size
            while packed:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(packed)
                packed = b""
                if frame.eof:
                    packed, frame = frame.unused_data, None
    except zstandard.ZstdError as error:
        raise ConfigError(f"--input {path}: cannot be decompressed ({error}); fetch or compress it again") from error
    if frame is not None:
        raise ConfigError(f"--input {path}: ends in the middle of a zstd frame; fetch or compress it again")


def _array_lines(pieces: Iterator[bytes], path: Path) -> Iterator[bytes]:
    """The records of a JSON array, or of an object id -> record (ScienceQA), one a line, their text as it is."""
    text = _Text(pieces, path)
    opening = text.next_character()
    if opening not in ("[", "{"):
        raise text.error(f"expected a JSON array of records, it begins with {opening!r}; JSON lines end in .jsonl")
    closing = "]" if opening == "[" else "}"
    text.position += 1
    first = True
    while True:
        character = text.next_character()
        if character == closing:
            text.position += 1
            break
        if not first:
            if character != ",":
                raise text.error(f"expected ',' or {closing!r} after a record, got {character!r}")
            text.position += 1
        first = False
        key = ""
        if opening == "{":
            key = text.value()
            if not key.startswith('"') or text.next_character() != ":":
                raise text.error("expected a record's id and a colon")
            text.position += 1
        yield _line(key, text.value()).encode("utf-8", "surrogatepass") + b"\n"
    if text.next_character() != "":
        raise text.error("there is more after the end of the array")


def _line(key: str, value: str) -> str:
    """One record on one line; the key of an object becomes its first field, `id`."""
    value = value.replace("\n", " ").replace("\r", " ")  # between tokens only: inside strings JSON escapes them
    if not key or not value.startswith("{"):
        return value
    rest = value[1:].lstrip()
    return f'{{"id": {key}{"" if rest.startswith("}") else ", "}{rest}'


class _Text:
    """Characters of a JSON file, a window at a time."""

    def __init__(self, pieces: Iterator[bytes], path: Path):
        self.path, self.pieces = path, pieces
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.json = json.JSONDecoder()
        self.window, self.position, self.passed, self.ended = "", 0, 0, False
        self._more()

    def error(self, message: str) -> ConfigError:
        return ConfigError(f"--input {self.path}: character {self.passed + self.position}: {message}")

    def next_character(self) -> str:
        """The next one that is not white space, '' at the end of the file."""
        while True:
            while self.position < len(self.window) and self.window[self.position] in " \t\r\n":
                self.position += 1
            if self.position < len(self.window) or self.ended:
                return self.window[self.position : self.position + 1]
            self._more()

    def value(self) -> str:
        """The text of the next JSON value."""
        self.next_character()
        while True:
            try:
                _, end = self.json.raw_decode(self.window, self.position)
            except (ValueError, RecursionError) as error:
                if self.ended or isinstance(error, RecursionError):
                    raise self.error(f"not JSON: {error}; a file with one record a line ends in .jsonl") from error
            else:
                if end < len(self.window) or self.ended:  # 12 at the end of the window may be the half of 1234
                    text = self.window[self.position : end]
                    self.position = end
                    return text
            self._more()

    def _more(self) -> None:
        """Forget what was read and at least double what was not, so that a long record costs a few tries only."""
        self.passed += self.position
        parts = [self.window[self.position :]]
        wanted = max(CHUNK, len(parts[0]))
        self.position = 0
        try:
            while wanted > 0 and not self.ended:
                piece = next(self.pieces, None)
                self.ended = piece is None
                parts.append(self.decoder.decode(piece or b"", final=self.ended))
                wanted -= len(piece or b"")
        except UnicodeDecodeError as error:
            raise ConfigError(f"--input {self.path}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
        self.window = "".join(parts)
