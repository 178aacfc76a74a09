"""Packed attention: equal to attention sequence by sequence, nothing crosses a border, errors instead of leaks."""

import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from ilvr_ds.errors import AttentionError
from ilvr_ds.model import varlen_attention
from ilvr_ds.model.sequence_attention import Bounds, per_sequence
from ilvr_ds.model.varlen_attention import REGISTERED_NAMES, resolve_attention, use_attention

CAUSAL = SimpleNamespace(is_causal=True)


def attention(lengths, q, k, v, backend="sdpa", **options):
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    function = AttentionInterface()[REGISTERED_NAMES[backend]]
    longest = max(lengths)
    packed = dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=longest, max_length_k=longest)
    return function(CAUSAL, q, k, v, None, **{**packed, **options})


def inputs(lengths, heads=4, key_heads=2, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = lambda h: (1, h, sum(lengths), size)  # noqa: E731
    return [
        torch.randn(shape(h), generator=generator, dtype=torch.float64).requires_grad_()
        for h in (heads, key_heads, key_heads)
    ]


def one_by_one(lengths, q, k, v, causal, scale):
    """softmax(q k^T scale) v, written out, a sequence at a time."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        scores = q[:, :, part] @ k[:, :, part].transpose(2, 3) * scale
        if causal:
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        out.append((scores.softmax(-1) @ v[:, :, part]).transpose(1, 2))
        start += length
    return torch.cat(out, 1)


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any),
    heads=st.sampled_from([(4, 2), (2, 2), (3, 1)]),
    causal=st.booleans(),
    seed=st.integers(0, 9),
)
def test_equals_attention_one_by_one(lengths, heads, causal, seed):
    q, k, v = inputs(lengths, *heads, seed=seed)
    out, weights = attention(lengths, q, k, v, is_causal=causal, scaling=0.3)
    expected = one_by_one(lengths, q, k, v, causal, 0.3)
    assert weights is None
    torch.testing.assert_close(out, expected)
    upstream = torch.randn(out.shape, dtype=out.dtype)
    for got, wanted in zip(
        torch.autograd.grad(out, [q, k, v], upstream), torch.autograd.grad(expected, [q, k, v], upstream), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def test_causal_is_the_modules_own_unless_told():
    lengths = [3, 4]
    q, k, v = inputs(lengths)
    default = attention(lengths, q, k, v)[0]
    assert torch.equal(default, attention(lengths, q, k, v, is_causal=True)[0])
    assert not torch.equal(default, attention(lengths, q, k, v, is_causal=False)[0])


@pytest.mark.parametrize("causal", [True, False])
def test_neighbours_change_exactly_nothing(causal):
    lengths, own = [5, 3, 5], slice(5, 8)
    q, k, v = inputs(lengths)
    out = attention(lengths, q, k, v, is_causal=causal)[0]
    changed = [x.detach().clone() for x in (q, k, v)]
    for x in changed:
        x[:, :, :5] += 10
        x[:, :, 8:] *= -3
    assert torch.equal(attention(lengths, *changed, is_causal=causal)[0][:, own], out[:, own])
    for grad in torch.autograd.grad(out[:, own].sum(), [q, k, v]):
        assert not grad[:, :, :5].any()
        assert not grad[:, :, 8:].any()
        assert grad[:, :, own].any()


def test_windows_of_one_length_are_one_call(monkeypatch):
    calls = []
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *a, **k: (calls.append(q.shape[0]), real(q, *a, **k))[1]
    )
    lengths = [4, 2] * 50
    attention(lengths, *inputs(lengths), is_causal=False)
    assert calls == [50, 50]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cu_seq_lens_q": None}, "without cu_seq_lens"),
        ({"cu_seq_lens_k": None}, "without cu_seq_lens"),
        ({"max_length_q": None}, "without cu_seq_lens"),
        ({"sliding_window": 2}, "sliding_window=2"),
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"cu_seq_lens_q": torch.tensor([0, 2], dtype=torch.int32)}, "end at 2 queries and 5 keys, there are 5"),
        ({"cu_seq_lens_k": torch.tensor([0, 2], dtype=torch.int32)}, "end at 5 queries and 2 keys, there are 5"),
        ({"cu_seq_lens_k": torch.tensor([0, 2, 5], dtype=torch.int32)}, "1 and 2 sequences"),
    ],
)
def test_what_would_leak_or_be_ignored_is_an_error(options, message):
    with pytest.raises(AttentionError, match=message):
        attention([5], *inputs([5]), **options)


def test_a_mask_rows_or_a_cache_are_errors():
    q, k, v = inputs([5])
    bounds = torch.tensor([0, 5], dtype=torch.int32)
    packed = dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=5, max_length_k=5)
    function = AttentionInterface()[REGISTERED_NAMES["sdpa"]]
    with pytest.raises(AttentionError, match="mask=True"):
        function(CAUSAL, q, k, v, torch.ones(1, 1, 5, 5), **packed)
    with pytest.raises(AttentionError, match="2 rows"):
        function(CAUSAL, *(torch.cat([x, x]) for x in (q, k, v)), None, **packed)
    with pytest.raises(AttentionError, match="1 queries and 5 keys"):
        function(CAUSAL, q[:, :, :1], k, v, None, **packed)


def test_a_model_called_the_ordinary_way_refuses_instead_of_leaking(small):
    network = small.network(0)
    use_attention(network, REGISTERED_NAMES["sdpa"])
    with pytest.raises(AttentionError, match="without cu_seq_lens"):
        network.model.language_model(inputs_embeds=torch.zeros(1, 4, small.width))


# ------------------------------------------------------------------------- more keys than queries
class Past:
    """A cache that puts earlier keys and values of each sequence before its new ones."""

    def __init__(self, past, old, new):
        self.past, self.old, self.new = past, old, new

    def extend(self, layer, key, value):
        assert layer == 7
        both = []
        for before, now in zip(self.past, (key, value), strict=True):
            pairs = zip(before.split(self.old), now.split(self.new), strict=True)
            both.append(torch.cat([part for pair in pairs for part in pair]))
        return tuple(both)


def after_past(old, new, q, k, v, *, backend="sdpa"):
    """Attention of the last `new` tokens of each sequence, the first `old` ones being in a cache."""
    layer = SimpleNamespace(is_causal=True, layer_idx=7)
    lengths = [a + b for a, b in zip(old, new, strict=True)]
    is_new = torch.cat([torch.arange(a + b) >= a for a, b in zip(old, new, strict=True)])
    past = Past([x[0, :, ~is_new].transpose(0, 1) for x in (k, v)], old, new)
    bounds = [torch.tensor([0, *x]).cumsum(0).to(torch.int32) for x in (new, lengths)]
    return AttentionInterface()[REGISTERED_NAMES[backend]](
        layer, *(x[:, :, is_new] for x in (q, k, v)), None, packed_cache=past, scaling=0.3,
        cu_seq_lens_q=bounds[0], cu_seq_lens_k=bounds[1], max_length_q=max(new), max_length_k=max(lengths),
    )[0], is_new  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=6),
    repeat=st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_tokens_after_a_past_see_what_they_see_in_one_call(pairs, repeat, seed):
    """Bottom-right causal, also where many sequences of a few shapes are gathered into one call."""
    pairs = pairs * repeat
    old, new = [list(x) for x in zip(*pairs, strict=True)]
    if not any(new):
        return
    q, k, v = inputs([a + b for a, b in pairs], seed=seed)
    out, is_new = after_past(old, new, q, k, v)
    expected = one_by_one([a + b for a, b in pairs], q, k, v, True, 0.3)[:, is_new]
    torch.testing.assert_close(out, expected)
    upstream = torch.randn(out.shape, dtype=out.dtype)
    for got, wanted in zip(
        torch.autograd.grad(out, [q, k, v], upstream), torch.autograd.grad(expected, [q, k, v], upstream), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def test_fewer_keys_than_queries_are_an_error():
    q, k, v = (x[0].transpose(0, 1) for x in inputs([5]))
    bounds = [torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 3, 5], dtype=torch.int32)]
    with pytest.raises(AttentionError, match="3 queries has 2 keys"):
        per_sequence(q, k, v, Bounds(*bounds, 3, 3), True, 1.0)


@pytest.mark.parametrize("backend", ["flash_attn", "torch_varlen"])
def test_half_precision_kernels_name_the_type(backend):
    with pytest.raises(AttentionError, match="float64"):
        attention([5], *inputs([5]), backend=backend)


# --------------------------------------------------------------------------------------- choosing
def test_auto():
    assert resolve_attention("auto", "cpu", torch.bfloat16) == REGISTERED_NAMES["sdpa"]
    assert resolve_attention("auto", "cuda", torch.float32) == REGISTERED_NAMES["sdpa"]
    assert resolve_attention("auto", "cuda", torch.bfloat16) != REGISTERED_NAMES["sdpa"]


@pytest.mark.parametrize(
    ("name", "device", "dtype", "missing"),
    [
        ("flash_attn", "cpu", torch.bfloat16, "CUDA"),
        ("torch_varlen", "cpu", torch.bfloat16, "CUDA"),
        ("torch_varlen", "cuda", torch.float32, "float32"),
        ("flash_attn", "cuda", torch.float32, "float32"),
        ("flex", "cuda", torch.float16, "allowed are 'auto'"),
    ],
)
def test_a_named_backend_that_cannot_run_is_an_error(name, device, dtype, missing):
    with pytest.raises(AttentionError, match=missing):
        resolve_attention(name, device, dtype)


def test_flash_attn_missing_is_said(monkeypatch):
    monkeypatch.setattr(varlen_attention, "_flash_attn_module", lambda: None)
    with pytest.raises(AttentionError, match="pip install flash-attn"):
        resolve_attention("flash_attn", "cuda", torch.bfloat16)
    assert resolve_attention("auto", "cuda", torch.bfloat16) == REGISTERED_NAMES["torch_varlen"]


def test_transformers_builds_no_mask_and_hands_over_bounds():
    for name in REGISTERED_NAMES.values():
        assert is_flash_attention_requested(requested_attention_implementation=name)
        assert name not in ALL_MASK_ATTENTION_FUNCTIONS


def test_two_models_of_one_process_may_differ(small):
    first, second = small.network(0), small.network(0)
    use_attention(first, REGISTERED_NAMES["sdpa"])
    use_attention(second, REGISTERED_NAMES["torch_varlen"])
    for model, backend in ((first, "sdpa"), (second, "torch_varlen")):
        for layer in (model.model.language_model.layers[0].self_attn, model.model.visual.blocks[0].attn):
            assert layer.config._attn_implementation == REGISTERED_NAMES[backend]


# ------------------------------------------------------------------- torch's kernel, as versions differ
def kernel_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None, scale=None):
    assert query.shape[1] == key.shape[1], "this version has no grouped queries"
    return per_sequence(query, key, value, Bounds(cu_seq_q, cu_seq_k, max_q, max_k), is_causal, scale)


def kernel_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert window_size in ((-1, 0), (-1, -1))
    return per_sequence(query, key, value, Bounds(cu_seq_q, cu_seq_k, max_q, max_k), window_size == (-1, 0), scale)


@pytest.mark.parametrize("kernel", [kernel_2_10, kernel_2_13])
@pytest.mark.parametrize("causal", [True, False])
def test_arguments_for_every_version_of_torchs_kernel(monkeypatch, kernel, causal):
    """The kernel itself needs a GPU (tests/gpu); here: each version's arguments mean the same."""
    monkeypatch.setattr(
        varlen_attention, "_torch_varlen_parameters", lambda: frozenset(inspect.signature(kernel).parameters)
    )
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    lengths = [3, 5]
    q, k, v = (x.detach().to(torch.bfloat16) for x in inputs(lengths))
    out = attention(lengths, q, k, v, backend="torch_varlen", is_causal=causal)[0]
    expected = attention(lengths, q, k, v, is_causal=causal)[0]
    torch.testing.assert_close(out, expected)


def test_the_installed_torch_has_the_arguments_we_pass():
    parameters = varlen_attention._torch_varlen_parameters()
    assert "scale" in parameters
    assert "window_size" in parameters or "is_causal" in parameters
