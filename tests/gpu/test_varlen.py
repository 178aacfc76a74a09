"""Every attention backend against attention written out, sequence by sequence; nothing crosses a border.

Tolerances are on the root mean square error of the worst sequence, over that of the whole reference (float64).

- bfloat16, 3 %: its unit roundoff is 2^-9 = 0.2 %. A flash kernel rounds the probabilities, the output and, in
  backward, the scores' gradient, and reads the rounded output again; the shortest sequences have larger values than
  the average that errors are measured by. An emulation with exactly these roundings stays below 1.5 %
  (tests/unit/test_gpu_benchmark.py), where a border off by one token, a missing causal mask, wrongly grouped heads
  or another scale give 18 % and more.
- float32, 1e-4: torch may compute its products from three TF32 products.
"""

import pytest
import torch

from ilvr_ds.model.varlen_attention import REGISTERED_NAMES, missing_for

UNEVEN = (150, 37, 1, 60, 200, 2, 90)
WINDOWS = (64, 64, 16, 64, 16, 4, 64)
# (heads, key heads, head size, causal): Qwen2.5-VL's decoder groups queries and is causal, its tower neither
SHAPES = [(4, 2, 64, True), (16, 2, 128, True), (7, 1, 128, True), (4, 4, 80, False), (4, 2, 64, False)]
TOLERANCE = {torch.bfloat16: 0.03, torch.float32: 1e-4}


@pytest.fixture(params=[(b, d) for b in REGISTERED_NAMES for d in TOLERANCE], ids=lambda p: f"{p[0]}-{p[1]}")
def backend(request, device):
    """(backend, type); skips what cannot run here and says why."""
    missing = missing_for(request.param[0], device, request.param[1])
    if missing:
        pytest.skip(missing)
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", [UNEVEN, WINDOWS])
def test_forward_and_gradients_equal_the_reference(checks, device, backend, shape, lengths):
    name, dtype = backend
    heads, key_heads, size, causal = shape
    case = checks.AttentionCase(lengths, heads, key_heads, size, causal, dtype)
    errors = checks.attention_errors(name, case, device)
    assert max(errors.values()) < TOLERANCE[dtype], errors


@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_neighbours_change_exactly_nothing(checks, device, backend, size, causal):
    """`own` fits one block of keys of every kernel: over more, backward adds with atomics, in any order."""
    name, dtype = backend
    case = checks.AttentionCase((150, 37, 1, 60, 200), 4, 2, size, causal, dtype)
    assert checks.attention_leaks(name, case, device, own=(1, 2, 3)) == []
