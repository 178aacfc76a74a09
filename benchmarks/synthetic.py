"""Qwen2.5-VL shapes with random weights, and random samples of CoMT's lengths: what a GPU benchmark needs, no files.

Dimensions are those of the published 3B and 7B configurations; `TINY` is for a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from ilvr_ds.contracts import IGNORE_INDEX, Sample
from ilvr_ds.data.pixels import PIXEL_ROW
from ilvr_ds.data.plan import Lengths
from ilvr_ds.data.tokens import Vocabulary


@dataclass(frozen=True)
class SampleLengths:
    """Ranges that samples are drawn from, uniform, both ends included. Half of the text is the assistant's."""

    spans: tuple[int, int] = (1, 6)
    text: tuple[int, int] = (200, 1500)
    image: tuple[int, int] = (100, 1300)  # merged visual tokens, of the input image and of each helper image


@dataclass(frozen=True)
class Shape:
    """A model's dimensions, its token ids, and the samples it is measured on."""

    name: str
    text: dict
    vision: dict
    tied: bool
    vocabulary: Vocabulary
    lengths: SampleLengths
    budgets: tuple[int, ...]  # default micro-batch token budgets

    def config(self, layers: int | None = None) -> Qwen2_5_VLConfig:
        """The stock configuration; `layers` replaces the number of decoder layers."""
        text = {**self.text, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": self.vocabulary.im_end}
        text["num_hidden_layers"] = layers or text["num_hidden_layers"]
        return Qwen2_5_VLConfig(
            text_config={**text, "tie_word_embeddings": self.tied},
            vision_config=dict(self.vision),
            image_token_id=self.vocabulary.image_pad,
            video_token_id=self.vocabulary.video_pad,
            vision_start_token_id=self.vocabulary.vision_start,
            vision_end_token_id=self.vocabulary.vision_end,
            tie_word_embeddings=self.tied,
        )


def _rope(*sections: int) -> dict:
    return {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections)}


QWEN_IDS = Vocabulary(
    im_start=151644, im_end=151645, vision_start=151652, vision_end=151653, image_pad=151655, video_pad=151656,
    latent_pad=151665, latent_start=151666, latent_end=151667, assistant=77091, size=151668, fingerprint="synthetic",
)  # fmt: skip
TINY_IDS = Vocabulary(
    im_start=500, im_end=501, vision_start=502, vision_end=503, image_pad=504, video_pad=505,
    latent_pad=506, latent_start=507, latent_end=508, assistant=509, size=510, fingerprint="synthetic",
)  # fmt: skip
_VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
    "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
}  # fmt: skip
_BUDGETS = (4096, 8192, 16384, 32768)

QWEN_3B = Shape(
    name="Qwen2.5-VL-3B",
    text={
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 2, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6,
        "use_sliding_window": False, "rope_parameters": _rope(16, 24, 24),
    },
    vision={**_VISION, "out_hidden_size": 2048}, tied=True,
    vocabulary=QWEN_IDS, lengths=SampleLengths(), budgets=_BUDGETS,
)  # fmt: skip
QWEN_7B = Shape(
    name="Qwen2.5-VL-7B",
    text={
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6,
        "use_sliding_window": False, "rope_parameters": _rope(16, 24, 24),
    },
    vision={**_VISION, "out_hidden_size": 3584}, tied=False,
    vocabulary=QWEN_IDS, lengths=SampleLengths(), budgets=_BUDGETS,
)  # fmt: skip
TINY = Shape(
    name="tiny",
    text={
        "vocab_size": 512, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
        "use_sliding_window": False, "rope_parameters": _rope(8, 12, 12),
    },
    vision={
        **_VISION, "depth": 2, "hidden_size": 160, "intermediate_size": 96, "num_heads": 2,
        "fullatt_block_indexes": [1], "out_hidden_size": 128,
    },
    tied=True, vocabulary=TINY_IDS, lengths=SampleLengths(spans=(1, 3), text=(10, 40), image=(2, 9)),
    budgets=(256, 512),
)  # fmt: skip


def random_network(
    config: Qwen2_5_VLConfig, *, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> Qwen2_5_VLForConditionalGeneration:
    """A network with transformers' own random initialisation, made in `dtype` on `device` without a detour."""
    previous = torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(previous)


def random_samples(count: int, shape: Shape, latent_size: int, seed: int = 0) -> list[Sample]:
    """`count` samples numbered from 0, each with one input image and a helper image per span; valid for `pack`."""
    return [_sample(np.random.default_rng([seed, number]), number, shape, latent_size) for number in range(count)]


def lengths_of(samples: Sequence[Sample]) -> Lengths:
    """The columns a `Planner` reads."""
    return Lengths(
        tokens=np.array([len(s.input_ids) for s in samples]),
        patches=np.array([len(s.input_pixels) + len(s.helper_pixels) for s in samples]),
        supervised=np.array([int((s.labels[1:] != IGNORE_INDEX).sum()) for s in samples]),
        spans=np.array([len(s.grids) - s.num_input_images for s in samples]),
    )


def _sample(rng: np.random.Generator, number: int, shape: Shape, latent_size: int) -> Sample:
    v, ranges = shape.vocabulary, shape.lengths
    plain = min(id for id in vars(v).values() if isinstance(id, int))  # every id below is an ordinary token
    spans, text = (int(rng.integers(low, high + 1)) for low, high in (ranges.spans, ranges.text))
    grids = tuple(_grid(rng, *ranges.image) for _ in range(1 + spans))

    def words(n: int) -> list[int]:
        return rng.integers(0, plain, n).tolist()

    ids = [v.im_start, *words(2), v.vision_start, *[v.image_pad] * (grids[0][1] * grids[0][2] // 4), v.vision_end]
    ids += [*words(text - text // 2), v.im_end, *words(1), v.im_start, v.assistant]
    first = len(ids)
    for part in np.array_split(np.arange(text // 2), spans + 1)[:-1]:
        ids += [*words(len(part)), v.latent_start, *[v.latent_pad] * latent_size, v.latent_end]
    ids += [*words(text // 2 // (spans + 1)), v.im_end, *words(1)]
    input_ids = np.array(ids, dtype=np.int64)  # (L,)
    supervised = (np.arange(len(ids)) >= first) & (input_ids != v.latent_pad)
    return Sample(
        number=number,
        id=f"synthetic-{number}",
        input_ids=input_ids,
        labels=np.where(supervised, input_ids, IGNORE_INDEX),
        grids=grids,
        num_input_images=1,
        input_pixels=_pixels(rng, grids[:1]),
        helper_pixels=_pixels(rng, grids[1:]),
    )


def _pixels(rng: np.random.Generator, grids: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    return rng.integers(0, 256, (sum(h * w for _, h, w in grids), PIXEL_ROW), dtype=np.uint8)


def _grid(rng: np.random.Generator, low: int, high: int) -> tuple[int, int, int]:
    """(1, h, w) in patches, h w / 4 about uniform in [low, high], sides at most 2 : 1."""
    tokens = int(rng.integers(low, high + 1))
    height = max(1, round((tokens * rng.uniform(0.5, 2.0)) ** 0.5))
    return 1, 2 * height, 2 * max(1, round(tokens / height))
