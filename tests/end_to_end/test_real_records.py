"""Real records with the real Qwen2.5-VL tokenizer, from JSONL to twenty training steps."""

import shutil
from pathlib import Path

import pytest

RECIPE = Path("launch/recipes/tiny_frozenlake.yaml")


@pytest.fixture(scope="module")
def model(realdata, program, tmp_path_factory) -> Path:
    """A narrow random model with the published vocabulary and tokenizer, made ready as a user would."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("model")
    published = Qwen2_5_VLConfig.from_pretrained(realdata / "qwen2_5_vl_7b")
    text, vision = published.text_config, published.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 32, 64, 2
    text.num_attention_heads, text.num_key_value_heads = 2, 1
    text.layer_types = text.layer_types[:2]
    text.rope_parameters = dict(text.rope_parameters, mrope_section=[2, 3, 3])
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 2, 32, 48, 2
    vision.out_hidden_size, vision.fullatt_block_indexes = 32, [1]
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(published).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.json"):
        shutil.copy(realdata / "qwen2_5_vl_7b" / name, folder / name)
    ready = tmp_path_factory.mktemp("ready") / "model"
    program("launch/prepare_model.py", "--model", folder, "--out", ready)
    return ready


@pytest.mark.parametrize(
    ("source", "file", "form", "records"),
    [("mirage", "examples.jsonl", "mirage", 10), ("mvot", "episodes.jsonl", "ilvr", 18)],
)
def test_real_records_train(source, file, form, records, realdata, model, program, train, metrics, tmp_path):
    shards, run = tmp_path / "shards", tmp_path / "run"
    out = program(
        "data_tools/build_shards.py", "--input", realdata / source / file, "--format", form, "--tokenizer", model,
        "--out", shards, "--input-max-pixels", 28 * 28 * 64, "--helper-max-pixels", 28 * 28 * 64,
    )  # fmt: skip
    assert (shards / "rejects.jsonl").read_text() == "", out
    program("data_tools/check_shards.py", shards, "--tokenizer", model)
    train(
        1, RECIPE, f"data.shards={shards}", f"model.path={model}", f"run.dir={run}", "data.samples_per_step=4",
        "data.token_budget=4096", "run.epochs=20", "run.max_steps=20", "run.tensorboard=false",
    )  # fmt: skip
    lines = metrics(run)
    assert len(lines) == 20 and all(line["applied"] for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["teacher_drift"] > 0
