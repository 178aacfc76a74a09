"""Reading shards: by offset, from any process, and never a sample that is not what the index says."""

import json
import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from data_tools.build_shards import main as build_main
from data_tools.reindex_shards import main as reindex_main
from ilvr_ds.data.index import INDEX_DTYPE, read_index, read_manifest, write_index, write_text
from ilvr_ds.data.sample_format import parse_sample
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.errors import BatchError, ShardError


@pytest.fixture
def folder(write_records, good_record, tokenizer_folder, tmp_path):
    """Seven samples in three shards."""
    source = write_records([good_record(f"r{i}", text_input="word " * (i + 1)) for i in range(7)])
    options = ["--input", source, "--tokenizer", tokenizer_folder, "--out", tmp_path / "out", "--samples-per-shard", 3]
    assert build_main([str(option) for option in (*options, "--workers", 0)]) == 0
    return tmp_path / "out"


PIXELS = ("input_pixels", "helper_pixels")


def rewrite_index(folder, **changes):
    """Change fields of row 4 and make the manifest believe it."""
    index = np.array(np.load(folder / "index.npy"))
    for name, value in changes.items():
        index[4][name] = value
    tree = json.loads((folder / "manifest.json").read_text())
    tree["index_sha256"] = write_index(folder, index)
    (folder / "manifest.json").write_text(json.dumps(tree))


def load(shards, number, tokenizer):
    sample = shards.load_sample(number, tokenizer)
    return sample.id, *(getattr(sample, name).tobytes() for name in ("input_ids", "labels", *PIXELS))


def test_manifest_and_index_round_trip(folder):
    manifest = read_manifest(folder)
    again = folder / "manifest.json"
    assert manifest.to_json() == again.read_text()
    write_text(again, manifest.to_json())
    assert read_manifest(folder) == manifest
    index = read_index(folder, manifest)
    assert index.dtype == INDEX_DTYPE and isinstance(index, np.memmap) and len(index) == 7
    assert index["shard"].tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert (index["offset"] % 512 == 0).all() and index["offset"][0] == 0


def test_same_samples_in_threads_forks_and_spawned_workers(folder, tokenizer):
    shards = ShardSet.open(folder)
    assert len(pickle.dumps(shards)) < 1000  # the folder travels, not the index
    calls = [(shards, number, tokenizer) for number in (6, 0, 3, 3, 5)]
    expected = [load(*call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda call: load(*call), calls * 4)) == expected * 4
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.starmap(ShardSet.load_sample, calls[:0]) == []
            copies = pool.starmap(ShardSet.load_sample, calls)
            assert [tuple(getattr(copy, name).tobytes() for name in PIXELS) for copy in copies] == [
                tuple(pixels) for *_, inputs, helpers in expected for pixels in [(inputs, helpers)]
            ]
            assert [copy.id for copy in copies] == ["r6", "r0", "r3", "r3", "r5"]


def test_numbers_outside_are_refused(folder):
    shards = ShardSet.open(folder)
    for number in (-1, 7):
        with pytest.raises(IndexError, match="of 7"):
            shards.read(number)


@pytest.mark.parametrize("name", ["text_tokens", "image_tokens", "helper_tokens", "spans", "supervised"])
def test_a_wrong_count_names_the_id_and_the_field(folder, tokenizer, name):
    rewrite_index(folder, **{name: 1_000})
    with pytest.raises(BatchError, match=rf"'r4'.*{name} is \d+, the index says 1000"):
        ShardSet.open(folder).load_sample(4, tokenizer)


@pytest.mark.parametrize("changes", [{"offset": 512}, {"offset": 13}, {"size": 512}, {"size": 1 << 20}, {"shard": 9}])
def test_a_wrong_place_names_the_shard(folder, tokenizer, changes):
    rewrite_index(folder, **changes)
    shards = ShardSet.open(folder)
    with pytest.raises(ShardError, match=r"shard-00000\d.tar: sample 4 at byte|row 4: field 'shard' is 9"):
        shards.load_sample(4, tokenizer)
    assert shards.load_sample(3, tokenizer).id == "r3"  # its neighbours are read


def test_two_samples_are_not_one(folder):
    shards = ShardSet.open(folder)
    first, second = shards.index[0], shards.index[1]
    blob = (folder / "shard-000000.tar").read_bytes()[: int(first["size"] + second["size"])]
    with pytest.raises(ShardError, match="expected one sample"):
        parse_sample(blob)


def test_open_names_what_is_wrong(folder):
    manifest, index, tar = folder / "manifest.json", folder / "index.npy", folder / "shard-000001.tar"
    kept = {path: path.read_bytes() for path in (manifest, index, tar)}

    def broken(path, content, match):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(ShardError, match=match) as error:
            ShardSet.open(folder)
        assert str(path) in str(error.value)
        path.write_bytes(kept[path])

    broken(manifest, None, r"data_tools.build_shards")
    broken(manifest, b"{", "not readable JSON")
    broken(manifest, b"\xff", "not readable JSON")
    broken(manifest, kept[manifest].replace(b'"format_version": 3', b'"format_version": 99'), "'format_version' is 99")
    broken(manifest, kept[manifest].replace(b'"built"', b'"bilt"'), "fields missing or unknown")
    broken(index, None, "no such file")
    broken(index, kept[index][:-1], "sha256")
    broken(index, kept[index].replace(b"\x01", b"\x02"), "data_tools.check_shards")
    broken(tar, None, "is missing")
    broken(tar, kept[tar][: len(kept[tar]) // 2], "repeat the build command")
    ShardSet.open(folder)


def test_another_tokenizer_or_latent_size_is_refused_until_counted_again(folder, tokenizer, spec, tmp_path, capsys):
    shards = ShardSet.open(folder)
    shards.require(tokenizer, 8)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(spec(("assistant", "word"))))
    other = ChatTokenizer.from_folder(tmp_path / "other")
    with pytest.raises(ShardError, match="reindex_shards") as error:
        shards.require(other, 8)
    assert tokenizer.vocabulary.fingerprint[:16] in str(error.value)
    assert other.vocabulary.fingerprint[:16] in str(error.value)
    with pytest.raises(ShardError, match=r"8 latents per span.*latent.size is 4"):
        shards.require(tokenizer, 4)
    before = shards.load_sample(2, tokenizer)
    assert reindex_main([str(folder), "--tokenizer", str(tmp_path / "other"), "--latent-size", "4"]) == 0
    again = ShardSet.open(folder)
    again.require(other, 4)
    after = again.load_sample(2, other)
    assert len(after.input_ids) < len(before.input_ids) - 4  # "word" is one token now, and a span is 4 shorter
    assert all((getattr(after, name) == getattr(before, name)).all() for name in PIXELS)
    with pytest.raises(ShardError):
        again.require(tokenizer, 8)
    assert reindex_main([str(tmp_path), "--tokenizer", str(tmp_path / "other")]) == 1
    assert "manifest.json: no such file" in capsys.readouterr().err


def test_no_samples_is_a_readable_folder(write_records, tokenizer_folder, tmp_path):
    source = write_records([b"{"])
    build_main(["--input", str(source), "--tokenizer", str(tokenizer_folder), "--out", str(tmp_path / "none")])
    assert len(ShardSet.open(tmp_path / "none")) == 0
