"""The cache of remote samples: bounded, shared by processes, whole after a kill."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from ilvr_ds.data.disk_cache import DiskCache
from ilvr_ds.errors import ReadError

LIMIT = 200_000


def content_of(key: str) -> bytes:
    generator = random.Random(key)
    return generator.randbytes(generator.randrange(1, 8000))


def size_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.entry"))


def test_round_trip_and_the_oldest_goes_first(tmp_path):
    cache = DiskCache(tmp_path, 4000)
    assert cache.get("aa") is None
    for age, key in enumerate(["aa", "bb", "cc"]):
        cache.put(key, key.encode() * 500)
        os.utime(cache._path(key), (age, age))
    assert cache.get("aa") == b"aa" * 500  # used: the youngest now
    cache.put("dd", b"d" * 1500)
    assert [cache.get(key) is not None for key in ("aa", "bb", "cc", "dd")] == [True, False, False, True]
    cache.put("ee", b"e" * 4001)  # larger than everything together
    assert cache.get("ee") is None and cache.get("dd") is not None
    cache.drop("dd")
    cache.drop("dd")
    assert cache.get("dd") is None


def test_an_older_folder_with_a_larger_limit_shrinks(tmp_path):
    large = DiskCache(tmp_path, LIMIT)
    for number in range(40):
        large.put(f"{number:02d}", bytes(4000))
    small = DiskCache(tmp_path, 20_000)
    small.put("zz", bytes(4000))
    assert size_on_disk(tmp_path) <= 20_000


@pytest.mark.parametrize("text", [b"", b"\x00\x00", b"12x"])
def test_a_damaged_sum_is_counted_again(tmp_path, text):
    cache = DiskCache(tmp_path, 10_000)
    for number in range(3):
        cache.put(f"{number:02d}", bytes(3000))
    (tmp_path / "lock").write_bytes(text)
    cache.put("zz", bytes(3000))
    assert size_on_disk(tmp_path) <= 10_000
    assert int((tmp_path / "lock").read_bytes()) == size_on_disk(tmp_path)


def test_a_disk_that_refuses_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ReadError, match=r"file/cache: the cache cannot be written.*data.cache_dir"):
        DiskCache(tmp_path / "file" / "cache", LIMIT).put("aa", b"x")


def work(folder: Path, seed: int) -> None:
    """Use the cache as a loader does, without end."""
    cache, generator = DiskCache(folder, LIMIT), random.Random(seed)
    while True:
        key = f"{generator.randrange(256):02x}-key"
        found = cache.get(key)
        if found is None:
            cache.put(key, content_of(key))
        elif found != content_of(key):
            os._exit(3)


def test_many_processes_and_kills_leave_it_bounded_and_whole(tmp_path):
    """256 keys of 1 MB in all compete for 200 kB; workers die by SIGKILL wherever they are."""
    context = multiprocessing.get_context("fork")
    generator = random.Random(0)
    largest = 0
    for round_number in range(6):
        workers = [context.Process(target=work, args=(tmp_path, 10 * round_number + n), daemon=True) for n in range(3)]
        for worker in workers:
            worker.start()
        end = time.monotonic() + generator.uniform(0.3, 0.8)
        while time.monotonic() < end:
            largest = max(largest, sum(size for _, size, _ in DiskCache(tmp_path, LIMIT).entries()))
        assert all(worker.is_alive() for worker in workers)  # nobody read a wrong byte
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
        for worker in workers:
            worker.join()
        for _, _, path in DiskCache(tmp_path, LIMIT).entries():
            assert path.read_bytes() == content_of(path.stem), path
        assert size_on_disk(tmp_path) <= int((tmp_path / "lock").read_bytes()) <= LIMIT
    assert largest > LIMIT // 2
    cache = DiskCache(tmp_path, LIMIT)
    cache._clear(0)
    assert not list(tmp_path.rglob("*.tmp")) and not cache.entries()
