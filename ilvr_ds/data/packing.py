"""Samples of one bin laid end to end: `pack` turns them into the `PackedBatch` a rank runs.

No token is padding. All index tensors the model needs are computed here, on the CPU, and each sample is
checked against its own plan (image tokens against grids, spans against helper images) before it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from ilvr_ds.contracts import IGNORE_INDEX, PackedBatch, Sample
from ilvr_ds.data.images import MERGE
from ilvr_ds.data.pixels import PIXEL_ROW
from ilvr_ds.data.plan import StepTotals
from ilvr_ds.data.rotary_positions import rotary_positions
from ilvr_ds.errors import BatchError

if TYPE_CHECKING:
    from ilvr_ds.data.tokens import Vocabulary

FLOAT_PATCH = 2 * PIXEL_ROW  # of a patch that is normalised and doubled in time
_PIXEL_KINDS = (((PIXEL_ROW,), np.dtype("uint8")), ((FLOAT_PATCH,), np.dtype("float32")))  # shape of a row, type
_REBUILD = "rebuild the shards with data_tools/build_shards.py (data_tools/check_shards.py finds all such samples)"


def special_ids(vocabulary: Vocabulary) -> tuple[int, ...]:
    """Ids the teacher's queries leave out: image tokens, vision markers, latent tokens and latent markers.

    Chat markers stay: the prompt includes them (docs/method.md), and the first local query begins at `<|im_start|>`.
    """
    v = vocabulary
    return (v.image_pad, v.video_pad, v.vision_start, v.vision_end, v.latent_pad, v.latent_start, v.latent_end)


@dataclass(frozen=True)
class _Layout:
    """Where things are in one sample; positions count from the sample's first token."""

    rotary: np.ndarray  # (3, L)
    images: np.ndarray  # positions of image tokens
    span_starts: np.ndarray  # (S,)
    prompt: np.ndarray
    local: np.ndarray  # assistant text before each span
    local_span: np.ndarray  # which span of the sample, same length as local
    supervised: np.ndarray  # (N,) positions whose next token is a target


def pack(
    samples: Sequence[Sample],
    vocabulary: Vocabulary,
    latent_size: int,
    *,
    totals: StepTotals,
    reduction: Literal["sample", "token"] = "sample",
    pixels: np.ndarray | None = None,
) -> PackedBatch:
    """Pack `samples`, in the order given, into one micro-batch.

    The weights make the step's loss a plain sum over all ranks and micro-batches; n_i are the supervised
    tokens of sample i, S_i its spans, and the totals are those of the whole optimizer step:

    - reduction "sample": ce_weight = 1 / (n_i * samples), align_weight = 1 / samples
    - reduction "token":  ce_weight = 1 / sum(n), align_weight = S_i / sum(S) (0 in a step without spans)

    Args:
        samples: at least one; an empty bin is `filler_batch`.
        latent_size: K, the number of `<|latent_pad|>` in every span.
        totals: of the optimizer step, from `StepPlan.totals`.
        pixels: (P, 588), where the samples' pixels are parts of one array in the batch's order already (`lay_out`);
            otherwise they are copied together.

    Raises:
        BatchError: a sample that does not fit its own plan, named by its id.
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("pack() needs at least one sample; an empty bin is filler_batch()")
    layouts = [_layout(sample, vocabulary, latent_size) for sample in samples]
    kinds = {(part.shape[1], part.dtype.name) for sample in samples for part in _pixels(sample)}
    if len({sample.helpers_decoded for sample in samples}) > 1:
        raise BatchError(f"samples {[s.id for s in samples]}: helper images decoded for some of them only")
    if len(kinds) > 1:
        raise BatchError(f"samples {[s.id for s in samples]}: pixels of different kinds in one batch: {sorted(kinds)}")
    lengths = np.array([len(sample.input_ids) for sample in samples])
    offsets = np.concatenate([[0], np.cumsum(lengths)])  # (B + 1,)
    spans_before = np.concatenate([[0], np.cumsum([len(layout.span_starts) for layout in layouts])])

    def shifted(name: str) -> torch.Tensor:
        parts = [getattr(layout, name) + offset for layout, offset in zip(layouts, offsets[:-1], strict=True)]
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    input_ids = torch.from_numpy(np.concatenate([s.input_ids for s in samples]).astype(np.int64))  # (T,)
    supervised = shifted("supervised")  # (N,)
    in_order = [s.input_pixels for s in samples] + [s.helper_pixels for s in samples]
    if pixels is None:
        pixels = np.concatenate(in_order)
    elif len(pixels) != sum(map(len, in_order)):
        raise ValueError(f"{len(pixels)} rows of pixels for samples of {sum(map(len, in_order))}")
    ce_weights, align_weights = _weights(layouts, totals, reduction)
    batch_of_span = np.repeat(np.arange(len(samples)), np.diff(spans_before))
    return PackedBatch(
        sample_ids=tuple(s.id for s in samples),
        sample_numbers=tuple(s.number for s in samples),
        is_filler=False,
        input_ids=input_ids,
        position_ids=torch.from_numpy(np.concatenate([layout.rotary for layout in layouts], axis=1)),
        cu_seqlens=torch.from_numpy(offsets.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        sample_of_token=torch.from_numpy(np.repeat(np.arange(len(samples)), lengths)),
        pixels=torch.from_numpy(pixels),
        grids=tuple(g for s in samples for g in s.grids[: s.num_input_images])
        + tuple(g for s in samples for g in s.grids[s.num_input_images :]),
        num_input_images=sum(s.num_input_images for s in samples),
        image_positions=shifted("images"),
        latent_size=latent_size,
        span_starts=shifted("span_starts"),
        span_sample=torch.from_numpy(batch_of_span),
        prompt_positions=shifted("prompt"),
        local_positions=shifted("local"),
        local_span=torch.from_numpy(
            np.concatenate([lay.local_span + before for lay, before in zip(layouts, spans_before[:-1], strict=True)])
        ),
        supervised_positions=supervised,
        targets=input_ids[supervised + 1],
        ce_weights=torch.from_numpy(ce_weights),
        align_weights=torch.from_numpy(align_weights),
    )


def check_sample(sample: Sample, vocabulary: Vocabulary, latent_size: int) -> None:
    """Raise the BatchError that `pack` would raise for this sample."""
    _layout(sample, vocabulary, latent_size)


def filler_batch(vocabulary: Vocabulary, latent_size: int) -> PackedBatch:
    """What a rank with an empty bin runs: every module once, every weight zero.

    One sample with a 2x2-patch input image, one span with a 2x2-patch helper image, text before, between and
    after, so that vision tower, teacher, head and alignment all take part in the collectives.
    """
    v = vocabulary
    span = [v.latent_start] + [v.latent_pad] * latent_size + [v.latent_end]
    user = [v.im_start, v.vision_start, v.image_pad, v.vision_end, v.im_end]
    ids = np.array([*user, v.im_start, v.assistant, *span, v.im_end], dtype=np.int64)
    labels = np.full_like(ids, IGNORE_INDEX)
    for position in (len(user) + 2, len(ids) - 2, len(ids) - 1):  # latent_start, latent_end, im_end
        labels[position] = ids[position]
    sample = Sample(
        number=-1,
        id="<filler>",
        input_ids=ids,
        labels=labels,
        grids=((1, MERGE, MERGE), (1, MERGE, MERGE)),
        num_input_images=1,
        input_pixels=np.full((MERGE * MERGE, PIXEL_ROW), 128, dtype=np.uint8),
        helper_pixels=np.full((MERGE * MERGE, PIXEL_ROW), 128, dtype=np.uint8),
    )
    batch = pack(
        [sample], vocabulary, latent_size, totals=StepTotals(samples=1, supervised=3, spans=1, tokens=len(ids))
    )
    return replace(
        batch,
        is_filler=True,
        ce_weights=torch.zeros_like(batch.ce_weights),
        align_weights=torch.zeros_like(batch.align_weights),
    )


def _weights(layouts: list[_Layout], totals: StepTotals, reduction: str) -> tuple[np.ndarray, np.ndarray]:
    """(N,) and (B,) float32, see `pack`."""
    supervised = np.array([len(layout.supervised) for layout in layouts])
    spans = np.array([len(layout.span_starts) for layout in layouts])
    if reduction == "sample":
        per_token = 1.0 / (supervised * totals.samples)
        align = np.full(len(layouts), 1.0 / totals.samples)
    elif reduction == "token":
        per_token = np.full(len(layouts), 1.0 / totals.supervised)
        align = spans / max(totals.spans, 1)
    else:
        raise ValueError(f"reduction={reduction!r}: 'sample' or 'token'")
    return np.repeat(per_token, supervised).astype(np.float32), align.astype(np.float32)


def _layout(sample: Sample, v: Vocabulary, latent_size: int) -> _Layout:
    """Find and check everything about one sample; raises BatchError with its id."""
    ids, labels = sample.input_ids, sample.labels
    if ids.ndim != 1 or ids.shape != labels.shape:
        raise _unfit(sample, f"input_ids {ids.shape} and labels {labels.shape} differ")
    _check_images(sample)
    input_grids = sample.grids[: sample.num_input_images]
    images = np.flatnonzero(ids == v.image_pad)
    expected = sum(h * w for _, h, w in input_grids) // MERGE**2
    if len(images) != expected:
        raise _unfit(sample, f"{len(images)} image tokens, its {len(input_grids)} input images need {expected}")
    try:
        rotary = rotary_positions(ids, input_grids, v.image_pad, MERGE)
    except BatchError as error:
        raise BatchError(f"sample {sample.id!r}: {error}") from None

    turns = np.flatnonzero((ids[:-1] == v.im_start) & (ids[1:] == v.assistant))
    if len(turns) == 0:
        raise _unfit(sample, "no assistant turn (no <|im_start|> followed by 'assistant')")
    turn = int(turns[0])
    starts = np.flatnonzero(ids == v.latent_start) + 1  # (S,) first pad of each span
    spans, helpers = len(starts), len(sample.grids) - sample.num_input_images
    if helpers != (spans if sample.helpers_decoded else 0):
        raise _unfit(sample, f"{spans} latent spans for {helpers} helper images")
    _check_spans(sample, starts, turn, v, latent_size)
    supervised = _supervised(sample, turn, v)

    ordinary = np.ones(len(ids), dtype=bool)  # (L,)
    for special in special_ids(v):
        ordinary &= ids != special
    begins = [turn, *(starts[:-1] + latent_size + 1).tolist()]
    local = [b + np.flatnonzero(ordinary[b : start - 1]) for b, start in zip(begins, starts.tolist(), strict=False)]
    return _Layout(
        rotary=rotary,
        images=images,
        span_starts=starts,
        prompt=np.flatnonzero(ordinary[:turn]),
        local=np.concatenate([*local, np.zeros(0, np.int64)]),
        local_span=np.repeat(np.arange(spans), [len(part) for part in local]),
        supervised=supervised,
    )


def _unfit(sample: Sample, message: str) -> BatchError:
    return BatchError(f"sample {sample.id!r}: {message}; {_REBUILD}")


def _pixels(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    return sample.input_pixels, sample.helper_pixels


def _check_images(sample: Sample) -> None:
    """Grids are those of still images, and the pixels are of these grids."""
    inputs = sample.num_input_images
    if not 0 <= inputs <= len(sample.grids):
        raise _unfit(sample, f"{inputs} input images of {sample.grids}")
    for number, (t, h, w) in enumerate(sample.grids):
        if t != 1 or h < MERGE or w < MERGE or h % MERGE or w % MERGE:
            raise _unfit(sample, f"image {number} has the grid {(t, h, w)}; expected (1, even, even)")
    of_grids = (sample.grids[:inputs], sample.grids[inputs:])
    for name, pixels, grids in zip(("input_pixels", "helper_pixels"), _pixels(sample), of_grids, strict=True):
        rows = sum(t * h * w for t, h, w in grids)
        if pixels.shape[:1] != (rows,):
            raise _unfit(sample, f"{name} {pixels.shape}, its grids need {rows} rows")
        if (pixels.shape[1:], pixels.dtype) not in _PIXEL_KINDS:
            raise _unfit(
                sample, f"{name} of shape {pixels.shape} and type {pixels.dtype}; allowed: {list(_PIXEL_KINDS)}"
            )


def _supervised(sample: Sample, turn: int, v: Vocabulary) -> np.ndarray:
    """(N,) positions whose next token is a target, at least one."""
    ids, labels = sample.input_ids, sample.labels
    kept = labels != IGNORE_INDEX
    if kept[: turn + 2].any():
        raise _unfit(sample, "a label in the prompt is not ignored")
    targets = ids[kept]
    if (labels[kept] != targets).any():
        raise _unfit(sample, "labels differ from input_ids where they are supervised")
    if (targets == v.latent_pad).any():
        raise _unfit(sample, "a latent pad is supervised")
    supervised = np.flatnonzero(kept[1:])
    if len(supervised) == 0:
        raise _unfit(sample, "no supervised token")
    return supervised


def _check_spans(sample: Sample, starts: np.ndarray, turn: int, v: Vocabulary, latent_size: int) -> None:
    """Every span is start, exactly `latent_size` pads, end, inside the assistant turn, and there is no stray pad."""
    ids = sample.input_ids
    pads = ids == v.latent_pad
    ends = np.flatnonzero(ids == v.latent_end)
    hint = f"(latent.size is {latent_size}; was it another number when the shards were built?)"
    if (starts <= turn + 2).any():
        raise _unfit(sample, "a latent span before the assistant's text")
    if len(ends) != len(starts) or (ends != starts + latent_size).any():
        raise _unfit(
            sample,
            f"spans begin at {starts.tolist()} and end at {ends.tolist()}, not {latent_size} pads later {hint}",
        )
    inside = starts[:, None] + np.arange(latent_size)  # (S, K)
    if not pads[inside].all():
        raise _unfit(sample, f"a span holds something else than latent pads {hint}")
    if np.count_nonzero(pads) != inside.size:
        raise _unfit(sample, f"{np.count_nonzero(pads)} latent pads, the spans need {inside.size} {hint}")
