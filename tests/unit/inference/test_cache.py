"""Rows of unequal length that come, grow and leave: attention is what each sequence computes alone."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ilvr_ds.errors import AttentionError
from ilvr_ds.inference import one_token
from ilvr_ds.inference.cache import ROUND_TO, DecodeCache

HEADS, KEY_HEADS, WIDTH, LAYERS = 6, 2, 4, 2


def alone(query, keys, values):
    """(H, d), (L, H_kv, d) twice -> (H, d)."""
    k, v = (x.transpose(0, 1).repeat_interleave(HEADS // KEY_HEADS, 0) for x in (keys, values))
    return F.scaled_dot_product_attention(query[:, None], k, v, scale=0.3)[:, 0]


ACTIONS = st.lists(
    st.one_of(
        st.lists(st.integers(1, 90), min_size=1, max_size=3),  # prompts of these lengths come
        st.integers(1, 20),  # steps
        st.sets(st.integers(0, 5), min_size=1, max_size=3),  # these rows leave
    ),
    min_size=2,
    max_size=8,
)


@settings(deadline=None, max_examples=40)
@given(ACTIONS)
def test_any_history(actions):
    generator = torch.Generator().manual_seed(0)
    cache = DecodeCache(LAYERS)
    rows = []  # per row, per layer: keys (L, H_kv, d), values

    def random(n, heads):
        return torch.randn(n, heads, WIDTH, generator=generator)

    for action in actions:
        if isinstance(action, list):
            packed = cache.prefill(action)
            new = [[] for _ in action]
            for layer in range(LAYERS):
                k, v = random(sum(action), KEY_HEADS), random(sum(action), KEY_HEADS)
                seen = packed.extend(layer, k, v)
                assert seen[0] is k
                assert seen[1] is v
                for own, a, b in zip(new, k.split(action), v.split(action), strict=True):
                    own.append((a, b))
            rows += new
        elif isinstance(action, set):
            leaving = [row for row in action if row < len(rows)]
            order = cache.drop(leaving)
            assert sorted(order) == [row for row in range(len(rows)) if row not in leaving]
            rows = [rows[row] for row in order]
        else:
            for _ in range(action if rows else 0):
                step = cache.step(torch.device("cpu"))
                for layer in range(LAYERS):
                    q, k, v = random(len(rows), HEADS), random(len(rows), KEY_HEADS), random(len(rows), KEY_HEADS)
                    out = step.attend(layer, q, k, v, 0.3)
                    for row, own in enumerate(rows):
                        keys, values = (
                            torch.cat([x, y[row : row + 1]]) for x, y in zip(own[layer], (k, v), strict=True)
                        )
                        own[layer] = (keys, values)
                        torch.testing.assert_close(out[row], alone(q[row], keys, values), rtol=1e-4, atol=1e-5)
        assert cache.lengths == [len(own[0][0]) for own in rows]


def test_memory_grows_by_halves():
    cache = DecodeCache(1)
    packed = cache.prefill([10])
    packed.extend(0, torch.zeros(10, KEY_HEADS, WIDTH), torch.zeros(10, KEY_HEADS, WIDTH))
    sizes = set()
    one = torch.zeros(1, KEY_HEADS, WIDTH)
    for _ in range(1000):
        cache.step(torch.device("cpu")).attend(0, torch.zeros(1, HEADS, WIDTH), one, one, 1.0)
        sizes.add(cache._keys[0].shape[2])
    assert len(sizes) <= 9
    assert all(size % ROUND_TO == 0 for size in sizes)


def test_the_step_attention_is_for_steps_only():
    q, k = torch.zeros(1, HEADS, 3, WIDTH), torch.zeros(1, KEY_HEADS, 3, WIDTH)
    with pytest.raises(AttentionError, match="one_token only"):
        one_token._attention(torch.nn.Linear(1, 1), q, k, k, None)
