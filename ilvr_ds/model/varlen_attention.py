"""Attention over sequences packed end to end: no token sees another sequence, and no mask is ever built.

Three backends compute the same thing; `resolve_attention` chooses one and returns the name under which it is
registered with transformers' `AttentionInterface`:

- `flash_attn`: the flash-attn package (version 3, 2 or 4, the first that is installed); CUDA, half precision
- `torch_varlen`: `torch.nn.attention.varlen.varlen_attn`, inside torch; CUDA, half precision
- `sdpa`: `scaled_dot_product_attention`, one call per distinct sequence length; any device, any precision

With a `PackedCache` the keys are more than the queries: those of earlier calls come first. Causal then means
bottom-right aligned: the last query of a sequence sees all its keys, the one before it all but the last. That is
what flash-attn computes since 2.1, and torch's varlen kernel, which is built from it (torch's own `causal_lower_right`
hands over to the same kernel; tests/gpu/test_latent_chain.py). Queries that are alone need no mask and get none.
Where the calls are: prompts and training samples have as many queries as keys, where both alignments agree; the text
after a span of stage 2 (`latent_chain`) has fewer, where they do not, so flash-attn before 2.1 is refused; the steps of
decoding and of the chain are single queries (`ilvr_ds.inference.one_token` calls no varlen kernel at all).

The registered names contain "flash" so that Qwen2.5-VL's vision tower hands over `cu_seqlens` in one call
instead of one call per window, and they have no entry in the mask registry so that no T x T mask is built.
Naming an implementation when the model is built (`attn_implementation=`, `set_attn_implementation`) makes
transformers 5 look for a kernel of that name on the hub and fail; so `use_attention` sets it on the config of
the finished model, where the layers read it at each call.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable
from typing import Literal, Protocol

import torch
from packaging.version import InvalidVersion, Version
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from ilvr_ds.errors import AttentionError
from ilvr_ds.model.sequence_attention import HALF, Bounds, per_sequence

AttentionName = Literal["auto", "flash_attn", "torch_varlen", "sdpa"]

# backend -> the name transformers knows it by; one each, so that two models of one process may differ
REGISTERED_NAMES = {
    "flash_attn": "ilvr_flash_package",
    "torch_varlen": "ilvr_flash_torch_varlen",
    "sdpa": "ilvr_flash_per_sequence",
}


def resolve_attention(name: AttentionName, device: torch.device | str, dtype: torch.dtype) -> str:
    """The registered implementation to use on `device` in `dtype`.

    "auto": on CUDA in half precision flash_attn if installed, else torch_varlen if this torch has it; else sdpa.

    Raises:
        AttentionError: a backend named explicitly that cannot run here; says what is missing.
    """
    device = torch.device(device)
    if name == "auto":
        candidates = ("flash_attn", "torch_varlen", "sdpa")
        return REGISTERED_NAMES[next(c for c in candidates if missing_for(c, device, dtype) is None)]
    if name not in REGISTERED_NAMES:
        raise AttentionError(f"model.attention={name!r}: allowed are 'auto', {', '.join(map(repr, REGISTERED_NAMES))}")
    missing = missing_for(name, device, dtype)
    if missing is not None:
        raise AttentionError(f"model.attention={name!r} cannot be used: {missing}; 'auto' takes what is available")
    return REGISTERED_NAMES[name]


def missing_for(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What `backend` lacks to run on `device` in `dtype`; None if it can run."""
    if backend == "sdpa":
        return None
    if device.type != "cuda":
        return f"it needs a CUDA device, got {device.type!r}"
    if dtype not in HALF:
        return f"its kernels compute in bfloat16 or float16, got {dtype}"
    if backend == "flash_attn" and _flash_attn_module() is None:
        return "no flash-attn package is installed (pip install flash-attn)"
    if backend == "flash_attn" and _flash_attn_module() == "flash_attn" and not _aligned_to_the_last_key():
        return (
            "the installed flash-attn is older than 2.1, or its version cannot be told: before 2.1 causal meant that "
            "the first query sees the first key only, also after cached keys; upgrade flash-attn"
        )
    if backend == "torch_varlen" and importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen (it came with torch 2.10)"
    return None


def use_attention(model: PreTrainedModel, implementation: str) -> None:
    """Let every layer of `model` (language model and vision tower) call a registered `implementation`."""
    model.config._attn_implementation = implementation


# ------------------------------------------------------------------------------------------ the calls
class PackedCache(Protocol):
    """Keys and values of tokens that were run before; handed down to the layers as `packed_cache=`."""

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """This call's keys and values (n, H_kv, d) -> those its queries see (m, H_kv, d), sequences end to end."""
        ...


def _attention(
    kernel: Callable[..., Tensor],
    module: nn.Module,
    query: Tensor,  # (1, H, T, d)
    key: Tensor,  # (1, H_kv, T, d)
    value: Tensor,  # (1, H_kv, T, d)
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,  # (B + 1,) int32
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    packed_cache: PackedCache | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention signature; returns ((1, T, H, d), None).

    Raises:
        AttentionError: called without `cu_seq_lens_q/k`, which would let samples see each other, or with
            something no backend computes (a mask, dropout, a sliding window, more than one row).
    """
    if cu_seq_lens_q is None or cu_seq_lens_k is None or max_length_q is None or max_length_k is None:
        raise AttentionError(
            f"{type(module).__name__} was called without cu_seq_lens_q/k and max_length_q/k; packed samples would see "
            "each other. Run the model through ilvr_ds.model.backbone, or set another attention implementation"
        )
    if query.shape[0] != 1:
        raise AttentionError(f"packed attention takes one row of packed tokens, got {query.shape[0]} rows")
    if query.shape[2] != key.shape[2]:
        raise AttentionError(
            f"{query.shape[2]} queries and {key.shape[2]} keys: transformers' own caches do not know packed sequences; "
            "hand over a packed_cache"
        )
    if attention_mask is not None or sliding_window is not None or dropout:
        raise AttentionError(
            f"packed attention has no mask, sliding window or dropout (got mask={attention_mask is not None}, "
            f"sliding_window={sliding_window}, dropout={dropout})"
        )
    causal = (module.is_causal if is_causal is None else is_causal) and max_length_q > 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, d), (T, H_kv, d) twice
    if packed_cache is not None:
        k, v = packed_cache.extend(module.layer_idx, k, v)
    bounds = Bounds(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    return kernel(q, k, v, bounds, causal, scale).unsqueeze(0), None


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, causal: bool, scale: float) -> Tensor:
    _require_half(q, "torch_varlen")
    parameters = _torch_varlen_parameters()
    options: dict[str, object] = {"scale": scale}
    if "window_size" in parameters:  # (-1, 0): everything to the left, nothing to the right
        options["window_size"] = (-1, 0) if causal else (-1, -1)
    else:
        options["is_causal"] = causal
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in parameters:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    varlen = importlib.import_module("torch.nn.attention.varlen")
    return varlen.varlen_attn(q, k, v, bounds.q, bounds.k, bounds.max_q, bounds.max_k, **options)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, causal: bool, scale: float) -> Tensor:
    _require_half(q, "flash_attn")
    module = _flash_attn_module()
    if module is None:
        raise AttentionError("no flash-attn package is installed (pip install flash-attn)")
    out = importlib.import_module(module).flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=bounds.q,
        cu_seqlens_k=bounds.k,
        max_seqlen_q=bounds.max_q,
        max_seqlen_k=bounds.max_k,
        softmax_scale=scale,
        causal=causal,
    )
    return out[0] if isinstance(out, tuple) else out  # versions 3 and 4 may add the log-sum-exp


def _require_half(query: Tensor, backend: str) -> None:
    if query.dtype not in HALF:
        raise AttentionError(
            f"model.attention={backend!r} computes in bfloat16 or float16, got {query.dtype}; set model.dtype=bfloat16 "
            "or model.attention=sdpa"
        )


@functools.cache
def _torch_varlen_parameters() -> frozenset[str]:
    """Parameter names of this torch's `varlen_attn`: `is_causal` became `window_size`, `enable_gqa` came later."""
    return frozenset(inspect.signature(importlib.import_module("torch.nn.attention.varlen").varlen_attn).parameters)


@functools.cache
def _flash_attn_module() -> str | None:
    """The module with `flash_attn_varlen_func`: version 3, else 2, else 4 (a `flash_attn` that has only `cute`)."""
    if importlib.util.find_spec("flash_attn_interface") is not None:
        return "flash_attn_interface"
    spec = importlib.util.find_spec("flash_attn")
    if spec is None:
        return None
    if spec.origin is not None:
        return "flash_attn"
    return "flash_attn.cute" if importlib.util.find_spec("flash_attn.cute") is not None else None


@functools.cache
def _aligned_to_the_last_key() -> bool:
    """The `flash_attn` package computes causal attention aligned to the last key (since 2.1), as cached calls need."""
    try:
        return Version(importlib.metadata.version("flash_attn")).release >= (2, 1)
    except (importlib.metadata.PackageNotFoundError, InvalidVersion):
        return False


for _backend, _kernel in (("flash_attn", _flash_attn), ("torch_varlen", _torch_varlen), ("sdpa", per_sequence)):
    AttentionInterface.register(REGISTERED_NAMES[_backend], functools.partial(_attention, _kernel))
