"""Greedy decoding gives the published implementation's recorded tokens, alone and in one ragged batch."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

FILE = "decode_open"


@pytest.fixture(scope="module")
def decode_check():
    spec = importlib.util.spec_from_file_location("golden_decode_check", Path(__file__).with_name("decode_check.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_wrong_token_is_found(golden, decode_check, tmp_path):
    tensors, description = load_file(golden / f"{FILE}.safetensors"), json.loads((golden / f"{FILE}.json").read_text())
    description["cases"] = description["cases"][:1]
    description["cases"][0]["new_tokens"][20] += 1
    save_file(tensors, tmp_path / "altered.safetensors")
    (tmp_path / "altered.json").write_text(json.dumps(description))
    rows = decode_check.check_decode(tmp_path / "altered.safetensors")
    assert rows == {"case0 alone": (1, 48), "case0 in one batch": (1, 48)}
    assert not decode_check.report_decode(rows)


def test_every_case_alone_and_in_one_batch(golden):
    script = Path(__file__).with_name("check.py")
    command = [sys.executable, str(script), str(golden / f"{FILE}.safetensors")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 cases, alone and in one batch: all tokens equal" in result.stdout
    for number in range(4):
        assert f"case{number} alone" in result.stdout
        assert f"case{number} in one batch       192" in result.stdout  # own tokens and the other three prompts'


def test_a_file_without_a_case_is_an_error(golden, decode_check, tmp_path):
    (tmp_path / "empty.json").write_text(json.dumps({"eos": 1, "cases": []}))
    save_file({"x": torch.zeros(1)}, tmp_path / "empty.safetensors")
    with pytest.raises(decode_check.UncheckableDecodeError, match="holds no case"):
        decode_check.check_decode(tmp_path / "empty.safetensors")


def test_latents_are_the_states_before_each_pad(golden, decode_check):
    """Recomputed without a cache: the whole sequence with its latents in place gives back the same latents."""
    file = decode_check.DecodeFile(golden / f"{FILE}.safetensors")
    prompt, settings, decoder = file.prompt(1), file.settings(1), file.decoder(1)
    generation = decoder.generate([prompt], settings)[0]
    assert generation.span_lengths == (8, 8)
    assert generation.latents.shape == (16, 64)
    network, vocabulary = file.network(1), file.tokens.vocabulary
    network.set_attn_implementation("eager")
    ids = torch.tensor([*prompt.input_ids.tolist(), *generation.tokens])
    with torch.no_grad():
        embeddings = network.model.language_model.embed_tokens(ids)
        features = network.model.visual(
            torch.from_numpy(prompt.pixels), grid_thw=torch.tensor(prompt.grids)
        ).pooler_output
        embeddings[ids == vocabulary.image_pad] = features
        pads = (ids == vocabulary.latent_pad).nonzero()[:, 0]
        embeddings[pads] = generation.latents
        new = torch.arange(len(generation.tokens)) + prompt.next_position
        positions = torch.cat([torch.from_numpy(prompt.position_ids), new.expand(3, -1)], 1)
        hidden = network.model.language_model(
            inputs_embeds=embeddings[None], position_ids=positions[:, None], use_cache=False
        ).last_hidden_state[0]
    torch.testing.assert_close(generation.latents, hidden[pads - 1], rtol=1e-4, atol=1e-5)
    assert network.lm_head(hidden[len(prompt.input_ids) - 1 : -1]).argmax(1)[:7].tolist() == list(generation.tokens[:7])


def test_recorded_outputs_say_nothing_about_early_end(decode_check, golden):
    """docs/method.md: they are the same whether the model may leave a span early or not."""
    file = decode_check.DecodeFile(golden / "decode_open.safetensors")
    for number, case in enumerate(file.cases):
        early = file.decoder(number).generate([file.prompt(number)], file.settings(number, early_end=True))[0]
        assert list(early.tokens) == case["new_tokens"]
        assert set(early.span_lengths) == {file.json["latent_size"]}
