from itertools import pairwise

import pytest

from ilvr_ds.config import OptimizerConfig
from ilvr_ds.train.schedule import learning_rate


def test_warm_up_peak_and_floor():
    config = OptimizerConfig(lr=1e-3, warmup_fraction=0.1, min_lr_fraction=0.1)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)  # the first step already moves
    assert rates[9] == pytest.approx(1e-3) and rates[10] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-4)
    assert all(a <= b for a, b in pairwise(rates[:10]))
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_a_single_step_and_no_warm_up():
    assert learning_rate(0, 1, OptimizerConfig(lr=2.0, warmup_fraction=0.0)) == pytest.approx(2.0)


def test_a_step_outside_the_run_is_an_error():
    with pytest.raises(ValueError, match="outside"):
        learning_rate(10, 10, OptimizerConfig())
