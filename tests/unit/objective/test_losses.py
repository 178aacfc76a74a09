"""Alignment loss and its noise."""

import pytest
import torch
import torch.nn.functional as F

from ilvr_ds.objective.losses import alignment_loss, target_noise

STARTS, SPAN_SAMPLE, COUNTS = torch.tensor([2, 8, 14]), torch.tensor([0, 0, 2]), torch.tensor([2, 3, 1])
WEIGHTS = torch.tensor([0.5, 7.0, 2.0])


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(20, 4, generator=generator).requires_grad_()
    values = torch.randn(3, 3, 4, generator=generator)
    values[torch.arange(3) >= COUNTS[:, None]] = 0
    return hidden, values


def loss_of(hidden, values, noise=None, weights=WEIGHTS):
    return alignment_loss(
        hidden,
        span_starts=STARTS,
        span_sample=SPAN_SAMPLE,
        values=values,
        counts=COUNTS,
        noise=noise,
        align_weights=weights,
    )


def test_is_the_mean_over_filled_latents_of_each_sample():
    hidden, values = inputs()
    noise = torch.randn(3, 3, 4) * 0.1
    total, per_sample = loss_of(hidden, values, noise)
    z = values + noise
    cosine = lambda t, s, k: F.cosine_similarity(hidden[t], z[s, k], dim=0)  # noqa: E731
    first = torch.stack([cosine(1, 0, 0), cosine(2, 0, 1), cosine(7, 1, 0), cosine(8, 1, 1), cosine(9, 1, 2)])
    expected = torch.stack([1 - first.mean(), torch.tensor(0.0), 1 - cosine(13, 2, 0)])
    torch.testing.assert_close(per_sample, expected)
    torch.testing.assert_close(total, 0.5 * expected[0] + 2 * expected[2])


def test_only_the_states_before_filled_latents_get_a_gradient():
    hidden, values = inputs()
    loss_of(hidden, values)[0].backward()
    assert hidden.grad.any(1).nonzero()[:, 0].tolist() == [1, 2, 7, 8, 9, 13]


def test_a_weight_of_zero_is_a_gradient_of_exactly_zero():
    hidden, values = inputs()
    loss_of(hidden, values, weights=torch.tensor([0.0, 0.0, 1.0]))[0].backward()
    assert hidden.grad.any(1).nonzero()[:, 0].tolist() == [13]


def test_no_span():
    hidden = torch.randn(5, 4, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    total, per_sample = alignment_loss(
        hidden, span_starts=none, span_sample=none, values=torch.zeros(0, 3, 4), counts=none, noise=None,
        align_weights=torch.ones(2),
    )  # fmt: skip
    assert total.item() == 0
    assert per_sample.tolist() == [0, 0]
    total.backward()
    assert not hidden.grad.any()


def test_cosines_are_in_fp32():
    hidden, values = inputs()
    total, _ = loss_of(hidden.bfloat16(), values.bfloat16())
    assert total.dtype == torch.float32
    expected, _ = loss_of(hidden.bfloat16().float(), values.bfloat16().float())
    torch.testing.assert_close(total, expected)


# ------------------------------------------------------------------------------------------ noise
def test_noise_does_not_depend_on_the_pack():
    together = target_noise([4, 9, 7], [0, 0, 1, 2], 3, 5, 0.01, seed=1)
    alone = [target_noise([n], [0] * spans, 3, 5, 0.01, seed=1) for n, spans in ((4, 2), (9, 1), (7, 1))]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together[2:], target_noise([9, 3, 7], [0, 2], 3, 5, 0.01, seed=1))


def test_noise_differs_between_samples_and_seeds():
    first = target_noise([4], [0], 3, 5, 0.01, seed=1)
    assert not torch.equal(first, target_noise([5], [0], 3, 5, 0.01, seed=1))
    assert not torch.equal(first, target_noise([4], [0], 3, 5, 0.01, seed=2))
    # neighbours are unrelated: (seed 1, sample 2) is not (seed 2, sample 1)
    assert not torch.equal(target_noise([2], [0], 3, 5, 1.0, seed=1), target_noise([1], [0], 3, 5, 1.0, seed=2))


def test_noise_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    target_noise([4], [0], 3, 5, 0.01, seed=1)
    assert torch.equal(state, torch.get_rng_state())


def test_noise_has_its_standard_deviation():
    noise = target_noise([4], [0] * 50, 8, 64, 0.01, seed=1)
    assert noise.std().item() == pytest.approx(0.01, rel=0.02)
    assert abs(noise.mean().item()) < 1e-4


def test_no_noise_and_no_span():
    assert target_noise([4], [0], 3, 5, 0.0, seed=1) is None
    assert target_noise([4], [], 3, 5, 0.01, seed=1).shape == (0, 3, 5)
