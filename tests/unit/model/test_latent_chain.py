"""The chain of latents: equal to running every prefix again, without running a token twice."""

import dataclasses
import importlib.util
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ilvr_ds.data.packing import filler_batch
from ilvr_ds.model.backbone import Backbone
from ilvr_ds.model.latent_chain import KeyValues, forward_with_chain, plan_chain, rounds_needed


@pytest.fixture(scope="module")
def oracle(repository):
    """`forward_recomputing`: the published way."""
    spec = importlib.util.spec_from_file_location("oracle", repository / "benchmarks" / "recomputed_prefix.py")
    module = sys.modules["oracle"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.forward_recomputing


@pytest.fixture(scope="module")
def samples(small):
    return [
        small.sample(0, images=2, spans=2),
        small.sample(1, images=0, spans=0),
        small.sample(2, images=1, spans=1, gap=6),
        small.sample(3, images=0, spans=3, gap=0),  # spans end to end
    ]


def student_of(small, checkpointing=False):
    return Backbone(small.network(0), attention="sdpa", gradient_checkpointing=checkpointing).train()


def run(student, batch, forward, weight_seed=1):
    """Hidden states and gradients of a random function of them."""
    student.zero_grad()
    features = student.encode_images(batch.pixels, batch.grids)[: len(batch.image_positions)]
    hidden = forward(student, batch, features).hidden
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(weight_seed))
    (hidden * weights).sum().backward()
    return hidden.detach(), {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}


def chained(rounds=0):
    def forward(student, batch, features):
        return forward_with_chain(student, batch, features, plan_chain(batch, rounds or rounds_needed(batch)))

    return forward


def assert_same(first, second, tolerance):
    torch.testing.assert_close(first[0], second[0], rtol=tolerance, atol=tolerance)
    assert first[1].keys() == second[1].keys()
    for name, grad in first[1].items():
        assert torch.linalg.norm(grad - second[1][name]) <= tolerance * torch.linalg.norm(grad) + 1e-9, name


# -------------------------------------------------------------------------------------- the oracle
def test_equals_running_every_prefix_again(small, samples, oracle):
    student, batch = student_of(small).double(), small.batch(samples)
    assert_same(run(student, batch, oracle), run(student, batch, chained()), 1e-6)  # norms are float32


def test_packed_equals_alone(small, samples):
    student = student_of(small).double()
    batch = small.batch(samples)
    hidden, _ = run(student, batch, chained())
    for sample, (start, end) in zip(samples, pairwise(batch.cu_seqlens.tolist()), strict=True):
        alone, _ = run(student, small.batch([sample]), chained())
        torch.testing.assert_close(hidden[start:end], alone, rtol=1e-10, atol=1e-10)


def test_latents_are_the_students_own_states(small, samples):
    """Not the pad's embedding: what the published code silently falls back to under checkpointing."""
    for checkpointing in (False, True):
        student, batch = student_of(small, checkpointing), small.batch(samples)
        before = run(student, batch, chained())[0]
        with torch.no_grad():
            student.language_model.embed_tokens.weight[small.vocabulary.latent_pad] += 1
        assert torch.equal(before, run(student, batch, chained())[0])
        pads_embedded = student.decode(student.embed(batch.input_ids), batch)
        pads = batch.input_ids == small.vocabulary.latent_pad
        assert not torch.allclose(before[pads], pads_embedded[pads], atol=1e-2)


def test_the_gradient_goes_through_the_whole_chain(small):
    """From the last text token to the prompt through the latents' inputs: cutting the chain changes it."""
    student, batch = student_of(small), small.batch([small.sample(0, spans=2)])
    _, whole = run(student, batch, chained())
    student_detached = student_of(small)
    final_norm = student_detached.language_model.norm
    final_norm.register_forward_hook(lambda m, a, out: out.detach() if out.shape[1] == 1 else out)
    _, cut = run(student_detached, batch, chained())
    name = "network.model.language_model.layers.0.mlp.down_proj.weight"
    assert torch.linalg.norm(whole[name] - cut[name]) > 0.05 * torch.linalg.norm(whole[name])


# ------------------------------------------------------------------------------------- the work
def test_no_token_is_run_twice_and_latents_run_side_by_side(small, samples):
    student, batch = student_of(small), small.batch(samples)
    sizes = []
    student.language_model.register_forward_pre_hook(
        lambda m, a, kwargs: sizes.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    run(student, batch, chained())
    assert sum(sizes) == len(batch.input_ids)
    assert len(sizes) == 4 + 3 * small.latents
    assert sizes[1 : 1 + small.latents] == [3] * small.latents  # three samples have a first span


# ------------------------------------------------------------------------------------ checkpointing
def test_checkpointing_changes_nothing(small, samples):
    batch = small.batch(samples)
    plain = run(student_of(small), batch, chained())
    student = student_of(small, checkpointing=True)
    calls = []
    student.language_model.layers[1].self_attn.k_proj.register_forward_hook(lambda *_: calls.append(1))
    checkpointed = run(student, batch, chained())
    assert len(calls) == 2 * (4 + 3 * small.latents)  # every call was run again in backward
    assert torch.equal(plain[0], checkpointed[0])
    for name, grad in plain[1].items():
        assert torch.equal(grad, checkpointed[1][name]), name


def test_keys_are_left_once():
    """A layer that runs again in backward sees the same keys and leaves nothing."""
    new = torch.randn(2, 1, 4)
    cache = KeyValues([((torch.zeros(3, 1, 4),), (torch.zeros(3, 1, 4),))], torch.tensor([0, 3, 4]), keep_all=True)
    seen = cache.extend(0, new, new)
    assert torch.equal(cache.take()[0][0], seen[0])
    assert torch.equal(cache.extend(0, new, new)[0], seen[0])
    assert cache._left is None


# ------------------------------------------------------------------------------------- more rounds
@pytest.mark.parametrize("checkpointing", [False, True])
def test_rounds_of_other_ranks_change_nothing(small, samples, checkpointing):
    student, batch = student_of(small, checkpointing), small.batch(samples[:3])
    assert rounds_needed(batch) == 3
    plain, longer = run(student, batch, chained()), run(student, batch, chained(5))
    assert torch.equal(plain[0], longer[0])
    for name, grad in plain[1].items():
        assert torch.equal(grad, longer[1][name]), name


def test_every_batch_calls_the_same_modules_in_forward_and_in_backward(small, samples):
    """For one number of rounds: what keeps the collectives of partitioned ranks matched."""
    student = student_of(small)
    calls = []

    def watch(name):
        def hook(module, arguments, output):
            output = output[0] if isinstance(output, tuple) else output
            calls.append(name)
            if isinstance(output, torch.Tensor):
                output.register_hook(lambda grad: calls.append(f"backward {name}"))

        return hook

    for name, module in student.language_model.named_modules():
        if not list(module.children()) and list(module.parameters()):
            module.register_forward_hook(watch(name))
    sequences = {}
    for kind, batch in {
        "full": small.batch(samples),
        "no span": small.batch([samples[1]]),
        "one span": small.batch([samples[2], samples[1]]),
        "filler": filler_batch(small.vocabulary, small.latents),
    }.items():
        calls.clear()
        _, grads = run(student, batch, chained(4))
        assert all(torch.isfinite(grad).all() for grad in grads.values())
        sequences[kind] = (list(calls), sorted(grads))
    for kind, sequence in sequences.items():
        assert sequence == sequences["full"], kind
    layers = len(student.language_model.layers)
    expected = (4 + 3 * small.latents) * layers
    assert sequences["no span"][0].count("backward layers.0.self_attn.k_proj") == expected // layers


def test_too_few_rounds_are_an_error(small, samples):
    with pytest.raises(ValueError, match="2 rounds, the batch needs 4"):
        plan_chain(small.batch(samples), 2)


# --------------------------------------------------------------------------------------- leakage
def test_neighbours_change_exactly_nothing(small, samples):
    student, batch = student_of(small), small.batch(samples)
    start, end = batch.cu_seqlens[:2].tolist()
    tokens = torch.arange(len(batch.input_ids))
    text = ((tokens < start) | (tokens >= end)) & (batch.input_ids < 49)
    changed = dataclasses.replace(batch, input_ids=torch.where(text, (batch.input_ids + 13) % 49, batch.input_ids))
    before, after = run(student, batch, chained())[0], run(student, changed, chained())[0]
    assert torch.equal(before[start:end], after[start:end])
    assert not torch.allclose(before[end:], after[end:], atol=1e-2)


# ------------------------------------------------------------------------------------------ plan
@settings(deadline=None, max_examples=40)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=5),
    extra=st.integers(0, 2),
)
def test_every_query_sees_its_own_past_and_nothing_else(small, shapes, extra):
    """The plan replayed on token numbers in place of keys."""
    batch = small.batch([small.sample(i, images=0, spans=s, gap=g) for i, (s, g) in enumerate(shapes)])
    plan = plan_chain(batch, rounds_needed(batch) + extra)
    starts = batch.cu_seqlens.tolist()
    kept = torch.zeros(0, dtype=torch.int64)
    done = []
    for r in plan.rounds:
        for place, call in enumerate((r.text, *r.latents)):
            if call.size == 0:
                continue
            done.append(call.tokens)
            seen = torch.cat([kept, call.tokens])
            seen = seen if call.rows is None else seen[call.rows]
            for (q0, q1), (k0, k1) in zip(
                pairwise(call.bounds.q.tolist()), pairwise(call.bounds.k.tolist()), strict=True
            ):
                queries, keys = call.tokens[q0:q1], seen[k0:k1]
                start = starts[int(batch.sample_of_token[queries[0]])]
                assert keys.tolist() == list(range(start, int(queries[-1]) + 1))
                assert keys[len(keys) - len(queries) :].tolist() == queries.tolist()
            assert call.bounds.max_q == int(call.bounds.q.diff().max())
            assert call.bounds.max_k == int(call.bounds.k.diff().max())
            if place == 0:
                kept = seen[: r.kept_keys]
                assert (batch.input_ids[call.tokens[r.last_text]] == small.vocabulary.latent_start).all()
                assert call.tokens[r.last_text].tolist() == [
                    int(t) - 1 for t in (*r.latents, call)[0].tokens[: len(r.last_text)]
                ]
            else:
                kept = torch.cat([kept, call.tokens])
    done = torch.cat(done)
    assert sorted(done.tolist()) == list(range(len(batch.input_ids)))
    assert torch.equal(done[plan.order], torch.arange(len(done)))
