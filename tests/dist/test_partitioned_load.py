"""Weights read straight into ZeRO-3 partitions: the same model as the stock loader's, and no rank with all of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

from ilvr_ds.config import parse_recipe, recipe_to_dict
from ilvr_ds.engine.build import build_engine
from ilvr_ds.engine.checkpoint import save_checkpoint
from ilvr_ds.engine.ds_config import compose_ds_config
from ilvr_ds.engine.export import export_checkpoint
from ilvr_ds.engine.partitioned_load import has_unread_weights, load_partitioned, reads_partitions
from ilvr_ds.engine.testing.ranks import run_ranks
from ilvr_ds.errors import CheckpointError, ConfigError
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


def untied_and_tied(untied: str, tied_folder: str) -> list[list[str]]:
    return [both_ways(untied, "bfloat16"), both_ways(tied_folder, "float32")]


def test_the_same_pieces_as_the_stock_loader(tmp_path):
    """Untied in bfloat16, and tied in float32 from bfloat16 files: pieces, buffers, ties, the start of the average."""
    folders = [make_folder(tmp_path / str(tie), tie=tie, shard_size="500KB") for tie in (False, True)]
    assert all((folder / "model.safetensors.index.json").is_file() for folder in folders)
    assert run_ranks(untied_and_tied, 2, *map(str, folders)) == [[[], []], [[], []]]


def load_and_save(folder: str, out: str) -> None:
    """Train nothing: partitions in, a checkpoint out."""
    recipe = recipe_of(folder)
    engine = build_engine(objective_of(recipe, read_weights=False), recipe, ZERO3)
    save_checkpoint(engine, Path(out) / "step-00000000", {"step": 0, "recipe": recipe_to_dict(recipe), "input_pixels": [3136, 12544]})


def test_load_save_and_stock_load_give_identical_logits(tmp_path):
    """Bit for bit, vision tower included, as the folder that went in; for the teacher as well."""
    folder = make_folder(tmp_path, shard_size="500KB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tmp_path / "tiny" / file, folder / file)
    run_ranks(load_and_save, 2, str(folder), str(tmp_path / "run"))
    networks = [Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype="auto")]
    for teacher in (False, True):
        out = tmp_path / f"out{teacher}"
        export_checkpoint(tmp_path / "run" / "step-00000000", out, teacher=teacher)
        networks.append(Qwen2_5_VLForConditionalGeneration.from_pretrained(out, dtype="auto"))
    config = networks[0].config
    ids = torch.arange(24)[None] + 5
    ids[0, 3:7] = config.image_token_id
    kinds = (ids == config.image_token_id).int()
    image = {"pixel_values": torch.randn(16, 1176), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    with torch.no_grad():
        logits = [n(input_ids=ids, mm_token_type_ids=kinds, **image).logits for n in networks]
    assert torch.isfinite(logits[0]).all() and logits[0].std() > 0
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def grown_memory(folder: str, partitioned: bool) -> int:
    """Bytes by which this rank's peak resident memory grew while it loaded the student."""
    from ilvr_ds.engine.distributed import init_distributed
    from ilvr_ds.model.folder import ModelFolder, empty_network

    init_distributed()
    recipe = recipe_of(folder)
    empty_network(ModelFolder(folder).config)  # imports on first use

    def status(field: str) -> int:
        text = Path("/proc/self/status").read_text()
        return int(text.split(field + ":")[1].split()[0]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    student = Backbone.load(folder, dtype=torch.bfloat16, attention="sdpa", read_weights=not partitioned)
    if partitioned:
        load_partitioned(student, [], compose_ds_config(ZERO3, recipe))
    else:
        assert all(bool(torch.isfinite(p).all()) for p in student.parameters())
    return status("VmHWM") - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux's /proc")
def test_no_rank_holds_the_whole_model(tmp_path):
    """benchmarks/load_memory.py in small: at most 0.65 of a copy plus 16 MiB on each of two ranks."""
    build_tiny_model(tmp_path / "tiny", seed=3)
    network = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "tiny", dtype=torch.bfloat16)
    network.resize_token_embeddings(300_000, mean_resizing=False)
    network.save_pretrained(tmp_path / "model", max_shard_size="40MB")
    copy = sum(t.nbytes for f in (tmp_path / "model").glob("*.safetensors") for t in load_file(f).values())
    assert copy > 140 * 2**20
    limit = 0.65 * copy + 16 * 2**20
    assert max(run_ranks(grown_memory, 2, str(tmp_path / "model"), True)) <= limit
    assert min(run_ranks(grown_memory, 2, str(tmp_path / "model"), False)) > limit  # the stock loader, so: it can fail


def refusals(folder: str) -> list[str]:
    """Messages of what cannot be built, on one rank."""
    recipe, found = recipe_of(folder), []

    def refused(error, function) -> None:
        try:
            function()
        except error as problem:
            found.append(str(problem))
        else:
            found.append("went through")

    for zero in ({"stage": 2}, {"stage": 3, "zero_hpz_partition_size": 2}):
        tree = {"zero_optimization": zero}
        refused(ConfigError, lambda t=tree: build_engine(objective_of(recipe, False), recipe, t))
    mixed = objective_of(recipe, False)
    mixed.student.network.model.visual.patch_embed.proj.to_empty(device="cpu")
    refused(ConfigError, lambda: build_engine(mixed, recipe, ZERO3))
    orphan = objective_of(recipe, False)
    orphan.student.unread = None
    refused(ConfigError, lambda: build_engine(orphan, recipe, ZERO3))
    short = objective_of(recipe, False)
    file = next(Path(folder).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])
    refused(CheckpointError, lambda: build_engine(short, recipe, ZERO3))
    return found


def test_what_cannot_be_loaded_is_said(tmp_path):
    [messages] = run_ranks(refusals, 1, str(make_folder(tmp_path)))
    stage2, hpz, mixed, orphan, short = messages
    assert "which only ZeRO-3 without hpZ reads piece by piece" in stage2 == hpz
    assert "patch_embed.proj.weight' has its values already" in mixed
    assert "no model folder is known for it" in orphan
    assert "model.safetensors: cut short while it was being read" in short


@pytest.mark.parametrize(("name", "expected"), [("zero2", False), ("zero3", True), ("zero3_offload", True)])
def test_which_runs_read_partitions(name, expected):
    assert reads_partitions(recipe_of("none", **{"engine": {"deepspeed": f"ds_configs/{name}.json"}})) is expected


def test_a_copied_teacher_has_no_memory_either(tmp_path):
    build_tiny_model(tmp_path / "model", seed=3)
    recipe = recipe_of(tmp_path / "model")
    objective = objective_of(recipe, read_weights=False)
    assert has_unread_weights(objective) and not has_unread_weights(objective_of(recipe, read_weights=True))
    assert all(p.is_meta for p in objective.parameters())
    assert not any(b.is_meta for b in objective.buffers())
