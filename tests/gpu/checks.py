"""What the GPU tests check, as functions of the device.

tests/unit/test_gpu_benchmark.py runs the same functions on the CPU, so that only what a GPU alone can show is
left for one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor
from transformers import AttentionInterface

from ilvr_ds.config import LatentConfig, LossConfig, TeacherConfig
from ilvr_ds.contracts import PackedBatch, Sample
from ilvr_ds.data.packing import pack
from ilvr_ds.data.plan import StepTotals
from ilvr_ds.model.backbone import Backbone
from ilvr_ds.model.host_plan import host_plan, to_device
from ilvr_ds.model.placement import filled_slots
from ilvr_ds.model.teacher import Teacher
from ilvr_ds.model.varlen_attention import REGISTERED_NAMES, AttentionName, missing_for
from ilvr_ds.objective.alignment import AlignmentObjective

REPOSITORY = Path(__file__).resolve().parents[2]
LATENTS = 4


def load_script(path: str) -> ModuleType:
    """A Python file of the repository that is in no package, as a module."""
    name = path.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, REPOSITORY / path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    return sys.modules[name]


synthetic = load_script("benchmarks/synthetic.py")


# --------------------------------------------------------------------------------------- attention
@dataclass(frozen=True)
class AttentionCase:
    """Sequences packed end to end, and the heads that attend over them."""

    lengths: tuple[int, ...]
    heads: int
    key_heads: int
    size: int  # of a head
    causal: bool
    dtype: torch.dtype

    @property
    def bounds(self) -> list[tuple[int, int]]:
        ends = torch.tensor([0, *self.lengths]).cumsum(0).tolist()
        return list(pairwise(ends))


def attention_inputs(case: AttentionCase, device: torch.device | str, seed: int = 0) -> list[Tensor]:
    """q (T, H, d), k and v (T, H_kv, d), and the gradient of the output (T, H, d), standard normal, in the case's type.

    Drawn on the CPU, so that every device gets the same values.
    """
    generator = torch.Generator().manual_seed(seed)
    heads = (case.heads, case.key_heads, case.key_heads, case.heads)
    shapes = [(sum(case.lengths), h, case.size) for h in heads]
    return [torch.randn(shape, generator=generator).to(case.dtype).to(device) for shape in shapes]


def run_backend(backend: str, case: AttentionCase, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Output and gradients through the function transformers calls, with the layouts its layers hand over."""
    *qkv, upstream = inputs
    qkv = [x.detach().clone().requires_grad_() for x in qkv]
    bounds = torch.tensor([0, *(end for _, end in case.bounds)], dtype=torch.int32, device=upstream.device)
    longest = max(case.lengths)
    out, _ = AttentionInterface()[REGISTERED_NAMES[backend]](
        SimpleNamespace(is_causal=True),
        *(x.transpose(0, 1).unsqueeze(0) for x in qkv),  # (1, H, T, d)
        None,
        is_causal=case.causal,
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=longest,
        max_length_k=longest,
    )
    gradients = torch.autograd.grad(out[0], qkv, upstream)
    return dict(zip(("out", "dq", "dk", "dv"), (out[0].detach(), *gradients), strict=True))


def run_reference(case: AttentionCase, inputs: list[Tensor]) -> dict[str, Tensor]:
    """softmax(q k^T / sqrt(d)) v, one sequence after the other, in float64 so that its own rounding does not count."""
    q, k, v, upstream = (x.detach().double() for x in inputs)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    parts = []
    for start, end in case.bounds:
        part = q[start:end]
        keys, values = (x[start:end].repeat_interleave(case.heads // case.key_heads, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", part, keys) / case.size**0.5
        if case.causal:
            future = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    out = torch.cat(parts)
    gradients = torch.autograd.grad(out, leaves, upstream)
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *gradients), strict=True))


def attention_errors(backend: str, case: AttentionCase, device: torch.device | str) -> dict[str, float]:
    """Per tensor: the worst sequence's root mean square error, over the root mean square of the whole reference."""
    inputs = attention_inputs(case, device)
    got, wanted = run_backend(backend, case, inputs), run_reference(case, inputs)
    errors = {}
    for name, reference in wanted.items():
        difference = got[name].double() - reference
        worst = max(_rms(difference[start:end]) for start, end in case.bounds)
        errors[name] = worst / _rms(reference)
    return errors


def attention_leaks(backend: str, case: AttentionCase, device: torch.device | str, own: tuple[int, ...]) -> list[str]:
    """What of the sequences `own` changes, by a bit, when everything in the other sequences does; nothing should.

    Also what gradient reaches the others when only `own` has a loss: exactly zero.
    """
    inputs = attention_inputs(case, device)
    mask = torch.zeros(sum(case.lengths), dtype=torch.bool, device=inputs[0].device)
    for number in own:
        mask[slice(*case.bounds[number])] = True
    changed = [torch.where(mask[:, None, None], x, -3 * x.roll(1, 0)) for x in inputs]
    first, second = run_backend(backend, case, inputs), run_backend(backend, case, changed)
    leaks = [f"{name} changed" for name in first if not torch.equal(first[name][mask], second[name][mask])]
    *qkv, upstream = inputs
    alone = run_backend(backend, case, [*qkv, upstream * mask[:, None, None]])
    return leaks + [f"{name} reaches neighbours" for name in ("dq", "dk", "dv") if alone[name][~mask].any()]


def _rms(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()


def available_backends(device: torch.device | str, dtype: torch.dtype) -> list[str]:
    """Attention backends that can run there."""
    return [b for b in REGISTERED_NAMES if missing_for(b, torch.device(device), dtype) is None]


# --------------------------------------------------------------------------------------- objective
def small_objective(
    device: torch.device | str, dtype: torch.dtype, backend: AttentionName, *, checkpointing: bool = False
) -> AlignmentObjective:
    """Student and teacher of `synthetic.TINY`, different weights, the same on every device but for rounding."""
    network = synthetic.random_network(synthetic.TINY.config(), device="cpu", dtype=torch.float32)
    _draw(network, seed=0)
    student = Backbone(
        _cast(network, dtype).to(device), attention=backend, device=device, gradient_checkpointing=checkpointing
    )
    teacher = Teacher.of(student, TeacherConfig())
    _draw(teacher.language_model, seed=1)
    return AlignmentObjective(student, teacher, LatentConfig(size=LATENTS, noise_std=0.01), LossConfig()).train()


@torch.no_grad()
def _draw(module: torch.nn.Module, seed: int) -> None:
    """Matrices of gain about one, so that activations, choices and gradients are of order one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        else:
            parameter.add_((0.1 * noise).to(parameter))


def _cast(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Parameters only: rotary frequencies stay in float32, as `from_pretrained(dtype=...)` leaves them."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def small_samples() -> list[Sample]:
    """Three samples with six spans, whose helper images have few candidates that are far from alike.

    Which candidate comes first is a discrete choice; were two nearly alike, rounding would decide it. With these
    samples the choices are the same after every weight was changed by 2 %, ten times bfloat16's rounding.
    """
    lengths = synthetic.SampleLengths(spans=(1, 2), text=(10, 60), image=(2, 4))
    shape = dataclasses.replace(synthetic.TINY, lengths=lengths)
    return synthetic.random_samples(3, shape, LATENTS, seed=3)


def pack_small(samples: list[Sample], of_step: int) -> PackedBatch:
    """One micro-batch of a step of `of_step` samples."""
    totals = StepTotals(samples=of_step, supervised=1, spans=1, tokens=1)
    return pack(samples, synthetic.TINY.vocabulary, LATENTS, totals=totals)


@dataclass(frozen=True)
class Outcome:
    """Loss terms and gradient of some samples, each in whatever micro-batch it ran."""

    ce: Tensor  # (N,) float32 per supervised token
    align: Tensor  # (B,) float32
    targets: list[Tensor]  # per micro-batch: (sum of K*, D) selected targets
    gradient: Tensor  # (parameters,) float32 of the sum of all losses


def run_objective(objective: AlignmentObjective, batches: list[PackedBatch]) -> Outcome:
    """Forward and backward over the micro-batches of one step."""
    objective.zero_grad()
    ce, align, targets = [], [], []
    for batch in batches:
        terms = objective(batch, noise_seed=0)
        terms.loss.backward()
        ce.append(terms.ce_per_token.float().cpu())
        align.append(terms.align_per_sample.cpu())
        targets.append(selected_targets(objective, batch)[1].float().cpu())
    gradient = torch.cat([p.grad.float().flatten().cpu() for p in objective.parameters() if p.grad is not None])
    return Outcome(torch.cat(ce), torch.cat(align), targets, gradient)


@torch.no_grad()
def selected_targets(objective: AlignmentObjective, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """The teacher's global queries (B, D) and selected targets (sum of K*, D), spans in order."""
    plan = host_plan(batch)
    batch = to_device(batch, objective.student.device)
    features = objective.student.encode_images(batch.pixels, batch.grids)
    inputs = batch.image_positions.shape[0]
    targets = objective.teacher.targets(batch, plan, features[:inputs], features[inputs:])
    return targets.global_query, targets.values[filled_slots(targets.counts, batch.latent_size)]


def differences(first: Outcome, second: Outcome) -> dict[str, float]:
    """How far apart two runs over the same samples are: losses by their largest difference, vectors by norm."""
    targets = [torch.cat(o.targets) for o in (first, second)]
    return {
        "ce": (first.ce - second.ce).abs().max().item(),
        "align": (first.align - second.align).abs().max().item(),
        "targets": _distance(*targets) if targets[0].shape == targets[1].shape else float("inf"),
        "gradient": _distance(first.gradient, second.gradient),
    }


def _distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def decode(objective: AlignmentObjective, batch: PackedBatch) -> None:
    """Student's decoder layers, forward and backward, on random embeddings; waits for the device afterwards.

    What runs between is under `forbid_waiting`.
    """
    device = objective.student.device
    batch = to_device(batch, device)
    width = objective.student.head.in_features
    embeddings = torch.randn(len(batch.input_ids), width, device=device, dtype=objective.student.network.dtype)
    embeddings.requires_grad_()
    for guard in (contextlib.nullcontext(), forbid_waiting(device)):  # libraries start up in the first pass
        with guard:
            hidden = objective.student.decode(embeddings, batch)
            hidden.sum().backward()


@contextlib.contextmanager
def forbid_waiting(device: torch.device) -> Iterator[None]:
    """On CUDA: an operation that waits for the device raises RuntimeError. Elsewhere: nothing."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --------------------------------------------------------------------------------------- golden file
def golden_errors(file: Path, device: torch.device | str) -> dict[str, float]:
    """Largest errors against recorded outputs of the published implementation, every case alone and packed.

    Relative for "ce", "loss" and "grad_norm", absolute for "query" and "targets", as in tests/golden/check.py,
    whose reading of the file this uses.
    """
    check = load_script("tests/golden/check.py")
    golden = check.GoldenFile(file)
    objective = golden.objective().to(device)
    objective.train()
    samples = [golden.sample(i) for i in range(len(golden.cases))]
    errors = dict.fromkeys(("ce", "loss", "grad_norm", "query", "targets"), 0.0)

    def worst(name: str, error: float) -> None:
        errors[name] = max(errors[name], error)

    for number, case in enumerate(golden.cases):
        for group, row in (([samples[number]], 0), (samples, number)):
            batch = _only(check.pack_samples(golden, group), row)
            objective.zero_grad()
            terms = objective(batch, noise_seed=0)
            terms.loss.backward()
            norms = [p.grad.double().norm() for p in objective.parameters() if p.grad is not None]
            expected = case["stage1"]
            worst("ce", check.relative(terms.ce.item(), expected["ce"]))
            worst("loss", check.relative(terms.loss.item(), expected["loss"]))
            worst("grad_norm", check.relative(torch.stack(norms).norm().item(), expected["grad_norm"]))
        query, targets = (x.cpu() for x in selected_targets(objective, check.pack_samples(golden, [samples[number]])))
        for name, value in (("query", query[0]), ("targets", targets)):
            wanted = golden.out(number, "query" if name == "query" else "teacher_latents")
            if wanted is not None and wanted.numel():
                worst(name, check.largest_difference(value, wanted.view_as(value) if name == "query" else wanted))
    return errors


def _only(batch: PackedBatch, row: int) -> PackedBatch:
    """Only the sample at place `row` bears a loss."""
    own = batch.sample_of_token[batch.supervised_positions] == row
    return dataclasses.replace(
        batch,
        ce_weights=batch.ce_weights * own,
        align_weights=(torch.arange(len(batch.sample_ids)) == row).float(),
    )
