"""Published model folders at shrunken widths: exact names, shard index, tokenizer and config; and every broken one."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from ilvr_ds.data.tokens import LATENT_TOKENS, ChatTokenizer
from ilvr_ds.errors import CheckpointError, ConfigError
from ilvr_ds.model.backbone import Backbone
from ilvr_ds.model.folder import EMBEDDING, HEAD, ModelFolder, empty_network, file_name, parameter_name
from ilvr_ds.model.latent_rows import NOISE, make_rows, prepare_folder
from ilvr_ds.model.latent_settings import read_latent_settings
from ilvr_ds.model.safetensors_stream import SafetensorsFile, TensorSource, write_safetensors

LATENT_IDS = {"<|latent_pad|>": 151665, "<|latent_start|>": 151666, "<|latent_end|>": 151667}
WIDTH, VOCABULARY_7B, VOCABULARY_ILVR = 16, 152064, 151668


def shrink(tree: dict, rows: int | None = None) -> dict:
    """A published config.json with two decoder layers, two vision blocks and narrow tables; the layout as it is."""
    vision = {
        **tree["vision_config"], "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
        "out_hidden_size": WIDTH, "fullatt_block_indexes": [1],
    }  # fmt: skip
    return {
        **tree, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vision_config": vision, "vocab_size": rows or tree["vocab_size"],
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }  # fmt: skip


def published_folder(
    path: Path, realdata: Path, *, rows: int | None = None, tied: bool = False, seed: int = 0, config: str = "7B"
) -> Path:
    """A folder as published: the 7B index's names and files for the layers there are, bf16, tokenizer and config."""
    source = realdata / "qwen2_5_vl_7b"
    tree = shrink(json.loads((realdata / "qwen2_5_vl_configs" / f"{config}.json").read_text()), rows)
    shutil.copytree(source, path, ignore=shutil.ignore_patterns("*.index.json", ".git*"), copy_function=shutil.copyfile)
    path.chmod(0o755)
    (path / "config.json").write_text(json.dumps(tree))
    published = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    network = empty_network(Qwen2_5_VLConfig.from_pretrained(path))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in network.named_parameters():
        values = torch.randn(parameter.shape, generator=generator) * (0.2 if parameter.ndim > 1 else 0.1)
        tensors[file_name(name)] = (values + (parameter.ndim == 1)).to(torch.bfloat16)
    weight_map = {name: published[name] for name in tensors}  # a name the published index lacks is an error here
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, path / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def logits_of(folder: Path) -> torch.Tensor:
    network = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        return network(input_ids=torch.arange(40)[None] * 3).logits[0]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory, realdata) -> Path:
    """The 7B layout with its true vocabulary."""
    return published_folder(tmp_path_factory.mktemp("base") / "7b", realdata)


@pytest.fixture(scope="module")
def prepared(base) -> Path:
    out = base.with_name("prepared")
    assert prepare_folder(base, out, latent_size=8, shard_bytes=2**22)
    return out


def test_names_are_those_of_stock_save_pretrained(tmp_path, base):
    """Ours, the published index's and stock transformers' are one set, and the way back is exact."""
    network = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, dtype=torch.bfloat16)
    network.save_pretrained(tmp_path / "stock")
    with safe_open(tmp_path / "stock" / "model.safetensors", "pt") as file:
        stock = set(file.keys())
    assert stock == {file_name(name) for name, _ in network.named_parameters()} == set(tensors_of(base))
    for name, _ in network.named_parameters():
        assert parameter_name(file_name(name)) == parameter_name(name) == name


def test_names_of_a_newer_library_are_read(tmp_path, base):
    copy = shutil.copytree(base, tmp_path / "new")
    for file in copy.glob("model*"):
        file.unlink()
    save_file({parameter_name(n): t for n, t in tensors_of(base).items()}, copy / "model.safetensors", {"format": "pt"})
    old, new = ModelFolder(base), ModelFolder(copy)
    for name in old.shapes:
        pairs = zip(old.chunks(name, torch.bfloat16), new.chunks(name, torch.bfloat16), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), name


def test_preparing_keeps_every_weight_and_the_table_length(base, prepared):
    before, after = tensors_of(base), tensors_of(prepared)
    assert set(before) == set(after)
    index = json.loads((prepared / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
    rows = list(LATENT_IDS.values())
    for name, tensor in before.items():
        assert after[name].shape == tensor.shape and after[name].dtype == tensor.dtype
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            kept = torch.ones(len(tensor), dtype=torch.bool)
            kept[rows] = False
            assert torch.equal(after[name][kept], tensor[kept])
            assert not torch.equal(after[name][rows], tensor[rows])
        else:
            assert torch.equal(after[name], tensor), name


def test_new_rows_follow_the_stated_rule(base, prepared):
    """Mean of the rows the tokenizer uses plus a tenth of their spread; apart from each other, alike in every run."""
    after = tensors_of(prepared)
    for name, parameter in (("model.embed_tokens.weight", EMBEDDING), ("lm_head.weight", HEAD)):
        known = tensors_of(base)[name][:151665].double()
        new = after[name][151665:151668].double()
        score = (new - known.mean(0)) / (NOISE * known.std(0))
        assert score.abs().max() < 5 and 0.5 < score.std() < 1.6
        assert len(torch.unique(new, dim=0)) == 3
        folder = ModelFolder(base)
        one, two = make_rows(folder, parameter, [151665], 0), make_rows(folder, parameter, [151665, 151666], 0)
        assert torch.equal(one[151665], two[151665])
        assert not torch.equal(one[151665], make_rows(folder, parameter, [151665], 1)[151665])


def test_tokenizer_of_a_prepared_folder(base, prepared):
    tokenizer = AutoTokenizer.from_pretrained(prepared)
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in LATENT_TOKENS} == LATENT_IDS
    assert tokenizer("a<|latent_start|><|latent_pad|><|latent_end|>").input_ids[1:] == [151666, 151665, 151667]
    assert tokenizer.decode([151665, 64], skip_special_tokens=True) == tokenizer.decode([64])
    plain = Tokenizer.from_file(str(prepared / "tokenizer.json"))  # without what tokenizer_config.json says
    assert plain.decode([151665, 64], skip_special_tokens=True) == plain.decode([64])
    ours = ChatTokenizer.from_folder(prepared).vocabulary
    assert ours == ChatTokenizer.from_folder(base).vocabulary  # the fingerprint too: shards built with either fit
    assert read_latent_settings(prepared).token_ids == LATENT_IDS


def test_a_prepared_folder_is_what_training_loads(base, prepared):
    vocabulary = ChatTokenizer.from_folder(prepared).vocabulary
    backbone = Backbone.load(prepared, dtype=torch.float32, vocabulary=vocabulary)
    assert backbone.language_model.embed_tokens.weight.shape == (VOCABULARY_7B, WIDTH)
    config = Qwen2_5_VLConfig.from_pretrained(prepared)
    assert config.ilvr["latent_size"] == 8 and config.text_config.vocab_size == VOCABULARY_7B
    kept = [i for i in range(VOCABULARY_7B) if i not in LATENT_IDS.values()]
    assert torch.equal(logits_of(base)[:, kept], logits_of(prepared)[:, kept])
    with pytest.raises(ConfigError, match=r"no latent tokens; add them with launch/prepare_model\.py"):
        Backbone.load(base, dtype=torch.float32, vocabulary=vocabulary)


def test_asking_again_is_free_and_asking_for_another_is_an_error(base, prepared):
    assert not prepare_folder(base, prepared, latent_size=8)
    with pytest.raises(ConfigError, match="latent_size: 8 there, 4 asked"):
        prepare_folder(base, prepared, latent_size=4)


def test_tied_3b_layout(tmp_path, realdata):
    """No head in the files; one table gets the rows, and stays tied."""
    folder = published_folder(tmp_path / "3b", realdata, config="3B")
    assert not any("lm_head" in name for name in tensors_of(folder))
    prepare_folder(folder, tmp_path / "out", latent_size=8)
    network = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert network.lm_head.weight is network.model.language_model.embed_tokens.weight
    assert network.lm_head.weight.shape == (151936, WIDTH)
    assert set(tensors_of(tmp_path / "out")) == set(tensors_of(folder))


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_model_with_a_head_in_its_files(tmp_path, realdata, equal):
    folder = published_folder(tmp_path / "3b", realdata, config="3B")
    head = tensors_of(folder)["model.embed_tokens.weight"] + (0 if equal else 1)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "extra.safetensors"
    save_file({"lm_head.weight": head}, folder / "extra.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if equal:
        assert HEAD not in ModelFolder(folder).shapes
    else:
        with pytest.raises(CheckpointError, match=r"extra.safetensors: 'lm_head.weight' differs from the embedding"):
            ModelFolder(folder)


@pytest.fixture(scope="module")
def published_ilvr(tmp_path_factory, realdata) -> Path:
    """An ILVR checkpoint as published: 151,668 rows, its tokenizer with the latent tokens, 4.50's names."""
    parent = tmp_path_factory.mktemp("ilvr")
    plain = published_folder(parent / "plain", realdata, rows=VOCABULARY_ILVR, seed=5)
    prepare_folder(plain, parent / "with_tokens", latent_size=8)
    published = published_folder(parent / "published", realdata, rows=VOCABULARY_ILVR, seed=5)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(parent / "with_tokens" / name, published / name)
    return published


def test_converting_a_published_ilvr_checkpoint(tmp_path, published_ilvr):
    """Nothing that was trained changes; `--rows` brings the tables back to the base model's length."""
    prepare_folder(published_ilvr, tmp_path / "same", latent_size=8)
    prepare_folder(published_ilvr, tmp_path / "long", latent_size=8, rows=VOCABULARY_7B)
    before, same, long = map(tensors_of, (published_ilvr, tmp_path / "same", tmp_path / "long"))
    for name, tensor in before.items():
        assert torch.equal(same[name], tensor), name
        assert torch.equal(long[name][: len(tensor)], tensor), name
    assert long["lm_head.weight"].shape == (VOCABULARY_7B, WIDTH)
    assert long["lm_head.weight"][VOCABULARY_ILVR:].float().norm(dim=1).max() < before["lm_head.weight"].float().norm()
    assert torch.equal(logits_of(tmp_path / "long")[:, :VOCABULARY_ILVR], logits_of(published_ilvr))
    for folder in ("same", "long"):
        vocabulary = ChatTokenizer.from_folder(tmp_path / folder).vocabulary
        Backbone.load(tmp_path / folder, dtype=torch.bfloat16, vocabulary=vocabulary, read_weights=False)
        assert read_latent_settings(tmp_path / folder).latent_size == 8


def test_tables_are_never_made_shorter(tmp_path, base):
    with pytest.raises(ConfigError, match="152064 rows and are never made shorter"):
        prepare_folder(base, tmp_path / "out", latent_size=8, rows=151800)
    assert not (tmp_path / "out").exists()


def test_too_few_rows(tmp_path, realdata, published_ilvr):
    short = published_folder(tmp_path / "short", realdata, rows=151665)
    with pytest.raises(ConfigError, match=r"151665 rows do not hold the tokenizer's 151668 ids.*--rows"):
        prepare_folder(short, tmp_path / "out", latent_size=8)
    prepare_folder(short, tmp_path / "longer", latent_size=8, rows=151668)
    assert logits_of(tmp_path / "longer").shape[-1] == 151668
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(published_ilvr / name, short / name)
    with pytest.raises(ConfigError, match="weights and tokenizer do not belong together"):
        prepare_folder(short, tmp_path / "out", latent_size=8, rows=151668)


def cut_short(folder: Path) -> None:
    file = folder / "model-00001-of-00005.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def cut_to_nothing(folder: Path) -> None:
    (folder / "model-00001-of-00005.safetensors").write_bytes(b"\x08\x00")


def not_safetensors(folder: Path) -> None:
    (folder / "model-00001-of-00005.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 9)


def no_shard(folder: Path) -> None:
    (folder / "model-00005-of-00005.safetensors").unlink()


def no_weights(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()


def edit_config(**changes):
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def edit_shard(changed: dict, dropped: str | None = None):
    def edit(folder: Path) -> None:
        file = folder / "model-00001-of-00005.safetensors"
        tensors = {name: tensor for name, tensor in load_file(file).items() if name != dropped}
        save_file(tensors | changed, file)

    return edit


def edit_index(added: str | None = None, dropped: str | None = None):
    def edit(folder: Path) -> None:
        file = folder / "model.safetensors.index.json"
        tree = json.loads(file.read_text())
        if added is not None:
            tree["weight_map"][added] = "model-00001-of-00005.safetensors"
        tree["weight_map"].pop(dropped, None)
        file.write_text(json.dumps(tree))

    return edit


NORM, MATRIX = "model.layers.0.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight"


def drop_a_tensor(folder: Path) -> None:
    edit_shard({}, dropped=MATRIX)(folder)
    edit_index(dropped=MATRIX)(folder)


def add_layer(folder: Path) -> None:
    edit_shard({"model.layers.9.x": torch.ones(1)})(folder)
    edit_index(added="model.layers.9.x")(folder)


def unreadable_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")


BROKEN = [
    (cut_short, CheckpointError, r"model-00001-of-00005\.safetensors: cut short: \d+ bytes, its header asks for \d+"),
    (cut_to_nothing, CheckpointError, r"model-00001-of-00005\.safetensors: cut short or not a safetensors file"),
    (not_safetensors, CheckpointError, r"model-00001-of-00005\.safetensors: cut short or not a safetensors file"),
    (no_shard, CheckpointError, r"model-00005-of-00005\.safetensors: missing, .*index\.json names it"),
    (no_weights, CheckpointError, "the weights are missing"),
    (unreadable_index, CheckpointError, r"index\.json: not a readable weight index"),
    (edit_index(added="model.extra.weight"), CheckpointError, r"tensor 'model\.extra\.weight' is not in it"),
    (drop_a_tensor, CheckpointError, r"'model\.layers\.1\.mlp\.up_proj\.weight' is in no weight file"),
    (add_layer, CheckpointError, r"tensor 'model\.layers\.9\.x'.* is not part of a Qwen"),
    (edit_shard({"model.norm.weight": torch.ones(16)}), CheckpointError, r"model\.norm\.weight' is in it, .*does not"),
    (edit_shard({NORM: torch.ones(3)}), CheckpointError, r"0\.input_layernorm\.weight' has shape \(3,\)"),
    (edit_shard({NORM: torch.ones(16).char()}), CheckpointError, "dtype I8"),
    (edit_config(vocab_size=151936), CheckpointError, "152064 rows, config.json says vocab_size=151936"),
    (edit_config(model_type="llava"), ConfigError, "model_type is 'llava', this is for 'qwen2_5_vl'"),
    (edit_config(architectures=["Qwen2_5_VLModel"]), ConfigError, r"architectures is \['Qwen2_5_VLModel'\]"),
    (lambda folder: (folder / "config.json").unlink(), ConfigError, "no config.json there"),
    (lambda folder: (folder / "config.json").write_text("{"), ConfigError, "config.json: not a readable JSON file"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "error", "message"), BROKEN)
def test_a_broken_folder_is_named(tmp_path, base, damage, error, message):
    copy = shutil.copytree(base, tmp_path / "broken")
    damage(copy)
    with pytest.raises(error, match=message):
        ModelFolder(copy)
    with pytest.raises(error, match=message):
        Backbone.load(copy, dtype=torch.float32)


def test_other_latent_ids_are_another_vocabulary(tmp_path, base, prepared):
    vocabulary = ChatTokenizer.from_folder(prepared).vocabulary
    copy = shutil.copytree(prepared, tmp_path / "copy")
    tree = json.loads((copy / "config.json").read_text())
    tree["ilvr"]["token_ids"]["<|latent_pad|>"] = 7
    (copy / "config.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=r"config.json: ilvr.token_ids is .*another vocabulary"):
        Backbone.load(copy, dtype=torch.float32, vocabulary=vocabulary, read_weights=False)
    tokenizer = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(tokenizer.replace("<|latent_pad|>", "<|latent_x|>"))
    with pytest.raises(ConfigError, match="no latent tokens"):
        Backbone.load(copy, dtype=torch.float32, vocabulary=vocabulary, read_weights=False)
    with pytest.raises(ConfigError, match=r"no key 'ilvr': this model has no latent tokens"):
        read_latent_settings(base)


def test_buffers_of_an_empty_network_are_the_stock_ones(base):
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, dtype=torch.bfloat16)
    empty = empty_network(stock.config, torch.bfloat16)
    assert all(p.is_meta for p in empty.parameters())
    ours, theirs = dict(empty.named_buffers()), dict(stock.named_buffers())
    assert list(ours) == list(theirs) and len(ours) == 4
    assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)
    assert set(empty.state_dict()) == set(stock.state_dict())  # what is not saved is not saved here either


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_range_in_any_dtype(tmp_path_factory, data):
    """write -> the library reads it; the library writes -> our ranges are its slices."""
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    tensors = {
        f"t{i}": torch.randn(data.draw(st.lists(st.integers(0, 5), max_size=3))).to(data.draw(dtypes))
        for i in range(data.draw(st.integers(1, 4)))
    }
    write_safetensors(
        path,
        [TensorSource(n, t.dtype, tuple(t.shape), lambda t=t: iter(t.flatten().split(3))) for n, t in tensors.items()],
    )
    loaded = load_file(path)
    assert all(torch.equal(loaded[n], t) and loaded[n].dtype == t.dtype for n, t in tensors.items())
    save_file(tensors, path)
    name = data.draw(st.sampled_from(sorted(tensors)))
    flat = tensors[name].flatten()
    start = data.draw(st.integers(0, flat.numel()))
    end = data.draw(st.integers(start, flat.numel()))
    out = torch.empty(end - start, dtype=data.draw(dtypes))
    SafetensorsFile(path).read(name, start, out)
    assert torch.equal(out, flat[start:end].to(out.dtype))


def test_a_source_that_lies_about_its_size(tmp_path):
    with pytest.raises(ValueError, match="'a': 8 bytes written, 12 announced"):
        write_safetensors(tmp_path / "x", [TensorSource("a", torch.float32, (3,), lambda: iter([torch.ones(2)]))])


def test_the_command(tmp_path, base, capsys, repository):
    sys.path.insert(0, str(repository / "launch"))
    import prepare_model

    assert prepare_model.main(["--model", str(base), "--out", str(tmp_path / "out"), "--latent-size", "4"]) == 0
    assert read_latent_settings(tmp_path / "out").latent_size == 4
    assert prepare_model.main(["--model", str(tmp_path / "none"), "--out", str(tmp_path / "no")]) == 1
    assert "no config.json there" in capsys.readouterr().err
