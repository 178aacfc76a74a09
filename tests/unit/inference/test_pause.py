"""Decoding a model trained with empty pads: within a span it is fed the pad's embedding, and its folder says so."""

import json

import pytest
import torch

from ilvr_ds.data.tokens import LATENT_TOKENS
from ilvr_ds.errors import ConfigError
from ilvr_ds.inference.decode import Decoder
from ilvr_ds.inference.load import load_model
from ilvr_ds.model.backbone import Backbone
from ilvr_ds.model.latent_settings import LatentSettings, read_latent_settings
from ilvr_ds.model.tiny import build_tiny_model
from ilvr_ds.model.vision import patches_of


@torch.no_grad()
def choices_of_one_forward(network, vocabulary, prompt, tokens) -> torch.Tensor:
    """Greedy choice after each prefix, from one stock forward in which every token is its embedding."""
    network.set_attn_implementation("eager")
    text = network.model.language_model
    ids = torch.cat([torch.from_numpy(prompt.input_ids), torch.tensor(tokens)])
    inputs = text.embed_tokens(ids)
    if prompt.grids:
        patches = patches_of(torch.from_numpy(prompt.pixels), prompt.grids)
        features = network.model.visual(patches, grid_thw=torch.tensor(prompt.grids)).pooler_output
        inputs[: len(prompt.input_ids)][torch.from_numpy(prompt.input_ids) == vocabulary.image_pad] = features
    after = torch.arange(len(tokens)).expand(3, -1) + prompt.next_position
    positions = torch.cat([torch.from_numpy(prompt.position_ids), after], 1)
    hidden = text(inputs_embeds=inputs[None], position_ids=positions[:, None], use_cache=False).last_hidden_state[0]
    logits = network.lm_head(hidden[len(prompt.input_ids) - 1 : -1])
    logits[:, vocabulary.size :] = -torch.inf
    return logits.argmax(-1)


def test_pause_decoding_is_the_plain_model_over_pads(decoding):
    prompts, v = decoding.prompts(6), decoding.vocabulary
    answers = decoding.decoder().generate(prompts, decoding.settings(pause=True))
    assert sum(answer.spans_opened for answer in answers) > 2
    network = decoding.network()
    pad = network.model.language_model.embed_tokens.weight[v.latent_pad].detach()
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = choices_of_one_forward(network, v, prompt, answer.tokens).tolist()
        for token, wanted in zip(answer.tokens, expected, strict=True):
            if token not in (v.latent_pad, v.latent_end):  # these are forced
                assert token == wanted
        assert torch.equal(answer.latents, pad.expand(sum(answer.span_lengths), -1))


def test_pause_is_not_the_same_as_latents(decoding):
    """The network is one whose answer depends on what a span is fed, else the test above could not fail."""
    prompts = decoding.prompts(6)
    fed, empty = (Decoder(Backbone(decoding.network(), attention="sdpa"), decoding.decoder().tokens).generate(
        prompts, decoding.settings(pause=pause)) for pause in (False, True))  # fmt: skip
    assert [a.tokens for a in fed] != [a.tokens for a in empty]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """A model folder, made once, its config.json and its latent ids."""
    folder = tmp_path_factory.mktemp("pause") / "m"
    build_tiny_model(folder, seed=0)
    known = load_model(folder, latent_size=4).tokenizer.vocabulary
    ids = dict(zip(LATENT_TOKENS, (known.latent_pad, known.latent_start, known.latent_end), strict=True))
    return folder, json.loads((folder / "config.json").read_text()), ids


@pytest.mark.parametrize(("source", "pause"), [("pause", True), ("self", False), ("teacher", False), (None, False)])
def test_a_model_folder_says_how_it_was_trained(tiny_folder, source, pause):
    folder, tree, ids = tiny_folder
    training = {} if source is None else {"latent": {"source": source}}
    settings = {"latent_size": 4, "token_ids": ids, "training": training}
    (folder / "config.json").write_text(json.dumps({**tree, "ilvr": settings}))
    model = load_model(folder)
    assert (model.pause, model.latent_size) == (pause, 4)


def test_damaged_training_facts_are_an_error(tmp_path):
    settings = {"latent_size": 4, "token_ids": {}, "training": {"latent": 3}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "ilvr": settings}))
    with pytest.raises(ConfigError, match=r"config.json.*ilvr"):
        read_latent_settings(tmp_path)
    assert not LatentSettings(4, {}).pause
