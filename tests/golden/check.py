"""Compare this project with recorded outputs of the published implementation.

    python tests/golden/check.py ilvr_open.safetensors        (its ilvr_open.json beside it)
    python tests/golden/check.py decode_open.safetensors      (greedy tokens; see decode_check.py)

Runs every case alone and all cases packed into one sequence, in fp32 on the CPU, through the project's own
packing, model and objective; prints the largest error of every case and check, and exits 1 if one is above
its tolerance, 2 if the file cannot be checked (another kind of file, or no case in it).

The format of such a file is in the golden data's own README.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from ilvr_ds.config import LatentConfig, LossConfig, TeacherConfig
from ilvr_ds.contracts import PackedBatch, Sample
from ilvr_ds.data.packing import pack
from ilvr_ds.data.plan import StepTotals
from ilvr_ds.data.tokens import Vocabulary
from ilvr_ds.errors import IlvrError
from ilvr_ds.model.backbone import Backbone
from ilvr_ds.model.host_plan import host_plan
from ilvr_ds.model.latent_chain import forward_with_chain, plan_chain, rounds_needed
from ilvr_ds.model.placement import filled_slots, latent_positions
from ilvr_ds.model.student import forward_with_targets
from ilvr_ds.model.teacher import Teacher
from ilvr_ds.objective.alignment import AlignmentObjective
from ilvr_ds.objective.relaxed import RelaxedObjective

# name of the check -> largest allowed error; "relative" ones are divided by the expected value
TOLERANCE = {
    "query": 1e-5,  # absolute
    "targets": 1e-5,  # absolute, in order; another number of targets is an infinite error
    "filled": 0.0,  # number of pads that differ
    "ce": 1e-5,  # relative
    "loss": 1e-5,  # relative
    "grad_norm": 1e-4,  # relative
    "grad_norms": 1e-4,  # relative, largest over the listed parameters
    "logits": 1e-4,  # absolute, last positions
    # the same of stage 2, where latents are the student's own states
    "loss2": 1e-5,
    "grad_norm2": 1e-4,
    "logits2": 1e-4,
}


class UncheckableError(IlvrError):
    """The file is of no kind this script knows, or holds nothing to check."""


# ----------------------------------------------------------------------------------------- reading
class GoldenFile:
    """Weights, inputs and expected outputs of one `ilvr` file."""

    def __init__(self, path: Path):
        description = path.with_suffix(".json")
        for file in (path, description):
            if not file.is_file():
                raise UncheckableError(f"{file}: no such file; give FILE.safetensors with FILE.json beside it")
        self.tensors = load_file(path)
        self.json = json.loads(description.read_text(encoding="utf-8"))
        self.cases = self.json.get("cases") or []
        if not any(name.startswith("student.") for name in self.tensors) or "coverage_p" not in self.json:
            raise UncheckableError(f"{path}: not a stage-1 file (no student.* tensors or no coverage_p)")
        if not self.cases:
            raise UncheckableError(f"{description}: holds no case")

    @property
    def latent_size(self) -> int:
        return self.json["latent_size"]

    def vocabulary(self) -> Vocabulary:
        ids = self.json["ids"]
        return Vocabulary(
            im_start=ids["im_start"],
            im_end=ids["im_end"],
            vision_start=ids["vision_start"],
            vision_end=ids["vision_end"],
            image_pad=ids["image"],
            video_pad=ids["video"],
            latent_pad=ids["latent_pad"],
            latent_start=ids["latent_start"],
            latent_end=ids["latent_end"],
            assistant=ids["assistant"],
            size=self.json["config"]["vocab_size"],
            fingerprint="golden",
        )

    def network(self) -> Qwen2_5_VLForConditionalGeneration:
        network = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**self.json["config"]))
        network.load_state_dict(self._weights("student."))
        return network.float()

    def objective(self) -> AlignmentObjective:
        student = Backbone(self.network(), attention="sdpa")
        config = TeacherConfig(coverage=self.json["coverage_p"], temperature=self.json.get("temperature", 1.0))
        teacher = Teacher.of(student, config)
        prefix = "model.language_model."
        weights = {k[len(prefix) :]: v for k, v in self._weights("teacher.").items() if k.startswith(prefix)}
        teacher.language_model.load_state_dict(weights)
        latent = LatentConfig(size=self.latent_size, noise_std=self.json["noise"])
        loss = LossConfig(ce_weight=self.json["ce_weight"], sim_weight=self.json["sim_weight"])
        return AlignmentObjective(student, teacher, latent, loss)

    def _weights(self, prefix: str) -> dict[str, Tensor]:
        """Tensors of one model by their names in transformers 5."""
        return {new_name(k[len(prefix) :]): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def sample(self, number: int) -> Sample:
        def tensor(name: str) -> Tensor | None:
            return self.tensors.get(f"case{number}.{name}")

        def grids(name: str) -> list[tuple[int, int, int]]:
            found = tensor(name)
            return [] if found is None else [tuple(row) for row in found.tolist()]

        none = torch.zeros(0, 1176)
        pixels = [none if t is None else t for t in (tensor("pixel_values"), tensor("pixel_values_latent"))]
        inputs = grids("image_grid_thw")
        mask = tensor("attention_mask")
        if mask is not None and not bool(mask.all()):
            raise UncheckableError(f"case{number}: a padded sequence; samples here have no padding")
        return Sample(
            number=number,
            id=f"case{number}",
            input_ids=tensor("input_ids")[0].numpy(),
            labels=tensor("labels")[0].numpy(),
            grids=(*inputs, *grids("image_grid_thw_latent")),
            num_input_images=len(inputs),
            input_pixels=pixels[0].float().numpy(),
            helper_pixels=pixels[1].float().numpy(),
        )

    def out(self, number: int, name: str) -> Tensor | None:
        return self.tensors.get(f"case{number}.out.{name}")


def new_name(old: str) -> str:
    """State-dict name of transformers 4.50 -> of transformers 5."""
    if old.startswith("model."):
        return "model.language_model." + old.removeprefix("model.")
    return "model." + old if old.startswith("visual.") else old


# ---------------------------------------------------------------------------------------- stage 1
def check_stage1(file: GoldenFile) -> dict[str, dict[str, float]]:
    """Errors by row ("case0 alone", "case0 packed", ...) and check."""
    objective = file.objective()
    objective.train()
    samples = [file.sample(i) for i in range(len(file.cases))]
    errors = {}
    for number, sample in enumerate(samples):
        errors[f"case{number} alone"] = _errors_of(file, objective, [sample], 0, number)
    for number in range(len(samples)):
        errors[f"case{number} packed"] = _errors_of(file, objective, samples, number, number)
    return errors


def _errors_of(
    file: GoldenFile, objective: AlignmentObjective, samples: list[Sample], row: int, number: int
) -> dict[str, float]:
    """Errors of the case at place `row` of a pack, its weights 1 and those of all other samples 0."""
    expected = file.cases[number]["stage1"]
    batch = _weighted(pack_samples(file, samples), row)
    objective.zero_grad()
    terms = objective(batch, noise_seed=0)
    terms.loss.backward()
    norms = {name: p.grad.double().norm().item() for name, p in objective.named_parameters() if p.grad is not None}
    errors = {
        "ce": relative(terms.ce.item(), expected["ce"]),
        "loss": relative(terms.loss.item(), expected["loss"]),
        "grad_norm": relative(sum(n**2 for n in norms.values()) ** 0.5, expected["grad_norm"]),
        "grad_norms": max(
            (
                relative(norms["student.network." + new_name(name)], norm)
                for name, norm in expected.get("grad_norms", {}).items()
            ),
            default=0.0,
        ),
    }
    with torch.no_grad():
        errors |= _selection_errors(file, objective, batch, row, number)
    return errors


def _selection_errors(
    file: GoldenFile, objective: AlignmentObjective, batch: PackedBatch, row: int, number: int
) -> dict[str, float]:
    student, plan = objective.student, host_plan(batch)
    features = student.encode_images(batch.pixels, batch.grids)
    inputs = len(batch.image_positions)
    targets = objective.teacher.targets(batch, plan, features[:inputs], features[inputs:])
    hidden = forward_with_targets(student, batch, features[:inputs], targets.values, targets.counts).hidden
    errors = {}
    start, end = batch.cu_seqlens[row : row + 2].tolist()

    query = file.out(number, "query")
    if query is not None and query.numel():
        errors["query"] = largest_difference(targets.global_query[row], query.flatten())

    spans = torch.tensor([s == row for s in plan.span_sample], dtype=torch.bool)
    filled = filled_slots(targets.counts, batch.latent_size)[spans]  # (s, K)
    wanted = file.out(number, "teacher_latents")
    wanted = torch.zeros(0, hidden.shape[1]) if wanted is None else wanted
    errors["targets"] = largest_difference(targets.values[spans][filled], wanted)

    mask = torch.zeros(end - start, dtype=torch.bool)
    mask[latent_positions(batch.span_starts, batch.latent_size)[spans][filled] - start] = True
    wanted_mask = file.out(number, "filled_mask")
    wanted_mask = torch.zeros_like(mask) if wanted_mask is None else wanted_mask
    errors["filled"] = float((mask != wanted_mask).sum()) if mask.shape == wanted_mask.shape else float("inf")

    tail = file.out(number, "stage1_logits_tail")
    if tail is not None:
        errors["logits"] = largest_difference(student.head.logits(hidden[end - len(tail) : end]), tail)
    return errors


def pack_samples(file: GoldenFile, samples: list[Sample]) -> PackedBatch:
    """All samples in one sequence, weighted as if each were a step of its own."""
    batch = pack(
        samples,
        file.vocabulary(),
        file.latent_size,
        totals=StepTotals(samples=1, supervised=1, spans=1, tokens=sum(len(s.input_ids) for s in samples)),
    )
    return dataclasses.replace(batch, align_weights=torch.ones(len(samples)))


def _weighted(batch: PackedBatch, row: int) -> PackedBatch:
    """Only the sample at place `row` bears a loss, so that the gradient is its own."""
    own = batch.sample_of_token[batch.supervised_positions] == row
    return dataclasses.replace(
        batch,
        ce_weights=batch.ce_weights * own,
        align_weights=(torch.arange(len(batch.sample_ids)) == row).float(),
    )


def relative(value: float, expected: float) -> float:
    return abs(value - expected) / max(abs(expected), 1e-12)


def largest_difference(value: Tensor, expected: Tensor) -> float:
    if value.shape != expected.shape:
        return float("inf")
    return (value - expected).abs().max().item() if expected.numel() else 0.0


# ---------------------------------------------------------------------------------------- stage 2
def check_stage2(file: GoldenFile) -> dict[str, dict[str, float]]:
    """Errors by row and check, as `check_stage1`; cases without a stage-2 record are left out."""
    latent = LatentConfig(size=file.latent_size, source="self")
    loss = LossConfig(ce_weight=file.json["ce_weight"], sim_weight=0.0)
    objective = RelaxedObjective(Backbone(file.network(), attention="sdpa"), latent, loss).train()
    samples = [file.sample(i) for i in range(len(file.cases))]
    packs = [("alone", [s], 0, i) for i, s in enumerate(samples)]
    packs += [("packed", samples, i, i) for i in range(len(samples))]
    return {
        f"case{number} {kind}": _stage2_errors(
            file, objective, _weighted(pack_samples(file, members), row), row, number
        )
        for kind, members, row, number in packs
        if "stage2" in file.cases[number]
    }


def _stage2_errors(
    file: GoldenFile, objective: RelaxedObjective, batch: PackedBatch, row: int, number: int
) -> dict[str, float]:
    expected = file.cases[number]["stage2"]
    objective.zero_grad()
    terms = objective(batch, noise_seed=0)
    terms.loss.backward()
    squares = sum(p.grad.double().square().sum().item() for p in objective.parameters() if p.grad is not None)
    errors = {
        "loss2": relative(terms.loss.item(), expected["loss"]),
        "grad_norm2": relative(squares**0.5, expected["grad_norm"]),
    }
    tail = file.out(number, "stage2_logits_tail")
    if tail is not None:
        with torch.no_grad():
            student, end = objective.student, int(batch.cu_seqlens[row + 1])
            features = student.encode_images(batch.pixels, batch.grids)[: len(batch.image_positions)]
            plan = plan_chain(batch, rounds_needed(batch))
            hidden = forward_with_chain(student, batch, features, plan).hidden
            errors["logits2"] = largest_difference(student.head.logits(hidden[end - len(tail) : end]), tail)
    return errors


# ----------------------------------------------------------------------------------------- report
def report(errors: dict[str, dict[str, float]]) -> bool:
    """Print the table; True if every error is within its tolerance (a NaN is not)."""
    width = max(len(row) for row in errors)
    print(" " * width + "".join(f"{name:>11}" for name in TOLERANCE))
    print("tolerance".ljust(width) + "".join(f"{value:11.0e}" for value in TOLERANCE.values()))
    good = True
    for row, values in errors.items():
        cells = ""
        for name, tolerance in TOLERANCE.items():
            if name not in values:
                cells += f"{'-':>11}"
                continue
            within = values[name] <= tolerance
            good = good and within
            cells += f"{values[name]:10.1e}" + (" " if within else "!")
        print(row.ljust(width) + cells)
    return good


def is_decode_file(path: Path) -> bool:
    """The description beside `path` asks for tokens. False where there is no description."""
    description = path.with_suffix(".json")
    if not description.is_file():
        return False
    tree = json.loads(description.read_text())
    return "eos" in tree and all("new_tokens" in case for case in tree.get("cases") or [])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="FILE.safetensors; FILE.json beside it")
    path = parser.parse_args(arguments).file
    try:
        if is_decode_file(path):
            from decode_check import main_decode  # beside this script; tests of the other kind load it from elsewhere

            return main_decode(path)
        file = GoldenFile(path)
        errors = check_stage1(file)
        for row, values in check_stage2(file).items():
            errors[row] |= values
        good = report(errors)
    except IlvrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(file.cases)} cases, alone and packed: {'all within tolerance' if good else 'ABOVE TOLERANCE (!)'}")
    return 0 if good else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
