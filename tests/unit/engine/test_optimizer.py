"""Parameter groups and the guarded AdamW of fp32 stage 0."""

import copy

import pytest
import torch
from torch import nn

from ilvr_ds.config import OptimizerConfig
from ilvr_ds.engine.optimizer import GuardedAdamW, build_optimizer, parameter_groups
from ilvr_ds.errors import ConfigError


def test_matrices_decay_and_vectors_do_not():
    module = nn.ModuleDict(
        {"embed": nn.Embedding(5, 4), "linear": nn.Linear(4, 3), "norm": nn.LayerNorm(3), "frozen": nn.Linear(3, 3)}
    )
    module["frozen"].requires_grad_(False)
    decay, plain = parameter_groups(module.named_parameters(), 0.1)
    assert [p.ndim for p in decay["params"]] == [2, 2] and decay["weight_decay"] == 0.1
    assert [p.ndim for p in plain["params"]] == [1, 1, 1] and plain["weight_decay"] == 0.0


def test_nothing_to_train_is_an_error():
    module = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        build_optimizer(module, OptimizerConfig(), offload=False, guard=False, device=torch.device("cpu"))


@pytest.mark.parametrize("clip", [0.0, 0.1, 100.0])
def test_guarded_adamw_is_clipping_then_adamw(clip):
    torch.manual_seed(0)
    ours = nn.Linear(4, 3)
    theirs = copy.deepcopy(ours)
    guarded, plain = (
        GuardedAdamW(ours.parameters(), max_norm=clip, lr=0.1),
        torch.optim.AdamW(theirs.parameters(), lr=0.1),
    )
    for _ in range(3):
        for module in (ours, theirs):
            module.zero_grad()
            module(torch.arange(8.0).view(2, 4)).square().sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip if clip else float("inf"))
        guarded.step()
        plain.step()
        assert not guarded.overflow and torch.isclose(guarded._global_grad_norm, norm)
    assert torch.allclose(ours.weight, theirs.weight) and torch.allclose(ours.bias, theirs.bias)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_guarded_adamw_refuses_a_step_that_is_not_finite(bad):
    module = nn.Linear(4, 3)
    before = module.weight.detach().clone()
    optimizer = GuardedAdamW(module.parameters(), max_norm=1.0, lr=0.1)
    module(torch.ones(1, 4)).sum().backward()
    module.bias.grad[0] = bad
    optimizer.step()
    assert optimizer.overflow and optimizer._global_grad_norm == float("inf")
    assert torch.equal(module.weight, before) and not optimizer.state
