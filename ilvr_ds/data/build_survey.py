"""One pass over the records before any image is opened: how many are bad, and who owns each id.

Ids are kept as 16-byte hashes in a file, never in memory: 100 million records are 1.6 GB on disk while the survey
runs. Two different ids share a hash with probability 1e-23 at that size.

The result is kept in `OUT/progress/survey.npz`. Jobs that start together on a folder without it each make their own,
with the same bytes: they need no lock, which shared file systems do not all have, and none waits for another. To read
the input only once, run `build_shards --survey-only` ahead of the jobs.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from ilvr_ds.data.build_settings import PROGRESS
from ilvr_ds.data.whole_file import write_whole

SURVEY = "survey.npz"
ID_HASH = np.dtype([("high", "<u8"), ("low", "<u8")])  # all zero: no id, the record is bad
AT_ONCE = 1 << 22  # hashes sorted in memory at a time


@dataclass(frozen=True)
class Survey:
    """What one pass over the input tells."""

    bad: int  # records whose fields (images aside) are wrong; they own no id
    duplicates: np.ndarray  # (n, 2) int64: place of a record whose id was taken, place of its owner; ascending

    def duplicates_within(self, start: int, stop: int) -> dict[int, int]:
        """The duplicates at the places start..stop-1, with their owners."""
        first, last = np.searchsorted(self.duplicates[:, 0], [start, stop])
        return {int(place): int(owner) for place, owner in self.duplicates[first:last]}


def id_hash(record_id: str) -> bytes:
    """16 bytes that stand for a record's id."""
    return hashlib.blake2b(record_id.encode(), digest_size=ID_HASH.itemsize).digest()


def find_duplicates(path: Path, records: int, at_once: int = AT_ONCE) -> Survey:
    """The survey from a file of `records` hashes in input order. An id belongs to the first good record that has it.

    Reads the file once per `at_once` records, each time sorting those hashes that fall into one range of values:
    memory is that of `at_once` records whatever their number.
    """
    passes = max(1, -(-records // at_once))
    bad, found = 0, [np.empty((0, 2), np.int64)]
    for number in range(passes):
        places, ids = [], []
        for start in range(0, records, at_once):
            chunk = np.fromfile(path, ID_HASH, min(at_once, records - start), offset=start * ID_HASH.itemsize)
            empty = (chunk["high"] == 0) & (chunk["low"] == 0)
            bad += int(empty.sum()) if number == 0 else 0
            group = ((chunk["high"] >> np.uint64(32)) * np.uint64(passes)) >> np.uint64(32)
            (here,) = np.nonzero(~empty & (group == number))
            places.append(here + start)
            ids.append(chunk[here])
        if places:
            found.append(_repeated(np.concatenate(places), np.concatenate(ids)))
    duplicates = np.concatenate(found)
    return Survey(bad, duplicates[np.argsort(duplicates[:, 0])])


def save_survey(out: Path, sha256: str, survey: Survey) -> None:
    """Keep the survey of the input with this sha256 in OUT/progress. Raises ShardError when it cannot be written."""
    buffer = io.BytesIO()
    np.savez(buffer, sha256=np.array(sha256), bad=np.array(survey.bad), duplicates=survey.duplicates)
    write_whole(out / PROGRESS / SURVEY, buffer.getvalue())


def load_survey(out: Path, sha256: str) -> Survey | None:
    """The survey kept in OUT/progress; None when there is none, or not of the input with this sha256."""
    try:
        with np.load(out / PROGRESS / SURVEY, allow_pickle=False) as kept:
            if str(kept["sha256"]) != sha256:
                return None
            return Survey(int(kept["bad"]), kept["duplicates"])
    except (FileNotFoundError, ValueError, KeyError, BadZipFile):  # none, or damaged: it is made again
        return None


def _repeated(places: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """(n, 2): every place but the first of its id, and that first place. `places` (m,) ascend, `ids` (m,) ID_HASH."""
    order = np.lexsort((ids["low"], ids["high"]))  # stable: places of one id stay in order
    ids, places = ids[order], places[order]
    fresh = np.ones(len(ids), bool)
    fresh[1:] = ids[1:] != ids[:-1]
    first = np.maximum.accumulate(np.where(fresh, np.arange(len(ids)), 0))
    return np.stack([places[~fresh], places[first[~fresh]]], axis=1).astype(np.int64)
