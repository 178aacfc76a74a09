"""Choices follow the distribution, keep to the top-p set, and depend on a row's own logits and number only."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ilvr_ds.errors import ConfigError
from ilvr_ds.inference.sampling import Sampling, Uniforms, choose


def top_p_set(logits, temperature, top_p):
    """Tokens of the smallest likeliest set with mass >= top_p, in float64."""
    p = torch.softmax(logits.double() / temperature, 0)
    order = p.argsort(descending=True, stable=True)
    count = int((p[order].cumsum(0) < top_p - 1e-6).sum()) + 1
    return set(order[:count].tolist()), p


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([0.3, 1.0, 2.0]), st.sampled_from([0.05, 0.5, 0.9, 1.0]))
def test_frequencies_within_the_top_p_set(seed, temperature, top_p):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(seed)) * 2
    kept, p = top_p_set(logits, temperature, top_p)
    uniforms = (torch.arange(4000) + 0.5) / 4000
    chosen = choose(logits.expand(4000, -1), Sampling(temperature, top_p), uniforms)
    assert set(chosen.tolist()) <= kept
    wanted = torch.tensor([float(p[i]) if i in kept else 0.0 for i in range(12)])
    frequencies = torch.bincount(chosen, minlength=12) / 4000
    torch.testing.assert_close(frequencies, wanted / wanted.sum(), atol=2e-3, rtol=0)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([Sampling(), Sampling(1.0), Sampling(0.7, 0.8)]))
def test_rows_do_not_mix(seed, sampling):
    generator = torch.Generator().manual_seed(seed)
    logits, uniforms = torch.randn(7, 50, generator=generator), torch.rand(7, generator=generator)
    together = choose(logits, sampling, uniforms)
    assert together.tolist() == [int(choose(logits[i : i + 1], sampling, uniforms[i : i + 1])) for i in range(7)]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("uniform", [0.0, float(np.nextafter(np.float32(1), np.float32(0)))])
def test_a_forbidden_token_is_never_chosen(top_p, uniform):
    """At the ends too: a forbidden first token for u = 0, a forbidden last one for u just below 1."""
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    chosen = int(choose(logits, Sampling(1.0, top_p), torch.tensor([uniform])))
    assert chosen in (1, 2)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 10**6), st.floats(-30, 30, width=32))
def test_the_largest_number_stays_within(seed, shift):
    logits = torch.randn(1, 64, generator=torch.Generator().manual_seed(seed)) * 3 + shift
    largest = torch.tensor([1 - 2**-24])
    assert 0 <= int(choose(logits, Sampling(1.0), largest)) < 64
    assert 0 <= int(choose(logits, Sampling(1.0, 0.5), largest)) < 64


def test_greedy_reads_no_number():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert choose(logits, Sampling(), torch.tensor([float("nan")])).tolist() == [1]


def test_numbers_are_a_function_of_seed_and_place():
    a, b = Uniforms(7, block=4), Uniforms(7, block=4)
    late = [b[i] for i in (9, 2, 0)]
    assert [a[i] for i in (9, 2, 0)] == late
    assert len({a[i] for i in range(40)}) == 40
    assert all(0 <= a[i] < 1 for i in range(40))
    assert Uniforms(8)[0] != Uniforms(7)[0]


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_impossible_values_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)
