"""The teacher's targets equal a slow computation with the stock model, one sample and one span at a time."""

import pytest
import torch
import torch.nn.functional as F

from ilvr_ds.model.host_plan import host_plan, to_device
from ilvr_ds.model.selection import pool_candidates


def targets_of(objective, batch):
    with torch.no_grad():
        features = objective.student.encode_images(batch.pixels, batch.grids)
    inputs = len(batch.image_positions)
    return objective.teacher.targets(batch, host_plan(batch), features[:inputs], features[inputs:])


def reference(objective, small, sample):
    """Global query and list of targets of one sample: steps 1 to 5 of the method, in Python loops.

    Stock language model in eager attention, no packing, no batching, its own search for positions.
    """
    v, config = small.vocabulary, objective.teacher.config
    stock = small.network(0)
    stock.set_attn_implementation("eager")
    language_model = stock.model.language_model
    language_model.load_state_dict(objective.teacher.language_model.state_dict())
    own = small.batch([sample])
    ids = sample.input_ids.tolist()
    with torch.no_grad():
        features = objective.student.encode_images(own.pixels, own.grids)
        parts = list(features.split([h * w // 4 for _, h, w in own.grids])) if own.grids else []
        inputs, helpers = parts[: sample.num_input_images], parts[sample.num_input_images :]
        embeddings = language_model.embed_tokens(own.input_ids)
        image = [t for t, i in enumerate(ids) if i == v.image_pad]
        fed = embeddings.clone()
        if image:
            fed[image] = torch.cat(inputs)
        hidden = language_model(
            inputs_embeds=fed[None], position_ids=own.position_ids[:, None], use_cache=False
        ).last_hidden_state[0]
        turn = next(t for t in range(len(ids)) if ids[t : t + 2] == [v.im_start, v.assistant])
        markers = {v.image_pad, v.vision_start, v.vision_end, v.latent_pad, v.latent_start, v.latent_end}
        prompt = [t for t in range(turn) if ids[t] not in markers]
        if image:
            attention = language_model.layers[-1].self_attn
            weights = torch.zeros(len(image))
            for t in prompt:
                q = attention.q_proj(hidden[t]).view(4, 8)
                for head in range(4):
                    k = attention.k_proj(hidden[image]).view(-1, 2, 8)[:, head // 2]
                    weights += (k @ q[head] / 8**0.5).softmax(0)
            u = (weights / weights.sum() @ hidden[image] + hidden[prompt].mean(0)) / 2
        else:
            u = embeddings[prompt].mean(0)
        targets, begin, history = [], turn, None
        for helper, (_, h, w) in zip(helpers, own.grids[sample.num_input_images :], strict=True):
            start = ids.index(v.latent_start, begin)
            local = [t for t in range(begin, start) if ids[t] not in markers]
            query = [u] + ([hidden[local].mean(0)] if local else []) + ([history] if history is not None else [])
            query = torch.stack(query).mean(0)
            candidates = pool_candidates(helper, h // 2, w // 2, config.max_candidates)
            mass = (F.cosine_similarity(candidates, query[None]) / config.temperature).softmax(0)
            order = mass.argsort(descending=True).tolist()
            kept, covered = [], 0.0
            while len(kept) < min(small.latents, len(order)) and covered < config.coverage:
                covered += mass[order[len(kept)]].item()
                kept.append(order[len(kept)])
            targets.append(candidates[kept])
            history = candidates[kept].mean(0)
            begin = ids.index(v.latent_end, start) + 1
    return u, targets


@pytest.mark.parametrize(
    ("seed", "options"),
    [
        (0, {}),
        (10, {"temperature": 0.05}),  # coverage ends the selection
        (20, {"max_candidates": 4}),  # helper images are pooled
        (30, {"coverage": 0.5, "temperature": 0.3}),
    ],
)
def test_a_pack_gets_the_targets_of_each_sample(small, seed, options):
    objective = small.objective(seed, **options)
    samples = [
        small.sample(seed, images=1, spans=3, side=7),
        small.sample(seed + 1, images=0, spans=2),  # no input image
        small.sample(seed + 2, images=2, spans=0),  # no span
        small.sample(seed + 3, images=2, spans=2, gap=0),  # spans without text between them
        small.sample(seed + 4, images=1, spans=1, text=0),
    ]
    packed = targets_of(objective, small.batch(samples))
    spans = iter(range(len(packed.counts)))
    for row, sample in enumerate(samples):
        u, targets = reference(objective, small, sample)
        torch.testing.assert_close(packed.global_query[row], u, rtol=1e-4, atol=5e-5)
        for wanted in targets:
            span = next(spans)
            assert packed.counts[span].item() == len(wanted)
            torch.testing.assert_close(packed.values[span, : len(wanted)], wanted, rtol=1e-4, atol=5e-5)
            assert not packed.values[span, len(wanted) :].any()
    assert next(spans, None) is None
    if options.get("temperature") == 0.05:
        assert packed.coverage_bound.any()


def test_local_text_and_history_matter(small):
    """Or else the test above could not see them missing: other text or another first helper changes later targets."""
    objective = small.objective(1, temperature=0.2)
    sample = small.sample(4, spans=2, side=8)
    batch = small.batch([sample])
    before = targets_of(objective, batch)
    second = batch.local_positions[batch.local_span == 1]
    ids = batch.input_ids.clone()
    ids[second] = (ids[second] + 11) % 49
    after = targets_of(objective, small.batch([sample], input_ids=ids))
    assert torch.equal(before.values[0], after.values[0])
    assert not torch.equal(before.values[1], after.values[1])
    pixels = batch.pixels.clone()
    first_helper = slice(*[sum(h * w for _, h, w in batch.grids[:n]) for n in (1, 2)])
    pixels[first_helper] = 255 - pixels[first_helper]
    after = targets_of(objective, small.batch([sample], pixels=pixels))
    assert not torch.equal(before.values[1], after.values[1])


def test_a_neighbour_changes_targets_exactly_nothing(small):
    objective = small.objective(2)
    samples = [small.sample(n, spans=2) for n in range(3)]
    batch = small.batch(samples)
    ids, start, end = batch.input_ids.clone(), *batch.cu_seqlens[1:3].tolist()
    other = torch.cat([torch.arange(start), torch.arange(end, len(ids))])
    text = other[ids[other] < 49]
    ids[text] = (ids[text] + 13) % 49
    pixels = batch.pixels.clone()
    owner = torch.tensor([0, 1, 2, 0, 0, 1, 1, 2, 2])  # sample of each grid: inputs, then helpers
    rows = owner.repeat_interleave(torch.tensor([h * w for _, h, w in batch.grids]))
    pixels[rows != 1] = 255 - pixels[rows != 1]
    before, after = (
        targets_of(objective, small.batch(samples, **c)) for c in ({}, {"input_ids": ids, "pixels": pixels})
    )
    assert torch.equal(before.global_query[1], after.global_query[1])
    assert torch.equal(before.values[2:4], after.values[2:4])
    assert torch.equal(before.counts[2:4], after.counts[2:4])
    assert not torch.equal(before.global_query[0], after.global_query[0])
    assert not torch.equal(before.values[:2], after.values[:2])


def test_frozen_and_never_training(small):
    objective = small.objective(0, gradient_checkpointing=True).train()
    assert objective.student.training
    assert not any(module.training for module in objective.teacher.modules())
    assert not any(p.requires_grad for p in objective.teacher.parameters())
    targets = targets_of(objective, small.batch([small.sample(0)]))
    assert not targets.values.requires_grad
    assert not targets.global_query.requires_grad


def test_starts_as_a_copy_that_shares_nothing(small):
    from ilvr_ds.config import TeacherConfig
    from ilvr_ds.model.backbone import Backbone
    from ilvr_ds.model.teacher import Teacher

    student = Backbone(small.network(0), attention="sdpa", gradient_checkpointing=True)
    teacher = Teacher.of(student, TeacherConfig())
    own = dict(student.language_model.named_parameters())
    for name, parameter in teacher.language_model.named_parameters():
        assert torch.equal(parameter, own[name])
        assert parameter.data_ptr() != own[name].data_ptr()
        assert own[name].requires_grad
    assert len(dict(teacher.named_parameters())) == len(own)


def test_one_forward_per_batch(small):
    objective = small.objective(0)
    calls = []
    objective.teacher.language_model.register_forward_hook(lambda *_: calls.append(1))
    targets_of(objective, small.batch([small.sample(n, spans=3) for n in range(3)]))
    assert calls == [1]


def test_host_plan_counts(small):
    batch = small.batch([small.sample(0, images=2, spans=2), small.sample(1, images=0, spans=0), small.sample(2)])
    plan = host_plan(batch)
    assert plan.span_sample == (0, 0, 2)
    assert plan.image_counts[1] == 0
    assert sum(plan.image_counts) == len(batch.image_positions)
    for sample, count in enumerate(plan.prompt_counts):
        assert count == int((batch.sample_of_token[batch.prompt_positions] == sample).sum())


def test_to_device_moves_tensors_only(small):
    batch = small.batch([small.sample(0)])
    moved = to_device(batch, torch.device("meta"))
    assert moved.input_ids.device.type == "meta"
    assert moved.align_weights.device.type == "meta"
    assert moved.grids == batch.grids
