"""check_shards: silent on a clean folder, and every lie is found with file, key and field."""

import hashlib
import io
import json
import re
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from data_tools.build_shards import main as build_main
from data_tools.check_shards import main
from ilvr_ds.data.index import write_index


@pytest.fixture
def folder(write_records, good_record, tokenizer_folder, tmp_path):
    source = write_records([good_record(f"r{i}") for i in range(5)] + [b"{"])
    options = ["--input", source, "--tokenizer", tokenizer_folder, "--out", tmp_path / "out", "--samples-per-shard", 2]
    assert build_main([str(option) for option in (*options, "--workers", 0)]) == 0
    return tmp_path / "out"


@pytest.fixture
def lie(folder, tokenizer_folder, capsys):
    """Run the check; returns what it complains about."""

    def call(with_tokenizer=True) -> str:
        capsys.readouterr()
        options = ["--tokenizer", str(tokenizer_folder)] if with_tokenizer else []
        assert main([str(folder), "--workers", "1", *options]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err[captured.err.index("error: ") :]

    return call


def change_manifest(folder, **changes):
    tree = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**tree, **changes}))


def change_index(folder, row, **changes):
    index = np.array(np.load(folder / "index.npy"))
    for name, value in changes.items():
        index[row][name] = value
    change_manifest(folder, index_sha256=write_index(folder, index))


def change_member(folder, member, content):
    """Put other bytes into a member of the second shard and make index and manifest fit: only the content lies."""
    first, second, end = change_member_only(folder, member, content)
    blob = (folder / "shard-000001.tar").read_bytes()
    change_index(folder, 2, offset=first, size=second - first, crc32=zlib.crc32(blob[first:second]))
    change_index(folder, 3, offset=second, size=end - second, crc32=zlib.crc32(blob[second:end]))


def change_member_only(folder, member, content) -> tuple[int, int, int]:
    """Put other bytes into a member of the second shard and fit the manifest; returns where its samples lie."""
    path = folder / "shard-000001.tar"
    with tarfile.open(path) as tar:
        members = {info.name: tar.extractfile(info).read() for info in tar}
    assert member in members
    members[member] = content(members[member])
    buffer = io.BytesIO()
    starts = {}
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            starts.setdefault(name.partition(".")[0], tar.offset)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        end = tar.offset
    path.write_bytes(buffer.getvalue())
    tree = json.loads((folder / "manifest.json").read_text())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    tree["shards"][1].update(bytes=path.stat().st_size, sha256=digest)
    change_manifest(folder, shards=tree["shards"])
    return *sorted(starts.values()), end


def edit_json(**changes):
    return lambda data: json.dumps({**json.loads(data), **changes}).encode()


def png(width, height):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def test_clean(folder, tokenizer_folder, capsys):
    assert main([str(folder), "--workers", "1"]) == 0
    assert "clean. 5 samples, 10 images, 3 shards, tokens not counted" in capsys.readouterr().out
    assert main([str(folder), "--tokenizer", str(tokenizer_folder), "--workers", "1"]) == 0
    assert "tokens counted again" in capsys.readouterr().out
    change_member(folder, "000000002.in0.png", lambda data: data)  # the forger's tool itself tells no lie
    assert main([str(folder), "--tokenizer", str(tokenizer_folder), "--workers", "1"]) == 0


def test_one_flipped_bit_anywhere(folder, lie):
    path = folder / "shard-000002.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    assert "shard-000002.tar: field 'sha256'" in lie()


def test_cut_missing_and_extra_shards(folder, lie):
    path = folder / "shard-000001.tar"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert "shard-000001.tar: field 'bytes'" in lie()
    path.unlink()
    assert "shard-000001.tar: the shard is missing" in lie()
    path.write_bytes(content)
    (folder / "shard-000009.tar").write_bytes(content)
    assert "shard-000009.tar: the shard is not in manifest.json" in lie()


def test_a_cut_shard_whose_manifest_agrees(folder, lie):
    path = folder / "shard-000001.tar"
    content = path.read_bytes()[:3000]
    path.write_bytes(content)
    tree = json.loads((folder / "manifest.json").read_text())
    tree["shards"][1].update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    change_manifest(folder, shards=tree["shards"])
    assert "shard-000001.tar: key 000000002: member" in lie()


@pytest.mark.parametrize("name", ["shard", "offset", "size", "image_tokens", "helper_tokens", "spans"])
def test_a_wrong_index_field(folder, lie, name):
    change_index(folder, 3, **{name: 7})
    for with_tokenizer in (True, False):
        assert f"shard-000001.tar: key 000000003: field '{name}': found" in lie(with_tokenizer)


@pytest.mark.parametrize("name", ["text_tokens", "supervised"])
def test_a_wrong_token_count(folder, lie, name):
    change_index(folder, 3, **{name: 7})
    assert f"key 000000003: field '{name}': found" in lie()


def test_index_with_a_row_too_few_or_too_many(folder, lie):
    index = np.array(np.load(folder / "index.npy"))
    change_manifest(folder, index_sha256=write_index(folder, index[:4]), built=4)
    assert "key 000000004: the sample is not in index.npy" in lie()
    change_manifest(folder, index_sha256=write_index(folder, np.concatenate([index, index[-1:]])), built=6)
    assert "index.npy: 6 rows, the tars hold 5 samples" in lie()


@pytest.mark.parametrize(
    ("member", "content", "expected"),
    [
        ("000000002.in0.png", lambda data: data[:200], "000000002: in0.png: the image cannot be decoded"),
        ("000000002.in0.png", lambda data: png(28, 28), "in0.png: field 'grids'"),
        ("000000002.in0.png", lambda data: png(30, 28), "in0.png: 30x28 pixels, sides must be multiples of 28"),
        ("000000003.json", edit_json(id="r2"), "key 000000003: field 'id': 'r2' is also the id of"),
        ("000000003.json", edit_json(steps=["Hi"]), "000000003.json names the images"),
        ("000000003.json", edit_json(prompt=["Other words", {"image": "in0.png"}]), "field 'text_tokens'"),
        ("000000003.json", lambda data: b"{", "000000003.json is missing or not"),
    ],
)
def test_a_wrong_member(folder, lie, member, content, expected):
    change_member(folder, member, content)
    assert "shard-000001.tar: key 00000000" in lie()
    assert expected in lie()


def test_bounds_rejects_and_tokenizer(folder, lie, spec, tmp_path, capsys):
    tree = json.loads((folder / "manifest.json").read_text())
    change_manifest(folder, images={**tree["images"], "helper_max_pixels": 10**6, "helper_min_pixels": 9000})
    assert "help0.png: 56x56 pixels, the bounds are 9000 to 1000000" in lie()
    change_manifest(folder, images=tree["images"], rejected=2)
    assert "rejects.jsonl: field 'rejected': found 1, manifest.json says 2" in lie()
    change_manifest(folder, rejected=1, reject_reasons={"other": 1})
    assert "rejects.jsonl: field 'reason'" in lie()
    (folder / "rejects.jsonl").unlink()
    assert "rejects.jsonl: cannot be read" in lie()
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec(("assistant",))))
    assert main([str(folder), "--tokenizer", str(tmp_path)]) == 1
    assert "manifest.json: field 'tokenizer_fingerprint'" in capsys.readouterr().err


def problems(folder, tokenizer_folder, capsys, workers) -> list[str]:
    capsys.readouterr()
    options = ["--tokenizer", str(tokenizer_folder), "--workers", str(workers)]
    assert main([str(folder), *options]) == 1
    return re.findall(r"^error: (.*)$", capsys.readouterr().err, re.M)


def test_every_problem_is_listed_whatever_the_workers(folder, tokenizer_folder, capsys):
    change_member(folder, "000000002.in0.png", lambda data: png(56, 56))
    change_member(folder, "000000003.json", edit_json(id="r0"))  # r0 lies in another shard
    change_index(folder, 0, spans=9)
    change_index(folder, 3, supervised=7)
    (folder / "shard-000009.tar").write_bytes(b"")
    (folder / "shard-000002.tar").unlink()
    (folder / "rejects.jsonl").unlink()
    found = problems(folder, tokenizer_folder, capsys, 1)
    expected = [
        "shard-000009.tar: the shard is not in manifest.json",
        "key 000000000: field 'spans': found 1",
        "key 000000002: in0.png: field 'grids'",
        "key 000000003: field 'supervised'",
        "shard-000002.tar: the shard is missing",
        "key 000000003: field 'id': 'r0' is also the id of",
        "index.npy: 5 rows, the tars hold 4 samples",
        "rejects.jsonl: cannot be read",
    ]
    assert [text for text in expected if not any(text in problem for problem in found)] == []
    assert len(found) == len(expected)
    assert problems(folder, tokenizer_folder, capsys, 3) == found  # same lines, same order


def test_workers_find_a_clean_folder_clean(folder, tokenizer_folder, capsys):
    assert main([str(folder), "--tokenizer", str(tokenizer_folder), "--workers", "2"]) == 0
    assert "clean. 5 samples, 10 images, 3 shards" in capsys.readouterr().out


def test_a_flipped_bit_is_also_found_in_its_sample(folder, tokenizer_folder, capsys):
    path = folder / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        content[tar.getmember("000000003.json").offset_data] ^= 1
    path.write_bytes(content)
    found = problems(folder, tokenizer_folder, capsys, 1)
    assert any("field 'sha256'" in problem for problem in found)
    assert any("key 000000003: field 'crc32'" in problem for problem in found)
    assert not any("key 000000002" in problem for problem in found)


def test_a_sample_lost_from_a_shard_is_one_problem_not_many(folder, tokenizer_folder, capsys):
    """Rows are matched to samples by their offset where the numbers differ."""
    index = np.array(np.load(folder / "index.npy"))
    tree = json.loads((folder / "manifest.json").read_text())
    tree["shards"][0]["samples"], tree["shards"][1]["samples"] = 2, 3
    extra = np.insert(index, 3, index[2])  # a row between the two samples of the second shard
    extra[3]["offset"] = 512
    change_manifest(folder, shards=tree["shards"], built=6, index_sha256=write_index(folder, extra))
    found = problems(folder, tokenizer_folder, capsys, 1)
    assert any("index.npy has a sample at byte 512, the tar has none there" in problem for problem in found)
    assert not any("field 'offset'" in problem or "field 'size'" in problem for problem in found)


def test_tars_are_checked_without_an_index(folder, tokenizer_folder, capsys):
    (folder / "index.npy").write_bytes(b"nothing")
    change_member_only(folder, "000000002.in0.png", lambda data: data[:200])
    found = problems(folder, tokenizer_folder, capsys, 1)
    assert any("index.npy" in problem for problem in found)
    assert any("000000002: in0.png: the image cannot be decoded" in problem for problem in found)


def test_an_index_of_other_bytes(folder, tokenizer_folder, capsys):
    change_manifest(folder, index_sha256="0" * 64)
    assert any("index.npy: sha256 is" in problem for problem in problems(folder, tokenizer_folder, capsys, 1))


def test_no_worker_is_refused(folder):
    with pytest.raises(SystemExit):
        main([str(folder), "--workers", "0"])


def test_an_unreadable_sample_does_not_hide_the_next_one(folder, tokenizer_folder, capsys):
    change_member(folder, "000000002.json", lambda data: b"{")
    change_index(folder, 3, supervised=7)
    found = problems(folder, tokenizer_folder, capsys, 1)
    assert len(found) == 2
    assert "000000002.json is missing or not" in found[0] and "key 000000003: field 'supervised'" in found[1]


# ------------------------------------------------------------------------------- behind a URL
@pytest.fixture
def there(folder, tokenizer_folder, tmp_path, capsys):
    """Check the folder as one behind a URL; (exit code, output, errors)."""

    def call(*options):
        capsys.readouterr()
        cache = ["--cache-dir", str(tmp_path / "cache")]
        code = main([f"file://{folder}", "--tokenizer", str(tokenizer_folder), *cache, *options])
        captured = capsys.readouterr()
        assert not list((tmp_path / "cache").rglob("*.tar"))  # no copy of a shard is left
        return code, captured.out, captured.err[max(0, captured.err.find("error: ")) :]

    return call


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_clean_folder_behind_a_url(folder, there, workers):
    code, out, _ = there("--workers", workers)
    assert code == 0
    assert f"file://{folder}: clean. 5 samples, 10 images, 3 shards, tokens counted again" in out


@pytest.mark.parametrize("workers", ["1", "2"])
def test_every_problem_behind_a_url_is_named_by_its_url(folder, there, workers):
    change_member(folder, "000000003.json", edit_json(id="r0"))
    path = folder / "shard-000002.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    (folder / "rejects.jsonl").write_text("")
    code, out, problems = there("--workers", workers)
    assert code == 1 and out == ""
    assert f"file://{folder}/shard-000001.tar: key 000000003: field 'id': 'r0' is also the id of file://" in problems
    assert f"file://{folder}/shard-000002.tar: field 'sha256'" in problems
    assert f"file://{folder}/rejects.jsonl: field 'rejected'" in problems
    assert "/cache/" not in problems


def test_a_shard_that_is_not_there_does_not_hide_the_others(folder, there):
    (folder / "shard-000000.tar").unlink()
    path = folder / "shard-000002.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    code, _, problems = there("--workers", "1")
    assert code == 1
    assert f"{folder}/shard-000000.tar" in problems and "shard-000002.tar: field 'sha256'" in problems


def test_a_url_needs_a_place_on_this_machine(folder, capsys):
    assert main([f"file://{folder}"]) == 1
    assert "cache_dir=None" in capsys.readouterr().err
