"""Selection: every equation against a direct computation, and the traps of pooling and history."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ilvr_ds.model import selection
from ilvr_ds.model.selection import (
    global_queries,
    image_weights,
    pad_candidates,
    pool_candidates,
    pooled_grid,
    segment_mean,
    select,
    select_spans,
    spans_by_ordinal,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------ queries
def test_segment_mean():
    values = random(5, 3)
    mean, present = segment_mean(values, torch.tensor([0, 0, 2, 2, 2]), 4)
    torch.testing.assert_close(mean[0], values[:2].mean(0))
    torch.testing.assert_close(mean[2], values[2:].mean(0))
    assert present.tolist() == [True, False, True, False]
    assert not mean[[1, 3]].any()


def test_segment_mean_of_nothing():
    mean, present = segment_mean(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 0)
    assert mean.shape == (0, 3)
    assert present.shape == (0,)


@settings(deadline=None, max_examples=25)
@given(
    prompts=st.integers(1, 7),
    images=st.integers(1, 7),
    heads=st.sampled_from([(4, 2), (2, 2), (6, 2)]),
    chunk=st.integers(1, 200),
)
def test_image_weights_written_out(prompts, images, heads, chunk):
    q, k = random(prompts, heads[0], 4, seed=1) * 2, random(images, heads[1], 4, seed=2)
    expected = torch.zeros(images)
    for i in range(prompts):
        for a in range(heads[0]):
            scores = torch.stack([q[i, a] @ k[j, a // (heads[0] // heads[1])] for j in range(images)])
            expected += (scores / math.sqrt(4)).softmax(0) / (prompts * heads[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "SCORE_ELEMENTS", chunk)
        weights = image_weights(q, k)
    torch.testing.assert_close(weights, expected / expected.sum())
    assert weights.sum().item() == pytest.approx(1, abs=1e-6)


def test_global_query_of_samples_with_and_without_image_and_prompt():
    hidden, queries, keys = random(10, 4), random(4, 2, 2, seed=1), random(4, 1, 2, seed=2)
    embeddings, features = random(4, 4, seed=3), random(4, 4, seed=4)
    prompt_positions, image_positions = torch.tensor([0, 1, 4, 5]), torch.tensor([2, 3, 6, 7])
    u, defined = global_queries(
        hidden=hidden, queries=queries, keys=keys, prompt_positions=prompt_positions,
        image_positions=image_positions, prompt_embeddings=embeddings, image_features=features,
        prompt_counts=[2, 2, 0, 0], image_counts=[2, 0, 2, 0],
    )  # fmt: skip
    weights = image_weights(queries[:2], keys[:2])
    torch.testing.assert_close(u[0], (weights @ hidden[[2, 3]] + hidden[[0, 1]].mean(0)) / 2)
    torch.testing.assert_close(u[1], embeddings[2:].mean(0))  # no image: prompt embeddings alone
    torch.testing.assert_close(u[2], features[2:].mean(0))  # no prompt: image features alone
    assert defined.tolist() == [True, True, True, False]


# ------------------------------------------------------------------------------------------ pooling
@settings(deadline=None, max_examples=100)
@given(height=st.integers(1, 60), width=st.integers(1, 60), limit=st.sampled_from([3, 16, 256]))
def test_pooled_grid_fits_and_is_as_large_as_can_be(height, width, limit):
    h, w = pooled_grid(height, width, limit)
    assert 1 <= h <= height
    assert 1 <= w <= width
    assert h * w <= limit
    if height * width <= limit:
        assert (h, w) == (height, width)
    else:
        assert h * w == max(a * min(width, limit // a) for a in range(1, min(height, limit) + 1))


@pytest.mark.parametrize(
    ("grid", "expected"), [((32, 16), (32, 8)), ((16, 16), (16, 16)), ((36, 36), (16, 16)), ((64, 16), (32, 8))]
)
def test_pooled_grid_keeps_the_aspect(grid, expected):
    assert pooled_grid(*grid, 256) == expected


def test_512_features_become_means_of_row_major_pairs():
    features = random(512, 8)
    torch.testing.assert_close(pool_candidates(features, 32, 16, 256), features.view(256, 2, 8).mean(1))


def test_256_features_are_untouched():
    features = random(256, 8)
    assert pool_candidates(features, 32, 8, 256) is features


@settings(deadline=None, max_examples=25)
@given(height=st.integers(1, 40), width=st.integers(1, 40), limit=st.sampled_from([5, 64, 256]))
def test_pooling_loses_no_feature(height, width, limit):
    """Every feature moves some candidate, the last ones too, and a constant stays the constant."""
    features = torch.ones(height * width, 1, requires_grad=True)
    pooled = pool_candidates(features, height, width, limit)
    assert pooled.shape[0] <= limit
    torch.testing.assert_close(pooled, torch.ones_like(pooled))
    assert (torch.autograd.grad(pooled.sum(), features)[0] > 0).all()


# ---------------------------------------------------------------------------------------- selecting
def kept_of(candidates, query, coverage, temperature, size):
    """The equation, one span at a time with Python lists."""
    scores = [F.cosine_similarity(c, query, dim=0).item() / temperature for c in candidates]
    total = sum(math.exp(s) for s in scores)
    order = sorted(range(len(scores)), key=lambda j: -scores[j])
    kept, mass = [], 0.0
    for j in order:
        kept.append(j)
        mass += math.exp(scores[j]) / total
        if mass >= coverage:
            return kept[:size], len(kept) <= size
    return kept[:size], len(kept) <= size


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    coverage=st.sampled_from([0.3, 0.9, 0.99]),
    temperature=st.sampled_from([0.05, 0.3, 1.0]),
    size=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_select_is_the_equation(sizes, coverage, temperature, size, seed):
    spans = [random(n, 5, seed=seed + i) for i, n in enumerate(sizes)]
    queries = random(len(spans), 5, seed=seed + 50)
    padded, is_candidate = pad_candidates(spans, like=spans[0])
    values, counts, bound = select(
        padded, is_candidate, queries, coverage=coverage, temperature=temperature, latent_size=size
    )
    for row, span in enumerate(spans):
        kept, fits = kept_of(span, queries[row], coverage, temperature, size)
        assert counts[row].item() == len(kept)
        assert bound[row].item() == fits
        assert torch.equal(values[row, : len(kept)], span[kept])
        assert not values[row, len(kept) :].any()


def test_top_p_ends_the_selection_at_low_temperature():
    candidates = torch.eye(6)[None]
    values, counts, bound = select(
        candidates, torch.ones(1, 6, dtype=torch.bool), candidates[:, 2], coverage=0.9, temperature=0.01, latent_size=4
    )
    assert counts.tolist() == [1]
    assert bound.tolist() == [True]
    assert torch.equal(values[0, 0], candidates[0, 2])


def test_fewer_candidates_than_latents():
    candidates, query = random(1, 2, 4), random(1, 4)
    _, counts, bound = select(
        candidates, torch.ones(1, 2, dtype=torch.bool), query, coverage=1.0, temperature=1.0, latent_size=8
    )
    assert counts.tolist() == [2]
    assert bound.tolist() == [True]


def test_equal_scores_keep_the_images_order():
    candidates = torch.ones(1, 6, 3) * 2.0 ** torch.arange(6)[None, :, None]  # the same direction, exactly
    values, _, _ = select(
        candidates, torch.ones(1, 6, dtype=torch.bool), torch.ones(1, 3), coverage=0.9, temperature=1.0, latent_size=3
    )
    assert values[0, :, 0].tolist() == [1, 2, 4]


def test_ordinals():
    assert spans_by_ordinal([0, 0, 0, 2, 2, 5]) == [[0, 3, 5], [1, 4], [2]]
    assert spans_by_ordinal([]) == []


@settings(deadline=None, max_examples=40)
@given(
    per_sample=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    temperature=st.sampled_from([0.1, 1.0]),
)
def test_spans_of_a_pack_are_the_spans_of_each_sample(per_sample, seed, temperature):
    """Against a loop over samples and spans with q = mean of the parts present."""
    size, width = 3, 5
    span_sample = [b for b, n in enumerate(per_sample) for _ in range(n)]
    total = len(span_sample)
    spans = [random(2 + (seed + i) % 5, width, seed=seed + i) for i in range(total)]
    u, local = random(len(per_sample), width, seed=seed + 70), random(total, width, seed=seed + 80)
    u_defined = random(len(per_sample), seed=seed) > -1
    local_defined = random(total, seed=seed + 1) > 0
    padded, is_candidate = pad_candidates(spans, like=u)
    values, counts, bound = select_spans(
        candidates=padded, is_candidate=is_candidate, global_query=u, global_defined=u_defined, local_query=local,
        local_defined=local_defined, span_sample=span_sample, coverage=0.8, temperature=temperature, latent_size=size,
    )  # fmt: skip
    assert values.shape == (total, size, width)
    history = None
    for row, sample in enumerate(span_sample):
        parts = ([u[sample]] if u_defined[sample] else []) + ([local[row]] if local_defined[row] else [])
        if row and span_sample[row - 1] == sample:
            parts.append(history)
        query = torch.stack(parts).mean(0) if parts else torch.zeros(width)
        kept, fits = kept_of(spans[row], query, 0.8, temperature, size)
        history = spans[row][kept].mean(0)
        assert counts[row].item() == len(kept)
        assert bound[row].item() == fits
        torch.testing.assert_close(values[row, : len(kept)], spans[row][kept])
