"""Text to token ids: Qwen2.5-VL's chat format with latent spans, for any `tokenizer.json` that has its tokens.

One sequence is

    <|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n
    <|im_start|>user\\n{prompt}<|im_end|>\\n
    <|im_start|>assistant\\n{steps}<|im_end|>\\n

without the line breaks between the three lines here (each turn already ends in its own `\\n`). In the
prompt an image is `<|vision_start|>` + n x `<|image_pad|>` + `<|vision_end|>`; in the steps a helper image
is `<|latent_start|>` + K x `<|latent_pad|>` + `<|latent_end|>`.

Four rules that decide ids:

- Neighbouring text parts are joined, with nothing between, before they are tokenised, and the user's first
  text is joined to `user\\n` (so a prompt that starts with a newline gives the one token `\\n\\n`, as the
  published preprocessing does).
- The steps are tokenised apart from `assistant\\n`. Generation starts from exactly these ids, so training must
  not see a merge over that place. (It matters only for an answer whose text starts with a line break.)
- A control token spelled inside a record's text (`<|im_end|>`, `<|image_pad|>`, ...) is ordinary text. Records
  cannot open a turn, add an image slot or end the answer. Tokens that the tokenizer itself lists as not
  special (`<tool_call>` in Qwen's) keep their id, as in Qwen's own tokenizer.
- Labels: every token after `<|im_start|>assistant` is supervised (the line break after `assistant`,
  `<|latent_start|>`, `<|latent_end|>`, the final `<|im_end|>\\n`), `<|latent_pad|>` is not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ilvr_ds.contracts import IGNORE_INDEX, ImageRef
from ilvr_ds.errors import ConfigError

SYSTEM_TEXT = "You are a helpful assistant."
CHAT_FORMAT = "qwen2.5-vl/ilvr/1"  # change it when a change here changes ids: it is part of the fingerprint

LATENT_TOKENS = ("<|latent_pad|>", "<|latent_start|>", "<|latent_end|>")  # in the order they are appended
REQUIRED_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")

Part = str | ImageRef


@dataclass(frozen=True)
class Vocabulary:
    """The ids the rest of the package needs to know."""

    im_start: int
    im_end: int
    vision_start: int
    vision_end: int
    image_pad: int
    video_pad: int
    latent_pad: int
    latent_start: int
    latent_end: int
    assistant: int  # the token "assistant" (Qwen's chat role)
    size: int  # number of ids, latent tokens included: an embedding needs at least this many rows
    fingerprint: str  # sha256 of everything that decides ids


class ChatTokenizer:
    """A `tokenizer.json` that speaks the chat format above. Picklable; safe after fork and in spawned workers.

    Appends the latent tokens the file lacks as special tokens, in the order pad, start, end, after its highest
    id: 151665, 151666, 151667 on Qwen2.5-VL's tokenizer.
    """

    def __init__(self, text: str, origin: str):
        """`text`: content of a tokenizer.json; `origin`: the file's name for messages. Raises ConfigError."""
        self._text, self._origin = text, origin
        try:
            spec = json.loads(text)
            added = spec["added_tokens"]
            vocab = spec["model"]["vocab"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{origin}: not a tokenizer.json of the `tokenizers` library: {error!r}") from error
        if not isinstance(vocab, dict):
            raise ConfigError(f"{origin}: field 'model.vocab': expected a mapping of tokens to ids (a BPE model)")
        _append_latent_tokens(added, vocab)
        ids = {**vocab, **{entry["content"]: entry["id"] for entry in added}}
        for token in (*REQUIRED_TOKENS, "assistant"):
            if token not in ids:
                raise ConfigError(
                    f"{origin}: the tokenizer lacks the token {token!r}; use the tokenizer of a Qwen2.5-VL model, "
                    f"or add the token to this one"
                )
        self._backend = _backend_of(spec, origin)
        self._backend.encode_special_tokens = True  # control tokens spelled in text stay text
        for token in (*REQUIRED_TOKENS, *LATENT_TOKENS):
            loaded = self._backend.token_to_id(token)
            if loaded != ids[token]:
                raise ConfigError(
                    f"{origin}: token {token!r}: id {ids[token]} in the file, {loaded} once loaded; "
                    f"the ids of added tokens must follow the vocabulary without a gap"
                )
        v = self.vocabulary = Vocabulary(
            **{token.strip("<|>"): ids[token] for token in (*REQUIRED_TOKENS, *LATENT_TOKENS, "assistant")},
            size=max(ids.values()) + 1,
            fingerprint=_fingerprint(spec, [ids[token] for token in LATENT_TOKENS]),
        )
        # what every sequence has, tokenised once
        newline = self.encode_text("\n")
        system = self.encode_text(f"system\n{SYSTEM_TEXT}")
        self._before_user = _ids(v.im_start, *system, v.im_end, *newline, v.im_start)
        self._after_user = _ids(v.im_end, *newline, v.im_start, v.assistant, *newline)
        self._after_steps = _ids(v.im_end, *newline)
        self._supervised_before_steps = len(newline)

    @classmethod
    def from_folder(cls, path: str | Path) -> ChatTokenizer:
        """Read `path/tokenizer.json`. Raises ConfigError naming the file and what is missing from it."""
        file = Path(path) / "tokenizer.json"
        try:
            text = file.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            raise ConfigError(f"{file}: no such file; a tokenizer folder holds a tokenizer.json") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file}: not UTF-8: {error}") from error
        return cls(text, str(file))

    def __reduce__(self) -> tuple:
        return ChatTokenizer, (self._text, self._origin)

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text; control tokens spelled in it are not recognised."""
        return self._backend.encode(text, add_special_tokens=False).ids if text else []

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of ids, control tokens spelled out unless `skip_special_tokens`."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def encode_prompt(self, prompt: Sequence[Part], image_token_counts: Sequence[int]) -> np.ndarray:
        """System turn, user turn and `<|im_start|>assistant\\n`: what generation starts from.

        `prompt`: text and images in reading order; `image_token_counts`: merged visual tokens of each image of
        the prompt, in that order. Returns (L0,) int64, exactly the first L0 ids of `encode_sample`.
        Raises ValueError if the number of counts is not the number of images.
        """
        images = sum(isinstance(part, ImageRef) for part in prompt)
        if images != len(image_token_counts):
            raise ValueError(f"{images} images in the prompt, {len(image_token_counts)} image token counts")
        v, counts = self.vocabulary, iter(image_token_counts)
        pieces = [self._before_user]
        for part in join_text(("user\n", *prompt)):
            if isinstance(part, str):
                pieces.append(_ids(*self.encode_text(part)))
            else:
                pieces.append(_run(v.vision_start, v.image_pad, next(counts), v.vision_end))
        return np.concatenate([*pieces, self._after_user])

    def encode_sample(
        self, prompt: Sequence[Part], steps: Sequence[Part], image_token_counts: Sequence[int], latent_size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The whole training sequence; every image in `steps` becomes a span of `latent_size` latents.

        Returns input_ids (L,) int64 and labels (L,) int64: the id where supervised, IGNORE_INDEX elsewhere,
        not shifted. Raises ValueError as `encode_prompt` does.
        """
        v = self.vocabulary
        prefix = self.encode_prompt(prompt, image_token_counts)
        pieces = [prefix]
        for part in join_text(steps):
            if isinstance(part, str):
                pieces.append(_ids(*self.encode_text(part)))
            else:
                pieces.append(_run(v.latent_start, v.latent_pad, latent_size, v.latent_end))
        input_ids = np.concatenate([*pieces, self._after_steps])
        labels = input_ids.copy()
        labels[: len(prefix) - self._supervised_before_steps] = IGNORE_INDEX  # through `<|im_start|>assistant`
        labels[input_ids == v.latent_pad] = IGNORE_INDEX
        return input_ids, labels


def join_text(parts: Iterable[Part]) -> list[Part]:
    """Neighbouring texts joined into one, images kept, empty texts dropped."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part != "":
            joined.append(part)
    return joined


def _ids(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.int64)


def _run(first: int, pad: int, count: int, last: int) -> np.ndarray:
    """(count + 2,) int64: `count` pads between two markers."""
    ids = np.full(count + 2, pad, dtype=np.int64)
    ids[0], ids[-1] = first, last
    return ids


def _backend_of(spec: dict, origin: str) -> Tokenizer:
    """The library's tokenizer of a parsed tokenizer.json. Raises ConfigError with what the library does not accept."""
    try:
        return Tokenizer.from_str(json.dumps(spec))
    except Exception as error:
        if type(error) is not Exception:  # the library raises the base class itself, and nothing narrower
            raise
        raise ConfigError(
            f"{origin}: the `tokenizers` library refuses it: {error}; fetch the tokenizer.json again, or write it with "
            "a version of the library that is not newer than the installed one"
        ) from error


def _append_latent_tokens(added: list[dict], vocab: dict[str, int]) -> None:
    """Make every control token of the chat format a special token of `added`, appending latents that are missing."""
    known = {entry["content"]: entry for entry in added}
    next_id = max([*vocab.values(), *(entry["id"] for entry in added)], default=-1) + 1
    for token in (*REQUIRED_TOKENS, *LATENT_TOKENS):
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        if token in known:
            known[token].update(flags)
        elif token in vocab:
            added.append({"id": vocab[token], "content": token, **flags})
        elif token in LATENT_TOKENS:
            added.append({"id": next_id, "content": token, **flags})
            next_id += 1
    added.sort(key=lambda entry: entry["id"])


def _fingerprint(spec: dict, latent_ids: list[int]) -> str:
    """sha256 over what decides ids, the same however the file is laid out or its merges are written."""
    model = {key: value for key, value in spec["model"].items() if value}  # null, false and absent mean the same
    model["merges"] = [m.split(" ") if isinstance(m, str) else m for m in spec["model"].get("merges", [])]
    facts = {
        "chat_format": CHAT_FORMAT,
        "model": model,
        "added_tokens": spec["added_tokens"],
        "normalizer": spec.get("normalizer"),
        "pre_tokenizer": spec.get("pre_tokenizer"),
        "latent_ids": latent_ids,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
