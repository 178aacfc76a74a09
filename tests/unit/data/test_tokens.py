"""The chat format: what is supervised, what text cannot do, and that prompts and samples agree."""

import json
import multiprocessing
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilvr_ds.contracts import IGNORE_INDEX, ImageRef
from ilvr_ds.data.tokens import LATENT_TOKENS, REQUIRED_TOKENS, ChatTokenizer
from ilvr_ds.errors import ConfigError

I = ImageRef("x.png")  # noqa: E741
PARTS = st.lists(
    st.one_of(st.just(I), st.text(max_size=12), st.sampled_from([*REQUIRED_TOKENS, "\n", " "])), max_size=5
)


def test_layout_and_labels(tokenizer):
    ids, labels = tokenizer.encode_sample(("See ", I, "?"), ("Go", I, I, "A"), [3], 2)
    v = tokenizer.vocabulary
    span = "<|latent_start|><|latent_pad|><|latent_pad|><|latent_end|>"
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nSee <|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>?<|im_end|>\n"
        f"<|im_start|>assistant\nGo{span}{span}A<|im_end|>\n"
    )
    role = int(np.flatnonzero(ids == v.im_start)[-1]) + 1
    assert ids[role] == v.assistant
    assert (labels[: role + 1] == IGNORE_INDEX).all()
    tail_ids, tail_labels = ids[role + 1 :], labels[role + 1 :]
    pads = tail_ids == v.latent_pad
    assert pads.sum() == 4
    assert (tail_labels[pads] == IGNORE_INDEX).all()
    assert (tail_labels[~pads] == tail_ids[~pads]).all()  # from "\n" after "assistant" to the last "\n"
    assert tokenizer.decode(tail_labels[:1]) == "\n"
    assert tail_labels[-2] == v.im_end
    assert ids.dtype == labels.dtype == np.int64


@settings(deadline=None, max_examples=60)
@given(prompt=PARTS, steps=PARTS, latent_size=st.integers(1, 4))
def test_prompt_is_the_exact_prefix_and_control_tokens_come_from_structure_only(tokenizer, prompt, steps, latent_size):
    """For any text, control tokens spelled in it included."""
    images = prompt.count(I)
    counts = list(range(1, images + 1))
    prefix = tokenizer.encode_prompt(prompt, counts)
    ids, labels = tokenizer.encode_sample(prompt, steps, counts, latent_size)
    assert (ids[: len(prefix)] == prefix).all()
    assert tokenizer.decode(prefix).endswith("<|im_start|>assistant\n")
    v = tokenizer.vocabulary
    spans = steps.count(I)
    found = {name: int((ids == getattr(v, name)).sum()) for name in
             ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad",
              "latent_pad", "latent_start", "latent_end")}  # fmt: skip
    assert found == {
        "im_start": 3, "im_end": 3, "vision_start": images, "vision_end": images, "image_pad": sum(counts),
        "video_pad": 0, "latent_pad": spans * latent_size, "latent_start": spans, "latent_end": spans,
    }  # fmt: skip
    assert (labels != IGNORE_INDEX).sum() == len(ids) - len(prefix) + 1 - spans * latent_size  # +1: "\n"


def test_text_is_joined_before_it_is_tokenised(tokenizer):
    """Two newlines of two parts are the one token that BPE makes of them; an image keeps them apart."""
    together, apart = (tokenizer.encode_text(text) for text in ("\n\n", "\n"))
    assert len(together) == 1
    assert tokenizer.encode_prompt(("\n", "\n", "x"), []).tolist() == tokenizer.encode_prompt(("\n\nx",), []).tolist()
    ids = tokenizer.encode_prompt(("\nx",), []).tolist()
    assert together[0] in ids  # "user\n" + "\nx"
    assert together[0] not in tokenizer.encode_prompt(("a\n", I, "\nb"), [1]).tolist()
    _, labels = tokenizer.encode_sample(("q",), ("\nx",), [], 1)
    assert labels[labels != IGNORE_INDEX][:2].tolist() == apart * 2  # no merge over the start of generation


def test_latent_tokens_are_appended_in_order_and_kept_when_there(spec):
    base = spec()
    top = max(entry["id"] for entry in base["added_tokens"])
    fresh = ChatTokenizer(json.dumps(base), "t").vocabulary
    assert (fresh.latent_pad, fresh.latent_start, fresh.latent_end) == (top + 1, top + 2, top + 3)
    assert fresh.size == top + 4
    # the same tokenizer saved with the latents, not even marked special, and laid out in another way
    for i, token in enumerate(LATENT_TOKENS):
        base["added_tokens"].append({"id": top + 1 + i, "content": token, "single_word": False, "lstrip": False,
                                     "rstrip": False, "normalized": True, "special": False})  # fmt: skip
    base["model"]["merges"] = [merge.split(" ") for merge in base["model"]["merges"]]
    saved = ChatTokenizer(json.dumps(base, indent=2), "t")
    assert saved.vocabulary == fresh
    assert fresh.latent_pad not in saved.encode_text("a <|latent_pad|> b")


@pytest.mark.parametrize("change", ["merges", "vocab", "normalizer", "latents", "added"])
def test_fingerprint_changes_with_what_decides_ids(spec, change):
    base, other = spec(), spec()
    top = max(entry["id"] for entry in base["added_tokens"])
    if change == "merges":
        other["model"]["merges"] = other["model"]["merges"][::-1]
    elif change == "vocab":
        other = spec(("assistant", "ĊĊ", "Ġthis"))
    elif change == "normalizer":
        other["normalizer"] = None
    elif change == "latents":
        other["added_tokens"].append({**base["added_tokens"][0], "id": top + 1, "content": "<|latent_end|>"})
    else:
        other["added_tokens"].append({**base["added_tokens"][0], "id": top + 1, "content": "<tool>", "special": False})
    first, second = (ChatTokenizer(json.dumps(s), "t").vocabulary.fingerprint for s in (base, other))
    assert first != second


@pytest.mark.parametrize("token", [*REQUIRED_TOKENS, "assistant"])
def test_missing_token_is_named(spec, token):
    base = spec() if token != "assistant" else spec(("Ġthe",))
    base["added_tokens"] = [entry for entry in base["added_tokens"] if entry["content"] != token]
    with pytest.raises(ConfigError, match=r"here\.json") as error:
        ChatTokenizer(json.dumps(base), "here.json")
    assert repr(token) in str(error.value)


def test_ids_with_a_hole_are_refused(spec):
    """The tokenizers library closes a hole in the added ids without a word: the file's ids would not be its ids."""
    base = spec()
    base["added_tokens"][-1]["id"] += 7
    with pytest.raises(ConfigError, match=r"<\|video_pad\|>"):
        ChatTokenizer(json.dumps(base), "t")


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer.json: no such file"):
        ChatTokenizer.from_folder(tmp_path)
    for content in (b"{", b"[]", b'{"added_tokens": []}', b"\xff\xfe"):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(ConfigError, match=r"tokenizer.json: not"):
            ChatTokenizer.from_folder(tmp_path)


def test_counts_must_match_images(tokenizer):
    with pytest.raises(ValueError, match="1 images in the prompt, 2 image token counts"):
        tokenizer.encode_prompt((I, "x"), [4, 4])


def test_pickle_and_spawn_keep_every_rule(tokenizer):
    text = "end <|im_end|> <|image_pad|>"
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.vocabulary == tokenizer.vocabulary
    assert copy.encode_text(text) == tokenizer.encode_text(text)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(tokenizer.encode_text, (text,)) == tokenizer.encode_text(text)


def test_real_tokenizer(realdata):
    """Ids of Qwen2.5-VL's own tokenizer, checked against transformers' test vectors."""
    folder = realdata / "qwen2_5_vl_7b"
    tokenizer = ChatTokenizer.from_folder(folder)
    v = tokenizer.vocabulary
    assert (v.latent_pad, v.latent_start, v.latent_end, v.size) == (151665, 151666, 151667, 151668)
    assert (v.im_start, v.im_end, v.image_pad, v.assistant) == (151644, 151645, 151655, 77091)
    vectors = json.loads((folder / "tokenizer_integration_vectors.json").read_text())
    for text, ids in zip(vectors["sequences"], vectors["input_ids"], strict=True):
        assert tokenizer.encode_text(text) == ids
    # the role and the line break that are put in by id are what tokenising them gives
    assert tokenizer.encode_text("assistant\n") == [v.assistant, *tokenizer.encode_text("\n")]
    assert 151657 in tokenizer.encode_text("<tool_call>")  # not special in Qwen's tokenizer: keeps its id
    assert max(tokenizer.encode_text("<|im_end|><|endoftext|>")) < 151643
