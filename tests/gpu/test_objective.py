"""Stage 1 on a GPU: packing, backends, recorded outputs, no waiting.

In bfloat16 another shape of a matrix product is another order of summation, so equal means equal to rounding.
Rounding all weights and activations to bfloat16 moves this model's token losses (about 6.8) by 0.05, its alignment
losses by 0.002, the targets by 1 % and the gradient by 2 % of their norms (measured on the CPU against float32).
`BF16` is three times that: both sides are rounded, and each in its own way. A swapped target alone moves the
targets by 30 % and more.
"""

import pytest
import torch

BF16 = {"ce": 0.15, "align": 0.01, "targets": 0.03, "gradient": 0.06}
FLOAT32 = {"ce": 1e-4, "loss": 1e-4, "grad_norm": 1e-3, "query": 1e-4, "targets": 1e-4}


def assert_close(errors: dict, tolerance: dict) -> None:
    assert all(errors[name] <= limit for name, limit in tolerance.items()), errors


@pytest.mark.parametrize("backend", ["flash_attn", "torch_varlen", "sdpa"])
def test_packed_equals_alone(checks, device, backend):
    if backend not in checks.available_backends(device, torch.bfloat16):
        pytest.skip(f"{backend} cannot run here")
    objective, samples = checks.small_objective(device, torch.bfloat16, backend), checks.small_samples()
    packed = checks.run_objective(objective, [checks.pack_small(samples, 3)])
    alone = checks.run_objective(objective, [checks.pack_small([sample], 3) for sample in samples])
    assert_close(checks.differences(packed, alone), BF16)


@pytest.mark.parametrize("backend", ["flash_attn", "torch_varlen"])
def test_kernels_agree_with_torchs_attention(checks, device, backend):
    if backend not in checks.available_backends(device, torch.bfloat16):
        pytest.skip(f"{backend} cannot run here")
    batch = checks.pack_small(checks.small_samples(), 3)
    first, second = (
        checks.run_objective(checks.small_objective(device, torch.bfloat16, name), [batch])
        for name in (backend, "sdpa")
    )
    assert_close(checks.differences(first, second), BF16)


def test_the_gpu_agrees_with_the_cpu(checks, device):
    batch = checks.pack_small(checks.small_samples(), 3)
    first, second = (
        checks.run_objective(checks.small_objective(where, torch.float32, "sdpa"), [batch]) for where in (device, "cpu")
    )
    assert_close(checks.differences(first, second), {"ce": 1e-3, "align": 1e-4, "targets": 1e-4, "gradient": 1e-3})


def test_recorded_outputs_of_the_published_implementation(checks, device, golden):
    """Ten times the CPU's tolerances: same type, other kernels, other orders of summation."""
    assert_close(checks.golden_errors(golden / "ilvr_open.safetensors", device), FLOAT32)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_decoder_layers_never_wait_for_the_device(checks, device, checkpointing):
    objective = checks.small_objective(device, torch.bfloat16, "torch_varlen", checkpointing=checkpointing)
    checks.decode(objective, checks.pack_small(checks.small_samples(), 3))


def test_the_check_for_waiting_can_fail(checks, device):
    """The sdpa backend reads the bounds from the device in each layer, which is why it is not for training there."""
    objective = checks.small_objective(device, torch.bfloat16, "sdpa")
    with pytest.raises(RuntimeError, match="synchroniz"):
        checks.decode(objective, checks.pack_small(checks.small_samples(), 3))
