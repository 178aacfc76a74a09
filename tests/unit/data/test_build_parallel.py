"""The same bytes from any number of workers and jobs; what the merge refuses; the survey; too many rejects."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.build_shards import main
from data_tools.merge_shards import main as merge_main
from ilvr_ds.data.build_settings import Job, shard_count
from ilvr_ds.data.build_survey import ID_HASH, find_duplicates, load_survey
from ilvr_ds.errors import ConfigError

RECORDS = 11


@pytest.fixture
def records(write_records, good_record):
    """Good records among a duplicate, a broken line, a missing image and a whole shard (of 2) that is bad."""
    lines = [good_record(f"r{i}") for i in range(RECORDS)]
    lines[3]["id"] = "r0"
    lines[4], lines[5] = b"{", good_record("r5", image_input="none.png")
    return write_records(lines)


@pytest.fixture
def run(tokenizer_folder, records, tmp_path):
    def call(out, *options, source=records) -> int:
        fixed = ["--input", source, "--tokenizer", tokenizer_folder, "--out", tmp_path / out, "--samples-per-shard", 2]
        return main([str(argument) for argument in [*fixed, *options]])

    return call


def merge(out, *parts) -> int:
    return merge_main([str(argument) for argument in ["--out", out, "--workers", 2, *parts]])


def files(folder) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


def test_the_bytes_do_not_depend_on_workers_or_jobs(run, tmp_path):
    assert run("one", "--workers", 0) == 0
    expected = files(tmp_path / "one")
    assert "shard-000002.tar" not in expected and len(expected) == 3 + 5  # records 4 and 5 are both bad
    assert run("three", "--workers", 3) == 0
    assert files(tmp_path / "three") == expected
    for count in (2, 3, 9):  # with 9 jobs some have no shard
        for index in reversed(range(count)):
            shared, own = f"shared{count}", f"part{count}-{index}"
            for out in (shared, own):
                assert run(out, "--workers", 0, "--job-index", index, "--job-count", count) == 0
        assert merge(tmp_path / shared) == 0
        assert files(tmp_path / shared) == expected
        assert not list((tmp_path / shared).rglob("*.tmp"))
        parts = [tmp_path / f"part{count}-{index}" for index in range(count)]
        before = [files(part) for part in parts]
        assert merge(tmp_path / f"merged{count}", *parts) == 0
        assert files(tmp_path / f"merged{count}") == expected
        assert [files(part) for part in parts] == before
        assert merge(tmp_path / f"merged{count}", *parts) == 0  # again: nothing to do
        assert files(tmp_path / f"merged{count}") == expected


def test_merge_refuses_gaps(run, tmp_path, capsys):
    for index in (0, 2):
        assert run("out", "--workers", 0, "--job-index", index, "--job-count", 3) == 0
    assert merge(tmp_path / "out") == 1
    assert "2 of 6 shards are missing or damaged: 1, 4;" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert run("out", "--workers", 0, "--job-index", 1, "--job-count", 3) == 0
    tar = tmp_path / "out" / "shard-000003.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    assert merge(tmp_path / "out") == 1
    assert "1 of 6 shards are missing or damaged: 3;" in capsys.readouterr().err
    assert run("out", "--workers", 0, "--job-index", 0, "--job-count", 3) == 0
    assert merge(tmp_path / "out") == 0


def test_merge_refuses_overlaps_and_strangers(run, records, tmp_path, capsys):
    for index in (0, 1):
        assert run(f"half{index}", "--workers", 0, "--job-index", index, "--job-count", 2) == 0
    assert run("third0", "--workers", 0, "--job-index", 0, "--job-count", 3) == 0
    halves = [tmp_path / "half0", tmp_path / "half1"]
    assert merge(tmp_path / "out", *halves, tmp_path / "third0") == 1
    error = capsys.readouterr().err
    assert "shard 0 is in both" in error and "half0" in error and "third0" in error
    assert merge(tmp_path / "out", *halves, tmp_path / "half0") == 1
    assert "named twice" in capsys.readouterr().err
    assert merge(tmp_path / "out", *halves, tmp_path / "nowhere") == 1
    assert "nowhere/progress/build.json: no such file" in capsys.readouterr().err
    assert run("other", "--workers", 0, "--job-index", 1, "--job-count", 2, "--latent-size", 3) == 0
    assert merge(tmp_path / "out", halves[0], tmp_path / "other") == 1
    assert "latent size: 3 there, 8 now" in capsys.readouterr().err
    records.write_bytes(records.read_bytes() + b"{}\n")
    assert run("changed", "--workers", 0, "--job-index", 1, "--job-count", 2) == 0
    assert merge(tmp_path / "out", halves[0], tmp_path / "changed") == 1
    assert "input sha256" in capsys.readouterr().err
    shutil.copy(halves[0] / "progress" / "shard-000000.json", halves[1] / "progress" / "shard-000006.json")
    assert merge(tmp_path / "out", *halves) == 1
    assert "shard-000006.json: no such shard in this build of 6" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_merge_refuses_what_is_there_with_other_bytes(run, tmp_path, capsys):
    """OUT holds shard 0 already, from a time when an image was another one."""
    assert run("out", "--workers", 0, "--job-index", 0, "--job-count", 2) == 0
    (tmp_path / "a.png").write_bytes((tmp_path / "c.png").read_bytes())
    assert run("part", "--workers", 0) == 0
    assert merge(tmp_path / "out", tmp_path / "part") == 1
    assert "is not the one in" in capsys.readouterr().err


def test_merge_takes_its_reject_fraction(run, tmp_path, capsys):
    for index in (0, 1):
        assert run("out", "--workers", 0, "--job-index", index, "--job-count", 2) == 0
    arguments = ["--out", str(tmp_path / "out"), "--max-reject-fraction"]
    assert merge_main([*arguments, "0.2"]) == 1
    assert "3 of 11 records are rejected" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert merge_main([*arguments, "0.3"]) == 0


def test_jobs_take_the_survey_that_is_there(run, tmp_path, records):
    assert run("out", "--survey-only") == 0
    survey = tmp_path / "out" / "progress" / "survey.npz"
    written = survey.stat().st_ino
    for index in (0, 1):
        assert run("out", "--workers", 0, "--job-index", index, "--job-count", 2) == 0
    assert survey.stat().st_ino == written
    digest = hashlib.sha256(records.read_bytes()).hexdigest()
    assert load_survey(tmp_path / "out", digest).duplicates.tolist() == [[3, 0]]
    assert load_survey(tmp_path / "out", "0" * 64) is None
    survey.write_bytes(b"PK")  # damaged: made again
    assert run("out", "--workers", 0, "--job-index", 0, "--job-count", 2) == 0
    assert load_survey(tmp_path / "out", digest).bad == 1


def test_too_many_rejects_end_the_build_early(run, write_records, good_record, tmp_path, capsys):
    good = [good_record(f"r{i}") for i in range(4)]
    missing = [good_record(f"m{i}", image_input="none.png") for i in range(40)]
    source = write_records([*good, *missing], "mostly_bad.jsonl")
    assert run("out", "--workers", 0, "--max-reject-fraction", 0.1, source=source) == 1
    error = capsys.readouterr().err
    assert "5 of 44 records are rejected (11.36%), --max-reject-fraction is 10.00%" in error
    assert "missing_image: 5, such as" in error and "none.png" in error and "(id 'm" in error
    out = tmp_path / "out"
    assert not (out / "manifest.json").exists() and not list(out.rglob("*.tmp"))
    assert sorted(path.name for path in out.glob("*.tar")) == ["shard-000000.tar", "shard-000001.tar"]
    assert run("two", "--workers", 2, "--max-reject-fraction", 0.1, source=source) == 1
    assert "none.png" in capsys.readouterr().err
    assert run("out", "--workers", 0, source=source) == 0  # the finished shards are kept, the rest follows
    assert json.loads((out / "manifest.json").read_text())["rejected"] == 40
    broken = write_records([*good, *[b"{"] * 5], "broken.jsonl")
    assert run("broken", "--workers", 0, "--max-reject-fraction", 0.1, source=broken) == 1
    assert "records that do not follow the format: 5" in capsys.readouterr().err
    assert not list((tmp_path / "broken").glob("*.tar"))  # known from the survey, before any image


@settings(deadline=None, max_examples=60)
@given(ids=st.lists(st.integers(0, 12), max_size=60), at_once=st.integers(1, 70))
def test_the_first_good_record_owns_an_id(tmp_path_factory, ids, at_once):
    """Against the plain dictionary; id 0 stands for a bad record."""
    hashes = np.zeros(len(ids), ID_HASH)
    values = np.random.default_rng(0).integers(0, 2**64, (13, 2), dtype=np.uint64)
    values[1, 0] = values[2, 0]  # different ids may share half of a hash
    values[0] = 0
    hashes["high"], hashes["low"] = values[ids].T if ids else (0, 0)
    path = tmp_path_factory.mktemp("survey") / "ids"
    hashes.tofile(path)
    owners: dict[int, int] = {}
    expected = [[place, owners[x]] for place, x in enumerate(ids) if x and owners.setdefault(x, place) != place]
    survey = find_duplicates(path, len(ids), at_once)
    assert survey.duplicates.tolist() == expected
    assert survey.bad == ids.count(0)
    assert survey.duplicates_within(10, 20) == {place: owner for place, owner in expected if 10 <= place < 20}


@given(records=st.integers(0, 200), size=st.integers(1, 12), count=st.integers(1, 9))
def test_jobs_have_every_shard_once(records, size, count):
    total = shard_count(records, size)
    assert (total - 1) * size < records <= total * size or records == total == 0
    assert sorted(n for index in range(count) for n in Job(index, count).shards(total)) == list(range(total))


@pytest.mark.parametrize(("index", "count"), [(2, 2), (-1, 3), (0, 0)])
def test_impossible_jobs(index, count):
    with pytest.raises(ConfigError, match=f"--job-index {index}, --job-count {count}"):
        Job(index, count)
