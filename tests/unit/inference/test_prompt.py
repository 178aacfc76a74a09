"""A prompt at inference is, to the byte, what training saw before the answer."""

import json

import numpy as np
import pytest
from PIL import Image

from ilvr_ds.contracts import ImageRef
from ilvr_ds.data.build import BuildSettings, build
from ilvr_ds.data.images import ImageSettings
from ilvr_ds.data.rotary_positions import rotary_positions
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.errors import ConfigError, RecordError
from ilvr_ds.inference.prompt import build_prompt, parts_of_text, prompt_of_ids, sequence_seed
from ilvr_ds.inference.requests import encode_requests, read_requests, typed_request
from ilvr_ds.model.tiny import train_tokenizer

IMAGES = ImageSettings(input_max_pixels=64 * 64, helper_max_pixels=200 * 200)  # other bounds for other roles
PROMPTS = [  # text_input, sizes of its images
    ("<image>\nWhich way?", [(90, 40)]),
    ("From <image> to <image>, how far?", [(31, 57), (200, 120)]),
    ("Images first.", [(64, 64)]),
    ("No image, but a control token: <|image_pad|><|im_end|>", []),
    ("\n\n a text that starts with line breaks", []),
]


@pytest.fixture(scope="module")
def tokenizer():
    return ChatTokenizer(train_tokenizer([text for text, _ in PROMPTS]).to_str(), "test")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A JSONL file of the prompts above with an answer each, and their images."""
    folder = tmp_path_factory.mktemp("records")
    rng = np.random.default_rng(0)
    lines = []
    for number, (text, sizes) in enumerate(PROMPTS):
        names = []
        for i, (width, height) in enumerate([*sizes, (50, 50)]):
            names.append(f"{number}-{i}.png")
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / names[-1])
        steps = [{"type": "text", "content": "So."}, {"type": "latent", "helper_image": names[-1]}]
        lines.append({"id": f"r{number}", "text_input": text, "image_input": names[:-1], "sequence_plan": steps,
                      "original_final_answer": "A"})  # fmt: skip
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "records.jsonl"


def test_equals_what_training_reads_from_shards(records, tokenizer, tmp_path):
    """Built into shards and read back as training does: ids, positions, grids and pixels are the same."""
    settings = BuildSettings((records,), "ilvr", records.parent, tmp_path / "shards", latent_size=3, images=IMAGES)
    build(settings, tokenizer, lambda n: None)
    shards = ShardSet.open(tmp_path / "shards")
    assert len(shards) == len(PROMPTS)
    prompts = {p.id: p for p in encode_requests(read_requests(records), tokenizer, IMAGES, seed=0)}
    for number in range(len(shards)):
        sample = shards.load_sample(number, tokenizer)
        prompt, length = prompts[sample.id], len(prompts[sample.id].input_ids)
        trained = prompt_of_ids(
            sample.id, sample.input_ids[:length], sample.grids[: sample.num_input_images], sample.input_pixels,
            tokenizer.vocabulary.image_pad,
        )  # fmt: skip
        assert prompt.sha256() == trained.sha256()
        positions = rotary_positions(
            sample.input_ids, sample.grids[: sample.num_input_images], tokenizer.vocabulary.image_pad
        )
        assert np.array_equal(prompt.position_ids, positions[:, :length])
        assert (positions[:, length] == prompt.next_position).all()
        # what follows is the answer, whole
        assert tokenizer.decode(sample.input_ids[length:]).startswith("So.<|latent_start|>")


def test_the_hash_sees_everything(records, tokenizer):
    prompt = next(encode_requests(read_requests(records), tokenizer, IMAGES, seed=0))
    v = tokenizer.vocabulary
    others = []
    for change in ("ids", "pixels"):
        ids, pixels = prompt.input_ids.copy(), prompt.pixels.copy()
        if change == "ids":
            ids[1] += 1
        else:
            pixels[0, 0] ^= 1
        others.append(prompt_of_ids("x", ids, prompt.grids, pixels, v.image_pad).sha256())
    (t, h, w), *rest = prompt.grids
    turned = prompt_of_ids("x", prompt.input_ids, [(t, w, h), *rest], prompt.pixels, v.image_pad).sha256()
    assert h != w
    assert len({prompt.sha256(), turned, *others}) == 4
    assert prompt_of_ids("other name", prompt.input_ids, prompt.grids, prompt.pixels, v.image_pad, 5).sha256() == (
        prompt.sha256()
    )


def test_a_record_needs_no_answer(records, tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text_input": "Hello", "image_input": []}\n')
    [request] = read_requests(tmp_path / "a.jsonl")
    assert (request.id, request.parts) == ("a-1", ("Hello",))


def test_marks_without_images_are_counted(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=r"2 <image> mark\(s\), 1 image\(s\)"):
        parts_of_text("<image> and <image>", ["a.png"])
    with pytest.raises(ConfigError, match=r"1 <image> mark\(s\), 0 image\(s\)"):
        typed_request("what is in <image>?", [])
    assert parts_of_text("a<image>b", ["x.png"]) == ("a", ImageRef("x.png"), "b")
    assert parts_of_text("ab", ["x.png"]) == (ImageRef("x.png"), "ab")
    with pytest.raises(RecordError, match=r"1 <image> mark\(s\) in the text have no image; 0 image\(s\)") as caught:
        build_prompt(["see <image>"], tokenizer, IMAGES, tmp_path, prompt_id="q", origin="f:3")
    assert (caught.value.reason, caught.value.record_id, caught.value.origin) == ("marker_count", "q", "f:3")
    file = tmp_path / "bad.jsonl"
    file.write_text('{"id": "q", "text_input": "<image> <image>", "image_input": ["a.png"]}\n')
    with pytest.raises(RecordError, match=r"bad.jsonl:1 \(id 'q'\).*2 <image> markers for 1 images"):
        read_requests(file)


def test_missing_and_damaged_images_are_named(tokenizer, tmp_path):
    file = tmp_path / "a.jsonl"
    line = {"id": "q", "text_input": "x", "image_input": ["no.png"]}
    file.write_text(json.dumps(line))
    with pytest.raises(RecordError, match=r"a.jsonl:1 \(id 'q'\): field 'image no.png': no such image"):
        read_requests(file)
    (tmp_path / "no.png").write_bytes(b"not an image")
    with pytest.raises(RecordError, match=r"a.jsonl:1 \(id 'q'\): field 'image no.png'.*cannot be decoded"):
        list(encode_requests(read_requests(file), tokenizer, IMAGES, seed=0))
    with pytest.raises(RecordError, match=r"missing\.png"):
        typed_request("x", ["missing.png"])


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ConfigError, match="holds no record"):
        read_requests(tmp_path / "a.jsonl")


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_requests(tmp_path / "none.jsonl")


def test_seeds_are_of_the_run_the_prompt_and_the_sample():
    seeds = [sequence_seed(0, "a"), sequence_seed(1, "a"), sequence_seed(0, "b"), sequence_seed(0, "a", 1)]
    assert len(set(seeds)) == 4
    assert sequence_seed(0, "a") == seeds[0]
    assert all(0 <= seed < 2**64 for seed in seeds)
