"""The stage-2 objective: text loss only, helper images unread, and recipes that ask for it or cannot."""

import dataclasses

import pytest
import torch

from ilvr_ds.config import ConfigError, LatentConfig, LossConfig, dump_recipe, parse_recipe, recipe_to_dict
from ilvr_ds.data.packing import filler_batch
from ilvr_ds.errors import BatchError
from ilvr_ds.model.backbone import Backbone
from ilvr_ds.model.flops import FlopsModel
from ilvr_ds.objective.alignment import AlignmentObjective
from ilvr_ds.objective.build import build_objective
from ilvr_ds.objective.relaxed import RelaxedObjective
from ilvr_ds.train.rundir import check_resumable


def relaxed(small, *, agree=lambda number: number, ce_weight=1.0, **backbone) -> RelaxedObjective:
    student = Backbone(small.network(0), attention="sdpa", **backbone)
    latent = LatentConfig(size=small.latents, source="self")
    return RelaxedObjective(student, latent, LossConfig(ce_weight=ce_weight, sim_weight=0), agree).train()


def run(objective, batch):
    objective.zero_grad()
    terms = objective(batch, 0)
    terms.loss.backward()
    return terms, {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def samples(small):
    return [small.sample(0, images=2, spans=2), small.sample(1, images=0, spans=0), small.sample(2, spans=1)]


def test_packed_is_the_sum_of_the_samples(small, samples):
    objective = relaxed(small)
    terms, grads = run(objective, small.batch(samples))
    alone = [run(objective, small.batch([s])) for s in samples]
    torch.testing.assert_close(terms.loss, sum(t.loss for t, _ in alone), rtol=1e-5, atol=1e-6)
    assert terms.spans.item() == 3
    assert terms.latents.item() == 3 * small.latents
    for name, grad in grads.items():
        difference = torch.linalg.norm(grad - sum(g[name] for _, g in alone))
        assert difference <= 1e-4 * torch.linalg.norm(grad) + 1e-7, name


def test_terms(small, samples):
    batch = small.batch(samples)
    terms = relaxed(small, ce_weight=0.25)(batch, 0)
    torch.testing.assert_close(terms.loss, 0.25 * terms.ce)
    torch.testing.assert_close(terms.ce, (terms.ce_per_token * batch.ce_weights).sum())
    assert terms.align.item() == 0
    assert terms.coverage_bound.item() == 0
    assert terms.align_per_sample.shape == (3,)
    assert terms.loss.dtype == torch.float32


def test_all_trainable_parameters_have_a_gradient_whatever_the_batch(small, samples):
    objective = relaxed(small, agree=lambda number: 4)
    trainable = {n for n, p in objective.named_parameters() if p.requires_grad}
    none = torch.zeros(0, dtype=torch.int64)
    silent = dict(supervised_positions=none, targets=none, ce_weights=torch.zeros(0))
    for batch in (
        small.batch(samples),
        small.batch([samples[1]]),
        small.batch(samples, **silent),
        filler_batch(small.vocabulary, small.latents),
    ):
        _, grads = run(objective, batch)
        assert grads.keys() == trainable


def test_a_filler_adds_exactly_nothing(small):
    terms, grads = run(relaxed(small, agree=lambda number: 3), filler_batch(small.vocabulary, small.latents))
    assert (terms.spans, terms.latents, terms.coverage_bound) == (0, 0, 0)  # its span is nobody's
    assert terms.loss.item() == 0
    assert not any(grad.any() for grad in grads.values())


@pytest.mark.parametrize("rounds", [0, 2])
def test_ranks_agree_once_on_the_largest_number(small, samples, rounds):
    asked = []

    def agree(number):
        asked.append(number)
        return number + rounds

    objective = relaxed(small, agree=agree)
    calls = []
    objective.student.language_model.register_forward_hook(lambda *_: calls.append(1))
    objective(small.batch(samples), 0)
    assert asked == [3]
    assert len(calls) == 3 + rounds + (2 + rounds) * small.latents


def test_helper_images_are_not_encoded(small, samples):
    objective, batch = relaxed(small), small.batch(samples)
    seen = []
    objective.student.network.model.visual.register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[0]))
    terms = objective(batch, 0)
    inputs = sum(h * w for _, h, w in batch.grids[: batch.num_input_images])
    assert seen == [inputs]
    assert inputs < batch.pixels.shape[0]
    changed = batch.pixels.clone()
    changed[inputs:] = 255 - changed[inputs:]
    assert torch.equal(terms.loss, objective(dataclasses.replace(batch, pixels=changed), 0).loss)


def test_checkpointing_changes_nothing(small, samples):
    batch = small.batch(samples)
    terms, grads = run(relaxed(small), batch)
    other, other_grads = run(relaxed(small, gradient_checkpointing=True), batch)
    assert torch.equal(terms.loss, other.loss)
    for name, grad in grads.items():
        assert torch.equal(grad, other_grads[name]), name


@pytest.mark.parametrize("train_vision", [False, True])
def test_vision_is_frozen_or_trained(small, samples, train_vision):
    _, grads = run(relaxed(small, train_vision=train_vision), small.batch(samples))
    assert any("visual" in name for name in grads) == train_vision


def test_a_batch_that_does_not_fit_is_an_error(small, samples):
    batch = small.batch(samples)
    with pytest.raises(BatchError, match=r"s0.*packed with 4 latents.*latent\.size is 3"):
        relaxed(small)(dataclasses.replace(batch, latent_size=4), 0)
    with pytest.raises(BatchError, match=r"s0.*rows of pixels"):
        relaxed(small)(dataclasses.replace(batch, pixels=batch.pixels[:-4]), 0)


# ---------------------------------------------------------------------------------------- recipes
def tree(**changes):
    base = {
        "name": "t",
        "run": {"dir": "r"},
        "data": {"shards": "s"},
        "model": {"path": "m", "dtype": "float32"},
        "latent": {"size": 3, "source": "self"},
        "teacher": None,
        "loss": {"sim_weight": 0},
    }
    return {**base, **changes}


def test_the_recipe_decides(small, samples, tmp_path):
    small.network(0).save_pretrained(tmp_path / "m")
    own = parse_recipe(tree(model={"path": str(tmp_path / "m"), "dtype": "float32"}), "test")
    objective = build_objective(own, small.vocabulary, agree=lambda number: 7)
    assert isinstance(objective, RelaxedObjective)
    assert objective.agree(1) == 7
    assert objective.ema_pairs() == []
    assert objective.student.language_model.layers[0].gradient_checkpointing
    assert torch.isfinite(objective(small.batch(samples), 0).loss)
    taught = tree(model={"path": str(tmp_path / "m"), "dtype": "float32"}, latent={"size": 3}, teacher={}, loss={})
    assert isinstance(build_objective(parse_recipe(taught, "test"), small.vocabulary), AlignmentObjective)


def test_a_model_with_too_few_rows_for_the_latent_tokens_is_refused(small, tmp_path):
    small.network(0, vocab_size=60).save_pretrained(tmp_path / "m")  # latent_end is 58, but 61 ids are needed
    recipe = parse_recipe(tree(model={"path": str(tmp_path / "m"), "dtype": "float32"}), "test")
    with pytest.raises(ConfigError, match=r"60 rows.*needs 61"):
        build_objective(recipe, small.vocabulary)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": {}}, r"teacher='a section'.*null, as latent.source='self'"),
        ({"latent": {"size": 3}}, r"teacher=None.*latent.source='teacher'"),
        ({"loss": {}}, r"loss.sim_weight=1.0.*0 with latent.source='self'"),
        ({"loss": {"sim_weight": 0, "ce_weight": 0}}, "ce_weight"),
        ({"latent": {"source": "pads"}}, "allowed are 'teacher', 'self'"),
    ],
)
def test_impossible_combinations(changes, message):
    with pytest.raises(ConfigError, match=message):
        parse_recipe(tree(**changes), "test")


def test_the_resolved_recipe_keeps_the_missing_teacher():
    import yaml

    recipe = parse_recipe(tree(), "test")
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe)), "dump") == recipe


def test_a_run_is_not_resumed_as_another_stage():
    own = parse_recipe(tree(), "test")
    check_resumable(recipe_to_dict(own), own, "here")
    taught = parse_recipe(tree(latent={"size": 3}, teacher={}, loss={}), "test")
    for saved, now in ((own, taught), (taught, own)):
        with pytest.raises(ConfigError, match=r"latent\.source|teacher="):
            check_resumable(recipe_to_dict(saved), now, "here")


def test_flops_without_a_teacher_leave_helper_images_out(small, samples):
    batch, config = small.batch(samples), small.network(0).config
    with_teacher, without = (FlopsModel(config, False, t, t).of_batch(batch) for t in (True, False))
    assert without.teacher == 0
    model = FlopsModel(config, False)
    helpers = model.vision_forward(batch.grids[batch.num_input_images :])
    assert with_teacher.student - without.student == pytest.approx(helpers)
