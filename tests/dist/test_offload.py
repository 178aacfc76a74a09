"""ZeRO-3 with the optimizer in host memory. Compiles DeepSpeed's CPU Adam (about a minute), so only when asked."""

import os

import pytest
import torch

from ilvr_ds.engine.build import build_engine
from ilvr_ds.engine.checkpoint import load_checkpoint, save_checkpoint
from ilvr_ds.engine.ds_config import load_ds_config
from ilvr_ds.engine.optimizer_state import OptimizerState
from ilvr_ds.engine.step import train_step
from ilvr_ds.engine.testing.ranks import run_ranks
from ilvr_ds.engine.testing.toy import ToyObjective, make_batches, toy_recipe


def run(engine, first, last) -> list:
    log = []
    for step in range(first, last):
        engine.module.fault = "nan gradient" if step == 1 else None
        outcome = train_step(
            engine, make_batches([7, 20, 9, 12], step)[2 * engine.rank :][:2], lr=1e-2, noise_seed=step
        )
        log.append((outcome.loss, outcome.teacher_drift, outcome.applied))
    return log


def with_and_without(folder: str) -> tuple[list, list, bool, list, list]:
    logs = []
    for path in ("ds_configs/zero3.json", "ds_configs/zero3_offload.json"):
        engine = build_engine(ToyObjective(), toy_recipe(), load_ds_config(path))
        logs.append(run(engine, 0, 3))
    save_checkpoint(engine, folder + "/step-3", {})
    before = [t.clone() for kind in OptimizerState(engine).tensors().values() for t in kind]
    expected = run(engine, 3, 5)
    again = build_engine(ToyObjective(seed=4), toy_recipe(), load_ds_config("ds_configs/zero3_offload.json"))
    load_checkpoint(again, folder + "/step-3")
    after = [t.clone() for kind in OptimizerState(again).tensors().values() for t in kind]
    return *logs, all(map(torch.equal, before, after)), expected, run(again, 3, 5)


@pytest.mark.skipif(
    "ILVR_TEST_OFFLOAD" not in os.environ, reason="set ILVR_TEST_OFFLOAD=1: compiles DeepSpeed's CPU Adam"
)
def test_offload_trains_and_resumes_like_the_plain_optimizer(tmp_path):
    """The state comes back exactly; the next steps agree to rounding, because DeepSpeed's C++ Adam keeps powers of
    the betas as running products and takes them anew after a load."""
    for plain, offloaded, same_state, expected, resumed in run_ranks(with_and_without, 2, str(tmp_path), timeout_s=280):
        for a, b in zip(plain, offloaded, strict=True):
            assert a == pytest.approx(b, rel=1e-4)
        assert same_state
        for a, b in zip(expected, resumed, strict=True):
            assert a == pytest.approx(b, rel=1e-5)
