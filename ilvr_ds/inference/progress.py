"""What an evaluation has done so far, on disk: it survives a kill at any moment and any number of ranks.

A folder holds one append-only file per rank, `progress-R-of-W.jsonl`. Its first line is the settings the outputs
depend on, every other line one output. A line counts once its newline is there; a torn last line is cut off when
its rank starts again, and ignored by the others. Every rank reads the files of all, so that an evaluation begun on
one number of ranks can be finished on another.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ilvr_ds.errors import EvaluationError


@dataclass(frozen=True)
class Answered:
    """The output for one example."""

    index: int  # place in the task file, from 0
    id: str
    prompt_sha256: str  # of everything the model saw
    output: str
    seconds: float  # its share of the time its batch took
    details: dict[str, Any] = field(default_factory=dict)  # what the decoder says about it (spans, ...), JSON values


class Progress:
    """The progress of one rank, open for appending, and of all others, read from disk."""

    def __init__(self, folder: Path, settings: dict[str, Any], rank: int, world: int):
        """Open `folder`, make it if it is not there. `settings`: JSON values, the same on every rank and every start.

        Raises EvaluationError if the folder holds outputs of other settings, or damaged lines.
        """
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"progress-{rank}-of-{world}.jsonl"
        self.read()  # refuses other settings before anything is written
        self._file = self.path.open("ab")
        whole = _whole_lines(self.path)
        self._file.truncate(len(whole))
        if not whole:
            self._append([{"settings": self.settings}])

    def read(self) -> dict[int, Answered]:
        """Everything answered so far by any rank, by index. Raises EvaluationError as the constructor does."""
        answered: dict[int, Answered] = {}
        for path in sorted(self.folder.glob("progress-*-of-*.jsonl")):
            lines = _whole_lines(path).splitlines()
            for number, line in enumerate(lines, start=1):
                try:
                    tree = json.loads(line)
                    if number == 1:
                        self._check(path, tree["settings"])
                        continue
                    entry = Answered(**tree)
                except (ValueError, TypeError, KeyError) as error:
                    message = f"{path}:{number}: damaged line ({error}); delete the file to answer its examples again"
                    raise EvaluationError(message) from error
                answered.setdefault(entry.index, entry)
        return answered

    def add(self, entries: Iterable[Answered]) -> None:
        """Append outputs; they are on disk when this returns."""
        self._append([asdict(entry) for entry in entries])

    def close(self) -> None:
        """Close the rank's file."""
        self._file.close()

    def _append(self, trees: list[dict[str, Any]]) -> None:
        self._file.write(b"".join(json.dumps(tree).encode("ascii") + b"\n" for tree in trees))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _check(self, path: Path, there: dict[str, Any]) -> None:
        if there == self.settings:
            return
        keys = [key for key in {**there, **self.settings} if there.get(key) != self.settings.get(key)]
        different = "; ".join(f"{key}: {there.get(key)!r} there, {self.settings.get(key)!r} asked" for key in keys)
        raise EvaluationError(f"{path}: begun with other settings ({different}); choose another --out folder")


def _whole_lines(path: Path) -> bytes:
    """The content up to the last newline."""
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1]
