"""Language-model head and cross-entropy in one: logits exist only for a few rows at a time.

For N supervised tokens and V vocabulary entries the logits would be N x V (2,000 x 152k in fp32: 1.2 GB, and
several copies in backward). `LossHead` walks over the rows in chunks and forms the gradients on the way, so
that nothing of size N x V is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2**26  # logits at one time, at most: 256 MiB in fp32


class LossHead(nn.Linear):
    """A linear head (weight (V, D), no bias) whose call is the weighted cross-entropy, not the logits."""

    def forward(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """sum_i weights_i * ce_i with ce_i = logsumexp(W h_i) - (W h_i)[targets_i].

        Args:
            hidden: (N, D), any float type; N may be 0.
            targets: (N,) int64.
            weights: (N,) float32; no gradient flows to them.

        Returns:
            the sum () float32 with gradient to `hidden` and the weight, and ce (N,) float32 without gradient.
        """
        return _ChunkedCrossEntropy.apply(hidden, self.weight, targets, weights)

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V), for a few rows (decoding, checks)."""
        return nn.functional.linear(hidden, self.weight)


def replace_head(model: nn.Module) -> None:
    """Put a `LossHead` in the place of `model.lm_head`, on the very same weight (tied embeddings stay tied)."""
    old = model.lm_head
    with torch.device("meta"):  # no second V x D tensor, not even for a moment
        head = LossHead(old.in_features, old.out_features, bias=False)
    head.weight = old.weight
    model.lm_head = head


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients are formed in forward, since loss and gradient need the same logits.

    dL/dlogits_i = w_i (softmax_i - onehot(target_i)).
    Softmax is in fp32; products are in the weight's type, as in an ordinary linear layer. Because nothing of
    the weight is needed in backward, a partitioned weight is gathered once per micro-batch, not twice.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        rows, vocabulary = hidden.shape[0], weight.shape[0]
        wants_hidden, wants_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None  # (N, D)
        grad_weight = torch.zeros_like(weight) if wants_weight else None  # (V, D)
        per_token = hidden.new_zeros(rows, dtype=torch.float32)
        chunk = max(1, CHUNK_ELEMENTS // vocabulary)
        for start in range(0, rows, chunk):
            part = slice(start, min(start + chunk, rows))
            h, target = hidden[part], targets[part, None]
            logits = (h.to(weight.dtype) @ weight.T).float()  # (n, V)
            log_sum = logits.logsumexp(1, keepdim=True)  # (n, 1)
            per_token[part] = (log_sum - logits.gather(1, target))[:, 0]
            if not (wants_hidden or wants_weight):
                continue
            grad = logits.sub_(log_sum).exp_()  # softmax, in place of the logits
            grad.scatter_add_(1, target, torch.full_like(target, -1, dtype=grad.dtype))
            grad = grad.mul_(weights[part, None]).to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = (grad @ weight).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, h.to(weight.dtype))
        ctx.gradients = (grad_hidden, grad_weight)
        ctx.mark_non_differentiable(per_token)
        return (per_token * weights).sum(), per_token

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sum: Tensor, _: Tensor):
        if ctx.gradients is None:
            raise RuntimeError("a LossHead's backward runs once; call the head again for another backward")
        # scaled in place and let go, so that the (V, D) gradient never exists twice
        grad_hidden, grad_weight = (None if g is None else g.mul_(grad_sum.to(g.dtype)) for g in ctx.gradients)
        ctx.gradients = None
        return grad_hidden, grad_weight, None, None
