"""Neighbouring samples are one read, and a read never loses or mixes a byte."""

import os
import pickle

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from ilvr_ds.data.byte_ranges import ByteRange, coalesce
from ilvr_ds.data.local_files import MAX_OPEN, LocalFiles
from ilvr_ds.errors import ReadError

SIZE = 4000
RANGES = st.lists(
    st.builds(ByteRange, st.sampled_from(["a", "b"]), st.integers(0, SIZE), st.integers(1, 500), st.just(0)),
    max_size=20,
)


@settings(deadline=None, max_examples=60)
@given(RANGES, st.integers(0, 300), st.integers(1, 2000))
def test_every_range_comes_out_of_exactly_one_run(ranges, gap, longest):
    files = {name: np.random.default_rng(ord(name)).bytes(SIZE + 500) for name in "ab"}
    runs = coalesce(ranges, gap=gap, longest=longest)
    assert sorted(member for run in runs for member in run.members) == list(range(len(ranges)))
    assert [(run.file, run.offset) for run in runs] == sorted((run.file, run.offset) for run in runs)
    for run in runs:
        blob = files[run.file][run.offset : run.stop]
        covered = np.zeros(run.size, bool)
        for member in run.members:
            r = ranges[member]
            assert run.cut(blob, r) == files[r.file][r.offset : r.offset + r.size]
            covered[max(0, r.offset - gap - run.offset) : r.offset + r.size - run.offset] = True
        assert covered.all()  # no more than `gap` bytes are read for nothing
        assert run.size <= max(longest, *(ranges[m].size for m in run.members))


def test_neighbours_are_one_system_call(tmp_path, monkeypatch):
    content = np.random.default_rng(0).bytes(100_000)
    (tmp_path / "a").write_bytes(content)
    files = LocalFiles(tmp_path)
    calls = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *call: calls.append(call) or pread(*call))
    wanted = [ByteRange("a", 30_000, 500, 0), ByteRange("a", 10, 20_000, 0), ByteRange("a", 20_010, 9_990, 0)]
    assert files.read(wanted) == [content[r.offset : r.offset + r.size] for r in wanted]
    assert len(calls) == 1


def test_open_files_are_bounded_and_closed(tmp_path):
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = open_files()
    names = [f"{n:04d}" for n in range(3 * MAX_OPEN)]
    for name in names:
        (tmp_path / name).write_text(name)
    files = LocalFiles(tmp_path)
    for _ in range(2):
        assert files.read([ByteRange(name, 0, 4, 0) for name in names]) == [name.encode() for name in names]
        assert open_files() - before <= MAX_OPEN
    del files
    assert open_files() == before


def test_a_file_that_ends_early_or_is_gone(tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    files = LocalFiles(tmp_path)
    assert files.read([ByteRange("a", 8, 5, 0), ByteRange("a", 0, 2, 0), ByteRange("a", 20, 5, 0)]) == [
        b"89",
        b"01",
        b"",
    ]
    with pytest.raises(ReadError, match=r"gone.*bytes 0 to 5 cannot be read"):
        files.read([ByteRange("gone", 0, 5, 0)])
    with pytest.raises(TypeError):
        pickle.dumps(files)  # descriptors do not travel; a ShardSet makes its own
