"""Every record of the published samples ends built or rejected with a reason; pixels through a shard's members."""

import hashlib
import io
import json

import numpy as np
import pytest
from PIL import Image

from ilvr_ds.contracts import ImageRef, Record
from ilvr_ds.data.encode import encode_record
from ilvr_ds.data.formats.source import open_source
from ilvr_ds.data.images import ImageSettings, image_to_patches, normalise_patches_numpy, read_image
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.errors import RecordError

SOURCES = [  # file, format, records, how many of them to encode, why all are rejected
    ("mirage/examples.jsonl", "mirage", 10, 4, None),
    ("mvot/episodes.jsonl", "ilvr", 18, 6, None),
    ("vsp_planning_test/test.jsonl", "vsp", 400, 12, None),
    ("m3cot/test_text_100.jsonl", "m3cot", 100, 100, "missing_image"),  # the release here is text only
    ("scienceqa/problems_100.json", "scienceqa", 100, 100, None),
]


@pytest.fixture(scope="module")
def qwen(realdata):
    return ChatTokenizer.from_folder(realdata / "qwen2_5_vl_7b")


@pytest.mark.parametrize(("path", "form", "count", "tried", "reason"), SOURCES)
def test_records_end_built_or_rejected_with_a_reason(path, form, count, tried, reason, realdata, qwen, tmp_path):
    source = open_source(realdata / path, form, tmp_path)
    assert len(source) == count
    built, rejected = 0, []
    for place in range(0, count, count // tried):
        [record] = source.read(place, place + 1)
        assert isinstance(record, Record)
        try:
            sample = encode_record(record, (realdata / path).parent, qwen, 8, ImageSettings())
        except RecordError as error:
            rejected.append(error.reason)
            continue
        built += 1
        assert sample.counts["spans"] == sum(isinstance(step, ImageRef) for step in record.steps)
    if form == "scienceqa":  # those with a picture are rejected, as the pictures are not there; the others are built
        problems = json.loads((realdata / path).read_text(encoding="utf-8")).values()
        pictured = sum(problem["image"] is not None for problem in problems)
        assert (built, rejected) == (count - pictured, ["missing_image"] * pictured) and 0 < pictured < count
    else:
        assert set(rejected) == ({reason} if reason else set())
        assert built == (0 if reason else len(range(0, count, count // tried)))


@pytest.mark.parametrize("form", ["m3cot", "scienceqa"])
def test_records_with_pictures_are_built(form, realdata, qwen, tmp_path):
    """The same records with stand-in pictures where the data sets keep theirs."""
    path, _, count, _, _ = next(entry for entry in SOURCES if entry[1] == form)
    buffer = io.BytesIO()
    Image.new("RGB", (60, 60), "red").save(buffer, format="PNG")
    source = open_source(realdata / path, form, tmp_path / "scratch")
    for record in source.read(0, count):
        for part in record.prompt:
            if isinstance(part, ImageRef):
                name = tmp_path / part.path.replace(".*", ".png")
                name.parent.mkdir(parents=True, exist_ok=True)
                name.write_bytes(buffer.getvalue())
        sample = encode_record(record, tmp_path, qwen, 8, ImageSettings())
        assert sample.counts["image_tokens"] == 4 * sum(isinstance(part, ImageRef) for part in record.prompt)


def test_members_hold_the_published_pixels_to_the_bit(realdata, qwen):
    """Resized once, stored as PNG, decoded again: the hash of the published processor's values, and its ids."""
    lines = (realdata / "preprocessing" / "reference.jsonl").read_text(encoding="utf-8").split("\n")
    compared = 0
    for expected in (json.loads(line) for line in lines if line):
        content = [part for part in expected["messages"][0]["content"]]
        parts = tuple(ImageRef(p["image"]) if p["type"] == "image" else p["text"] for p in content)
        images = [ImageRef(p["image"]) for m in expected["messages"][1:] for p in m["content"] if p["type"] == "image"]
        record = Record(expected["id"], parts, (*images, "x"), None, None, "reference.jsonl:1")
        sample = encode_record(record, realdata, qwen, 8, ImageSettings())
        tree = json.loads(sample.members["json"])
        names = [part["image"] for part in (*tree["prompt"], *tree["steps"]) if isinstance(part, dict)]
        assert [tree["grids"][name] for name in names] == expected["image_grid_thw"], expected["id"]
        patches = [image_to_patches(np.asarray(read_image(sample.members[name])))[0] for name in names]
        pixels = normalise_patches_numpy(np.concatenate(patches))
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == expected["pixel_values_sha256"], expected["id"]
        counts = [grid[1] * grid[2] // 4 for grid in expected["image_grid_thw"]]
        ids = qwen.encode_prompt(parts, counts[: sum(isinstance(part, ImageRef) for part in parts)])
        assert expected["input_ids"][: len(ids) - 3] == ids[:-3].tolist(), expected["id"]
        compared += 1
    assert compared == 14
