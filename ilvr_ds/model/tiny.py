"""A tiny model folder that needs no download: Qwen2.5-VL's architecture, about a million random
parameters, and a byte-level tokenizer learnt from FrozenLake puzzle texts.

Stock transformers reads the folder like the published 7B one (`Qwen2_5_VLForConditionalGeneration`,
`AutoTokenizer`, `AutoImageProcessor`). What is the same: layer structure, 3-D rotary positions, windowed vision
attention with full-attention blocks in between, untied head, pre-tokenizer and normalizer, names of the
special tokens, chat format, image settings. What is not: sizes, weights, token ids. The three latent
tokens come last, as when they are added to the real tokenizer.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from ilvr_ds.data.finished_folder import is_finished, write_folder
from ilvr_ds.data.frozenlake_records import example_texts
from ilvr_ds.data.tokens import LATENT_TOKENS
from ilvr_ds.errors import ConfigError
from ilvr_ds.model.latent_settings import LATENT_KEY, LatentSettings
from ilvr_ds.model.pixel_bounds import PREPROCESSOR_FILE, PUBLISHED

FOLDER_VERSION = 2  # raise it when the same settings would give another folder
VOCAB_SIZE = 1024  # rows of the embedding; the tokenizer may use fewer, as with the real model
CORPUS_PUZZLES = 200
LATENT_SIZE = 8  # K that config.json names: that of the published models
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|latent_pad|>",
    "<|latent_start|>",
    "<|latent_end|>",
)
ROLES = ("system", "user", "assistant")  # one token each, so that `<|im_start|>assistant` is two ids
SYSTEM_PROMPT = "You are a helpful assistant."
# Qwen's split into words: contractions, letters with one leading sign, single digits, signs, line ends, spaces.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + SYSTEM_PROMPT + "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tiny_model(folder: Path, seed: int, corpus_texts: Sequence[str] | None = None) -> bool:
    """Write the model folder; True if written, False if it was already there with the same settings.

    `seed` draws the weights. `corpus_texts` is what the tokenizer's merges are learnt from (default: the
    texts of `CORPUS_PUZZLES` generated puzzles). The same arguments give the same bytes; the global random
    state is left as it was. Raises `ConfigError` if the folder holds something else (see
    `ilvr_ds.data.finished_folder`) or the seed is out of range.
    """
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed: got {seed}; allowed: 0 to 2**63 - 1")
    folder = Path(folder)
    texts = example_texts(CORPUS_PUZZLES) if corpus_texts is None else list(corpus_texts)
    settings = {
        "made_by": "make_tiny_model",
        "version": FOLDER_VERSION,
        "seed": seed,
        "corpus_texts": len(texts),
        "corpus_sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
    }
    if is_finished(folder, settings):
        return False
    tokenizer = train_tokenizer(texts)
    model = tiny_model(tiny_config(tokenizer), seed)
    with write_folder(folder, settings) as partial:
        model.save_pretrained(partial)  # config.json, generation_config.json, model.safetensors
        (partial / "model.safetensors").chmod(0o644)  # safetensors writes it readable by its owner only
        tokenizer.save(str(partial / "tokenizer.json"))
        _write_json(partial / "tokenizer_config.json", _tokenizer_settings())
        _write_json(partial / "chat_template.json", {"chat_template": _CHAT_TEMPLATE})
        _write_json(partial / PREPROCESSOR_FILE, PUBLISHED)
    return True


def train_tokenizer(texts: Sequence[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Byte-level BPE with Qwen's pre-tokenizer and NFC normalizer: 256 bytes, merges, special tokens.

    At most `vocab_size` ids in all. Any text comes back from decode(encode(text)) up to NFC. `ROLES` are
    single tokens whatever the texts are.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_with_roles([*texts, f"\n{SYSTEM_PROMPT}"]), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def tiny_config(tokenizer: Tokenizer) -> Qwen2_5_VLConfig:
    """The configuration, its token ids taken from the tokenizer. About 1.2 million parameters."""
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,  # head size 32: 16 rotary frequencies, shared out by mrope_section
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        # 1e6, made for contexts of 100k tokens and heads of 128, would leave the columns of a picture less than a
        # thousandth of a turn apart: with random weights the model could not tell them apart
        "rope_parameters": {"rope_type": "default", "rope_theta": 5.0, "mrope_section": [2, 7, 7]},
        "initializer_range": 0.08,  # about 1 / sqrt(hidden_size): attention has preferences from the first step
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": None,  # a padding row would be zeroed at initialisation
    }
    vision = {
        "depth": 4,
        "fullatt_block_indexes": [1, 3],  # blocks 0 and 2 attend within windows
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": text["hidden_size"],
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 112,
        "tokens_per_second": 2,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
        dtype="float32",
        **{LATENT_KEY: asdict(LatentSettings(LATENT_SIZE, {token: ids[token] for token in LATENT_TOKENS}))},
    )


def tiny_model(config: Qwen2_5_VLConfig, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """Random float32 weights on the CPU, drawn from `seed` by transformers' own initialisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    text = config.text_config
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=[text.eos_token_id, text.bos_token_id],
        pad_token_id=text.bos_token_id,
    )
    return model


def _with_roles(texts: Sequence[str]) -> Iterator[str]:
    """The texts, then each role word more often than any pair of bytes occurs in them: the trainer merges
    by frequency, so the roles are merged first."""
    copies = sum(len(text.encode()) for text in texts) + 1
    yield from texts
    for role in ROLES:
        yield from itertools.repeat(role, copies)


def _tokenizer_settings() -> dict[str, Any]:
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "processor_class": "Qwen2_5_VLProcessor",
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "additional_special_tokens": [t for t in SPECIAL_TOKENS if t not in ("<|im_end|>", "<|endoftext|>")],
        "model_max_length": 32768,
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
