"""Packing: every index of a packed batch, on the published cases and on broken samples."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ilvr_ds.contracts import IGNORE_INDEX, PackedBatch, Sample
from ilvr_ds.data.packing import FLOAT_PATCH, filler_batch, pack, special_ids
from ilvr_ds.data.pixels import PIXEL_ROW
from ilvr_ds.data.plan import StepTotals
from ilvr_ds.data.tokens import Vocabulary
from ilvr_ds.errors import BatchError

K = 3
V = Vocabulary(
    im_start=90, im_end=91, vision_start=92, vision_end=93, image_pad=94, video_pad=95,
    latent_pad=96, latent_start=97, latent_end=98, assistant=99, size=100, fingerprint="test",
)  # fmt: skip
SPAN = [V.latent_start, *[V.latent_pad] * K, V.latent_end]


def image(h: int, w: int) -> list[int]:
    return [V.vision_start, *[V.image_pad] * (h * w // 4), V.vision_end]


def sample(name: str = "s", user=(5, (2, 4), 6), steps=(10, 11, (2, 2), 12, (4, 2), 13), number: int = 0) -> Sample:
    """A number is a text token, a pair the grid of an image (in the user turn) or of a helper (in the steps)."""
    inputs = [part for part in user if isinstance(part, tuple)]
    helpers = [part for part in steps if isinstance(part, tuple)]
    ids = [V.im_start, 1]
    for part in user:
        ids += image(*part) if isinstance(part, tuple) else [part]
    ids += [V.im_end, 2, V.im_start, V.assistant, 2]
    prompt = len(ids) - 1
    for part in steps:
        ids += SPAN if isinstance(part, tuple) else [part]
    input_ids = np.array([*ids, V.im_end, 2])
    labels = np.where((np.arange(len(input_ids)) < prompt) | (input_ids == V.latent_pad), IGNORE_INDEX, input_ids)
    grids = tuple((1, h, w) for h, w in (*inputs, *helpers))
    rows = sum(h * w for _, h, w in grids)
    pixels = np.full((rows, PIXEL_ROW), number, np.uint8)
    pixels[:, 0] = np.arange(rows)
    of_inputs = sum(h * w for h, w in inputs)
    return Sample(number, name, input_ids, labels, grids, len(inputs), pixels[:of_inputs], pixels[of_inputs:])


def totals_of(samples: list[Sample]) -> StepTotals:
    return StepTotals(
        samples=len(samples),
        supervised=sum(int((s.labels != IGNORE_INDEX).sum()) for s in samples),
        spans=sum(len(s.grids) - s.num_input_images for s in samples),
        tokens=sum(len(s.input_ids) for s in samples),
    )


THREE = [
    sample("a", number=7),
    sample("b", user=(5, 6), steps=(10, 11), number=8),  # no image, no span
    sample("c", user=((2, 2), (4, 4)), steps=((2, 4), (2, 2)), number=9),  # spans with no text before them
]


def pack_alone(s: Sample, **more) -> PackedBatch:
    return pack([s], V, K, **({"totals": totals_of([s])} | more))


def test_one_sample_index_by_index():
    #       0 1 2 3  4  5  6  7 8   9 10 11 12  13 14 15   16..18 19  20 21   22..24 25  26 27  28
    # ids: <s 1 5 <v im im v> 6 e> 2 <s as  2  10 11 <l   pads   l>  12 <l   pads   l>  13 e>   2
    b = pack_alone(sample())
    assert b.input_ids.shape == (29,)
    assert b.cu_seqlens.tolist() == [0, 29] and b.cu_seqlens.dtype == torch.int32 and b.max_seqlen == 29
    assert b.image_positions.tolist() == [4, 5]
    assert b.span_starts.tolist() == [16, 22] and b.span_sample.tolist() == [0, 0]
    assert b.prompt_positions.tolist() == [0, 1, 2, 7, 8, 9]  # system, chat markers; no image token, no vision marker
    assert b.local_positions.tolist() == [10, 11, 12, 13, 14, 20]  # from <|im_start|> of the turn; between the spans
    assert b.local_span.tolist() == [0, 0, 0, 0, 0, 1]
    # hidden state t predicts t + 1; pads are not predicted, markers and the final newline are
    assert b.supervised_positions.tolist() == [11, 12, 13, 14, 18, 19, 20, 24, 25, 26, 27]
    assert b.targets.tolist() == b.input_ids[b.supervised_positions + 1].tolist()
    assert b.targets.tolist() == [2, 10, 11, 97, 98, 12, 97, 98, 13, 91, 2]
    assert b.grids == ((1, 2, 4), (1, 2, 2), (1, 4, 2)) and b.num_input_images == 1
    assert b.position_ids[:, 3:8].tolist() == [[3, 4, 4, 6, 7], [3, 4, 4, 6, 7], [3, 4, 5, 6, 7]]
    assert not b.is_filler and b.sample_ids == ("s",)


def assert_concatenation(packed: PackedBatch, singles: list[PackedBatch]) -> None:
    """`packed` is the singles end to end, each index shifted by what lies before it."""
    tokens = np.cumsum([0, *[len(s.input_ids) for s in singles]]).tolist()
    spans = np.cumsum([0, *[len(s.span_starts) for s in singles]]).tolist()

    def joined(name: str, offsets: list[int] | None = None, dim: int = 0) -> torch.Tensor:
        parts = [getattr(s, name) for s in singles]
        return torch.cat(parts if offsets is None else [p + o for p, o in zip(parts, offsets, strict=False)], dim)

    for name in ("image_positions", "span_starts", "prompt_positions", "local_positions", "supervised_positions"):
        assert torch.equal(getattr(packed, name), joined(name, tokens)), name
    for name in ("input_ids", "targets"):
        assert torch.equal(getattr(packed, name), joined(name)), name
    assert torch.equal(packed.position_ids, joined("position_ids", dim=1))  # restart at 0 in every sample
    assert packed.cu_seqlens.tolist() == tokens
    assert packed.max_seqlen == max(s.max_seqlen for s in singles)
    numbers = list(range(len(singles)))
    assert torch.equal(packed.sample_of_token, joined("sample_of_token", numbers))
    assert torch.equal(packed.span_sample, joined("span_sample", numbers))
    assert torch.equal(packed.local_span, joined("local_span", spans))
    inputs = [s.grids[: s.num_input_images] for s in singles]
    helpers = [s.grids[s.num_input_images :] for s in singles]
    assert packed.grids == tuple(g for grids in inputs + helpers for g in grids)
    assert packed.num_input_images == sum(map(len, inputs))
    cut = [sum(h * w for _, h, w in grids) for grids in inputs]
    rows = [s.pixels[:c] for s, c in zip(singles, cut, strict=True)]
    rows += [s.pixels[c:] for s, c in zip(singles, cut, strict=True)]
    assert torch.equal(packed.pixels, torch.cat(rows))


def test_packed_is_the_concatenation_of_singles():
    assert_concatenation(pack(THREE, V, K, totals=totals_of(THREE)), [pack_alone(s) for s in THREE])


def test_nothing_is_supervised_across_samples():
    packed = pack(THREE, V, K, totals=totals_of(THREE))
    same = (
        packed.sample_of_token[packed.supervised_positions] == packed.sample_of_token[packed.supervised_positions + 1]
    )
    assert same.all()


def test_span_without_text_before_it_has_no_local_query():
    b = pack_alone(THREE[2])
    assert b.local_span.unique().tolist() == [0]  # the first has the turn's opening, the second nothing


def golden_samples(golden) -> tuple[Vocabulary, int, list[Sample]]:
    facts = json.loads((golden / "ilvr_open.json").read_text(encoding="utf-8"))
    tensors = load_file(golden / "ilvr_open.safetensors")
    ids = facts["ids"]
    names = (
        "im_start",
        "im_end",
        "vision_start",
        "vision_end",
        "latent_pad",
        "latent_start",
        "latent_end",
        "assistant",
    )
    vocabulary = Vocabulary(
        **{name: ids[name] for name in names}, image_pad=ids["image"], video_pad=ids["video"], size=320, fingerprint=""
    )
    samples = []
    while f"case{len(samples)}.input_ids" in tensors:
        case = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"case{len(samples)}.")}
        inputs, none = case["image_grid_thw"].tolist(), torch.zeros(0, FLOAT_PATCH)
        helpers = case["image_grid_thw_latent"].tolist() if "image_grid_thw_latent" in case else []
        samples.append(
            Sample(
                number=len(samples),
                id=f"case{len(samples)}",
                input_ids=case["input_ids"][0].numpy(),
                labels=case["labels"][0].numpy(),
                grids=tuple(tuple(g) for g in inputs + helpers),
                num_input_images=len(inputs),
                input_pixels=case["pixel_values"].float().numpy(),
                helper_pixels=case.get("pixel_values_latent", none).float().numpy(),
            )
        )
    return vocabulary, facts["latent_size"], samples


def test_golden_cases_packed(golden):
    vocabulary, latent_size, samples = golden_samples(golden)
    assert len(samples) == 7
    tensors = load_file(golden / "ilvr_open.safetensors")
    singles = [pack([s], vocabulary, latent_size, totals=totals_of(samples)) for s in samples]
    packed = pack(samples, vocabulary, latent_size, totals=totals_of(samples))
    assert_concatenation(packed, singles)
    assert packed.ce_weights.sum().item() == pytest.approx(1, abs=1e-6)
    for s, single in zip(samples, singles, strict=True):  # pads are where the published code says
        mask = tensors[f"{s.id}.image_out_mask"].flatten().bool()
        ours = torch.zeros_like(mask)
        ours[(single.span_starts[:, None] + torch.arange(latent_size)).flatten()] = True
        assert torch.equal(ours, mask), s.id


@pytest.mark.parametrize("reduction", ["sample", "token"])
def test_weights_over_the_micro_batches_of_a_step_sum_to_one(reduction):
    totals = totals_of(THREE)
    batches = [pack(THREE[:1], V, K, totals=totals, reduction=reduction)]
    batches += [pack(THREE[1:], V, K, totals=totals, reduction=reduction), filler_batch(V, K)]
    ce = torch.cat([b.ce_weights for b in batches])
    align = torch.cat([b.align_weights for b in batches])
    assert ce.dtype == align.dtype == torch.float32
    assert ce.sum().item() == pytest.approx(1, abs=1e-6) and align.sum().item() == pytest.approx(1, abs=1e-6)
    if reduction == "sample":
        per_sample = torch.zeros(3)
        per_sample.index_add_(0, torch.repeat_interleave(torch.arange(3), torch.tensor([11, 5, 7])), ce[:23])
        torch.testing.assert_close(per_sample, torch.full((3,), 1 / 3))
        torch.testing.assert_close(align[:3], torch.full((3,), 1 / 3))
    else:
        torch.testing.assert_close(ce[:23], torch.full((23,), 1 / 23))
        torch.testing.assert_close(align[:3], torch.tensor([2 / 4, 0, 2 / 4]))


def test_token_reduction_without_any_span():
    b = pack_alone(THREE[1], reduction="token")
    assert b.align_weights.tolist() == [0.0] and b.ce_weights.sum().item() == pytest.approx(1)


def test_filler_has_one_of_everything_and_weighs_nothing():
    b = filler_batch(V, K)
    assert b.is_filler and b.sample_numbers == (-1,)
    assert b.num_input_images == 1 and b.grids == ((1, 2, 2), (1, 2, 2)) and b.pixels.shape == (8, PIXEL_ROW)
    assert len(b.image_positions) == len(b.span_starts) == 1
    assert len(b.prompt_positions) and len(b.local_positions) and len(b.supervised_positions) == 3
    assert b.targets.tolist() == [V.latent_start, V.latent_end, V.im_end]
    assert b.ce_weights.tolist() == [0.0] * 3 and b.align_weights.tolist() == [0.0]


def test_special_ids_keep_chat_markers():
    assert V.im_start not in special_ids(V) and V.im_end not in special_ids(V)
    assert {V.image_pad, V.vision_start, V.latent_pad, V.latent_start, V.latent_end} <= set(special_ids(V))


def edit(**change) -> Sample:
    return dataclasses.replace(sample("broken"), **change)


def with_id(position: int, value: int) -> Sample:
    s = sample("broken")
    s.input_ids[position] = value
    s.labels[position] = value if s.labels[position] != IGNORE_INDEX else IGNORE_INDEX
    return s


def with_label(position: int, value: int) -> Sample:
    s = sample("broken")
    s.labels[position] = value
    return s


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (edit(grids=((1, 2, 2), (1, 2, 2), (1, 4, 2)), input_pixels=sample().input_pixels[:4]), "2 image tokens"),
        (edit(grids=((1, 2, 2), (1, 2, 4), (1, 4, 2))), "input_pixels"),  # in all as many rows
        (edit(grids=((1, 2, 4), (1, 2, 2))), "helper_pixels"),
        (edit(grids=((1, 2, 4), (1, 2, 2), (1, 3, 2))), "even"),
        (edit(grids=((2, 2, 4), (1, 2, 2), (1, 4, 2))), "even"),
        (edit(input_pixels=sample().input_pixels[:-1]), "input_pixels"),
        (edit(helper_pixels=sample().helper_pixels[:-1]), "helper_pixels"),
        (edit(input_pixels=sample().input_pixels.astype(np.float32)), "input_pixels"),
        (edit(helper_pixels=sample().helper_pixels[:, :-1]), "helper_pixels"),
        (edit(num_input_images=4), "4 input images"),
        (edit(labels=sample().labels[:-1]), "differ"),
        (with_id(4, 5), "1 image tokens"),
        (with_id(11, 5), "assistant"),  # no assistant turn
        (with_id(15, 5), "1 latent spans for 2 helper images"),
        (with_id(17, 5), "latent pads"),  # something else inside a span
        (with_id(19, 5), "end at"),  # a span without an end
        (with_id(20, V.latent_pad), "stray|latent pads|supervised"),  # a pad outside a span
        (with_label(16, V.latent_pad), "pad is supervised"),
        (with_label(13, 3), "labels differ"),
        (with_label(2, 5), "prompt"),
        (edit(labels=np.full(29, IGNORE_INDEX)), "no supervised"),
    ],
)
def test_a_sample_that_does_not_fit_its_plan_is_named(broken, says):
    with pytest.raises(BatchError, match=says) as caught:
        pack([THREE[0], broken], V, K, totals=totals_of(THREE))
    assert "'broken'" in str(caught.value)


def test_span_length_is_the_recipes():
    with pytest.raises(BatchError, match=r"latent\.size is 4"):
        pack([THREE[0]], V, K + 1, totals=totals_of(THREE))


def test_mixed_pixel_kinds_and_empty_batches_are_refused():
    floats = [
        np.zeros((len(rows), FLOAT_PATCH), np.float32) for rows in (sample().input_pixels, sample().helper_pixels)
    ]
    with pytest.raises(BatchError, match="different kinds"):
        pack([THREE[0], edit(input_pixels=floats[0], helper_pixels=floats[1])], V, K, totals=totals_of(THREE))
    with pytest.raises(BatchError, match="different kinds"):
        pack([edit(helper_pixels=floats[1])], V, K, totals=totals_of(THREE))
    with pytest.raises(ValueError, match="filler_batch"):
        pack([], V, K, totals=totals_of(THREE))


def test_pixels_that_lie_in_the_batchs_order_are_not_copied():
    copied = pack(THREE, V, K, totals=totals_of(THREE))
    rows = copied.pixels.numpy().copy()
    laid = pack(THREE, V, K, totals=totals_of(THREE), pixels=rows)
    assert laid.pixels.data_ptr() == rows.ctypes.data and torch.equal(laid.pixels, copied.pixels)
    with pytest.raises(ValueError, match="rows of pixels"):
        pack(THREE, V, K, totals=totals_of(THREE), pixels=rows[:-1])
