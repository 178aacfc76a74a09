"""Every kind of bad input, each between two good records: the culprit is named and the good ones are built."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from data_tools.build_shards import main as build_main
from data_tools.check_shards import main as check_main
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.errors import ShardError


@pytest.fixture
def build(write_records, good_record, tokenizer_folder, tmp_path):
    """Build [good, `record`, good]; returns the folder."""

    def call(record, options=()):
        source = write_records([good_record("before"), record, good_record("after")])
        arguments = ["--input", source, "--tokenizer", tokenizer_folder, "--out", tmp_path / "out", *options]
        assert build_main([str(argument) for argument in arguments]) == 0
        return tmp_path / "out"

    return call


def the_reject(folder) -> dict:
    """The one rejected record, after checking that its neighbours are there and the folder is sound."""
    shards = ShardSet.open(folder)
    assert [shards.sample_id(number) for number in range(len(shards))] == ["before", "after"]
    assert check_main([str(folder)]) == 0
    (reject,) = (json.loads(line) for line in (folder / "rejects.jsonl").read_text().split("\n") if line)
    assert reject["origin"].endswith("records.jsonl:2")
    assert set(reject) == {"origin", "id", "field", "reason", "message"}
    assert shards.manifest.reject_reasons == {reject["reason"]: 1}
    return reject


@pytest.mark.parametrize(
    ("image", "role"), [({"image_input": "gone.png"}, "input"),
                        ({"sequence_plan": [{"type": "latent", "helper_image": "gone.png"}]}, "helper")],
)  # fmt: skip
def test_missing_image(build, good_record, image, role):
    reject = the_reject(build(good_record("bad", **image)))
    assert (reject["reason"], reject["id"], reject["field"]) == ("missing_image", "bad", f"{role} image gone.png")


def test_broken_json_line(build, good_record):
    reject = the_reject(build(json.dumps(good_record("bad")).encode()[:-5]))
    assert (reject["reason"], reject["id"]) == ("broken_json", None)


def test_latent_step_without_helper_image(build, good_record):
    plan = [{"type": "text", "content": "x"}, {"type": "latent"}]
    reject = the_reject(build(good_record("bad", sequence_plan=plan)))
    assert (reject["reason"], reject["field"]) == ("missing_helper_image", "sequence_plan[1].helper_image")


def test_unknown_step_type(build, good_record):
    reject = the_reject(build(good_record("bad", sequence_plan=[{"type": "sketch"}])))
    assert (reject["reason"], reject["field"]) == ("unknown_step_type", "sequence_plan[0].type")
    assert "'sketch'" in reject["message"]


def test_zero_size_image(build, good_record, tmp_path):
    (tmp_path / "empty.png").touch()
    reject = the_reject(build(good_record("bad", image_input="empty.png")))
    assert (reject["reason"], reject["field"]) == ("zero_size_image", "input image empty.png")
    assert "empty.png" in reject["message"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"text", "undecodable_image"), (b"version https://git-lfs.github.com/spec/v1\n", "git_lfs_pointer")],
)
def test_unusable_image(build, good_record, tmp_path, content, reason):
    (tmp_path / "bad.png").write_bytes(content)
    assert the_reject(build(good_record("bad", image_input="bad.png")))["reason"] == reason


def test_truncated_image(build, good_record, tmp_path, write_records):
    write_records([])  # makes a.png
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    assert the_reject(build(good_record("bad", image_input="cut.png")))["reason"] == "truncated_image"


def test_extreme_aspect_ratio(build, good_record, tmp_path):
    Image.new("RGB", (2, 500)).save(tmp_path / "thin.png")
    assert the_reject(build(good_record("bad", image_input="thin.png")))["reason"] == "extreme_aspect_ratio"


def test_image_with_a_side_below_28_is_upscaled(build, good_record, tmp_path, tokenizer):
    Image.new("RGB", (400, 20), (9, 8, 7)).save(tmp_path / "flat.png")
    shards = ShardSet.open(build(good_record("flat", image_input="flat.png")))
    assert [shards.sample_id(number) for number in range(3)] == ["before", "flat", "after"]
    assert shards.load_sample(1, tokenizer).grids[0] == (1, 2, 28)  # 28 x 392 pixels
    with Image.open(io.BytesIO(shards.read(1).images["in0.png"])) as image:
        assert image.size == (392, 28)


def test_record_with_40_helper_images(build, good_record, tmp_path, tokenizer):
    """Members of a sample lie in the order of their names (help10 before help2); the spans keep the record's order."""
    plan = []
    for number in range(40):
        Image.new("RGB", (28 * (1 + number % 5), 112), (number, 0, 0)).save(tmp_path / f"h{number}.png")
        plan += [
            {"type": "text", "content": f"Step {number}."},
            {"type": "latent", "helper_image": f"h{number}.png"},
        ]
    folder = build(good_record("many", sequence_plan=plan), ["--helper-min-pixels", "784"])
    shards = ShardSet.open(folder)
    assert len(shards) == 3 and shards.index[1]["spans"] == 40
    sample = shards.load_sample(1, tokenizer)
    assert sample.grids[1:] == tuple((1, 8, 2 * (1 + number % 5)) for number in range(40))
    ends = np.cumsum([0, *(h * w for _, h, w in sample.grids[1:])])
    assert sample.helper_pixels[ends[:-1], 0].tolist() == list(range(40))  # the red of each helper image
    assert (sample.input_ids == tokenizer.vocabulary.latent_pad).sum() == 40 * 8
    assert check_main([str(folder)]) == 0


def test_helper_image_may_be_the_input_image(build, good_record, tokenizer):
    plan = [{"type": "latent", "helper_image": "a.png"}, {"type": "text", "content": "A"}]
    shards = ShardSet.open(build(good_record("same", sequence_plan=plan)))
    sample = shards.load_sample(1, tokenizer)
    assert sample.grids[0] == sample.grids[1]
    assert len(sample.input_pixels) and (sample.input_pixels == sample.helper_pixels).all()


def test_line_that_is_not_utf8(build, good_record):
    line = json.dumps(good_record("bad", text_input="caf_")).encode().replace(b"caf_", b"caf\xe9")
    reject = the_reject(build(line))
    assert reject["reason"] == "not_utf8"
    assert "UTF-8" in reject["message"]


def test_blank_line_between_records(build):
    assert the_reject(build(b"  "))["reason"] == "broken_json"


def test_shard_cut_in_half(build, good_record, tokenizer, capsys):
    folder = build(good_record("middle"))
    shards = ShardSet.open(folder)
    path = folder / "shard-000000.tar"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ShardError, match=r"shard-000000\.tar"):
        ShardSet.open(folder)
    with pytest.raises(ShardError, match=r"shard-000000\.tar: sample 2"):  # cut while it is open
        shards.load_sample(2, tokenizer)
    assert shards.load_sample(0, tokenizer).id == "before"
    assert check_main([str(folder)]) == 1
    assert "shard-000000.tar" in capsys.readouterr().err


def test_index_that_does_not_match_its_tar(
    build, good_record, write_records, tokenizer, tokenizer_folder, tmp_path, capsys
):
    """The index of one build beside the tar of another."""
    folder = build(good_record("middle"))
    source = write_records(
        [good_record("x", image_input=["a.png", "c.png"]), good_record("y"), good_record("z")], "other.jsonl"
    )
    other = tmp_path / "other"
    assert build_main(["--input", str(source), "--tokenizer", str(tokenizer_folder), "--out", str(other)]) == 0
    (folder / "index.npy").write_bytes((other / "index.npy").read_bytes())
    with pytest.raises(ShardError, match=r"index\.npy: sha256"):
        ShardSet.open(folder)
    assert check_main([str(folder)]) == 1
    assert "index.npy" in capsys.readouterr().err
    # with a manifest that believes the index, reading finds out by itself
    tree = json.loads((folder / "manifest.json").read_text())
    tree["index_sha256"] = json.loads((other / "manifest.json").read_text())["index_sha256"]
    (folder / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(ShardError, match=r"sample 2 at byte"):
        ShardSet.open(folder).load_sample(2, tokenizer)
    assert check_main([str(folder)]) == 1
    assert "shard-000000.tar: key 000000000: field 'size'" in capsys.readouterr().err
