"""What goes where, and where gradients go."""

import torch

from ilvr_ds.model.placement import filled_slots, latent_positions, place_image_features, place_targets


def test_image_features_replace_tokens_and_take_their_gradient():
    embeddings = torch.randn(6, 4, requires_grad=True)
    features = torch.randn(2, 4, requires_grad=True)
    placed = place_image_features(embeddings, torch.tensor([4, 1]), features)
    assert torch.equal(placed[4], features[0])
    assert torch.equal(placed[1], features[1])
    placed.sum().backward()
    assert torch.equal(embeddings.grad[:, 0], torch.tensor([1.0, 0, 1, 1, 0, 1]))
    assert torch.equal(features.grad, torch.ones(2, 4))


def test_no_image_leaves_everything():
    embeddings = torch.randn(3, 4)
    assert torch.equal(
        place_image_features(embeddings, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)), embeddings
    )


def test_targets_fill_the_first_pads_only():
    embeddings = torch.randn(10, 4, requires_grad=True)
    starts, counts = torch.tensor([1, 6]), torch.tensor([2, 3])
    values = torch.randn(2, 3, 4)
    placed = place_targets(embeddings, starts, values, counts)
    assert torch.equal(placed[1:3], values[0, :2])
    assert torch.equal(placed[6:9], values[1])
    kept = [0, 3, 4, 5, 9]  # position 3 is a pad without a target
    assert torch.equal(placed[kept], embeddings[kept])
    placed.sum().backward()
    expected = torch.zeros(10)
    expected[kept] = 1
    assert torch.equal(embeddings.grad[:, 0], expected)


def test_no_span_leaves_everything():
    embeddings = torch.randn(3, 4)
    none = torch.zeros(0, dtype=torch.int64)
    assert torch.equal(place_targets(embeddings, none, torch.zeros(0, 3, 4), none), embeddings)


def test_features_are_cast_to_the_embeddings():
    placed = place_image_features(torch.zeros(2, 4, dtype=torch.bfloat16), torch.tensor([0]), torch.ones(1, 4))
    assert placed.dtype == torch.bfloat16


def test_slots():
    assert latent_positions(torch.tensor([5, 9]), 3).tolist() == [[5, 6, 7], [9, 10, 11]]
    assert filled_slots(torch.tensor([0, 2]), 3).tolist() == [[False] * 3, [True, True, False]]
