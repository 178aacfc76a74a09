"""Small parts that need no process group: pairs, checksums, moving a batch, what DeepSpeed is shown."""

import pytest
import torch
from torch import nn

from ilvr_ds.engine.build import LossModule
from ilvr_ds.engine.fingerprint import _checksum
from ilvr_ds.engine.partition import resolve_pairs
from ilvr_ds.engine.step import train_step
from ilvr_ds.engine.testing.toy import ToyObjective
from ilvr_ds.errors import ConfigError


def test_pairs_are_found_by_name_whatever_their_order():
    objective = ToyObjective()
    pairs = resolve_pairs(objective, objective.ema_pairs()[::-1])
    for pair in pairs:
        assert pair.teacher is objective.get_parameter(pair.name)
        assert pair.student is objective.get_parameter("student" + pair.name.removeprefix("teacher"))
    assert len(pairs) == len(list(objective.teacher.parameters()))


def test_names_are_the_objectives_own():
    objective = ToyObjective()
    assert [n for n, _ in LossModule(objective).named_parameters()] == [n for n, _ in objective.named_parameters()]


def test_an_objective_with_a_parameter_of_its_own_is_refused():
    objective = ToyObjective()
    objective.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(ConfigError, match="'scale'"):
        LossModule(objective)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checksum_sees_every_element_and_its_place(dtype):
    weight = nn.Parameter(torch.randn(4, 5).to(dtype), requires_grad=False)
    total = int(_checksum(weight))
    assert int(_checksum(nn.Parameter(weight.clone()))) == total
    seen = {total}
    for i in range(weight.numel()):
        changed = weight.detach().clone()
        changed.view(-1)[i] += 1
        seen.add(int(_checksum(nn.Parameter(changed))))
    seen.add(int(_checksum(nn.Parameter(weight.detach().flip(0)))))
    assert len(seen) == weight.numel() + 2


def test_a_step_without_micro_batches_is_refused():
    with pytest.raises(ValueError, match="at least one micro-batch"):
        train_step(None, [], lr=1e-3, noise_seed=0)
