"""Shards behind a URL: the batches of a local folder byte for byte, whatever the network does; a bounded cache."""

import dataclasses
import multiprocessing
import pickle
import sys
import zlib
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from shard_servers import ShardServer, nginx, s3, serving

from data_tools.build_shards import main as build
from data_tools.make_frozenlake import main as make_puzzles
from ilvr_ds.config import DataConfig
from ilvr_ds.data.byte_ranges import Run
from ilvr_ds.data.loader import StepLoader
from ilvr_ds.data.remote_files import RemoteFiles, RetryPolicy
from ilvr_ds.data.remote_folder import RemoteSettings
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.errors import ConfigError, ReadError, ShardError
from ilvr_ds.model.tiny import build_tiny_model

SAMPLES, K = 40, 8
QUICK = RetryPolicy(attempts=6, first_wait_s=0.002, longest_wait_s=0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("remote")
    build_tiny_model(root / "model", seed=0)
    assert make_puzzles(["--out", str(root / "puzzles"), "--count", str(SAMPLES), "--sizes", "3", "--seed", "1"]) == 0
    options = ["--input", root / "puzzles" / "records.jsonl", "--format", "ilvr", "--tokenizer", root / "model"]
    assert build([str(o) for o in (*options, "--out", root / "shards", "--samples-per-shard", 16)]) == 0
    return root / "shards"


@pytest.fixture(scope="module")
def tokenizer(folder) -> ChatTokenizer:
    return ChatTokenizer.from_folder(folder.parent / "model")


def batches(shards, tokenizer, *, workers: int = 0, steps: int = 10) -> list[dict]:
    """Every tensor and value of two ranks' batches; 10 steps are two epochs."""
    data = DataConfig(shards="", samples_per_step=8, token_budget=2048, workers=workers)
    found = []
    for rank in range(2):
        with StepLoader(
            shards, tokenizer, data, latent_size=K, reduction="sample", seed=3, rank=rank, world=2, start_step=0,
            total_steps=steps,
        ) as loader:  # fmt: skip
            found += [dataclasses.asdict(batch) for _, _, packed in loader for batch in packed]
    return found


def same(left: list[dict], right: list[dict]) -> bool:
    def equal(a: object, b: object) -> bool:
        if isinstance(a, torch.Tensor):
            return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        return a == b

    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a) for a, b in zip(left, right, strict=True)
    )


@pytest.fixture(scope="module")
def local(folder, tokenizer) -> list[dict]:
    return batches(ShardSet.open(folder), tokenizer)


def remote(tmp_path: Path, cache_bytes: int = 1 << 30, retry: RetryPolicy = QUICK) -> RemoteSettings:
    return RemoteSettings(str(tmp_path / "cache"), cache_bytes, retry)


def test_range_requests_give_the_same_batches_and_the_cache_answers_the_next_time(folder, tokenizer, local, tmp_path):
    with serving(folder) as server:
        shards = ShardSet.open(server.url, remote(tmp_path))
        assert same(batches(shards, tokenizer), local)
        first = server.requests
        assert first < 2 * SAMPLES  # neighbours share a request
        assert same(batches(shards, tokenizer), local)
        assert server.requests == first
        again = ShardSet.open(server.url + "/", remote(tmp_path))
        assert same(batches(again, tokenizer), local)
        assert server.requests == first + 1  # the manifest alone


def test_nginx(folder, tokenizer, local, tmp_path):
    with nginx(folder, tmp_path / "nginx") as url:
        assert same(batches(ShardSet.open(url, remote(tmp_path)), tokenizer), local)
    lines = (tmp_path / "nginx" / "access.log").read_text().splitlines()
    ranged = [line for line in lines if ".tar" in line]
    assert ranged and all('" 206 ' in line for line in ranged)


def test_s3(folder, tokenizer, local, tmp_path, monkeypatch):
    with s3(folder, monkeypatch) as url:
        shards = ShardSet.open(url, remote(tmp_path))
        assert same(batches(shards, tokenizer, workers=1), local)
        assert same(batches(shards, tokenizer), local)  # from the cache
        for nowhere in (url + "-2", "s3://no-such-bucket/shards"):
            with pytest.raises(ReadError, match=f"{nowhere}/manifest.json: no such file"):
                ShardSet.open(nowhere, remote(tmp_path))


@pytest.mark.parametrize("workers", [0, 2])
def test_refused_and_cut_connections_change_nothing(folder, tokenizer, local, tmp_path, workers):
    """Twice the share of faults that a bad day has; a cache for a fifth of the samples, so that much is asked again."""
    index = ShardSet.open(folder).index
    limit = int(index["size"].sum()) // 5
    with serving(folder, fault_share=0.1) as server:
        shards = ShardSet.open(server.url, remote(tmp_path, limit))
        assert same(batches(shards, tokenizer, workers=workers), local)
        assert server.refused and server.cut
    entries = [path.stat().st_size for path in (tmp_path / "cache" / "samples").rglob("*.entry")]
    assert 0 < sum(entries) <= limit


def test_wrong_bytes_are_fetched_again_and_never_cached(folder, tokenizer, local, tmp_path):
    with serving(folder) as server:
        shards = ShardSet.open(server.url, remote(tmp_path))
        server.spoil_next = 2
        assert shards.load_sample(3, tokenizer).id == ShardSet.open(folder).load_sample(3, tokenizer).id
        server.spoil_next = 1000
        with pytest.raises(ShardError, match=r"shard-000000.tar: sample 5 .*key 000000005.*crc32"):
            shards.load_sample(5, tokenizer)
        assert len(list((tmp_path / "cache" / "samples").rglob("*.entry"))) == 1  # sample 3
        server.spoil_next = 0
        shards.load_sample(5, tokenizer)
        for path in (tmp_path / "cache" / "samples").rglob("*.entry"):
            path.write_bytes(bytes(path.stat().st_size))  # the cache's disk is bad
        assert same(batches(shards, tokenizer), local)
        before = server.requests
        assert same(batches(shards, tokenizer), local)
        assert server.requests == before  # good bytes have replaced the bad ones


def test_storage_that_gives_less_than_asked_for(folder, tmp_path):
    """HTTP tells how much will come; other storages need not."""
    files = RemoteFiles(folder.as_uri(), QUICK)
    size = (folder / "manifest.json").stat().st_size
    assert files.fetch([Run("manifest.json", 0, size, ())]) == [(folder / "manifest.json").read_bytes()]
    with pytest.raises(ReadError, match=rf"manifest.json, bytes 10 to {size + 5}: 6 attempts failed.*only {size - 10}"):
        files.fetch([Run("manifest.json", 10, size - 5, ())])


def test_the_final_error_names_url_range_and_attempts(folder, tokenizer, tmp_path):
    with serving(folder) as server:
        shards = ShardSet.open(server.url, remote(tmp_path))
        server.status_for_all, before = 503, server.requests
        with pytest.raises(ReadError) as caught:
            shards.read(0)
        assert server.requests - before == QUICK.attempts
        message = str(caught.value)
        assert f"{server.url}/shard-000000.tar, bytes 0 to {shards.index[0]['size']}: 6 attempts failed" in message
        assert "503" in message
        server.status_for_all, before = 403, server.requests
        with pytest.raises(ReadError, match="403"):
            shards.read(0)
        assert server.requests - before == 1  # it would not change
        server.status_for_all = None
        with pytest.raises(ReadError, match=r"none/manifest.json: no such file"):
            ShardSet.open(server.url + "/none", remote(tmp_path))
    with pytest.raises(ReadError, match=r"manifest.json: 6 attempts failed"):  # nobody listens any more
        ShardSet.open(server.url, remote(tmp_path))


def test_a_server_without_range_requests_is_refused(folder, tmp_path):
    with (
        serving(folder, ranges=False) as server,
        pytest.raises(ReadError, match="does not answer range requests"),
    ):
        ShardSet.open(server.url, remote(tmp_path))


def test_settings_that_cannot_work(tmp_path):
    with pytest.raises(ConfigError, match=r"data.cache_dir=None"):
        ShardSet.from_config(DataConfig(shards="http://127.0.0.1:9/shards"))
    with pytest.raises(ConfigError, match=r"ilvr_ds\[remote\]"):
        ShardSet.open("nosuch://bucket/shards", remote(tmp_path))


def test_an_index_that_is_not_the_manifests(folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.glob("*.*"):
        (copy / path.name).write_bytes(path.read_bytes())
    content = bytearray((copy / "index.npy").read_bytes())
    content[-1] ^= 1
    (copy / "index.npy").write_bytes(content)
    with serving(copy) as server, pytest.raises(ShardError, match=r"index.npy: sha256 is .*manifest.json says"):
        ShardSet.open(server.url, remote(tmp_path))
    assert not list((tmp_path / "cache").rglob("index.npy*"))


def read_all(shards: ShardSet) -> int:
    return zlib.crc32(b"".join(shards.read_bytes(range(len(shards)))))


def test_spawned_and_forked_processes_share_the_cache(folder, tmp_path):
    expected = read_all(ShardSet.open(folder))
    with serving(folder) as server:
        shards = ShardSet.open(server.url, remote(tmp_path))
        assert len(pickle.dumps(shards)) < 1000
        assert read_all(shards) == expected
        before = server.requests
        for method in ("spawn", "fork"):
            with multiprocessing.get_context(method).Pool(2) as pool:
                assert pool.map(read_all, [shards] * 2) == [expected] * 2
        assert server.requests == before  # a worker asks nothing again, not even the manifest


def test_webdataset_reads_the_shards(folder, tokenizer, tmp_path):
    """Plain webdataset, by path and by URL: the same images and texts, in tar order."""
    import webdataset

    ours = [ShardSet.open(folder).read(number) for number in range(SAMPLES)]
    names = [entry.name for entry in ShardSet.open(folder).manifest.shards]
    fetch = "import sys, urllib.request as u; sys.stdout.buffer.write(u.urlopen(sys.argv[1]).read())"
    with serving(folder) as server:
        over_http = [f"pipe:{sys.executable} -c '{fetch}' {server.url}/{name}" for name in names]
        for urls in ([f"{folder}/{name}" for name in names], over_http):
            theirs = list(webdataset.WebDataset(urls, shardshuffle=False))
            assert [sample["__key__"] for sample in theirs] == [raw.key for raw in ours]
            for raw, sample in zip(ours, theirs, strict=True):
                assert sample["json"] == raw.json_bytes
                assert {name: sample[name] for name in raw.images} == raw.images


def test_the_server_of_these_tests_has_faults(folder):
    """Otherwise the tests above would show nothing."""
    server = ShardServer(folder, fault_share=0.05, seed=0)
    fates = [server.fate() for _ in range(400)]
    server.server_close()
    assert fates.count("refuse") >= 5 and fates.count("cut") >= 5 and len(set(fates)) == 3
