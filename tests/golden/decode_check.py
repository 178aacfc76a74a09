"""Greedy decoding against recorded tokens of the published implementation (`decode_*.safetensors`).

Every case alone on its own weights; and, since each case has weights of its own, every prompt of the file in one
ragged batch on every case's weights, which must give the recorded tokens for the case's own prompt and the tokens
of single generation for the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from ilvr_ds.data.tokens import Vocabulary
from ilvr_ds.errors import IlvrError
from ilvr_ds.inference.decode import Decoder, Generation
from ilvr_ds.inference.prompt import EncodedPrompt, prompt_of_ids
from ilvr_ds.inference.sequence import DecodeSettings
from ilvr_ds.model.backbone import Backbone


class UncheckableDecodeError(IlvrError):
    """The file holds no case, or not what a case needs."""


class GoldenTokens:
    """Ids without texts."""

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, ids))


class DecodeFile:
    """Weights, prompts and expected tokens of one file."""

    def __init__(self, path: Path):
        self.tensors = load_file(path)
        self.json = json.loads(path.with_suffix(".json").read_text())
        self.cases = self.json["cases"]
        if not self.cases:
            raise UncheckableDecodeError(f"{path.with_suffix('.json')}: holds no case")
        for number in range(len(self.cases)):
            if f"case{number}.input_ids" not in self.tensors:
                raise UncheckableDecodeError(f"{path}: no tensor case{number}.input_ids")

    @property
    def tokens(self) -> GoldenTokens:
        ids = self.json["ids"]
        names = ("im_start", "im_end", "vision_start", "vision_end", "latent_pad", "latent_start", "latent_end")
        return GoldenTokens(
            Vocabulary(
                **{name: ids[name] for name in names},
                image_pad=ids["image"],
                video_pad=ids["video"],
                assistant=ids["assistant"],
                size=self.json["config"]["vocab_size"],
                fingerprint="golden",
            )
        )

    def settings(self, number: int, **changes) -> DecodeSettings:
        return DecodeSettings(
            latent_size=self.json["latent_size"],
            max_new_tokens=self.cases[number]["max_new_tokens"],
            stop_tokens=(self.json["eos"],),
            **changes,
        )

    def network(self, number: int) -> Qwen2_5_VLForConditionalGeneration:
        prefix = f"case{number}.model."
        weights = {_new_name(k[len(prefix) :]): v for k, v in self.tensors.items() if k.startswith(prefix)}
        network = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**self.json["config"]))
        network.load_state_dict(weights)
        return network.float().eval()

    def decoder(self, number: int) -> Decoder:
        return Decoder(Backbone(self.network(number), attention="sdpa"), self.tokens)

    def prompt(self, number: int) -> EncodedPrompt:
        pixels, grids = (self.tensors.get(f"case{number}.{name}") for name in ("pixel_values", "image_grid_thw"))
        return prompt_of_ids(
            f"case{number}",
            self.tensors[f"case{number}.input_ids"][0].numpy(),
            [] if grids is None else [tuple(row) for row in grids.tolist()],
            (torch.zeros(0, 1176) if pixels is None else pixels.float()).numpy(),
            self.tokens.vocabulary.image_pad,
        )


def _new_name(old: str) -> str:
    """State-dict name of transformers 4.50 -> of transformers 5."""
    if old.startswith("model."):
        return "model.language_model." + old.removeprefix("model.")
    return "model." + old if old.startswith("visual.") else old


def check_decode(path: Path) -> dict[str, tuple[int, int]]:
    """Row -> (tokens that differ, tokens compared); rows are "case0 alone", "case0 in one batch", ..."""
    file = DecodeFile(path)
    prompts = [file.prompt(i) for i in range(len(file.cases))]
    rows = {}
    for number, case in enumerate(file.cases):
        decoder, settings = file.decoder(number), file.settings(number)
        alone = [decoder.generate([prompt], settings)[0] for prompt in prompts]
        together = decoder.generate(prompts, settings)
        expected = case["new_tokens"]
        rows[f"case{number} alone"] = _compare([alone[number]], [expected])
        wanted = [list(generation.tokens) for generation in alone]
        wanted[number] = expected
        rows[f"case{number} in one batch"] = _compare(together, wanted)
    return rows


def _compare(found: Sequence[Generation], expected: Sequence[Sequence[int]]) -> tuple[int, int]:
    wrong = total = 0
    for generation, tokens in zip(found, expected, strict=True):
        pairs = zip(generation.tokens, tokens, strict=False)
        wrong += sum(a != b for a, b in pairs) + abs(len(generation.tokens) - len(tokens))
        total += len(tokens)
    return wrong, total


def report_decode(rows: dict[str, tuple[int, int]]) -> bool:
    """Print the table; True if every token is the recorded one."""
    width = max(len(row) for row in rows)
    print("".ljust(width) + "    tokens  different")
    for row, (wrong, total) in rows.items():
        print(f"{row.ljust(width)}{total:10}{wrong:10}" + ("!" if wrong else ""))
    return all(wrong == 0 for wrong, _ in rows.values())


def main_decode(path: Path) -> int:
    """Check a file, print the table; exit code 0 or 1. Raises UncheckableDecodeError."""
    rows = check_decode(path)
    good = report_decode(rows)
    print(f"{len(rows) // 2} cases, alone and in one batch: {'all tokens equal' if good else 'TOKENS DIFFER (!)'}")
    return 0 if good else 1
