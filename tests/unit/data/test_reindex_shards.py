"""reindex_shards: the index and manifest a build would have written, by any number of processes, stopped or not."""

import json
import os
import shutil

import numpy as np
import pytest

from data_tools.build_shards import main as build_main
from data_tools.reindex_shards import main
from ilvr_ds.data.shards import ShardSet

FILES = ("index.npy", "manifest.json")


@pytest.fixture
def build(write_records, good_record, tokenizer_folder, tmp_path):
    """Seven samples in three shards, their lengths all different."""
    source = write_records([good_record(f"r{i}", text_input="word " * (i + 1) + "<image>") for i in range(7)])

    def call(name, tokenizer=tokenizer_folder, latents=8):
        options = ["--input", source, "--tokenizer", tokenizer, "--out", tmp_path / name, "--samples-per-shard", 3]
        assert build_main([str(option) for option in (*options, "--latent-size", latents, "--workers", 0)]) == 0
        return tmp_path / name

    return call


@pytest.fixture
def other_tokenizer(spec, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(spec(("assistant", "word"))))
    return tmp_path / "other"


def content(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def reindex(folder, tokenizer, *options):
    return main([str(folder), "--tokenizer", str(tokenizer), *map(str, options)])


@pytest.mark.parametrize("workers", [1, 2])
def test_it_is_what_a_build_would_write(build, tokenizer_folder, other_tokenizer, workers):
    folder, wanted = build("a"), build("b", other_tokenizer, 3)
    before, tars = content(folder), [path.read_bytes() for path in sorted(folder.glob("*.tar"))]
    assert reindex(folder, other_tokenizer, "--latent-size", 3, "--workers", workers) == 0
    assert content(folder) == content(wanted) != before  # the places and checksums of the samples among it
    assert [path.read_bytes() for path in sorted(folder.glob("*.tar"))] == tars
    assert not (folder / "progress").exists()
    assert {path.name for path in folder.iterdir()} == {path.name for path in wanted.iterdir()} - {"progress"}
    assert reindex(folder, tokenizer_folder, "--latent-size", 8, "--workers", workers) == 0
    assert content(folder) == before


@pytest.mark.parametrize("at", range(4))
def test_stopped_at_any_moment_it_is_the_old_folder_or_finishes(build, other_tokenizer, monkeypatch, at):
    folder, wanted = build("a"), build("b", other_tokenizer)
    before, calls, replace = content(folder), [], os.replace

    def stop_at(source, target):
        calls.append(target)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_at)
        with pytest.raises(KeyboardInterrupt):
            reindex(folder, other_tokenizer, "--workers", 1)
    assert len(calls) == at + 1
    assert content(folder)["manifest.json"] == before["manifest.json"]
    if at < 3:
        assert content(folder) == before and len(ShardSet.open(folder)) == 7
    (folder / "index.npy.reindexed.0123456789ab.tmp").touch()  # what a killed process leaves
    assert reindex(folder, other_tokenizer, "--workers", 1) == 0
    assert content(folder) == content(wanted)
    assert not list(folder.glob("*.reindexed*"))


def test_a_damaged_sample_ends_it_by_name_and_leaves_the_folder_alone(build, other_tokenizer, capsys):
    folder = build("a")
    before, row = content(folder), ShardSet.open(folder).row(4)
    path = folder / "shard-000001.tar"
    blob = bytearray(path.read_bytes())
    blob[int(row["offset"]) + 600] ^= 1
    path.write_bytes(blob)
    for workers in (1, 2):
        assert reindex(folder, other_tokenizer, "--workers", workers) == 1
        assert "shard-000001.tar: sample 4 at byte" in capsys.readouterr().err
        assert content(folder) == before and not list(folder.glob("*.reindexed*"))


def test_a_folder_built_again_is_not_taken_for_the_one_before(build, tokenizer_folder, other_tokenizer):
    folder = build("a")
    assert reindex(folder, other_tokenizer, "--workers", 1) == 0
    shutil.rmtree(folder)
    before = content(build("a", latents=5))
    assert reindex(folder, tokenizer_folder, "--workers", 1) == 0
    assert content(folder) == before
    assert np.load(folder / "index.npy").dtype.names == ShardSet.open(folder).index.dtype.names


@pytest.mark.parametrize("option", [("--workers", "0"), ("--latent-size", "0")])
def test_impossible_options(build, tokenizer_folder, option):
    with pytest.raises(SystemExit):
        reindex(build("a"), tokenizer_folder, *option)
