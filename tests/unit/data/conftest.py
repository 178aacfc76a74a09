"""A small tokenizer and small records, made on the spot, for tests of the data part."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel

from ilvr_ds.data.tokens import ChatTokenizer

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def tokenizer_spec(words: tuple[str, ...] = ("assistant", "ĊĊ", "Ġthe")) -> dict:
    """A byte-level BPE like Qwen's: 256 bytes, the merges that build `words`, the control tokens but no latents."""
    vocab = {character: number for number, character in enumerate(sorted(ByteLevel.alphabet()))}
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append(f"{word[: end - 1]} {word[end - 1]}")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    split = {"type": "Split", "pattern": {"Regex": QWEN_SPLIT}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": len(vocab) + i, "content": token, **flags} for i, token in enumerate(CONTROL)],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


@pytest.fixture(scope="session")
def spec() -> Callable[..., dict]:
    """The function that makes a tokenizer.json's content."""
    return tokenizer_spec


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A folder with a small byte-level tokenizer in Qwen's chat format."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_spec()))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder) -> ChatTokenizer:
    return ChatTokenizer.from_folder(tokenizer_folder)


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def write_records(tmp_path) -> Callable[..., Path]:
    """Write a JSONL file of records (dicts, or bytes as they are) beside three images a.png, b.png, c.png."""
    for seed, (name, size) in enumerate([("a.png", (60, 90)), ("b.png", (56, 56)), ("c.png", (84, 28))]):
        noise_image(*size, seed).save(tmp_path / name)

    def write(records: list[dict | bytes], name: str = "records.jsonl") -> Path:
        lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
        (tmp_path / name).write_bytes(b"\n".join(lines) + b"\n")
        return tmp_path / name

    return write


@pytest.fixture
def good_record() -> Callable[..., dict]:
    """A correct ILVR record; keyword arguments replace fields."""

    def make(record_id: str = "good", **changes) -> dict:
        record = {
            "id": record_id,
            "text_input": f"What is the {record_id}?",
            "image_input": "a.png",
            "sequence_plan": [
                {"type": "text", "content": "First."},
                {"type": "latent", "helper_image": "b.png"},
                {"type": "text", "content": "The final answer is: A"},
            ],
            "original_final_answer": "A",
        }
        return {**record, **changes}

    return make
