"""The tar is webdataset's, byte for byte, and what is said of it is what is in it."""

import hashlib
import io
import zlib

from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset import TarWriter

from ilvr_ds.data.shard_writer import ShardWriter

members = st.dictionaries(
    st.sampled_from(["json", "in0.png", "in1.jpg", "in10.png", "help0.png"]),
    st.one_of(st.binary(max_size=1100), st.sampled_from([512, 10240, 3 << 20]).map(bytes)),
    min_size=1,
)


@settings(deadline=None, max_examples=25)
@given(samples=st.lists(members, max_size=5))
def test_bytes_of_webdataset_and_their_hashes(samples):
    expected, ours = io.BytesIO(), io.BytesIO()
    with TarWriter(expected, encoder=False, mtime=0, user="ilvr_ds", group="ilvr_ds", mode=0o444) as tar:
        for number, sample in enumerate(samples):
            tar.write({"__key__": f"{number:09d}", **sample})
    with ShardWriter(ours) as shard:
        runs = [shard.write(f"{number:09d}", sample) for number, sample in enumerate(samples)]
    content = ours.getvalue()
    assert content == expected.getvalue()
    assert (shard.bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    end = 0
    for (offset, size, crc32), sample in zip(runs, samples, strict=True):
        assert offset == end and size >= sum(map(len, sample.values()))
        assert crc32 == zlib.crc32(content[offset : offset + size])
        end = offset + size
    assert content[end:].strip(b"\0") == b""
