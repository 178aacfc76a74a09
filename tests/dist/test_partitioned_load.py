"""Weights read straight into ZeRO-3 partitions: the same model as the stock loader's, and no rank with all of it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from ilvr_ds.config import parse_recipe
from ilvr_ds.engine.build import build_engine
from ilvr_ds.engine.testing.ranks import run_ranks
from ilvr_ds.model.backbone import Backbone
from ilvr_ds.model.teacher import Teacher
from ilvr_ds.model.tiny import build_tiny_model
from ilvr_ds.objective.alignment import AlignmentObjective

ZERO3 = {"zero_optimization": {"stage": 3}}


def recipe_of(folder, dtype="bfloat16", **sections):
    tree = {
        "name": "load", "run": {"dir": "none"}, "data": {"shards": "none"},
        "model": {"path": str(folder), "dtype": dtype, "gradient_checkpointing": False},
    }  # fmt: skip
    return parse_recipe(tree | sections, "test")


def objective_of(recipe, read_weights):
    student = Backbone.load(
        recipe.model.path, dtype=getattr(torch, recipe.model.dtype), attention="sdpa", read_weights=read_weights
    )
    return AlignmentObjective(student, Teacher.of(student, recipe.teacher), recipe.latent, recipe.loss)


def own_pieces(engine) -> dict:
    """This rank's elements of every parameter, padding left out, and every buffer."""
    found = {}
    for name, p in engine.deepspeed.module.named_parameters():
        start = min(p.ds_tensor.numel() * engine.rank, p.ds_numel)
        found[name] = (tuple(p.ds_shape), p.requires_grad, p.ds_tensor[: p.ds_numel - start].clone())
    found.update((name, (b.dtype, str(b.device), b.clone())) for name, b in engine.deepspeed.module.named_buffers())
    return found


def both_ways(folder: str, dtype: str) -> list[str]:
    """Names of parameters and buffers in which the two loaders differ on this rank."""
    built = []
    for read_weights in (True, False):
        recipe = recipe_of(folder, dtype)
        engine = build_engine(objective_of(recipe, read_weights), recipe, ZERO3)
        assert engine.module.student.unread is None
        built.append((own_pieces(engine), [s.clone() for s in engine.ema.shadows], tied(engine)))
        engine.deepspeed.destroy()
    (stock, shadows, ties), (ours, our_shadows, our_ties) = built
    assert list(stock) == list(ours)
    assert ties == our_ties
    differing = [n for n in stock if stock[n][:2] != ours[n][:2] or not torch.equal(stock[n][2], ours[n][2])]
    same_average = all(torch.equal(a, b) for a, b in zip(shadows, our_shadows, strict=True))
    return differing + ([] if same_average else ["moving average"])


def tied(engine) -> bool:
    network = engine.module.student.network
    return network.lm_head._parameters["weight"] is network.model.language_model.embed_tokens._parameters["weight"]


def make_folder(path: Path, *, tie: bool = False, shard_size: str = "50GB") -> Path:
    """The tiny model as bfloat16, in the number of files `shard_size` asks for, tied or not."""
    build_tiny_model(path / "tiny", seed=3)
    if tie:
        file = path / "tiny" / "config.json"
        tree = json.loads(file.read_text())
        tree["tie_word_embeddings"] = True
        file.write_text(json.dumps(tree))
    network = Qwen2_5_VLForConditionalGeneration.from_pretrained(path / "tiny", dtype=torch.bfloat16)
    if tie:
        network.tie_weights()
    network.save_pretrained(path / "model", max_shard_size=shard_size)
    return path / "model"


@pytest.mark.parametrize(
    ("world", "tie", "dtype"), [(2, False, "bfloat16"), (2, True, "float32"), (1, False, "bfloat16")]
)
def test_the_same_pieces_as_the_stock_loader(tmp_path, world, tie, dtype):
    folder = make_folder(tmp_path, tie=tie, shard_size="500KB")
    assert (folder / "model.safetensors.index.json").is_file()
    assert run_ranks(both_ways, world, str(folder), dtype) == [[]] * world
