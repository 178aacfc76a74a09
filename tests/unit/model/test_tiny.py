"""The tiny model folder: same bytes every time, read by stock transformers, chat format of the real one."""

import json
import os
import subprocess
import sys
import unicodedata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from ilvr_ds.data.finished_folder import SETTINGS
from ilvr_ds.data.frozenlake import parse_map
from ilvr_ds.data.frozenlake_records import example_texts
from ilvr_ds.data.frozenlake_render import render
from ilvr_ds.errors import ConfigError
from ilvr_ds.model.tiny import ROLES, SPECIAL_TOKENS, VOCAB_SIZE, build_tiny_model, train_tokenizer

CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Plan?"}, {"type": "video"}]},
    {"role": "assistant", "content": "R"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    assert build_tiny_model(path, seed=0)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def model(folder):
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_another_process_writes_the_same_bytes(folder, repository, tmp_path):
    """Hash seeds and thread counts differ between processes; the folder must not."""
    script = str(repository / "launch" / "make_tiny_model.py")
    result = subprocess.run(
        [sys.executable, script, "--out", str(tmp_path / "m"), "--seed", "0"],
        env={**os.environ, "PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "2"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert files(tmp_path / "m") == files(folder)
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.iterdir())  # others may read them


def test_a_finished_folder_is_left_alone_and_other_settings_are_refused(folder):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert not build_tiny_model(folder, seed=0)
    with pytest.raises(ConfigError, match="seed: 0 there, 1 asked"):
        build_tiny_model(folder, seed=1)
    with pytest.raises(ConfigError, match="corpus_sha256"):
        build_tiny_model(folder, seed=0, corpus_texts=["other words"])
    with pytest.raises(ConfigError, match="seed: got -1"):
        build_tiny_model(folder, seed=-1)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_seed_draws_the_weights_and_leaves_the_global_generator_alone(folder, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_tiny_model(tmp_path / "one", seed=1, corpus_texts=example_texts(3))
    assert torch.equal(torch.rand(3), expected)
    assert files(tmp_path / "one")["model.safetensors"] != files(folder)["model.safetensors"]


def test_stock_transformers_loads_it_and_runs_one_forward_with_an_image(folder, model):
    assert model.dtype == torch.float32
    assert 0.9e6 < sum(p.numel() for p in model.parameters()) < 1.5e6
    assert not model.config.tie_word_embeddings
    words = AutoTokenizer.from_pretrained(folder)
    picture = Image.fromarray(render(parse_map([[1, 0, 0], [0, -1, 0], [0, 0, 2]])))
    images = AutoImageProcessor.from_pretrained(folder)(images=[picture], return_tensors="pt")
    grid = images["image_grid_thw"]
    assert grid.tolist() == [[1, 14, 14]]  # 192 px, rounded to 196 = 14 patches of 14
    text = words.apply_chat_template(CHAT[:1], add_generation_prompt=True, tokenize=False)
    text = text.replace("<|image_pad|>", "<|image_pad|>" * 49).replace(
        "<|vision_start|><|video_pad|><|vision_end|>", ""
    )
    batch = words([text], return_tensors="pt")
    is_image = batch["input_ids"] == model.config.image_token_id
    assert int(is_image.sum()) == 49
    with torch.no_grad():
        logits = model(**batch, **images, mm_token_type_ids=is_image.int()).logits  # (1, T, V)
        blank = model(
            **batch,
            pixel_values=torch.zeros_like(images["pixel_values"]),
            image_grid_thw=grid,
            mm_token_type_ids=is_image.int(),
        ).logits
    assert logits.shape == (1, batch["input_ids"].shape[1], VOCAB_SIZE)
    assert torch.isfinite(logits).all()
    assert (logits[0, -1] - blank[0, -1]).abs().max() > 1e-4  # the picture reaches the last token


def test_different_cells_have_different_visual_features(model, folder):
    """The frozen random tower must tell ice from holes, or the selection has nothing to choose from."""
    picture = Image.fromarray(render(parse_map([[1, 0, 0], [0, -1, 0], [0, 0, 2]])))
    images = AutoImageProcessor.from_pretrained(folder)(images=[picture], return_tensors="pt")
    with torch.no_grad():
        features = model.model.visual(images["pixel_values"], grid_thw=images["image_grid_thw"]).pooler_output
    cosine = torch.nn.functional.normalize(features, dim=-1) @ torch.nn.functional.normalize(features, dim=-1).T
    assert features.shape == (49, 128)
    assert cosine.min() < 0.8


def test_weights_carry_the_published_names(folder):
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "visual.patch_embed.proj.weight",
    } <= names


def test_config_agrees_with_the_tokenizer(model, tokenizer):
    config, text = model.config, model.config.text_config
    assert config.image_token_id == tokenizer.token_to_id("<|image_pad|>")
    assert config.video_token_id == tokenizer.token_to_id("<|video_pad|>")
    assert config.vision_start_token_id == tokenizer.token_to_id("<|vision_start|>")
    assert config.vision_end_token_id == tokenizer.token_to_id("<|vision_end|>")
    assert text.eos_token_id == tokenizer.token_to_id("<|im_end|>")
    assert model.generation_config.pad_token_id == tokenizer.token_to_id("<|endoftext|>")
    assert tokenizer.get_vocab_size() <= text.vocab_size == VOCAB_SIZE
    assert sum(text.rope_parameters["mrope_section"]) * 2 == text.hidden_size // text.num_attention_heads
    vision = config.vision_config
    assert set(vision.fullatt_block_indexes) < set(range(vision.depth))  # both kinds of attention occur


def test_special_tokens_are_one_id_each_and_the_latent_ones_come_last(tokenizer):
    ids = [tokenizer.encode(token).ids for token in SPECIAL_TOKENS]
    assert all(len(one) == 1 for one in ids)
    size = tokenizer.get_vocab_size()
    assert [one[0] for one in ids] == list(range(size - len(SPECIAL_TOKENS), size))
    assert SPECIAL_TOKENS[-3:] == ("<|latent_pad|>", "<|latent_start|>", "<|latent_end|>")
    for role in ROLES:
        assert len(tokenizer.encode(f"<|im_start|>{role}\n").ids) == 3
    assert tokenizer.decode(tokenizer.encode("a<|latent_pad|>b").ids, skip_special_tokens=True) == "ab"


def test_roles_stay_single_tokens_whatever_the_corpus():
    """Words made to win the first merges: every pair of 'assistant', crossed with other letters."""
    hostile = [" ".join(["tass", "stan", "antan", "usus", "emem", "erse"] * 50)] * 20
    small = train_tokenizer(hostile, vocab_size=256 + len(SPECIAL_TOKENS) + 16)
    for role in ROLES:
        assert len(small.encode(role).ids) == 1


@settings(deadline=None, max_examples=150)
@given(st.text(max_size=60))
def test_any_text_comes_back(tokenizer, text):
    text = unicodedata.normalize("NFC", text)  # like the real tokenizer, which normalises
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_every_byte_has_an_id(tokenizer):
    alphabet = [token for token in tokenizer.get_vocab() if len(token) == 1]
    assert len(alphabet) == 256


def test_auto_tokenizer_agrees_with_the_tokenizers_library(folder, tokenizer):
    auto = AutoTokenizer.from_pretrained(folder)
    for text in [
        *example_texts(3),
        "<|im_start|>assistant\n\nIt's 12 <think> 你好 <|latent_start|><|latent_pad|><|im_end|>",
    ]:
        assert auto(text).input_ids == tokenizer.encode(text).ids
    assert (auto.eos_token, auto.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_puzzle_texts_take_few_tokens(tokenizer):
    """Merges were learnt from such texts: about four characters a token, not one byte a token."""
    texts = example_texts(20, seed=123)  # other puzzles than those it was trained on
    assert sum(map(len, texts)) / sum(len(tokenizer.encode(text).ids) for text in texts) > 3


def test_same_chat_format_pre_tokenizer_and_image_settings_as_the_real_model(folder, tokenizer, realdata):
    real = realdata / "qwen2_5_vl_7b"
    theirs = json.loads((real / "tokenizer.json").read_text(encoding="utf-8"))
    ours = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert ours["normalizer"] == theirs["normalizer"]
    assert ours["pre_tokenizer"]["pretokenizers"][0] == theirs["pre_tokenizer"]["pretokenizers"][0]
    for name in ("preprocessor_config.json",):
        assert json.loads((folder / name).read_text()) == json.loads((real / name).read_text())
    template = json.loads((real / "chat_template.json").read_text())["chat_template"]
    auto = AutoTokenizer.from_pretrained(folder)
    for chat in (CHAT, [{"role": "system", "content": "Be brief."}, *CHAT], [{"role": "user", "content": "Hi"}]):
        for ask in (True, False):
            settings_ = {"tokenize": False, "add_generation_prompt": ask}
            assert auto.apply_chat_template(chat, **settings_) == auto.apply_chat_template(
                chat, chat_template=template, **settings_
            )


def test_settings_are_stated(folder):
    stated = json.loads((folder / SETTINGS).read_text())
    assert stated["seed"] == 0
    assert set(stated) == {"made_by", "version", "seed", "corpus_texts", "corpus_sha256"}
