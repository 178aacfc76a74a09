"""Cases of other people's public tests and logs, block by block (docs/scoring.md says where each is from)."""

import json

import numpy as np
import pytest

from ilvr_ds.contracts import IGNORE_INDEX, ImageRef, Sample
from ilvr_ds.data.formats.ilvr_jsonl import parse_line
from ilvr_ds.data.formats.jsonl import read_lines
from ilvr_ds.data.packing import pack
from ilvr_ds.data.plan import StepTotals
from ilvr_ds.data.tokens import LATENT_TOKENS, ChatTokenizer, Vocabulary
from ilvr_ds.errors import BatchError
from ilvr_ds.inference.tasks import task_named

# block -> where it is tested, or why there is nothing to compare
BLOCKS = {
    "comt_record_schema": "here",
    "tokenizer": "here",
    "segment_expansion": "here",
    "vsp_answers": "tests/unit/inference_scoring/test_paths.py",
    "zebra_ilvr_rules": "tests/unit/inference_scoring/test_paths.py",
    "mrope": "tests/unit/data/test_rotary_positions.py",
    "training_run_on_real_comt": "a log of a 7B run on images that are not available; nothing to compute",
}


@pytest.fixture(scope="module")
def vectors(realdata):
    return json.loads((realdata / "scoring/third_party_vectors.json").read_text(encoding="utf-8"))


def test_every_block_is_tested_or_explained(vectors, repository):
    assert set(vectors) - {"_note"} == set(BLOCKS)
    for block, place in BLOCKS.items():
        if place.endswith(".py"):
            assert f'"{block}"' in (repository / place).read_text(encoding="utf-8"), block


def test_tokenizer(vectors, realdata):
    """Ids and sizes logged with the published processor, before and after the latent tokens were added."""
    case, tokenizer = vectors["tokenizer"], ChatTokenizer.from_folder(realdata / "qwen2_5_vl_7b")
    v = tokenizer.vocabulary
    assert v.size == case["len_after_adding_3_latent_tokens"] <= case["model_config_vocab_size"]
    assert v.latent_pad == min(v.latent_pad, v.latent_start, v.latent_end) == case["len"]
    logged = case["before_adding"]
    for token in LATENT_TOKENS:  # spelled in a text they are text, here as before they were tokens
        assert tokenizer.encode_text(token) == logged[token]
        assert tokenizer.decode(logged[token]) == token
    assert logged["<|im_start|>assistant"] == [v.im_start, v.assistant]
    assert logged["<|vision_start|>"] == [v.vision_start]
    assert logged["<|vision_end|>"] == [v.vision_end]
    assert logged["<|endoftext|>"] == [case["vocab_size"]]
    assert tokenizer.decode([case["vocab_size"]]) == "<|endoftext|>"


def vocabulary_of(ids: dict[str, int]) -> Vocabulary:
    """1, 2 open the assistant's turn; ids that do not occur in the case for the rest."""
    return Vocabulary(
        im_start=1, assistant=2, im_end=90, vision_start=91, vision_end=92, image_pad=93, video_pad=94,
        latent_pad=ids["pad"], latent_start=ids["start"], latent_end=ids["end"], size=100, fingerprint="",
    )  # fmt: skip


def packed(ids: list[int], vocabulary: Vocabulary, spans: int, labels: np.ndarray | None = None):
    ids = np.array(ids)
    if labels is None:
        labels = np.where((np.arange(len(ids)) >= 2) & (ids != vocabulary.latent_pad), ids, IGNORE_INDEX)
    grids = ((1, 2, 2),) * spans
    sample = Sample(
        0, "case", ids, labels, grids, 0, np.zeros((0, 588), np.uint8), np.zeros((4 * spans, 588), np.uint8)
    )
    return pack([sample], vocabulary, 8, totals=StepTotals(samples=1, supervised=1, spans=1, tokens=len(ids)))


def test_segment_expansion(vectors):
    """Spans of eight pads; the text before each; pads bear no label; a span of another length is refused."""
    case = vectors["segment_expansion"]
    v = vocabulary_of(case["ids"])
    assert case["values"] == "[1,2,3,70]+[71]*8+[72,4,70]+[71]*8+[72,5]"
    ids = [1, 2, 3, 70] + [71] * 8 + [72, 4, 70] + [71] * 8 + [72, 5]
    batch = packed(ids, v, spans=2)
    assert batch.span_starts.tolist() == [4, 15]
    found = [batch.local_positions[batch.local_span == span].tolist() for span in range(2)]
    # the case counts the first text from its `assistant_start`; the published outputs, and we, from <|im_start|>
    assert found[0] == [0, 1, *case["local_text_positions"][0]]
    assert [p for p in found[0] if p >= case["assistant_start"]] == case["local_text_positions"][0]
    assert found[1] == case["local_text_positions"][1]
    assert not set(batch.targets.tolist()) & {v.latent_pad}
    labels = np.array([IGNORE_INDEX] * 2 + ids[2:])
    with pytest.raises(BatchError, match="a latent pad is supervised"):
        packed(ids, v, spans=2, labels=labels)
    with pytest.raises(BatchError, match="8 pads later"):
        packed([1, 2, 3, 70, 71, 72, 5], v, spans=1)


def test_comt_records(vectors, tmp_path):
    """The record as published for ILVR and the original one, as their readers see them."""
    block = vectors["comt_record_schema"]
    picture = "images_comt/creation/10003.png"
    line = json.dumps({"id": "creation-10003", **block["ilvr_record_skeleton"]}, ensure_ascii=False)
    (tmp_path / "comt.jsonl").write_text(line + "\n", encoding="utf-8")
    (record,) = map(parse_line, read_lines(tmp_path / "comt.jsonl"))
    assert record.prompt == (ImageRef(picture), "<question and options>")
    assert record.steps == (
        "<reasoning text>", ImageRef(picture), "<more reasoning>", "The final answer is: 70°",
    )  # fmt: skip
    assert record.answer == "70°"

    original = block["original_comt_record_creation-10003"]
    for image in ({"IMAGE0": "10003"}, "{'IMAGE0': '10003'}"):
        fields = {key: value for key, value in original.items() if key != "image_field_note"}
        line = json.dumps(fields | {"image": image}, ensure_ascii=False)
        (tmp_path / "original.jsonl").write_text(line + "\n", encoding="utf-8")
        (example,) = task_named("comt").read(tmp_path / "original.jsonl", tmp_path)
        assert example.images == ("images/creation/10003.png",)
        assert (example.answer, example.options["D"]) == ("D", "70°")
        assert example.group == "creation"
