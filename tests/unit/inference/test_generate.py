"""launch/generate.py and the loading of model folders, on a tiny model folder."""

import importlib.util
import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ilvr_ds.data.tokens import LATENT_TOKENS
from ilvr_ds.errors import CheckpointError, ConfigError
from ilvr_ds.inference.cache import DecodeCache
from ilvr_ds.inference.load import image_settings_of, load_model
from ilvr_ds.inference.prompt import build_prompt
from ilvr_ds.model.tiny import build_tiny_model

TEXTS = ["Which way? Go left, right, up or down. The final answer is: A"] * 3


@pytest.fixture(scope="module")
def command(repository):
    spec = importlib.util.spec_from_file_location("launch_generate", repository / "launch" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model folder whose model opens a span soon: its head's row for it is raised."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny_model(folder, seed=0, corpus_texts=TEXTS)
    loaded = load_model(folder, latent_size=4)
    prompt = build_prompt(["Which way?"], loaded.tokenizer, loaded.images, folder, prompt_id="", origin="")
    with torch.no_grad():
        hidden = loaded.decoder.prefill([prompt], DecodeCache(len(loaded.decoder.backbone.language_model.layers)))[0]
    weights = load_file(folder / "model.safetensors")
    # a logit of 7 at such states, where the others have a standard deviation of 1: about one token in three
    weights["lm_head.weight"][loaded.tokenizer.vocabulary.latent_start] = 7 * hidden / hidden.square().sum()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def copied(model, tmp_path):
    """A copy of the folder for a test to damage."""
    return shutil.copytree(model, tmp_path / "model")


def edit(folder, name, change):
    tree = json.loads((folder / name).read_text())
    change(tree)
    (folder / name).write_text(json.dumps(tree))


@pytest.fixture
def records(tmp_path):
    Image.new("RGB", (60, 90), (10, 200, 30)).save(tmp_path / "a.png")
    lines = [
        {"id": f"r{i}", "text_input": f"<image> Which way? {'left ' * i}", "image_input": ["a.png"]} for i in range(5)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "in.jsonl"


def run(command, model, *arguments):
    return command(["--model", str(model), "--device", "cpu", "--latent-size", "4", *map(str, arguments)])


def test_answers_do_not_depend_on_the_batch(command, model, records, tmp_path):
    options = ["--input", records, "--max-new-tokens", 24, "--temperature", 1.0, "--top-p", 0.95, "--seed", 3]
    answers = []
    for size in (1, 3, 16):
        assert run(command, model, *options, "--batch-size", size, "--out", tmp_path / f"{size}.jsonl") == 0
        answers.append([json.loads(line) for line in (tmp_path / f"{size}.jsonl").read_text().splitlines()])
    assert answers[0] == answers[1] == answers[2]
    assert [a["id"] for a in answers[0]] == [f"r{i}" for i in range(5)]
    assert len({tuple(a["tokens"]) for a in answers[0]}) == 5
    spans = [n for a in answers[0] for n in a["span_lengths"]]
    assert 4 in spans
    assert any("⟦4 latents⟧" in a["display"] and "⟦" not in a["text"] for a in answers[0])
    assert {a["end"] for a in answers[0]} <= {"stop", "length", "length_in_span"}
    assert not list(tmp_path.glob(".*partial*"))


def test_one_prompt_on_the_terminal(command, model, records, capsys):
    image = records.parent / "a.png"
    arguments = ["--prompt", "<image> Which way?", "--image", image, "--max-new-tokens", 40, "--temperature", 1]
    assert run(command, model, *arguments) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("[prompt] ")
    assert "1 answers, 40 tokens" in printed.err
    assert run(command, model, *arguments, "--max-spans", 0) == 0
    held = capsys.readouterr()
    assert "⟦" not in held.out
    assert " 0 spans," in held.err


def test_wrong_input_is_one_line(command, model, records, tmp_path, capsys):
    def error(*arguments, folder=model):
        assert run(command, folder, *arguments) == 1
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("generate: ")
        return message

    assert "1 <image> mark(s), 0 image(s)" in error("--prompt", "<image>?")
    assert "no such image: none.png" in error("--prompt", "x", "--image", "none.png")
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl: holds no record" in error("--input", tmp_path / "empty.jsonl")
    assert "no config.json" in error("--prompt", "x", folder=tmp_path / "nowhere")
    assert "top_p=2.0" in error("--prompt", "x", "--top-p", 2)
    assert "max_new_tokens=0" in error("--prompt", "x", "--max-new-tokens", 0)
    records.write_text(records.read_text().replace("a.png", "b.png", 1))
    assert "(id 'r0'): field 'image b.png': no such image" in error("--input", records)


@pytest.mark.parametrize(
    "arguments", [["--image", "a.png", "--input", "x"], ["--prompt", "x", "--batch-size", "0"], []]
)
def test_wrong_arguments(command, model, arguments, capsys):
    with pytest.raises(SystemExit):
        run(command, model, *arguments)
    assert "error:" in capsys.readouterr().err


def test_a_model_without_latent_tokens_is_refused(copied):
    def remove(tree):
        tree["added_tokens"] = [t for t in tree["added_tokens"] if t["content"] not in LATENT_TOKENS]
        for token in LATENT_TOKENS:
            tree["model"]["vocab"].pop(token, None)

    edit(copied, "tokenizer.json", remove)
    for latent_size in (4, None):
        with pytest.raises(ConfigError, match=r"tokenizer\.json: this model has no latent tokens"):
            load_model(copied, latent_size=latent_size)


def test_the_number_of_latents_must_be_known(copied):
    assert load_model(copied).latent_size == 8  # what the tiny model's config says
    edit(copied, "config.json", lambda tree: tree.pop("ilvr"))
    with pytest.raises(ConfigError, match=r"config\.json.*--latent-size"):
        load_model(copied)
    vocabulary = load_model(copied, latent_size=4).tokenizer.vocabulary
    ids = (vocabulary.latent_pad, vocabulary.latent_start, vocabulary.latent_end)
    settings = {"latent_size": 5, "token_ids": dict(zip(LATENT_TOKENS, ids, strict=True)), "training": {}}
    edit(copied, "config.json", lambda tree: tree.update(ilvr=settings))
    assert load_model(copied).latent_size == 5
    assert load_model(copied, latent_size=4).latent_size == 4


def test_another_vocabulary_is_refused(copied, model):
    edit(copied, "config.json", lambda tree: tree.update(image_token_id=7))
    with pytest.raises(ConfigError, match=r"image_token_id is 7.*different vocabularies"):
        load_model(copied, latent_size=4)
    shutil.copy(model / "config.json", copied / "config.json")
    weights = load_file(copied / "model.safetensors")
    rows = load_model(model, latent_size=4).tokenizer.vocabulary.size - 1
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.language_model.embed_tokens.weight"):
        if name in weights:
            weights[name] = weights[name][:rows].clone()
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    edit(copied, "config.json", lambda tree: tree["text_config"].update(vocab_size=rows))
    with pytest.raises(ConfigError, match=f"embedding has {rows} rows"):
        load_model(copied, latent_size=4)


def test_an_impossible_tokenizer_is_refused(command, copied, capsys):
    edit(copied, "tokenizer.json", lambda tree: tree.update(pre_tokenizer={"type": "NoSuchThing"}))
    assert run(command, copied, "--prompt", "x") == 1
    message = capsys.readouterr().err
    assert "tokenizer.json: the `tokenizers` library refuses it: " in message and "Traceback" not in message
    edit(copied, "tokenizer.json", lambda tree: tree.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}}))
    assert run(command, copied, "--prompt", "x") == 1
    assert "refuses it" in capsys.readouterr().err


def test_truncated_weights_are_refused(copied):
    content = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(copied, latent_size=4)


def test_pixel_bounds(copied):
    assert image_settings_of(copied).bounds("input") == (3136, 12845056)
    assert image_settings_of(copied, max_pixels=12544).bounds("input") == (3136, 12544)
    edit(copied, "preprocessor_config.json", lambda tree: tree.update(min_pixels=None, max_pixels=9999))
    assert image_settings_of(copied).bounds("input") == (3136, 9999)
    with pytest.raises(ConfigError, match="min_pixels=3136, max_pixels=100"):
        image_settings_of(copied, max_pixels=100)
    edit(copied, "preprocessor_config.json", lambda tree: tree.update(size=[1]))
    with pytest.raises(ConfigError, match="field 'size': expected an object"):
        image_settings_of(copied)
    (copied / "preprocessor_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json: not a readable JSON"):
        image_settings_of(copied)
