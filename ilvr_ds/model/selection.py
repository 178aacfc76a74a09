"""Which visual features of a helper image become the latents' targets. Pure functions, no module, no gradient.

The teacher asks three things of a span's helper image: what matters for the question (global query `u`), what
the text just said (local query) and what was already drawn (history). Queries are means of the teacher's last
hidden states `H`; candidates are the helper image's merged visual features, in the same space. All softmaxes,
means and cosines are in float32.

Published source: ILVR, arXiv 2512.05665, section 3; where its text leaves room, its code's outputs decide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SCORE_ELEMENTS = 2**26  # attention scores held at one time, at most: 256 MiB in fp32


def membership(segment: Tensor, count: int) -> Tensor:
    """Segment of each row (n,) int64 in [0, count) -> (n, count) float32, 1 in the row's segment. n, count may be 0."""
    return (segment[:, None] == torch.arange(count, device=segment.device)).float()


def segment_mean(values: Tensor, segment: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean of the rows of each segment.

    Args:
        values: (n, D), any float type.
        segment: (n,) int64 in [0, count).

    Returns:
        (count, D) float32, zero for an empty segment, and (count,) bool: the segment has rows.

    A product with a 0/1 matrix, so that on every device the order of summation is fixed and a row of one
    segment adds exactly nothing to another.
    """
    member = membership(segment, count)  # (n, count)
    sizes = member.sum(0)  # (count,)
    return (member.T @ values.float()) / sizes.clamp(min=1)[:, None], sizes > 0


def image_weights(queries: Tensor, keys: Tensor) -> Tensor:
    """How much the prompt looks at each image token of one sample.

    w_j = mean over heads a and prompt tokens i of softmax_j(q_ia . k_jg / sqrt(d)), renormalised to sum 1;
    key head g serves H / H_kv query heads (grouped-query attention).

    Args:
        queries: (n, H, d) of the prompt tokens, n >= 1.
        keys: (m, H_kv, d) of the image tokens, m >= 1.

    Returns:
        (m,) float32.
    """
    _, heads, size = queries.shape
    tokens, key_heads, _ = keys.shape
    grouped = queries.float().unflatten(1, (key_heads, heads // key_heads))  # (n, H_kv, H / H_kv, d)
    total = torch.zeros(tokens, device=keys.device)
    for rows in grouped.split(max(1, SCORE_ELEMENTS // (heads * tokens))):
        scores = torch.einsum("ngrd,mgd->ngrm", rows, keys.float()) / math.sqrt(size)
        total += scores.softmax(-1).sum((0, 1, 2))
    return total / total.sum()


def global_queries(
    *,
    hidden: Tensor,
    queries: Tensor,
    keys: Tensor,
    prompt_positions: Tensor,
    image_positions: Tensor,
    prompt_embeddings: Tensor,
    image_features: Tensor,
    prompt_counts: Sequence[int],
    image_counts: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """u = (sum_j w_j H[image_j] + mean_i H[prompt_i]) / 2 for every sample, w as in `image_weights`.

    A sample without image or without prompt token: u is the mean of (mean prompt token embedding, mean image
    feature), of those that exist.

    Args:
        hidden: (T, D) H.
        queries: (n, H, d) W_q H + b of all prompt tokens; keys: (m, H_kv, d) W_k H + b of all image tokens.
        prompt_positions: (n,); image_positions: (m,); both ordered by sample.
        prompt_embeddings: (n, D) token embeddings; image_features: (m, D) what the image tokens were fed.
        prompt_counts, image_counts: per sample, B each.

    Returns:
        (B, D) float32 and (B,) bool on the same device: u is defined.
    """
    rows, defined = [], []
    prompt_start = image_start = 0
    for prompts, images in zip(prompt_counts, image_counts, strict=True):
        p = slice(prompt_start, prompt_start + prompts)
        m = slice(image_start, image_start + images)
        prompt_start, image_start = p.stop, m.stop
        if prompts and images:
            weights = image_weights(queries[p], keys[m])  # (images,)
            seen = weights @ hidden[image_positions[m]].float()  # (D,)
            rows.append((seen + hidden[prompt_positions[p]].float().mean(0)) / 2)
        else:
            parts = ([prompt_embeddings[p].float().mean(0)] if prompts else []) + (
                [image_features[m].float().mean(0)] if images else []
            )
            nothing = torch.zeros(hidden.shape[1], device=hidden.device)
            rows.append(torch.stack(parts).mean(0) if parts else nothing)
        defined.append(bool(prompts or images))
    return torch.stack(rows), torch.tensor(defined).to(hidden.device)


# ------------------------------------------------------------------------------------------ candidates
def pooled_grid(height: int, width: int, limit: int) -> tuple[int, int]:
    """The grid that `height` x `width` features are pooled to: (h', w') with h' <= height, w' <= width, h' w' <= limit.

    The largest number of cells; among those the one that distorts the aspect least, |log(h'/h) - log(w'/w)|;
    among those the one with more rows. 32 x 16 to 256 gives 32 x 8, the mean of row-major pairs.
    """
    if height * width <= limit:
        return height, width
    choices = [(h, min(width, limit // h)) for h in range(1, min(height, limit) + 1)]
    return max(
        choices,
        key=lambda c: (c[0] * c[1], -round(abs(math.log(c[0] / height) - math.log(c[1] / width)), 9), c[0]),
    )


def pool_candidates(features: Tensor, height: int, width: int, limit: int) -> Tensor:
    """Features (P, D) of one image in row-major order -> at most `limit` of them, by 2-D adaptive averages.

    Every feature takes part in a mean: cell (i, j) of h' x w' averages rows floor(i h / h') to
    ceil((i + 1) h / h') and columns alike. P <= limit: returned untouched.
    """
    cells = pooled_grid(height, width, limit)
    if cells == (height, width):
        return features
    grid = features.float().T.reshape(1, -1, height, width)  # (1, D, h, w)
    return F.adaptive_avg_pool2d(grid, cells).reshape(features.shape[1], -1).T.to(features.dtype)


def pad_candidates(candidates: Sequence[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """S tensors (P_s, D) -> (S, P_max, D) padded with zeros, and (S, P_max) bool: is a candidate.

    S may be 0; `like` (any, D) gives width, type and device.
    """
    if not candidates:
        return like.new_zeros(0, 1, like.shape[1]), torch.zeros(0, 1, dtype=torch.bool, device=like.device)
    sizes = torch.tensor([len(c) for c in candidates])
    padded = torch.nn.utils.rnn.pad_sequence(list(candidates), batch_first=True)
    is_candidate = torch.arange(padded.shape[1]) < sizes[:, None]
    return padded, is_candidate.to(padded.device, non_blocking=True)


# ------------------------------------------------------------------------------------------- selection
def select(
    candidates: Tensor, is_candidate: Tensor, query: Tensor, *, coverage: float, temperature: float, latent_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The features of n spans that explain `coverage` of the probability mass, best first, at most K.

    s_j = cos(c_j, q);  p = softmax(s / temperature);  sorted descending, the smallest prefix with
    sum p >= coverage is kept, at most K of it.

    Args:
        candidates: (n, P, D); is_candidate: (n, P) bool, at least one per row; query: (n, D) float32.

    Returns:
        values (n, K, D) in the candidates' type, zero beyond the count; counts (n,) int64 in 1..K;
        bound (n,) bool: the prefix that reaches `coverage` fits into K.
    """
    scores = F.cosine_similarity(candidates.float(), query[:, None], dim=-1)  # (n, P)
    mass = (scores / temperature).masked_fill(~is_candidate, -math.inf).softmax(-1)
    mass, order = mass.sort(dim=-1, descending=True, stable=True)
    needed = 1 + (mass.cumsum(-1) < coverage).sum(-1)  # (n,) size of the smallest prefix
    needed = torch.minimum(needed, is_candidate.sum(-1))  # rounding may keep the full sum just below coverage
    counts = needed.clamp(max=latent_size)
    order = F.pad(order, (0, max(0, latent_size - order.shape[1])))[:, :latent_size]  # (n, K)
    values = candidates.gather(1, order[:, :, None].expand(-1, -1, candidates.shape[2]))  # (n, K, D)
    kept = torch.arange(latent_size, device=counts.device) < counts[:, None]
    return values.masked_fill(~kept[:, :, None], 0), counts, needed <= latent_size


def select_spans(
    *,
    candidates: Tensor,
    is_candidate: Tensor,
    global_query: Tensor,
    global_defined: Tensor,
    local_query: Tensor,
    local_defined: Tensor,
    span_sample: Sequence[int],
    coverage: float,
    temperature: float,
    latent_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`select` for every span of a pack: q = unweighted mean of the parts present of (u, local, history).

    History is the mean of the features kept for the previous span of the same sample, so spans of one sample
    follow each other; first spans of all samples are selected at once, then all second ones, and so on.

    Args:
        candidates (S, P, D), is_candidate (S, P): from `pad_candidates`.
        global_query (B, D), global_defined (B,); local_query (S, D), local_defined (S,): float32 and bool.
        span_sample: sample of each span, ascending; Python integers, so that nothing waits for the device.

    Returns:
        values (S, K, D), counts (S,), bound (S,) as in `select`. S may be 0.
    """
    spans, _, width = candidates.shape
    device = candidates.device
    values = candidates.new_zeros(spans, latent_size, width)
    counts = torch.zeros(spans, dtype=torch.int64, device=device)
    bound = torch.zeros(spans, dtype=torch.bool, device=device)
    for ordinal, members in enumerate(spans_by_ordinal(span_sample)):
        rows = torch.tensor(members).to(device, non_blocking=True)  # (n,)
        samples = torch.tensor([span_sample[s] for s in members]).to(device, non_blocking=True)
        total = global_query[samples] * global_defined[samples, None] + local_query[rows] * local_defined[rows, None]
        parts = global_defined[samples].float() + local_defined[rows].float()  # (n,)
        if ordinal:
            previous = rows - 1  # spans of a sample are neighbours
            total = total + values[previous].float().sum(1) / counts[previous, None]
            parts = parts + 1
        chosen, kept, fits = select(
            candidates[rows],
            is_candidate[rows],
            total / parts.clamp(min=1)[:, None],
            coverage=coverage,
            temperature=temperature,
            latent_size=latent_size,
        )
        values = values.index_copy(0, rows, chosen)
        counts = counts.index_copy(0, rows, kept)
        bound = bound.index_copy(0, rows, fits)
    return values, counts, bound


def spans_by_ordinal(span_sample: Sequence[int]) -> list[list[int]]:
    """Indices of all first spans, of all second spans, ...: [0, 0, 0, 2, 2] -> [[0, 3], [1, 4], [2]]."""
    groups: list[list[int]] = []
    ordinal = 0
    for index, sample in enumerate(span_sample):
        ordinal = ordinal + 1 if index and span_sample[index - 1] == sample else 0
        if ordinal == len(groups):
            groups.append([])
        groups[ordinal].append(index)
    return groups
