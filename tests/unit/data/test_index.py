"""read_index: what is looked at with the hash and what without."""

import dataclasses

import numpy as np
import pytest

from ilvr_ds.data.index import INDEX_DTYPE, INDEX_NAME, read_index, read_manifest, write_index
from ilvr_ds.errors import ShardError
from tests.unit.data.test_loader import byte_tokenizer, write_shards


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path / "shards", byte_tokenizer(), 5)
    return tmp_path / "shards"


@pytest.mark.parametrize("verify", [True, False])
def test_the_index_is_mapped(folder, verify):
    index = read_index(folder, read_manifest(folder), verify)
    assert isinstance(index, np.memmap) and index.dtype == INDEX_DTYPE and len(index) == 5


def test_one_changed_byte_is_seen_by_the_hash_alone(folder):
    manifest, path = read_manifest(folder), folder / INDEX_NAME
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShardError, match=r"index\.npy: sha256 is .* says .*check_shards"):
        read_index(folder, manifest)
    assert len(read_index(folder, manifest, verify=False)) == 5  # for the workers of a process that has looked


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("damage", ["cut", "gone", "header", "rows", "columns"])
def test_what_is_not_the_manifests_index_is_refused(folder, damage, verify):
    manifest, path = read_manifest(folder), folder / INDEX_NAME
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "gone":
        path.unlink()
    elif damage == "header":
        path.write_bytes(b"not an array" + path.read_bytes()[12:])
    elif damage == "rows":
        manifest = dataclasses.replace(manifest, index_sha256=write_index(folder, np.zeros(4, INDEX_DTYPE)))
    else:
        np.save(path, np.zeros(5, np.int64))
    with pytest.raises(ShardError, match=r"index\.npy: .*check_shards"):
        read_index(folder, manifest, verify)
