"""Stage 2 on a GPU: more keys than queries in every kernel, and the chain against the recomputed prefix.

Tolerances as in test_varlen.py and test_objective.py. A causal mask aligned to the top left instead of the bottom
right would let the last query see 1 of 150 keys; errors would be of order one.
"""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface

from ilvr_ds.config import LatentConfig, LossConfig
from ilvr_ds.model.backbone import Backbone
from ilvr_ds.model.varlen_attention import REGISTERED_NAMES, missing_for
from ilvr_ds.objective.relaxed import RelaxedObjective

# (keys, queries) of each sequence: one query, some, all
SHAPES = [((150, 1), (37, 1), (1, 1), (200, 1)), ((150, 20), (37, 37), (130, 129), (64, 3), (5, 1))]
BACKENDS = [(b, d) for b in REGISTERED_NAMES for d in (torch.bfloat16, torch.float32)]
TOLERANCE = {torch.bfloat16: 0.03, torch.float32: 1e-4}


class Keys:
    """A cache that hands out the keys and values of a whole sequence."""

    def __init__(self, k, v):
        self.k, self.v = k, v

    def extend(self, layer, key, value):
        return self.k, self.v


@pytest.fixture(params=BACKENDS, ids=lambda p: f"{p[0]}-{p[1]}")
def backend(request, device):
    missing = missing_for(request.param[0], device, request.param[1])
    if missing:
        pytest.skip(missing)
    return request.param


def reference(q, k, v, shapes):
    """Attention written out, bottom-right causal, (queries, H, d)."""
    group = q.shape[1] // k.shape[1]
    out, q0, k0 = [], 0, 0
    for keys, queries in shapes:
        own_q = q[q0 : q0 + queries].transpose(0, 1)
        own_k, own_v = (x[k0 : k0 + keys].repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        scores = own_q @ own_k.transpose(1, 2) * q.shape[-1] ** -0.5
        hidden = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(keys - queries + 1)
        out.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ own_v).transpose(0, 1))
        q0, k0 = q0 + queries, k0 + keys
    return torch.cat(out)


@pytest.mark.parametrize("shapes", SHAPES)
def test_causal_is_aligned_to_the_last_key(device, backend, shapes):
    name, dtype = backend
    keys, queries = (torch.tensor([0, *x]).cumsum(0).to(torch.int32).to(device) for x in zip(*shapes, strict=True))
    draw = lambda n, h: torch.randn(int(n), h, 128, generator=torch.Generator().manual_seed(h)).to(device, dtype)  # noqa: E731
    q, k, v = draw(queries[-1], 4), draw(keys[-1], 2), draw(keys[-1], 2) * 0.5
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    new = [leaves[0].transpose(0, 1)[None], *(x[: q.shape[0]].transpose(0, 1)[None] for x in (k, v))]
    out = AttentionInterface()[REGISTERED_NAMES[name]](
        SimpleNamespace(is_causal=True, layer_idx=0), *new, None, packed_cache=Keys(*leaves[1:]),
        cu_seq_lens_q=queries, cu_seq_lens_k=keys, max_length_q=max(s[1] for s in shapes),
        max_length_k=max(s[0] for s in shapes),
    )[0][0]  # fmt: skip
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected = reference(*exact, shapes)
    upstream = torch.randn_like(expected)
    got = (out, *torch.autograd.grad(out, leaves, upstream.to(dtype)))
    for found, wanted in zip(got, (expected, *torch.autograd.grad(expected, exact, upstream)), strict=True):
        error = (found.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
        assert error < TOLERANCE[dtype], error


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_chain_equals_the_recomputed_prefix(checks, device, backend, checkpointing):
    """Token losses, and the gradient. In bfloat16 the chain carries rounding from latent to latent."""
    name, dtype = backend
    network = checks.synthetic.random_network(checks.synthetic.TINY.config(), device="cpu", dtype=torch.float32)
    checks._draw(network, seed=0)
    student = Backbone(
        checks._cast(network, dtype).to(device), attention=name, device=device, gradient_checkpointing=checkpointing
    )
    own = RelaxedObjective(student, LatentConfig(size=checks.LATENTS, source="self"), LossConfig(sim_weight=0)).train()
    oracle = checks.load_script("benchmarks/recomputed_prefix.py").RecomputingObjective(student).train()
    batch = checks.pack_small(checks.small_samples(), 3)
    batch = dataclasses.replace(batch, ce_weights=torch.ones_like(batch.ce_weights) / len(batch.ce_weights))
    found = []
    for objective in (own, oracle):
        student.zero_grad()
        terms = objective(batch, 0)
        terms.loss.backward()
        grads = torch.cat([p.grad.float().flatten() for p in student.parameters() if p.grad is not None])
        found.append((terms.ce_per_token.float(), grads))
    limit = {torch.bfloat16: (0.3, 0.15), torch.float32: (1e-3, 1e-3)}[dtype]
    assert (found[0][0] - found[1][0]).abs().max() < limit[0]
    assert torch.linalg.norm(found[0][1] - found[1][1]) < limit[1] * torch.linalg.norm(found[1][1])
