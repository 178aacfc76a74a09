"""Real records with the real tokenizer, through build_shards and back: the published preprocessing, exactly."""

import hashlib
import json

import numpy as np
import pytest

from data_tools.build_shards import main as build_main
from data_tools.check_shards import main as check_main
from ilvr_ds.contracts import ImageRef
from ilvr_ds.data.images import image_to_patches, merged_tokens, normalise_patches_numpy, read_image, resize_image
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.data.tokens import ChatTokenizer

SOURCES = {"mirage": ("mirage/examples.jsonl", "mirage"), "mvot": ("mvot/episodes.jsonl", "ilvr")}


@pytest.fixture(scope="module")
def tokenizer(realdata):
    return ChatTokenizer.from_folder(realdata / "qwen2_5_vl_7b")


@pytest.fixture(scope="module")
def shards(realdata, tmp_path_factory):
    """Both sources, built and checked by the commands."""
    root = tmp_path_factory.mktemp("shards")
    built = {}
    for source, (path, form) in SOURCES.items():
        folder, tokenizer_folder = str(root / source), str(realdata / "qwen2_5_vl_7b")
        options = ["--input", str(realdata / path), "--format", form, "--tokenizer", tokenizer_folder, "--out", folder]
        assert build_main([*options, "--samples-per-shard", "4"]) == 0
        assert check_main([folder, "--tokenizer", tokenizer_folder]) == 0
        built[source] = ShardSet.open(folder)
        assert built[source].manifest.rejected == 0
    return built


def expected_lines(golden):
    return [json.loads(line) for line in (golden / "sequence_open.jsonl").read_text(encoding="utf-8").splitlines()]


def test_sequences_equal_the_golden_ones(golden, shards, tokenizer):
    lines = expected_lines(golden)
    assert len(lines) == 14
    for expected in lines:
        where = (expected["source"], expected["index"])
        sample = shards[expected["source"]].load_sample(expected["index"], tokenizer)
        assert sample.input_ids.tolist() == expected["input_ids"], where
        assert sample.labels.tolist() == expected["labels"], where
        latents = np.flatnonzero(sample.input_ids == tokenizer.vocabulary.latent_pad)
        assert latents.tolist() == expected["latent_positions"], where
        grids = [list(grid) for grid in sample.grids]
        assert grids[: sample.num_input_images] == expected["image_grid_thw"], where
        assert grids[sample.num_input_images :] == expected["helper_grid_thw"], where
        if expected["record_id"] is not None:
            assert sample.id == expected["record_id"]
        inputs = sum(h * w for _, h, w in sample.grids[: sample.num_input_images])
        images = np.split(
            np.concatenate([sample.input_pixels, sample.helper_pixels]),
            np.cumsum([h * w for _, h, w in sample.grids])[:-1],
        )
        cut = [
            image_to_patches(image.reshape(14 * h, 14 * w, 3))[0]
            for image, (_, h, w) in zip(images, sample.grids, strict=True)
        ]
        pixels = normalise_patches_numpy(np.concatenate(cut))
        for part, name in ((pixels[:inputs], "pixel"), (pixels[inputs:], "helper_pixel")):
            assert part.mean(dtype=np.float64) == pytest.approx(expected[f"{name}_mean"], abs=1e-3), where
            assert part.std(dtype=np.float64) == pytest.approx(expected[f"{name}_std"], abs=1e-3), where
        head = pixels.reshape(-1)[: len(expected["pixel_head"])]
        np.testing.assert_allclose(head, expected["pixel_head"], atol=1e-3, rtol=0, err_msg=str(where))


def test_images_equal_the_published_processor_to_the_bit(realdata):
    """Grids and the hash of all pixel values, of records of two data sets."""
    lines = (realdata / "preprocessing" / "reference.jsonl").read_text(encoding="utf-8").split("\n")
    compared = 0
    for expected in (json.loads(line) for line in lines if line):
        content = [part for message in expected["messages"] for part in message["content"]]
        images = [read_image(realdata / part["image"]) for part in content if part["type"] == "image"]
        cut = [image_to_patches(np.asarray(resize_image(image))) for image in images]
        assert [list(grid) for _, grid in cut] == expected["image_grid_thw"], expected["id"]
        pixels = normalise_patches_numpy(np.concatenate([patches for patches, _ in cut]))
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == expected["pixel_values_sha256"], expected["id"]
        compared += 1
    assert compared == 14


def test_prompts_equal_the_chat_template(realdata, tokenizer):
    """The user turn (images first, as that file has it) with the ids the published processor gives."""
    lines = (realdata / "preprocessing" / "reference.jsonl").read_text(encoding="utf-8").split("\n")
    compared = 0
    for expected in (json.loads(line) for line in lines if line):
        if expected["messages"][0]["role"] != "user":
            continue
        parts = [p["text"] if p["type"] == "text" else ImageRef(p["image"]) for p in expected["messages"][0]["content"]]
        images = sum(isinstance(part, ImageRef) for part in parts)
        counts = [merged_tokens(tuple(grid)) for grid in expected["image_grid_thw"][:images]]
        prompt = tokenizer.encode_prompt(parts, counts)
        # the last "\n" could have merged with what follows in one string; nothing here starts with a line break
        assert expected["input_ids"][: len(prompt)] == prompt.tolist(), expected["id"]
        compared += 1
    assert compared == 14
