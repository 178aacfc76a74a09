"""Prompts, a model that likes to open spans, and generation done the slow way, for the tests of decoding."""

import dataclasses

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from ilvr_ds.inference.decode import Decoder
from ilvr_ds.inference.prompt import EncodedPrompt, prompt_of_ids
from ilvr_ds.inference.sampling import choose
from ilvr_ds.inference.sequence import DecodeSettings, SequenceState
from ilvr_ds.model.backbone import Backbone
from ilvr_ds.model.vision import patches_of


class Numbers:
    """A tokenizer without texts."""

    def __init__(self, vocabulary):
        self.vocabulary = vocabulary

    def decode(self, ids, skip_special_tokens=False):
        special = range(self.vocabulary.im_start, self.vocabulary.latent_end + 1)
        return "".join(f"{int(i)} " for i in ids if not (skip_special_tokens and i in special))


def talkative(small, seed=0) -> Qwen2_5_VLForConditionalGeneration:
    """A random network that opens spans and ends answers more often than other tokens come."""
    network = small.network(seed).eval()
    with torch.no_grad():
        network.lm_head.weight[small.vocabulary.latent_start] *= 2.5
        network.lm_head.weight[small.vocabulary.im_end] *= 1.5
    return network


def prompts_of(small, count: int, images=(0, 1, 2)) -> list[EncodedPrompt]:
    """Different prompts of different lengths, `images[i % len]` images in the i-th."""
    prompts = []
    for i in range(count):
        sample = small.sample(100 + i, images=images[i % len(images)], spans=0, text=3 + 5 * (i % 4), gap=0)
        ids = sample.input_ids[:-2]  # without the end of an empty answer
        prompts.append(
            prompt_of_ids(f"p{i}", ids, sample.grids, sample.input_pixels, small.vocabulary.image_pad, seed=1000 + i)
        )
    return prompts


@torch.no_grad()
def slowly(network, vocabulary, prompt: EncodedPrompt, settings: DecodeSettings) -> dict:
    """Stock modules, eager attention, one sequence, everything run again for each token."""
    network.set_attn_implementation("eager")
    text = network.model.language_model
    ids = torch.from_numpy(prompt.input_ids)
    inputs = text.embed_tokens(ids)
    if prompt.grids:
        patches = patches_of(torch.from_numpy(prompt.pixels), prompt.grids)
        features = network.model.visual(patches, grid_thw=torch.tensor(prompt.grids)).pooler_output
        inputs[ids == vocabulary.image_pad] = features
    positions = torch.from_numpy(prompt.position_ids)
    state = SequenceState(prompt.seed, prompt.next_position, settings, vocabulary)
    latents, margin = [], []
    while state.end is None:
        hidden = text(inputs_embeds=inputs[None], position_ids=positions[:, None], use_cache=False)
        last = hidden.last_hidden_state[0, -1:]
        choice = None
        if state.wants_choice:
            logits = network.lm_head(last)
            logits[:, vocabulary.size :] = -torch.inf
            if not state.may_open_span:
                logits[:, vocabulary.latent_start] = -torch.inf
            top = logits.topk(2).values[0]
            margin.append(float(top[0] - top[1]))
            choice = int(choose(logits, settings.sampling, torch.tensor([state.uniform])))
        if state.advance(choice):
            latents.append(last[0])
            new = last
        else:
            new = text.embed_tokens(torch.tensor(state.tokens[-1:]))
        inputs = torch.cat([inputs, new])
        positions = torch.cat([positions, torch.full((3, 1), prompt.next_position + len(state.tokens) - 1)], 1)
    width = inputs.shape[1]
    return {
        "tokens": tuple(state.tokens),
        "latents": torch.stack(latents) if latents else torch.zeros(0, width),
        "smallest_margin": min(margin),
    }


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What the tests share, as one fixture."""

    small: object
    slowly = staticmethod(slowly)

    @property
    def vocabulary(self):
        return self.small.vocabulary

    def network(self, seed=0):
        return talkative(self.small, seed)

    def decoder(self, seed=0, **options) -> Decoder:
        return Decoder(Backbone(self.network(seed), attention="sdpa"), Numbers(self.small.vocabulary), **options)

    def prompts(self, count, images=(0, 1, 2)):
        return prompts_of(self.small, count, images)

    def settings(self, **changes) -> DecodeSettings:
        return DecodeSettings(**{"latent_size": self.small.latents, "max_new_tokens": 40, **changes})


@pytest.fixture(scope="session")
def decoding(small) -> Decoding:
    return Decoding(small)
