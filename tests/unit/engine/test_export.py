"""Training checkpoints as model folders: what stock transformers makes of them is what the run had."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from data_tools.build_shards import main as build_shards
from ilvr_ds.config import parse_recipe, recipe_to_dict
from ilvr_ds.data.images import resize_image
from ilvr_ds.engine.build import build_engine
from ilvr_ds.engine.checkpoint import save_checkpoint
from ilvr_ds.engine.export import export_checkpoint
from ilvr_ds.engine.optimizer_state import OptimizerState
from ilvr_ds.engine.testing.ranks import run_ranks
from ilvr_ds.errors import CheckpointError, ConfigError, ShardError
from ilvr_ds.inference.load import image_settings_of
from ilvr_ds.model.backbone import Backbone
from ilvr_ds.model.latent_settings import read_latent_settings
from ilvr_ds.model.teacher import Teacher
from ilvr_ds.model.tiny import build_tiny_model
from ilvr_ds.objective.alignment import AlignmentObjective


def recipe_of(model: Path, train_vision: bool = False):
    tree = {
        "name": "export", "run": {"dir": "none"}, "data": {"shards": "none"},
        "model": {"path": str(model), "gradient_checkpointing": False, "train_vision": train_vision},
        "latent": {"size": 5}, "optimizer": {"lr": 2e-3},
    }  # fmt: skip
    return parse_recipe(tree, "test")


def train_a_little(model: str, out: str, stage: int, train_vision: bool) -> None:
    """Masters and averages moved off the folder's values; then a checkpoint, and the full weights beside it."""
    recipe = recipe_of(Path(model), train_vision)
    student = Backbone.load(model, dtype=torch.bfloat16, attention="sdpa", train_vision=train_vision)
    objective = AlignmentObjective(student, Teacher.of(student, recipe.teacher), recipe.latent, recipe.loss)
    engine = build_engine(objective, recipe, {"zero_optimization": {"stage": stage}})
    state = OptimizerState(engine)
    masters = state.tensors()["master"]
    for (name, piece), master in zip(state.pieces, masters, strict=True):
        master += change(name, piece.start, piece.numel)
    for piece, shadow in zip(engine.ema.pieces, engine.ema.shadows, strict=True):
        shadow += change(piece.name, piece.start, piece.numel)
    save_checkpoint(
        engine,
        Path(out) / "step-00000007",
        {"step": 7, "recipe": recipe_to_dict(recipe), "input_pixels": [3136, 12544]},
    )


def change(name: str, start: int, numel: int) -> torch.Tensor:
    """A number for every element of every parameter, the same however it is cut."""
    return torch.sin(torch.arange(start, start + numel) * 0.37 + len(name)) * 0.05


def expected(model: Path, weights: str, train_vision: bool) -> dict[str, torch.Tensor]:
    """fp32 tensors by file name, put together without any of the code under test."""
    found = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        values = tensor.to(torch.bfloat16).float()
        inside = name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
        inside = f"model.{name}" if name.startswith("visual.") else inside
        owner = f"student.network.{inside}"
        if weights == "teacher" and name.startswith("model."):
            owner = f"teacher.language_model.{name.removeprefix('model.')}"
        if train_vision or not name.startswith("visual."):
            values = values + change(owner, 0, values.numel()).view_as(values)
        found[name] = values
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "model"
    build_tiny_model(folder, seed=1)
    return folder


@pytest.fixture(scope="module")
def checkpoint(model) -> Path:
    run_ranks(train_a_little, 2, str(model), str(model.parent / "zero3"), 3, False)
    return model.parent / "zero3" / "step-00000007"


@pytest.mark.parametrize("weights", ["student", "teacher"])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_every_weight_is_the_runs(tmp_path, model, checkpoint, weights, dtype):
    out = tmp_path / "out"
    assert export_checkpoint(checkpoint, out, teacher=weights == "teacher", dtype=dtype, shard_bytes=10**6)
    written = {n: t for f in out.glob("*.safetensors") for n, t in load_file(f).items()}
    wanted = expected(model, weights, train_vision=False)
    target = torch.bfloat16 if dtype is None else dtype
    assert set(written) == set(wanted)
    for name, values in wanted.items():
        assert torch.equal(written[name], values.to(target)), name
    assert len(list(out.glob("*.safetensors"))) > 1


def test_pieces_of_another_stage_and_a_trained_vision_tower(tmp_path, model):
    """ZeRO-1 cuts one flat buffer, so pieces end inside parameters; every parameter is trained."""
    run_ranks(train_a_little, 2, str(model), str(tmp_path), 1, True)
    export_checkpoint(tmp_path / "step-00000007", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, values in expected(model, "student", train_vision=True).items():
        assert torch.equal(written[name], values.bfloat16()), name


def test_stock_transformers_loads_it(tmp_path, model, checkpoint):
    """from_pretrained and AutoTokenizer take the folder; its logits are those of the run's weights."""
    export_checkpoint(checkpoint, tmp_path / "out", dtype=torch.float32)
    network, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "out", dtype="auto", local_files_only=True, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert network.dtype == torch.float32 and network.config.ilvr["latent_size"] == 5
    reference = Qwen2_5_VLForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    values = expected(model, "student", train_vision=False)
    save_file(values, tmp_path / "reference.safetensors", {"format": "pt"})
    shutil.copytree(model, tmp_path / "ref")
    shutil.copyfile(tmp_path / "reference.safetensors", tmp_path / "ref" / "model.safetensors")
    reference = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "ref", dtype=torch.float32)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(network(input_ids=ids).logits, reference(input_ids=ids).logits)
    tokenizer, before = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(model)
    assert tokenizer.get_vocab() == before.get_vocab()
    assert tokenizer.chat_template == before.chat_template


def test_saving_again_with_stock_transformers_changes_nothing(tmp_path, checkpoint):
    """Names and tensors are those stock save_pretrained writes."""
    export_checkpoint(checkpoint, tmp_path / "out")
    network = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="auto")
    network.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert set(first) == set(second)
    assert all(torch.equal(first[n], second[n]) and first[n].dtype == second[n].dtype for n in first)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_config_says(tmp_path, model, checkpoint):
    export_checkpoint(checkpoint, tmp_path / "out", teacher=True)
    latent = read_latent_settings(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert latent.latent_size == 5
    assert latent.token_ids == {t: tokenizer.convert_tokens_to_ids(t) for t in latent.token_ids}
    training = latent.training
    assert (training["recipe"], training["step"], training["weights"]) == ("export", 7, "teacher")
    assert training["optimizer"]["lr"] == 2e-3
    tree = json.loads((tmp_path / "out" / "config.json").read_text())
    assert tree["dtype"] == "bfloat16" and "torch_dtype" not in tree


def test_auto_processor(tmp_path, checkpoint):
    pytest.importorskip("torchvision", reason="AutoProcessor's video part needs torchvision")
    from transformers import AutoProcessor

    export_checkpoint(checkpoint, tmp_path / "out")
    assert AutoProcessor.from_pretrained(tmp_path / "out").tokenizer is not None


def test_the_images_of_the_run(tmp_path, model, checkpoint):
    """Ours and the stock processor resize as the run's shards were: no option needed, nothing else changed."""
    export_checkpoint(checkpoint, tmp_path / "out")
    assert image_settings_of(tmp_path / "out").bounds("input") == (3136, 12544)
    assert read_latent_settings(tmp_path / "out").training["input_pixels"] == [3136, 12544]
    stock, before = (AutoImageProcessor.from_pretrained(folder) for folder in (tmp_path / "out", model))
    assert (stock.size["shortest_edge"], stock.size["longest_edge"]) == (3136, 12544)
    assert before.size["longest_edge"] == 12845056
    picture = Image.new("RGB", (1000, 300))
    ours = resize_image(picture, *image_settings_of(tmp_path / "out").bounds("input"))
    _, height, width = stock(images=[picture], return_tensors="pt")["image_grid_thw"][0].tolist()
    assert ours.size == (14 * width, 14 * height)
    changed = stock.to_dict() | {"size": None}
    assert changed == before.to_dict() | {"size": None}


def test_the_images_of_an_older_checkpoint(tmp_path, model, checkpoint):
    """One that does not say how large its images were: the recipe's shards say it, or the export ends."""
    copy = damaged(checkpoint, tmp_path)
    state = json.loads((copy / "state.json").read_text())
    del state["input_pixels"]
    (copy / "state.json").write_text(json.dumps(state))
    with pytest.raises(ShardError, match=r"none/manifest\.json: no such file"):
        export_checkpoint(copy, tmp_path / "out")
    Image.new("RGB", (90, 60)).save(tmp_path / "a.png")
    steps = [{"type": "text", "content": "I look."}, {"type": "text", "content": "The final answer is: A"}]
    record = {"id": "a", "text_input": "<image>?", "image_input": ["a.png"], "sequence_plan": steps}
    (tmp_path / "records.jsonl").write_text(json.dumps(record | {"original_final_answer": "A"}) + "\n")
    arguments = ["--input", tmp_path / "records.jsonl", "--format", "ilvr", "--tokenizer", model,
                 "--out", tmp_path / "shards", "--input-max-pixels", 7056]  # fmt: skip
    assert build_shards([str(argument) for argument in arguments]) == 0
    state["recipe"]["data"]["shards"] = str(tmp_path / "shards")
    (copy / "state.json").write_text(json.dumps(state))
    assert export_checkpoint(copy, tmp_path / "out")
    assert image_settings_of(tmp_path / "out").bounds("input") == (3136, 7056)


def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "runs" / checkpoint.name)


def test_wrong_checkpoints(tmp_path, model, checkpoint):
    copy = damaged(checkpoint, tmp_path)
    file = copy / "optimizer-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"optimizer-00001-of-00002\.safetensors: cut short"):
        export_checkpoint(copy, tmp_path / "out")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"optimizer-00001-of-00002\.safetensors: missing"):
        export_checkpoint(copy, tmp_path / "out")
    (copy / "COMPLETE").unlink()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        export_checkpoint(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_program(tmp_path, checkpoint):
    copy = damaged(checkpoint, tmp_path)
    (copy / "state.json").write_text('{"step": 7}')
    with pytest.raises(CheckpointError, match=r"state\.json: no recipe in it"):
        export_checkpoint(copy, tmp_path / "out")


def test_another_model_folder(tmp_path, model, checkpoint):
    """Its frozen weights differ: nothing is written, not even a part."""
    build_tiny_model(tmp_path / "other", seed=2)
    with pytest.raises(CheckpointError, match="has other values than the run was trained with"):
        export_checkpoint(checkpoint, tmp_path / "out", model=tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other"]


def test_a_model_folder_of_another_shape(tmp_path, model, checkpoint):
    other = shutil.copytree(model, tmp_path / "other")
    network = Qwen2_5_VLForConditionalGeneration.from_pretrained(model)
    network.resize_token_embeddings(900)
    network.save_pretrained(other)
    with pytest.raises(CheckpointError, match=r"has shape \(1024, 128\), in .*other it is \(900, 128\)"):
        export_checkpoint(checkpoint, tmp_path / "out", model=other)


def test_no_teacher_to_export(tmp_path, checkpoint):
    copy = damaged(checkpoint, tmp_path)
    tree = json.loads((copy / "model.json").read_text())
    tree["parameters"] = [row for row in tree["parameters"] if row[2] != "averaged"]
    (copy / "model.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match="this run has no teacher"):
        export_checkpoint(copy, tmp_path / "out", teacher=True)
    assert export_checkpoint(copy, tmp_path / "out")


def test_a_base_without_latent_tokens(tmp_path, model, checkpoint):
    base = shutil.copytree(model, tmp_path / "base")
    tree = json.loads((base / "tokenizer.json").read_text())
    tree["added_tokens"] = [entry for entry in tree["added_tokens"] if "latent" not in entry["content"]]
    for token in ("<|latent_pad|>", "<|latent_start|>", "<|latent_end|>"):
        tree["model"]["vocab"].pop(token, None)
    (base / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match="this model has no latent tokens"):
        export_checkpoint(checkpoint, tmp_path / "out", model=base)


def test_the_command(tmp_path, checkpoint, capsys, repository):
    sys.path.insert(0, str(repository / "launch"))
    import export

    run = tmp_path / "run"
    shutil.copytree(checkpoint, run / "checkpoints" / checkpoint.name)
    assert export.main(["--run", str(run), "--out", str(tmp_path / "out")]) == 0
    assert "the student of" in capsys.readouterr().out
    assert export.main(["--run", str(run), "--out", str(tmp_path / "out")]) == 0
    assert "already there" in capsys.readouterr().out
    assert export.main(["--run", str(run), "--out", str(tmp_path / "out"), "--teacher"]) == 1
    assert "weights: 'student' there, 'teacher' asked" in capsys.readouterr().err
    assert export.main(["--run", str(tmp_path / "none"), "--out", str(tmp_path / "x")]) == 1
    assert "no complete checkpoint there" in capsys.readouterr().err
