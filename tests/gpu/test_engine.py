"""ZeRO-3 on one GPU: steps, the moving average, a checkpoint, memory."""

import pytest
import torch


@pytest.fixture(scope="module")
def found(device, engine_checks, tmp_path_factory):
    """One run of four steps; the process group it makes is this process's only one."""
    if torch.distributed.is_initialized() and torch.distributed.get_backend() != "nccl":
        pytest.skip("another test of this process made a CPU process group; run tests/gpu alone")
    findings = engine_checks.Findings(**engine_checks.four_steps(str(tmp_path_factory.mktemp("checkpoints"))))
    if not findings.device.startswith("cuda"):
        pytest.skip(f"DeepSpeed's accelerator is {findings.device!r}: unset DS_ACCELERATOR and run tests/gpu alone")
    return findings


def test_steps_are_applied_and_the_loss_falls(found):
    assert all(o.applied and o.grad_norm > 0 for o in found.outcomes)
    assert found.outcomes[-1].loss < found.outcomes[0].loss


def test_the_moving_average_moves(found):
    assert found.shadow_moved > 1e-3
    assert all(o.teacher_drift > 0 for o in found.outcomes)


def test_the_teacher_is_the_cast_of_the_average_exactly(found):
    assert found.teacher_is_cast == [True] * 4


def test_the_teachers_forward_uses_the_new_weights(found):
    """To bfloat16's rounding: DeepSpeed's linear layers add the bias after rounding the product."""
    assert found.query_new < 0.02 and found.query_old > 0.06


def test_a_checkpoint_goes_on_bit_for_bit(found):
    """Sequences here fit one block of keys, so that the attention's backward adds in one order."""
    assert found.resumed == found.outcomes[2:]
    assert found.same_state


def test_memory_does_not_grow(found):
    """The first step makes Adam's moments; a kept graph or a second copy of any weight would be megabytes a step."""
    assert found.allocated[0] > 0
    assert max(found.allocated[2:]) - found.allocated[1] < 2**18


def test_rotary_frequencies_stay_in_float32(found):
    """In bfloat16 positions beyond 256 would no longer be told apart."""
    assert found.inverse_frequencies == torch.float32
