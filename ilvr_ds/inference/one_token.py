"""One more token for each of many sequences, in one call of the stock text decoder.

The prompts run through the packed attention of `ilvr_ds.model.varlen_attention`. A step has one query per
sequence, for which packing the keys anew would copy the whole cache; so for the length of a step the decoder's
layers call the function registered here, which reads the cache where it lies. Its name has no entry in
transformers' mask registry, so no mask is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import AttentionInterface

from ilvr_ds.errors import AttentionError
from ilvr_ds.inference.cache import DecodeCache, StepKeys

ONE_TOKEN = "ilvr_flash_one_token"


def run_one_token(language_model: nn.Module, embeddings: Tensor, position_ids: Tensor, cache: DecodeCache) -> Tensor:
    """Append one token to every row of `cache`.

    Args:
        embeddings: (n, D), row by row.
        position_ids: (n,) int64: the token's rotary position, the same in all three rows.

    Returns:
        (n, D) hidden states after the final norm.
    """
    with _one_token_attention(language_model.config):
        output = language_model(
            inputs_embeds=embeddings[None],
            position_ids=position_ids.expand(4, 1, -1),
            attention_mask=None,
            use_cache=False,
            step_keys=cache.step(embeddings.device),
        )
    return output.last_hidden_state[0]


@contextmanager
def _one_token_attention(config) -> Iterator[None]:
    """The layers read the implementation's name at each call; see `varlen_attention.use_attention`."""
    before = config._attn_implementation
    config._attn_implementation = ONE_TOKEN
    try:
        yield
    finally:
        config._attn_implementation = before


def _attention(
    module: nn.Module,
    query: Tensor,  # (1, H, n, d)
    key: Tensor,  # (1, H_kv, n, d)
    value: Tensor,  # (1, H_kv, n, d)
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    step_keys: StepKeys | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention signature; returns ((1, n, H, d), None).

    Raises:
        AttentionError: called outside `run_one_token`.
    """
    if step_keys is None or attention_mask is not None:
        raise AttentionError(f"{type(module).__name__}: {ONE_TOKEN!r} is for ilvr_ds.inference.one_token only")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return step_keys.attend(module.layer_idx, q.contiguous(), k, v, scale)[None], None


AttentionInterface.register(ONE_TOKEN, _attention)
