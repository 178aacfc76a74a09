"""The chunked cross-entropy equals the plain one and never holds all logits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ilvr_ds.model import loss_head
from ilvr_ds.model.loss_head import LossHead, replace_head


def make(rows, vocabulary, width, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    head = LossHead(width, vocabulary, bias=False).to(dtype)
    hidden = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    return head, hidden, torch.randint(0, vocabulary, (rows,)), torch.rand(rows)


def plain(head, hidden, targets, weights):
    ce = F.cross_entropy(head.logits(hidden).float(), targets, reduction="none")
    return (ce * weights).sum(), ce


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 40), vocabulary=st.integers(2, 90), chunk=st.integers(1, 300), seed=st.integers(0, 99))
def test_equals_cross_entropy_for_any_chunk(rows, vocabulary, chunk, seed):
    head, hidden, targets, weights = make(rows, vocabulary, 8, seed)
    expected, expected_ce = plain(head, hidden, targets, weights)
    expected_grads = torch.autograd.grad(3 * expected, [hidden, head.weight])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_head, "CHUNK_ELEMENTS", chunk)
        total, ce = head(hidden, targets, weights)
    grads = torch.autograd.grad(3 * total, [hidden, head.weight])
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(ce, expected_ce)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6)
    assert not ce.requires_grad


def test_large_logits_do_not_overflow():
    head, hidden, targets, weights = make(4, 10, 8)
    total, _ = head(hidden * 1e4, targets, weights)
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(head.weight.grad).all()


def test_no_supervised_token_still_takes_part_in_backward():
    head, hidden, targets, weights = make(0, 10, 8)
    total, ce = head(hidden, targets, weights)
    total.backward()
    assert total.item() == 0
    assert ce.shape == (0,)
    assert head.weight.grad.shape == (10, 8)
    assert not head.weight.grad.any()


def test_bf16_is_close_to_fp32():
    head, hidden, targets, weights = make(50, 200, 32, dtype=torch.bfloat16)
    total, _ = head(hidden, targets, weights)
    total.backward()
    wanted, _ = plain(head.float(), hidden.detach().float(), targets, weights)
    assert total.dtype == torch.float32
    assert hidden.grad.dtype == torch.bfloat16
    torch.testing.assert_close(total, wanted, rtol=1e-2, atol=0)


def test_a_frozen_head_gets_no_gradient():
    head, hidden, targets, weights = make(5, 10, 8)
    head.weight.requires_grad_(False)
    head(hidden, targets, weights)[0].backward()
    assert head.weight.grad is None
    assert hidden.grad is not None


def test_a_second_backward_is_an_error_not_a_wrong_gradient():
    head, hidden, targets, weights = make(5, 10, 8)
    total, _ = head(hidden, targets, weights)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        total.backward()


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_full_logits_never_exist(monkeypatch):
    rows, vocabulary, width = 500, 4000, 4
    monkeypatch.setattr(loss_head, "CHUNK_ELEMENTS", 20 * vocabulary)
    head, hidden, targets, weights = make(rows, vocabulary, width)
    with LargestTensor() as largest:
        head(hidden, targets, weights)[0].backward()
    assert largest.elements <= 20 * vocabulary  # a 25th of the logits
    with LargestTensor() as largest:  # the measure sees them where they do exist
        plain(head, hidden, targets, weights)[0].backward()
    assert largest.elements >= rows * vocabulary


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_takes_the_same_weight(small, tied):
    network = small.network(0, tied=tied)
    names, weight = list(network.state_dict()), network.lm_head.weight
    replace_head(network)
    assert isinstance(network.lm_head, LossHead)
    assert network.lm_head.weight is weight
    assert list(network.state_dict()) == names
    assert (network.lm_head.weight is network.model.language_model.embed_tokens.weight) == tied
