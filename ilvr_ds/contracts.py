"""The data that flows through the package, in flow order. Open this file first.

    Record ──build_shards──▶ shard + index ──plan──▶ Sample ──pack──▶ PackedBatch
      ──teacher──▶ TeacherTargets ──student──▶ StudentOutput ──objective──▶ LossTerms
      ──engine──▶ StepReport

Shape letters, the same everywhere: `B` samples in a micro-batch, `T` packed tokens, `L` tokens of one
sample, `D` hidden size, `S` latent spans, `K` latents in a span, `P` vision patches, `N` supervised
tokens, `V` vocabulary. Nothing here imports torch at run time but for type names, and nothing computes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from torch import Tensor

IGNORE_INDEX = -100  # label of a token that bears no loss (the value torch's cross_entropy ignores)


# ---------------------------------------------------------------------------------------- records
@dataclass(frozen=True)
class ImageRef:
    """An image a record points to: a file, a member of a tar, or the file's bytes themselves.

    `path` is absolute or relative to the reader's image root; `pictures.tar::a/b.png` is member `a/b.png` of a tar
    and `a/b.*` the one file of that name with any ending. Where `content` is there, `path` only names the image.
    """

    path: str
    # a whole image file (PNG, JPEG, ...), or what makes it: pictures that are drawn are so when somebody looks
    content: bytes | Callable[[], bytes] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Record:
    """One training example as a reader hands it over, nothing tokenised, no image opened.

    Raises nothing by itself: the readers in `ilvr_ds.data.formats` check the fields.
    """

    id: str
    prompt: tuple[str | ImageRef, ...]  # the user turn in reading order
    steps: tuple[str | ImageRef, ...]  # the assistant turn; an ImageRef is a helper image = one latent span
    answer: str | None  # the reference answer for scoring; never tokenised
    map_desc: tuple[tuple[int, ...], ...] | None  # FrozenLake map (1 start, 2 goal, 0 safe, -1 hole)
    origin: str  # "FILE:LINE", for error messages


# ---------------------------------------------------------------------------------------- samples
@dataclass(frozen=True)
class Sample:
    """One example, tokenised, its images decoded. Held in CPU memory as numpy.

    Sequence: system turn, user turn, `<|im_start|>assistant\\n`, text and spans, `<|im_end|>\\n`.
    An input image is `<|vision_start|>` + merged-token-count x `<|image_pad|>` + `<|vision_end|>`;
    a span is `<|latent_start|>` + K x `<|latent_pad|>` + `<|latent_end|>`.
    """

    number: int  # position in the index; -1 for the filler of an empty bin
    id: str
    input_ids: np.ndarray  # (L,) int64
    labels: np.ndarray  # (L,) int64, = input_ids where supervised, IGNORE_INDEX elsewhere (not shifted)
    grids: tuple[tuple[int, int, int], ...]  # (t, h, w) in patches; input images first, then helper images
    num_input_images: int
    # (P, 588) uint8: an image of grid (1, h, w) is h * w consecutive rows that hold its pixels, (14 h, 14 w, 3) RGB;
    # or (P, 1176) float32: its patches, cut, normalised and doubled in time already
    input_pixels: np.ndarray
    helper_pixels: np.ndarray
    helpers_decoded: bool = True  # False: grids are of the input images only, helper_pixels has no row


# ------------------------------------------------------------------------------------ packed batch
@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch of one rank: B samples laid end to end in one sequence of T tokens, no padding.

    Index tensors are made on the CPU by `ilvr_ds.data.packing.pack`, so that the model never has to ask
    the device where something is (each such question is a synchronisation).
    """

    sample_ids: tuple[str, ...]  # B
    sample_numbers: tuple[int, ...]  # B
    is_filler: bool  # True: this rank's bin is empty; weights are 0, collectives still run
    # tokens
    input_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (3, T) int64: temporal, height, width rotary positions; restart per sample
    cu_seqlens: Tensor  # (B + 1,) int32
    max_seqlen: int
    sample_of_token: Tensor  # (T,) int64 in [0, B)
    # images: input images of all samples in order, then helper images of all samples in order
    pixels: Tensor  # (P, 588) uint8 or (P, 1176) float32, as in Sample
    grids: tuple[tuple[int, int, int], ...]  # n_input + S grids (t, h, w), in patches; n_input where helper images
    #                                          were not decoded (nobody looks at them when latents are the student's)
    num_input_images: int
    image_positions: Tensor  # (N_image_tokens,) int64: where merged input features go, in feature order
    # latent spans, in token order
    latent_size: int  # K
    span_starts: Tensor  # (S,) int64: position of each span's first `<|latent_pad|>`
    span_sample: Tensor  # (S,) int64 in [0, B), ascending
    # what the teacher's queries average over (docs/method.md: global and local query)
    prompt_positions: Tensor  # (n,) int64: prompt tokens less image tokens and latent/vision markers
    local_positions: Tensor  # (m,) int64: assistant text before each span, special ids left out
    local_span: Tensor  # (m,) int64 in [0, S): which span each local position belongs to
    # supervision; hidden state at `supervised_positions[i]` predicts `targets[i]`
    supervised_positions: Tensor  # (N,) int64
    targets: Tensor  # (N,) int64
    ce_weights: Tensor  # (N,) float32; over all ranks and micro-batches of a step they sum to 1
    align_weights: Tensor  # (B,) float32: weight of each sample's alignment mean, same normalisation


# ----------------------------------------------------------------------------------------- teacher
@dataclass(frozen=True)
class TeacherTargets:
    """What the momentum teacher selected, per span; no gradient."""

    global_query: Tensor  # (B, D) float32: u of every sample
    values: Tensor  # (S, K, D): z_1..z_K*, zero beyond counts
    counts: Tensor  # (S,) int64: K*, 1..K
    coverage_bound: Tensor  # (S,) bool: coverage p was reached within K (False: cut at K)


# ----------------------------------------------------------------------------------------- student
@dataclass(frozen=True)
class StudentOutput:
    """The student's forward over one packed sequence."""

    hidden: Tensor  # (T, D): last hidden state after the final norm


# ------------------------------------------------------------------------------------------ losses
@dataclass(frozen=True)
class LossTerms:
    """Loss of one micro-batch as sums over known global counts: adding the terms of every micro-batch
    and every rank gives the step's loss; no further division."""

    loss: Tensor  # () float32 with gradient: ce_weight * ce + sim_weight * align
    ce: Tensor  # () float32, detached
    align: Tensor  # () float32, detached: sum over samples of align_weight * (1 - mean cos)
    ce_per_token: Tensor  # (N,) float32, detached, unweighted
    align_per_sample: Tensor  # (B,) float32, detached: 1 - mean cos; 0 where a sample has no span
    latents: Tensor  # () int64: filled latents, sum of K*
    spans: Tensor  # () int64
    coverage_bound: Tensor  # () int64: spans where coverage, not K, ended the selection


# ------------------------------------------------------------------------------------------ report
@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did, the same numbers on every rank; a line of `metrics.jsonl`."""

    step: int  # 1-based count of finished steps
    epoch: int
    loss: float
    ce: float
    align: float
    lr: float
    grad_norm: float  # before clipping
    applied: bool  # False: the optimizer skipped the step (non-finite gradient); the teacher did not move
    samples: int
    tokens: int
    micro_batches: int  # per rank
    micro_batches_lower_bound: int
    imbalance: float  # sum over micro-steps of the dearest rank's cost / sum of the mean cost
    latents_per_span: float  # mean K*; 0 without spans
    coverage_bound_fraction: float  # share of spans where coverage ended the selection
    teacher_drift: float  # ||teacher - student|| / ||student|| over tracked parameters, fp32; 0 without teacher
    data_wait_s: float  # slowest rank
    step_s: float
