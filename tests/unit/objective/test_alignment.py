"""The stage-1 objective: packing changes nothing, nothing leaks, every rank calls the same modules."""

import dataclasses
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ilvr_ds.config import parse_recipe
from ilvr_ds.data.packing import filler_batch
from ilvr_ds.errors import BatchError
from ilvr_ds.objective.alignment import AlignmentObjective


def run(objective, batch, noise_seed=0):
    """Terms and gradients by name."""
    objective.zero_grad()
    terms = objective(batch, noise_seed)
    terms.loss.backward()
    return terms, {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}


def only(batch, row):
    """Weights of all samples but one set to zero."""
    own = (torch.arange(len(batch.sample_ids)) == row).float()
    return dataclasses.replace(
        batch,
        ce_weights=batch.ce_weights * own[batch.sample_of_token[batch.supervised_positions]],
        align_weights=own,
    )


@pytest.fixture(scope="module")
def samples(small):
    return [
        small.sample(0, images=2, spans=2),
        small.sample(1, images=0, spans=0),
        small.sample(2, images=1, spans=1, gap=6),
        small.sample(3, images=0, spans=2),
    ]


# --------------------------------------------------------------------------------------- packing
@pytest.mark.parametrize("noise_std", [0.0, 0.3])
def test_packed_is_the_sum_of_the_samples(small, samples, noise_std):
    objective = small.objective(0, noise_std=noise_std)
    terms, grads = run(objective, small.batch(samples), noise_seed=5)
    alone = [run(objective, small.batch([s]), noise_seed=5) for s in samples]
    for name in ("loss", "ce", "align"):
        torch.testing.assert_close(getattr(terms, name), sum(getattr(t, name) for t, _ in alone), rtol=1e-5, atol=1e-6)
    for name in ("latents", "spans", "coverage_bound"):
        assert getattr(terms, name).item() == sum(getattr(t, name).item() for t, _ in alone)
    torch.testing.assert_close(terms.ce_per_token, torch.cat([t.ce_per_token for t, _ in alone]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        terms.align_per_sample, torch.cat([t.align_per_sample for t, _ in alone]), rtol=1e-4, atol=1e-5
    )
    for name, grad in grads.items():
        torch.testing.assert_close(grad, sum(g[name] for _, g in alone), rtol=1e-3, atol=1e-5)


def test_noise_is_there_and_follows_the_seed(small, samples):
    objective, batch = small.objective(0, noise_std=0.3), small.batch(samples)
    first, same, other = (objective(batch, seed).align for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert not torch.equal(first, small.objective(0)(batch, 1).align)


# --------------------------------------------------------------------------------------- leakage
@pytest.mark.parametrize("row", [0, 2])
def test_neighbours_change_losses_and_gradients_exactly_nothing(small, samples, row):
    """Their text, images, helper images (hence latents) and number of targets."""
    objective, batch = small.objective(0), small.batch(samples)
    start, end = batch.cu_seqlens[row : row + 2].tolist()
    tokens = torch.arange(len(batch.input_ids))
    text = ((tokens < start) | (tokens >= end)) & (batch.input_ids < 49)
    ids = torch.where(text, (batch.input_ids + 13) % 49, batch.input_ids)
    counts = [s.num_input_images for s in samples], [len(s.grids) - s.num_input_images for s in samples]
    owner = [b for kind in counts for b, n in enumerate(kind) for _ in range(n)]
    rows = torch.tensor(owner).repeat_interleave(torch.tensor([h * w for _, h, w in batch.grids]))
    pixels = torch.where((rows != row)[:, None], 255 - batch.pixels, batch.pixels)
    before, grads = run(objective, only(batch, row))
    after, changed_grads = run(objective, only(dataclasses.replace(batch, input_ids=ids, pixels=pixels), row))
    assert torch.equal(before.loss, after.loss)
    assert torch.equal(before.align_per_sample[row], after.align_per_sample[row])
    own = batch.sample_of_token[batch.supervised_positions] == row
    assert torch.equal(before.ce_per_token[own], after.ce_per_token[own])
    assert not torch.equal(before.ce_per_token[~own], after.ce_per_token[~own])  # the change was a change
    assert not torch.equal(before.align_per_sample, after.align_per_sample)
    for name, grad in grads.items():
        assert torch.equal(grad, changed_grads[name]), name


def test_the_loss_of_a_sample_has_no_gradient_in_its_neighbours(small, samples):
    objective, batch = small.objective(0), small.batch(samples)
    inputs = []

    def keep(module, args, kwargs):
        kwargs["inputs_embeds"].retain_grad()
        inputs.append(kwargs["inputs_embeds"])

    objective.student.language_model.register_forward_pre_hook(keep, with_kwargs=True)
    for row in range(len(samples)):
        run(objective, only(batch, row))
        moved = inputs[-1].grad[0].any(1)  # (T,)
        assert moved.any()
        assert (batch.sample_of_token[moved] == row).all()


# ------------------------------------------------------------------------- ranks never diverge
def batches_of_every_kind(small):
    none = torch.zeros(0, dtype=torch.int64)
    full = small.batch([small.sample(0, images=2, spans=2), small.sample(1, images=1, spans=1)])
    return {
        "full": full,
        "no span": small.batch([small.sample(2, spans=0)]),
        "no input image": small.batch([small.sample(3, images=0, spans=1)]),
        "no image at all": small.batch([small.sample(4, images=0, spans=0)]),
        "nothing supervised": dataclasses.replace(
            full, supervised_positions=none, targets=none, ce_weights=torch.zeros(0)
        ),
        "no prompt": dataclasses.replace(full, prompt_positions=none),
        "no local text": dataclasses.replace(full, local_positions=none, local_span=none),
        "filler": filler_batch(small.vocabulary, small.latents),
    }


@pytest.mark.parametrize("train_vision", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_batch_calls_the_same_modules_and_moves_the_same_parameters(small, train_vision, checkpointing):
    objective = small.objective(0, train_vision=train_vision, gradient_checkpointing=checkpointing)
    calls = []
    for name, module in objective.named_modules():
        if not list(module.children()):
            module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    trainable = {n for n, p in objective.named_parameters() if p.requires_grad}
    sequences = {}
    for kind, batch in batches_of_every_kind(small).items():
        calls.clear()
        _, grads = run(objective, batch)
        sequences[kind] = list(calls)
        assert grads.keys() == trainable, kind
        assert all(torch.isfinite(g).all() for g in grads.values()), kind
    for (kind, sequence), (other, expected) in itertools.pairwise(sequences.items()):
        assert sequence == expected, f"{kind} and {other}"
    assert "student.network.lm_head" in sequences["full"]
    assert sum(name == "student.network.model.visual.patch_embed.proj" for name in sequences["full"]) == 1
    assert any("visual" in name for name in trainable) == train_vision


def test_a_filler_adds_exactly_nothing(small):
    terms, grads = run(small.objective(0, noise_std=0.1), filler_batch(small.vocabulary, small.latents))
    assert (terms.spans, terms.latents, terms.coverage_bound) == (0, 0, 0)  # its span is nobody's
    assert terms.loss.item() == 0
    assert not any(grad.any() for grad in grads.values())


# ------------------------------------------------------------------------------------ the whole
def test_loss_is_the_weighted_sum_of_its_terms(small, samples):
    from ilvr_ds.config import LossConfig

    objective, batch = small.objective(0), small.batch(samples)
    objective.loss = LossConfig(ce_weight=0.25, sim_weight=3.0)
    terms = objective(batch, 0)
    torch.testing.assert_close(terms.loss, 0.25 * terms.ce + 3 * terms.align)
    torch.testing.assert_close(terms.ce, (terms.ce_per_token * batch.ce_weights).sum())
    torch.testing.assert_close(terms.align, (terms.align_per_sample * batch.align_weights).sum())
    assert terms.loss.dtype == torch.float32
    for name in ("ce", "align", "ce_per_token", "align_per_sample"):
        assert not getattr(terms, name).requires_grad


def test_checkpointing_changes_no_gradient(small, samples):
    batch = small.batch(samples)
    terms, grads = run(small.objective(0), batch)
    other, other_grads = run(small.objective(0, gradient_checkpointing=True), batch)
    assert torch.equal(terms.loss, other.loss)
    for name, grad in grads.items():
        assert torch.equal(grad, other_grads[name]), name


def test_trained_vision_gets_its_gradient_from_the_inputs_alone(small, samples):
    """Targets and the teacher's inputs are detached: helper images bear no gradient."""
    objective, batch = small.objective(0, train_vision=True), small.batch(samples)
    features = []

    def keep(module, args, output):
        output.pooler_output.retain_grad()
        features.append(output.pooler_output)

    objective.student.network.model.visual.register_forward_hook(keep)
    run(objective, batch)
    (feature,) = features
    inputs = len(batch.image_positions)
    assert feature.grad[:inputs].any(1).all()
    assert not feature.grad[inputs:].any()


def test_vision_runs_once_for_student_and_teacher(small, samples):
    objective, calls = small.objective(0), []
    objective.student.network.model.visual.register_forward_hook(lambda *_: calls.append(1))
    objective(small.batch(samples), 0)
    assert calls == [1]


@pytest.mark.parametrize("tied", [False, True])
def test_ema_pairs_name_every_parameter_of_the_language_model(small, tied):
    objective = small.objective(0, tied=tied)
    parameters = dict(objective.named_parameters())
    pairs = objective.ema_pairs()
    teachers = {n for n in parameters if n.startswith("teacher.")}
    assert {t for t, _ in pairs} == teachers
    assert len(pairs) == len(teachers)
    for teacher, student in pairs:
        assert parameters[teacher].shape == parameters[student].shape
        assert teacher.removeprefix("teacher.") == student.removeprefix("student.network.model.")
        assert parameters[student].requires_grad
    assert not any("visual" in s or "lm_head" in s for _, s in pairs)


def test_spans_of_another_size_are_an_error(small, samples):
    with pytest.raises(BatchError, match=r"s0.*packed with 4 latents.*latent\.size is 3"):
        small.objective(0)(small.batch(samples, latent_size=4), 0)


class Shapes(TorchDispatchMode):
    """Shapes of all floating-point tensors any operation made."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.seen.add(tuple(tensor.shape))
        return out


def test_logits_exist_at_supervised_positions_only_and_no_mask_is_built(small, samples):
    objective, batch = small.objective(0), small.batch(samples)
    tokens, vocabulary = len(batch.input_ids), 64
    with Shapes() as shapes:
        objective(batch, 0).loss.backward()
    logits = {shape for shape in shapes.seen if shape and shape[-1] == vocabulary and tokens in shape}
    assert not logits
    assert (len(batch.targets), vocabulary) in shapes.seen  # the measure sees what is there
    assert not any(shape[-2:] == (tokens, tokens) for shape in shapes.seen if len(shape) > 1)


def test_from_recipe(small, samples, tmp_path):
    small.network(0).save_pretrained(tmp_path / "m")
    recipe = parse_recipe(
        {
            "name": "t",
            "run": {"dir": "r"},
            "data": {"shards": "s"},
            "model": {"path": str(tmp_path / "m"), "dtype": "float32", "gradient_checkpointing": True},
            "latent": {"size": small.latents, "noise_std": 0.0},
            "teacher": {"coverage": 0.7},
        },
        "test",
    )
    objective = AlignmentObjective.from_recipe(recipe, small.vocabulary)
    assert objective.teacher.config.coverage == 0.7
    assert objective.student.language_model.layers[0].gradient_checkpointing
    parameters = dict(objective.named_parameters())
    for teacher, student in objective.ema_pairs():  # the teacher starts as the student
        assert torch.equal(parameters[teacher], parameters[student])
    assert torch.isfinite(objective(small.batch(samples), 0).loss)
