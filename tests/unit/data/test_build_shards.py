"""The build: what it writes, that it is repeatable to the byte, and that it can be interrupted anywhere."""

import hashlib
import json
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_tools.build_shards import main
from data_tools.check_shards import main as check_main
from ilvr_ds.data.build import BuildSettings
from ilvr_ds.data.images import read_image, resize_image
from ilvr_ds.data.pixels import image_pixels
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.errors import ConfigError


@pytest.fixture
def run(tokenizer_folder, tmp_path):
    """Run the command; returns its exit code. `options` are added."""

    def call(source, *options, out="out") -> int:
        arguments = ["--input", source, "--tokenizer", tokenizer_folder, "--out", tmp_path / out, *options]
        return main([str(argument) for argument in arguments])

    return call


def files(folder) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


def rejects(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "rejects.jsonl").read_text().split("\n") if line]


def test_what_goes_in_comes_out(run, write_records, good_record, tmp_path, tokenizer):
    source = write_records([good_record(f"r{i}") for i in range(5)] + [good_record("plain", image_input=[])])
    assert run(source, "--samples-per-shard", 2) == 0
    shards = ShardSet.open(tmp_path / "out")
    assert [entry.samples for entry in shards.manifest.shards] == [2, 2, 2]
    assert (shards.manifest.built, shards.manifest.rejected, len(shards)) == (6, 0, 6)
    assert [shards.sample_id(i) for i in range(6)] == ["r0", "r1", "r2", "r3", "r4", "plain"]
    sample = shards.load_sample(3, tokenizer)
    expected = [image_pixels(resize_image(read_image(tmp_path / name))) for name in ("a.png", "b.png")]
    assert sample.grids == tuple(grid for _, grid in expected)
    assert (sample.input_pixels == expected[0][0]).all() and (sample.helper_pixels == expected[1][0]).all()
    assert sample.num_input_images == 1 and sample.number == 3 and sample.id == "r3"
    row = shards.index[3]
    assert len(sample.input_ids) == row["text_tokens"] + row["image_tokens"]
    assert shards.load_sample(5, tokenizer).num_input_images == 0
    record = shards.read(3).record
    assert record.origin == "records.jsonl:4" and record.answer == "A"


def test_every_record_is_built_or_rejected_and_neighbours_survive(run, write_records, good_record, tmp_path):
    records = [good_record("a"), b"{", good_record("b", image_input="none.png"), good_record("a"), good_record("c")]
    source = write_records(records)
    assert run(source) == 0
    manifest = ShardSet.open(tmp_path / "out").manifest
    assert manifest.built + manifest.rejected == len(records)
    assert manifest.reject_reasons == {"broken_json": 1, "duplicate_id": 1, "missing_image": 1}
    found = {reject["reason"]: reject for reject in rejects(tmp_path / "out")}
    assert found["broken_json"]["origin"] == f"{source}:2" and found["broken_json"]["id"] is None
    assert found["missing_image"]["id"] == "b" and "none.png" in found["missing_image"]["message"]
    assert found["missing_image"]["field"] == "input image none.png"
    assert f"record 1 of the input, {source}:1, already has this id" in found["duplicate_id"]["message"]
    shards = ShardSet.open(tmp_path / "out")
    assert [shards.sample_id(i) for i in range(2)] == ["a", "c"]
    assert [shards.read(i).key for i in range(2)] == ["000000000", "000000004"]  # place in the input, not in the index


def test_an_unusable_record_does_not_own_its_id(run, write_records, good_record, tmp_path):
    source = write_records([good_record("a", sequence_plan=[]), good_record("a")])
    assert run(source) == 0
    assert ShardSet.open(tmp_path / "out").manifest.reject_reasons == {"empty_steps": 1}


def test_same_bytes_again_wherever_the_input_lies(run, write_records, good_record, tmp_path):
    source = write_records([good_record(f"r{i}") for i in range(5)])
    assert run(source, "--samples-per-shard", 2) == 0
    (tmp_path / "elsewhere").mkdir()
    moved = source.rename(tmp_path / "elsewhere" / source.name)
    assert run(moved, "--samples-per-shard", 2, "--image-root", tmp_path, out="again") == 0
    assert files(tmp_path / "out") == files(tmp_path / "again")


def test_shards_do_not_depend_on_rejects_elsewhere(run, write_records, good_record, tmp_path):
    """A record that turns bad changes its own shard only."""
    records = [good_record(f"r{i}") for i in range(6)]
    assert run(write_records(records), "--samples-per-shard", 2) == 0
    records[1] = {**records[1], "image_input": "none.png"}
    assert run(write_records(records), "--samples-per-shard", 2, out="other") == 0
    before, after = files(tmp_path / "out"), files(tmp_path / "other")
    assert [before[n] == after[n] for n in sorted(before) if n.endswith(".tar")] == [False, True, True]


@pytest.mark.parametrize(
    "damage", ["tar missing", "tar changed", "progress missing", "progress broken", "tar temporary"]
)
def test_a_stopped_build_keeps_finished_shards(run, write_records, good_record, tmp_path, damage):
    source = write_records([good_record(f"r{i}") for i in range(6)])
    assert run(source, "--samples-per-shard", 2) == 0
    out = tmp_path / "out"
    expected = files(out)
    for name in ("manifest.json", "index.npy", "rejects.jsonl"):
        (out / name).unlink()
    tar, progress = out / "shard-000001.tar", out / "progress" / "shard-000001.json"
    match damage:
        case "tar missing":
            tar.unlink()
        case "tar changed":
            tar.write_bytes(tar.read_bytes()[:-1] + b"x")
        case "progress missing":
            progress.unlink()
        case "progress broken":
            progress.write_text(progress.read_text()[:10])
        case "tar temporary":
            tar.rename(out / "shard-000001.tar.0123456789ab.tmp")
            (out / "progress" / "shard-000001.json.0123456789ab.tmp").write_text("{")
    kept = {path: path.stat().st_ino for path in out.glob("*.tar")}
    assert run(source, "--samples-per-shard", 2) == 0
    written = [path.name for path in sorted(out.glob("*.tar")) if kept.get(path) != path.stat().st_ino]
    assert written == ["shard-000001.tar"]
    assert not list(out.rglob("*.tmp"))
    assert files(out) == expected


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--latent-size", 3], "latent size: 8 there, 3 now"), (["--samples-per-shard", 5], "samples per shard"),
     (["--input-max-pixels", 4000], "images"), (["--max-tokens", 500], "max tokens"),
     (["--jpeg-quality", 0], "images")],
)  # fmt: skip
def test_another_build_in_the_same_folder_is_refused(run, write_records, good_record, tmp_path, capsys, options, named):
    source = write_records([good_record("a"), good_record("b")])
    assert run(source) == 0
    before = files(tmp_path / "out")
    assert run(source, *options) == 1
    assert named in capsys.readouterr().err
    write_records([good_record("a"), good_record("changed")])
    assert run(source) == 1
    assert "input sha256" in capsys.readouterr().err
    assert files(tmp_path / "out") == before


def test_exit_codes_and_limits(run, write_records, good_record, tmp_path, capsys):
    assert run(tmp_path / "none.jsonl") == 1
    assert "none.jsonl: no such file" in capsys.readouterr().err
    assert run(write_records([b"{"], "bad.jsonl"), out="bad") == 1
    assert "nothing was built" in capsys.readouterr().err
    assert run(write_records([], "empty.jsonl"), out="empty") == 1
    source = write_records([good_record("a"), b"{"])
    assert run(source, "--max-reject-fraction", 0.4, out="strict") == 1
    message = capsys.readouterr().err
    assert "1 of 2 records are rejected (50.00%), --max-reject-fraction is 40.00%" in message
    assert run(source, "--max-reject-fraction", 0.5, out="lenient") == 0
    assert run(source, "--input-min-pixels", 9000, "--input-max-pixels", 5000, out="bounds") == 1
    assert "--input-min-pixels 9000" in capsys.readouterr().err
    assert run(source, "--latent-size", 0, out="zero") == 1


def test_too_long_records_are_rejected(run, write_records, good_record, tmp_path):
    source = write_records([good_record("short"), good_record("long", text_input="word " * 500)])
    assert run(source, "--max-tokens", 400) == 0
    (reject,) = rejects(tmp_path / "out")
    assert (reject["id"], reject["reason"]) == ("long", "too_long")


def test_pixel_bounds_per_role(run, write_records, good_record, tmp_path, tokenizer):
    source = write_records([good_record("a", image_input="b.png")])  # input and helper are the same 56x56 image
    assert run(source, "--input-min-pixels", 12544, "--helper-min-pixels", 784, "--helper-max-pixels", 784) == 0
    sample = ShardSet.open(tmp_path / "out").load_sample(0, tokenizer)
    assert sample.grids == ((1, 8, 8), (1, 2, 2))


def test_plain_webdataset_and_tar_read_the_shards(run, write_records, good_record, tmp_path):
    source = write_records([good_record(f"r{i}", image_input=["a.png", "c.png"]) for i in range(3)])
    assert run(source, "--samples-per-shard", 2) == 0
    urls = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in read] == ["000000000", "000000001", "000000002"]
    assert [sample["json"]["id"] for sample in read] == ["r0", "r1", "r2"]
    assert read[0]["in0.png"].shape == (84, 56, 3) and read[0]["in1.png"].shape == (56, 112, 3)
    assert "help0.png" in read[0]
    with tarfile.open(urls[0]) as tar:
        assert {(info.mtime, info.uname, info.uid) for info in tar} == {(0, "ilvr_ds", 0)}


def test_settings_name_the_option(tmp_path):
    with pytest.raises(ConfigError, match=r"--image-root .*nowhere"):
        (tmp_path / "x.jsonl").touch()
        BuildSettings((tmp_path / "x.jsonl",), "ilvr", tmp_path / "nowhere", tmp_path / "out")


def test_a_build_begun_by_other_rules_of_storage_is_refused(run, write_records, good_record, tmp_path, capsys):
    """A version that encoded every JPEG anew knew no such entry: its shards are not mixed with ours."""
    source = write_records([good_record("a")])
    assert run(source) == 0
    path = tmp_path / "out" / "progress" / "build.json"
    tree = json.loads(path.read_text())
    for other in ({**tree, "image storage": 1}, {k: v for k, v in tree.items() if k != "image storage"}):
        path.write_text(json.dumps(other))
        assert run(source) == 1
        assert f"image storage: {other.get('image storage')!r} there, 2 now" in capsys.readouterr().err


def test_a_photograph_is_stored_as_it_came_and_read_back(
    run, write_records, good_record, tmp_path, tokenizer, tokenizer_folder
):
    rough = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    rough.resize((112, 84), Image.Resampling.BICUBIC).save(tmp_path / "photo.jpg", quality=85, exif=exif)
    source = write_records([good_record("a", image_input="photo.jpg")])
    assert run(source) == 0
    assert check_main([str(tmp_path / "out"), "--tokenizer", str(tokenizer_folder)]) == 0
    shards = ShardSet.open(tmp_path / "out")
    stored = shards.read(0).images["in0.jpg"]
    assert b"taken at home" in (tmp_path / "photo.jpg").read_bytes() and b"taken at home" not in stored
    assert (tmp_path / "photo.jpg").read_bytes().endswith(stored[-500:])  # the scan
    pixels, grid = image_pixels(read_image(tmp_path / "photo.jpg"))
    sample = shards.load_sample(0, tokenizer)
    assert sample.grids[0] == grid == (1, 6, 8)
    assert (sample.input_pixels == pixels).all()


def test_storage_settings(run, write_records, good_record, tmp_path, capsys):
    """Noise, which JPEG stores in less space: as PNG, as JPEG, and at the saving and the error that it still allows."""
    source = write_records([good_record("a")])

    def stored(out, *options) -> tuple[list[str], dict]:
        assert run(source, *options, out=out) == 0
        with tarfile.open(tmp_path / out / "shard-000000.tar") as tar:
            names = sorted(name.partition(".")[2] for name in tar.getnames())
        return names, json.loads((tmp_path / out / "manifest.json").read_text())["images"]

    png, jpg = ["help0.png", "in0.png", "json"], ["help0.jpg", "in0.jpg", "json"]
    names, images = stored("default")
    assert names == png and (images["jpeg_quality"], images["jpeg_saving"], images["jpeg_max_error"]) == (97, 1.5, 1.0)
    names, images = stored("jpeg", "--jpeg-quality", 50, "--jpeg-max-error", 99, "--jpeg-saving", 1.1)
    assert names == jpg and (images["jpeg_quality"], images["jpeg_saving"], images["jpeg_max_error"]) == (50, 1.1, 99)
    names, images = stored("never", "--jpeg-quality", 0, "--jpeg-max-error", 99)
    assert names == png and images["jpeg_quality"] is None
    assert stored("saving", "--jpeg-quality", 50, "--jpeg-max-error", 99, "--jpeg-saving", 50)[0] == png
    assert stored("error", "--jpeg-quality", 50, "--jpeg-max-error", 0)[0] == png
    for option, value in (("quality", 101), ("quality", -1), ("saving", 0.5), ("max-error", -1), ("saving", "nan")):
        assert run(source, f"--jpeg-{option}", value, out="bad") == 1
        assert f"--jpeg-{option} {value}" in capsys.readouterr().err
