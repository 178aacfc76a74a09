"""A small random Qwen2.5-VL, samples for it, and packs of them: what the model and objective tests share."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from ilvr_ds.config import LatentConfig, LossConfig, TeacherConfig
from ilvr_ds.contracts import IGNORE_INDEX, Sample
from ilvr_ds.data.packing import pack
from ilvr_ds.data.plan import StepTotals
from ilvr_ds.data.tokens import Vocabulary
from ilvr_ds.model.backbone import Backbone
from ilvr_ds.model.teacher import Teacher
from ilvr_ds.objective.alignment import AlignmentObjective

VOCABULARY = Vocabulary(
    im_start=50, im_end=51, vision_start=52, vision_end=53, image_pad=54, video_pad=55, latent_pad=56,
    latent_start=57, latent_end=58, assistant=59, size=61, fingerprint="test",
)  # fmt: skip
NEWLINE, USER = 60, 49
LATENTS = 3
WIDTH = 32


def network_of(seed: int, *, tied: bool = False, vocab_size: int = 64) -> Qwen2_5_VLForConditionalGeneration:
    """Three decoder layers, two vision blocks (one windowed), weights large enough that choices differ."""
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocab_size, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": 0,
            "eos_token_id": VOCABULARY.im_end, "tie_word_embeddings": tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": WIDTH,
            "window_size": 56, "fullatt_block_indexes": [1],
        },
        tie_word_embeddings=tied,
    )  # fmt: skip
    network = Qwen2_5_VLForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            scale = 0.25 if parameter.ndim > 1 else 0.1
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    return network


def sample_of(
    seed: int, *, images: int = 1, spans: int = 1, text: int = 5, gap: int = 3, number: int | None = None, side: int = 4
) -> Sample:
    """Random prompt with `images` input images, `spans` spans with `gap` text tokens before each."""
    rng, v = np.random.default_rng(seed), VOCABULARY
    grids = [(1, int(2 * rng.integers(1, side)), int(2 * rng.integers(1, side))) for _ in range(images + spans)]
    words = lambda n: rng.integers(0, 49, n).tolist()  # noqa: E731
    ids = [v.im_start, USER, NEWLINE]
    for _, h, w in grids[:images]:
        ids += [v.vision_start, *[v.image_pad] * (h * w // 4), v.vision_end]
    ids += [*words(text), v.im_end, NEWLINE, v.im_start, v.assistant]
    start = len(ids)
    ids += [NEWLINE]
    for _ in range(spans):
        ids += [*words(gap), v.latent_start, *[v.latent_pad] * LATENTS, v.latent_end]
    ids = np.array([*ids, *words(gap), v.im_end, NEWLINE])
    labels = np.where((np.arange(len(ids)) >= start) & (ids != v.latent_pad), ids, IGNORE_INDEX)
    pixels = rng.integers(0, 256, (sum(t * h * w for t, h, w in grids), 588), dtype=np.uint8)
    own = sum(t * h * w for t, h, w in grids[:images])
    number = seed if number is None else number
    return Sample(number, f"s{seed}", ids, labels, tuple(grids), images, pixels[:own], pixels[own:])


def batch_of(samples: list[Sample], **changes):
    """The samples packed, each weighted as a step of its own; `changes` replace fields."""
    totals = StepTotals(samples=1, supervised=1, spans=1, tokens=sum(len(s.input_ids) for s in samples))
    return dataclasses.replace(pack(samples, VOCABULARY, LATENTS, totals=totals), **changes)


def objective_of(
    seed: int = 0, *, noise_std: float = 0.0, tied: bool = False, coverage: float = 0.9, temperature: float = 1.0,
    max_candidates: int = 256, **backbone,
) -> AlignmentObjective:  # fmt: skip
    """Student and teacher with different weights."""
    config = TeacherConfig(coverage=coverage, temperature=temperature, max_candidates=max_candidates)
    student = Backbone(network_of(seed, tied=tied), attention="sdpa", **backbone)
    teacher = Teacher.of(student, config)
    other = network_of(seed + 1, tied=tied).model.language_model.state_dict()
    teacher.language_model.load_state_dict(other)
    return AlignmentObjective(student, teacher, LatentConfig(size=LATENTS, noise_std=noise_std), LossConfig()).train()


@dataclasses.dataclass(frozen=True)
class Small:
    """The builders above, handed to tests as one fixture."""

    vocabulary = VOCABULARY
    latents = LATENTS
    width = WIDTH
    network = staticmethod(network_of)
    sample = staticmethod(sample_of)
    batch = staticmethod(batch_of)
    objective = staticmethod(objective_of)


@pytest.fixture(scope="session")
def small() -> Small:
    return Small()
