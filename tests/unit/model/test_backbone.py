"""The adapter runs stock modules on packed sequences and gives what the stock model gives one by one."""

import pytest
import torch

from ilvr_ds.errors import AttentionError, BatchError, ConfigError
from ilvr_ds.model.backbone import Backbone, check_vocabulary
from ilvr_ds.model.placement import place_image_features
from ilvr_ds.model.vision import patches_of


def hidden_of(backbone, batch):
    features = backbone.encode_images(batch.pixels, batch.grids)[: len(batch.image_positions)]
    embeddings = place_image_features(backbone.embed(batch.input_ids), batch.image_positions, features)
    return backbone.decode(embeddings, batch)


@pytest.fixture(scope="module")
def samples(small):
    return [small.sample(0, images=2, spans=1), small.sample(1, images=0, spans=0), small.sample(2, images=1, spans=2)]


@pytest.fixture(scope="module")
def backbone(small):
    return Backbone(small.network(0), attention="sdpa")


def test_packed_equals_the_stock_model_sample_by_sample(small, samples, backbone):
    batch = small.batch(samples)
    packed = hidden_of(backbone, batch)
    stock = small.network(0)
    stock.set_attn_implementation("eager")
    for sample, (start, end) in zip(samples, batch.cu_seqlens.unfold(0, 2, 1).tolist(), strict=True):
        own = small.batch([sample])
        inputs = sum(t * h * w for t, h, w in sample.grids[: sample.num_input_images])
        images = {}
        if inputs:
            grids = sample.grids[: sample.num_input_images]
            images["pixel_values"] = patches_of(torch.from_numpy(sample.input_pixels), grids)
            images["image_grid_thw"] = torch.tensor(sample.grids[: sample.num_input_images])
        # the tower's placeholder id is the stock config's; ours is given by position
        stock.config.image_token_id = small.vocabulary.image_pad
        with torch.no_grad():
            expected = stock.model(
                input_ids=own.input_ids[None], position_ids=own.position_ids[:, None], use_cache=False, **images
            ).last_hidden_state[0]
        torch.testing.assert_close(packed[start:end], expected, rtol=1e-4, atol=5e-5)


def test_a_neighbour_changes_exactly_nothing(small, samples, backbone):
    first = small.batch(samples)
    own = slice(*first.cu_seqlens[1:3].tolist())
    changed = first.input_ids.clone()
    changed[: own.start] = (changed[: own.start] + 7) % 49
    changed[own.stop :] = 3
    second = small.batch(samples, input_ids=changed, pixels=255 - first.pixels)
    with torch.no_grad():
        before, after = hidden_of(backbone, first), hidden_of(backbone, second)
    assert torch.equal(before[own], after[own])
    assert not torch.equal(before[: own.start], after[: own.start])


def test_gradients_stay_in_the_sample(small, samples, backbone):
    batch = small.batch(samples)
    embeddings = torch.randn(len(batch.input_ids), small.width, requires_grad=True)
    own = slice(*batch.cu_seqlens[1:3].tolist())
    (grad,) = torch.autograd.grad(backbone.decode(embeddings, batch)[own].pow(2).sum(), embeddings)
    assert grad[own].any()
    assert not grad[: own.start].any()
    assert not grad[own.stop :].any()


def test_what_the_language_model_is_called_with(small, samples, backbone):
    """2-D or three-row positions, a cache or a mask make transformers mix packed samples."""
    calls = []
    handle = backbone.language_model.register_forward_pre_hook(lambda m, a, k: calls.append(k), with_kwargs=True)
    batch = small.batch(samples)
    hidden_of(backbone, batch)
    handle.remove()
    (call,) = calls
    assert call["position_ids"].shape == (4, 1, len(batch.input_ids))
    for start, end in batch.cu_seqlens.unfold(0, 2, 1).tolist():
        assert call["position_ids"][0, 0, start:end].tolist() == list(range(end - start))
    assert call["use_cache"] is False
    assert call["attention_mask"] is None
    assert isinstance(call["max_length_q"], int)


def test_one_vision_call_equals_one_call_per_image(small, backbone):
    batch = small.batch([small.sample(3, images=3, spans=2, side=6)])
    together = backbone.encode_images(batch.pixels, batch.grids)
    sizes = [h * w for _, h, w in batch.grids]
    alone = [
        backbone.encode_images(pixels, (grid,))
        for pixels, grid in zip(batch.pixels.split(sizes), batch.grids, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=5e-5)


def test_without_images_the_tower_is_called_all_the_same(small):
    for train in (False, True):
        backbone = Backbone(small.network(0), attention="sdpa", train_vision=train)
        calls = []
        backbone.network.model.visual.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        features = backbone.encode_images(torch.zeros(0, 588, dtype=torch.uint8), ())
        assert calls == [1]
        assert features.shape == (0, small.width)
        assert features.requires_grad == train


def test_frozen_vision_has_no_graph(small):
    batch = small.batch([small.sample(0)])
    frozen = Backbone(small.network(0), attention="sdpa")
    assert not frozen.encode_images(batch.pixels, batch.grids).requires_grad
    assert not any(p.requires_grad for p in frozen.network.model.visual.parameters())
    trained = Backbone(small.network(0), attention="sdpa", train_vision=True)
    trained.encode_images(batch.pixels, batch.grids).sum().backward()
    assert all(p.grad is not None for p in trained.network.model.visual.parameters())


def test_pixels_that_do_not_fit_the_grids(small, backbone):
    batch = small.batch([small.sample(0)])
    with pytest.raises(BatchError, match="grids of the batch need"):
        backbone.encode_images(batch.pixels[:-1], batch.grids)


# -------------------------------------------------------------------------------- checkpointing
def test_checkpointing_is_the_language_models_alone(small):
    backbone = Backbone(small.network(0), attention="sdpa", gradient_checkpointing=True)
    assert all(layer.gradient_checkpointing for layer in backbone.language_model.layers)
    assert not any(block.gradient_checkpointing for block in backbone.network.model.visual.blocks)
    assert not any(layer.gradient_checkpointing for layer in Backbone(small.network(0)).language_model.layers)


def test_checkpointing_recomputes_and_gives_the_same_gradients(small, samples):
    batch = small.batch(samples)
    runs = []
    mlp_calls = []
    for checkpointing in (False, True):
        backbone = Backbone(small.network(0), attention="sdpa", gradient_checkpointing=checkpointing).train()
        mlp_calls.append([])
        for layer in backbone.language_model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_, calls=mlp_calls[-1]: calls.append(1))
        hidden_of(backbone, batch).pow(2).sum().backward()
        runs.append({n: p.grad for n, p in backbone.named_parameters() if p.grad is not None})
    assert len(mlp_calls[0]) == 3
    assert len(mlp_calls[1]) == 6  # otherwise nothing was checkpointed
    assert runs[0].keys() == runs[1].keys()
    for name in runs[0]:
        assert torch.equal(runs[0][name], runs[1][name]), name


# -------------------------------------------------------------------------------------- loading
def test_load_equals_the_saved_network(small, tmp_path, samples):
    network = small.network(4)
    network.save_pretrained(tmp_path / "m")
    loaded = Backbone.load(tmp_path / "m", dtype=torch.float32, attention="auto", vocabulary=small.vocabulary)
    batch = small.batch(samples)
    with torch.no_grad():
        assert torch.equal(hidden_of(loaded, batch), hidden_of(Backbone(network), batch))
    assert loaded.head.weight.shape == (64, small.width)


def test_load_in_bf16(small, tmp_path):
    small.network(4).save_pretrained(tmp_path / "m")
    loaded = Backbone.load(tmp_path / "m", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_load_errors(small, tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        Backbone.load(tmp_path / "none", dtype=torch.float32)
    small.network(0).save_pretrained(tmp_path / "m")
    with pytest.raises(AttentionError, match="CUDA"):
        Backbone.load(tmp_path / "m", dtype=torch.bfloat16, attention="torch_varlen")
    small.network(0, vocab_size=60).save_pretrained(tmp_path / "short")
    with pytest.raises(ConfigError, match=r"has 60 rows.*needs 61 ids"):
        Backbone.load(tmp_path / "short", dtype=torch.float32, vocabulary=small.vocabulary)


def test_vocabulary_that_just_fits(small):
    check_vocabulary(small.network(0, vocab_size=61), small.vocabulary, "model")


def test_tied_embeddings_stay_one_parameter_with_one_gradient(small, samples):
    batch = small.batch(samples)
    tied = Backbone(small.network(0, tied=True), attention="sdpa")
    embedding = tied.language_model.embed_tokens.weight
    assert tied.head.weight is embedding
    loss, _ = tied.head(hidden_of(tied, batch)[batch.supervised_positions], batch.targets, batch.ce_weights)
    loss.backward()
    # an untied model with equal weights: the tied gradient is the sum of its two
    other = small.network(0, tied=False)
    other.load_state_dict({**other.state_dict(), **tied.network.state_dict(), "lm_head.weight": embedding.data.clone()})
    untied = Backbone(other, attention="sdpa")
    loss, _ = untied.head(hidden_of(untied, batch)[batch.supervised_positions], batch.targets, batch.ce_weights)
    loss.backward()
    both = untied.language_model.embed_tokens.weight.grad + untied.head.weight.grad
    torch.testing.assert_close(embedding.grad, both)
