"""Tar headers read directly: what `tarfile` writes is read as `tarfile` reads it, and damage is refused."""

import io
import tarfile

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from ilvr_ds.data.tar_members import BLOCK, read_header, read_members
from ilvr_ds.errors import ShardError

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=24)


def tar(members: dict[str, bytes], **fields) -> bytes:
    """The members as `tarfile` writes them, without the end mark."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as out:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in fields.items():
                setattr(info, field, value)
            out.addfile(info, io.BytesIO(content))
        end = out.offset
    return file.getvalue()[:end]


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(NAMES, st.binary(max_size=1200), max_size=4))
@example({"000000001.json": bytes(BLOCK), "000000001.in0.png": b"", "é" * 50: b"x" * 511})
def test_members_are_those_of_tarfile(members):
    blob = tar(members)
    assert dict(read_members(blob)) == dict(read_members(blob + bytes(1024))) == members
    with tarfile.open(fileobj=io.BytesIO(blob + bytes(1024))) as theirs:
        assert [(name, len(content)) for name, content in read_members(blob)] == [(i.name, i.size) for i in theirs]


@settings(deadline=None, max_examples=100)
@given(st.integers(0, BLOCK - 1), st.integers(1, 255))
def test_no_changed_byte_of_a_header_is_believed(position, flip):
    blob = bytearray(tar({"000000001.json": b"{}"}))
    blob[position] ^= flip
    try:
        found = dict(read_members(bytes(blob)))
    except ShardError as error:
        assert "not a tar header" in str(error) or "cut short" in str(error)
    else:  # the checksum's own trailing characters do not count
        assert 148 <= position < 156 and found == {"000000001.json": b"{}"}


@pytest.mark.parametrize("cut", [1, 511, 512, 700, 1023])
def test_a_run_that_ends_early(cut):
    with pytest.raises(ShardError, match=r"only|cut short"):
        dict(read_members(tar({"a.json": b"x" * 500})[:cut]))


def test_what_is_not_a_file_or_needs_an_extension():
    for blob in (tar({"a": b""}, type=tarfile.DIRTYPE), tar({"a": b""}, type=tarfile.SYMTYPE, linkname="b")):
        with pytest.raises(ShardError, match="is not a file with a short name"):
            dict(read_members(blob))
    with pytest.raises(ShardError, match="is not a file with a short name"):
        read_header(tar({f"{'d' * 60}/{'n' * 60}": b""}))
    with pytest.raises(ShardError, match="not a tar header"):
        dict(read_members(bytes(BLOCK) + tar({"a": b""})))
    for blob in (bytes(BLOCK), b"\xff" * BLOCK):
        with pytest.raises(ShardError, match="not a tar header"):
            read_header(blob)
