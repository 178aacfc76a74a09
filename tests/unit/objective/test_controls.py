"""The objectives of the controls against plain torch, one sample at a time; recipes that ask for them or cannot."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ilvr_ds.config import ConfigError, LatentConfig, LossConfig, load_recipe, parse_recipe, recipe_to_dict
from ilvr_ds.contracts import IGNORE_INDEX
from ilvr_ds.data.packing import filler_batch
from ilvr_ds.errors import BatchError
from ilvr_ds.model.backbone import Backbone
from ilvr_ds.model.flops import FlopsModel
from ilvr_ds.model.vision import patches_of
from ilvr_ds.objective.build import build_objective
from ilvr_ds.objective.pause import PauseObjective
from ilvr_ds.objective.pooled import PooledObjective, pool_to

MIRAGE = LossConfig(ce_weight=0.1, sim_weight=1.0)


def pooled(small, *, noise_std=0.0, loss=MIRAGE, **backbone) -> PooledObjective:
    student = Backbone(small.network(0), attention="sdpa", **backbone)
    return PooledObjective(student, LatentConfig(small.latents, "pooled", noise_std), loss).train()


def pause(small, **backbone) -> PauseObjective:
    student = Backbone(small.network(0), attention="sdpa", **backbone)
    return PauseObjective(student, LatentConfig(small.latents, "pause"), LossConfig(0.5, 0.0)).train()


CONTROLS = {"pooled": pooled, "pause": pause}


def run(objective, batch, noise_seed=0):
    objective.zero_grad()
    terms = objective(batch, noise_seed)
    terms.loss.backward()
    return terms, {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def samples(small):
    """Helper images of 1 to 9 merged tokens: fewer than K = 3, K, a multiple and not a multiple of it."""
    return [
        small.sample(0, images=2, spans=2),
        small.sample(1, images=0, spans=0),
        small.sample(2, images=1, spans=3, gap=6),
        small.sample(3, images=0, spans=2),
    ]


# ----------------------------------------------------------------------------------------- oracle
def plain_pool(features: torch.Tensor, size: int) -> torch.Tensor:
    """Means of contiguous runs, written as a loop."""
    count = len(features)
    runs = [(math.floor(k * count / size), math.ceil((k + 1) * count / size)) for k in range(size)]
    return torch.stack([features[low:high].mean(0) for low, high in runs])


def plain(small, samples, forced: bool, loss: LossConfig):
    """Loss and gradients of stock modules, eager attention, sample by sample: CE mean and alignment mean of each."""
    network, v, size = small.network(0), small.vocabulary, small.latents
    network.set_attn_implementation("eager")
    network.model.visual.requires_grad_(False)
    text = network.model.language_model
    ces, aligns = [], []
    for sample in samples:
        ids, labels = torch.from_numpy(sample.input_ids), torch.from_numpy(sample.labels)
        inputs = text.embed_tokens(ids).clone()
        helpers = []
        if sample.grids:
            pixels = np.concatenate([sample.input_pixels, sample.helper_pixels])
            patches = patches_of(torch.from_numpy(pixels), sample.grids)
            features = network.model.visual(patches, grid_thw=torch.tensor(sample.grids)).pooler_output
            images = list(features.split([h * w // 4 for _, h, w in sample.grids]))
            helpers = images[sample.num_input_images :]
            if sample.num_input_images:
                inputs[ids == v.image_pad] = torch.cat(images[: sample.num_input_images])
        pads = (ids == v.latent_pad).nonzero()[:, 0]
        targets = torch.cat([plain_pool(h, size) for h in helpers]) if helpers else None
        if forced and targets is not None:
            inputs[pads] = targets
        positions = small.batch([sample]).position_ids
        hidden = text(inputs_embeds=inputs[None], position_ids=positions[:, None], use_cache=False).last_hidden_state[0]
        ces.append(F.cross_entropy(network.lm_head(hidden[:-1]), labels[1:], ignore_index=IGNORE_INDEX))
        if forced and targets is not None:
            aligns.append(1 - F.cosine_similarity(hidden[pads - 1], targets, dim=-1).mean())
        else:
            aligns.append(torch.zeros(()))
    ce, align = torch.stack(ces).sum(), torch.stack(aligns).sum()
    total = loss.ce_weight * ce + loss.sim_weight * align
    total.backward()
    grads = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    return total.detach(), ce.detach(), align.detach(), grads


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", CONTROLS)
def test_packed_is_the_plain_computation(small, samples, kind, checkpointing):
    objective = CONTROLS[kind](small, gradient_checkpointing=checkpointing)
    terms, grads = run(objective, small.batch(samples))
    total, ce, align, expected = plain(small, samples, kind == "pooled", objective.loss)
    torch.testing.assert_close(terms.loss.detach(), total, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms.ce, ce, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms.align, align, rtol=1e-5, atol=1e-6)
    if kind == "pooled":
        assert align > 0.1
    for name, gradient in expected.items():
        found = grads[f"student.network.{name}"]
        difference = torch.linalg.norm(found - gradient)
        assert difference <= 1e-4 * torch.linalg.norm(gradient) + 1e-6, name
    assert terms.spans == 7
    assert terms.latents == (7 * small.latents if kind == "pooled" else 0)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 99))
def test_pooling_is_means_of_contiguous_runs(count, size, seed):
    features = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    found = pool_to(features, size)
    assert found.shape == (size, 5)
    torch.testing.assert_close(found, plain_pool(features, size))
    if count == size:
        torch.testing.assert_close(found, features)
    assert pool_to(features.bfloat16(), size).dtype == torch.bfloat16


def test_pause_reads_no_helper_image_and_pooled_does(small, samples):
    batch = small.batch(samples)
    rows = sum(t * h * w for t, h, w in batch.grids[: batch.num_input_images])
    other = torch.cat([batch.pixels[:rows], 255 - batch.pixels[rows:]])
    for kind, differs in (("pause", False), ("pooled", True)):
        first, second = (CONTROLS[kind](small)(b, 0).loss for b in (batch, dataclasses.replace(batch, pixels=other)))
        assert torch.equal(first, second) != differs


def test_pause_trains_the_pad_and_pooled_targets_have_no_gradient(small, samples):
    batch, pad = small.batch(samples), small.vocabulary.latent_pad
    _, grads = run(pause(small), batch)
    assert grads["student.network.model.language_model.embed_tokens.weight"][pad].any()
    _, grads = run(pooled(small), batch)  # every pad is replaced
    assert not grads["student.network.model.language_model.embed_tokens.weight"][pad].any()
    objective, seen = pooled(small, train_vision=True), []

    def keep(module, args, output):
        output.pooler_output.retain_grad()
        seen.append(output.pooler_output)

    objective.student.network.model.visual.register_forward_hook(keep)
    run(objective, batch)
    (feature,) = seen
    inputs = len(batch.image_positions)
    assert feature.grad[:inputs].any(1).all()
    assert not feature.grad[inputs:].any()


def test_noise_of_pooled_follows_the_seed(small, samples):
    objective, batch = pooled(small, noise_std=0.3), small.batch(samples)
    first, same, other = (objective(batch, seed).align for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


# ------------------------------------------------------------------------- ranks never diverge
@pytest.mark.parametrize("train_vision", [False, True])
@pytest.mark.parametrize("kind", CONTROLS)
def test_every_batch_calls_the_same_modules_and_moves_the_same_parameters(small, kind, train_vision):
    objective = CONTROLS[kind](small, train_vision=train_vision)
    calls = []
    for name, module in objective.named_modules():
        if not list(module.children()):
            module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    trainable = {n for n, p in objective.named_parameters() if p.requires_grad}
    batches = {
        "full": small.batch([small.sample(0, images=2, spans=2), small.sample(1, images=1, spans=1)]),
        "no span": small.batch([small.sample(2, spans=0)]),
        "no image at all": small.batch([small.sample(4, images=0, spans=0)]),
        "filler": filler_batch(small.vocabulary, small.latents),
    }
    sequences = {}
    for name, batch in batches.items():
        calls.clear()
        terms, grads = run(objective, batch)
        sequences[name] = list(calls)
        assert grads.keys() == trainable, name
    assert (terms.spans, terms.latents, terms.loss.item()) == (0, 0, 0)  # a filler adds nothing
    assert not any(grad.any() for grad in grads.values())
    for one, two in itertools.pairwise(sequences.values()):
        assert one == two


@pytest.mark.parametrize("kind", CONTROLS)
def test_spans_of_another_size_are_an_error(small, samples, kind):
    with pytest.raises(BatchError, match=r"packed with 4 latents.*latent\.size is 3"):
        CONTROLS[kind](small)(small.batch(samples, latent_size=4), 0)


# ----------------------------------------------------------------------------------------- recipes
def tree(**changes) -> dict:
    base = {
        "name": "t", "run": {"dir": "r"}, "data": {"shards": "s"}, "model": {"path": "m", "dtype": "float32"},
        "latent": {"size": 3, "source": "pooled"}, "teacher": None,
    }  # fmt: skip
    return {**base, **changes}


@pytest.mark.parametrize(
    ("source", "kind"), [("pooled", PooledObjective), ("pause", PauseObjective)], ids=["pooled", "pause"]
)
def test_a_recipe_builds_its_objective(small, samples, tmp_path, source, kind):
    small.network(0).save_pretrained(tmp_path / "m")
    loss = {"sim_weight": 0 if source == "pause" else 1}
    recipe = parse_recipe(
        tree(model={"path": str(tmp_path / "m"), "dtype": "float32"}, latent={"size": 3, "source": source}, loss=loss),
        "test",
    )
    objective = build_objective(recipe, small.vocabulary)
    assert type(objective) is kind
    assert objective.ema_pairs() == []
    assert torch.isfinite(objective(small.batch(samples), 0).loss)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": {}}, r"teacher='a section'.*null, as latent.source='pooled'"),
        ({"teacher": {}, "latent": {"size": 3, "source": "pause"}}, r"null, as latent.source='pause'"),
        ({"latent": {"size": 3, "source": "pause"}}, r"loss.sim_weight=1.0.*0 with latent.source='pause'"),
        ({"latent": {"size": 3, "source": "pause"}, "loss": {"sim_weight": 0, "ce_weight": 0}}, "loss.ce_weight=0"),
        ({"loss": {"sim_weight": 0, "ce_weight": 0}}, "must not both be 0"),
        ({"latent": {"size": 3, "source": "mean"}}, "allowed are 'teacher', 'self', 'pooled', 'pause'"),
    ],
)
def test_impossible_combinations(changes, message):
    with pytest.raises(ConfigError, match=message):
        parse_recipe(tree(**changes), "test")


def test_recipes_of_the_controls_differ_in_what_defines_them_alone(repository):
    folder = repository / "launch" / "recipes" / "controls"
    recipes = {path.stem: recipe_to_dict(load_recipe(path)) for path in sorted(folder.glob("*.yaml"))}
    assert recipes.keys() == {
        "sft", "text", "pause", "mirage", "mirage_stage2", "ilvr_frozen", "ilvr", "ilvr_stage2"
    }  # fmt: skip
    base = recipes["ilvr"]
    assert recipes["mirage_stage2"]["optimizer"] == recipes["ilvr_stage2"]["optimizer"]
    for name, recipe in recipes.items():
        assert recipe["name"] == name
        stage2 = name.endswith("stage2")
        same = {
            "run": {**recipe["run"], "dir": "", "epochs": 5},
            "data": {**recipe["data"], "shards": ""},
            "model": {**recipe["model"], "path": ""},
            "optimizer": {**recipe["optimizer"], **({"lr": base["optimizer"]["lr"]} if stage2 else {})},
            "engine": recipe["engine"],
        }
        assert same == {
            "run": {**base["run"], "dir": ""},
            "data": {**base["data"], "shards": ""},
            "model": {**base["model"], "path": ""},
            "optimizer": base["optimizer"],
            "engine": base["engine"],
        }
        assert recipe["latent"]["size"] == 8
    sources = {name: recipe["latent"]["source"] for name, recipe in recipes.items()}
    assert sources == {
        "sft": "pause", "text": "pause", "pause": "pause", "mirage": "pooled", "mirage_stage2": "self",
        "ilvr_frozen": "teacher", "ilvr": "teacher", "ilvr_stage2": "self",
    }  # fmt: skip
    assert (recipes["mirage"]["loss"]["ce_weight"], recipes["mirage"]["loss"]["sim_weight"]) == (0.1, 1.0)
    assert recipes["mirage"]["latent"]["noise_std"] == 0
    assert {**recipes["ilvr_frozen"]["teacher"], "decay": recipes["ilvr"]["teacher"]["decay"]} == recipes["ilvr"][
        "teacher"
    ]
    assert recipes["ilvr_frozen"]["teacher"]["decay"] == 1
    assert recipes["mirage_stage2"]["optimizer"] == recipes["ilvr_stage2"]["optimizer"]


def test_flops_count_helper_images_where_they_are_encoded(small, samples):
    batch, config = small.batch(samples), small.network(0).config
    reading, not_reading = (FlopsModel(config, False, False, reads).of_batch(batch) for reads in (True, False))
    helpers = FlopsModel(config, False).vision_forward(batch.grids[batch.num_input_images :])
    assert reading.student - not_reading.student == pytest.approx(helpers)
    assert reading.teacher == 0
