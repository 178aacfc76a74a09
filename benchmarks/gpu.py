#!/usr/bin/env python
"""Speed and memory of a stage-1 step on one GPU: Qwen2.5-VL shapes, random weights, samples of CoMT's lengths.

    python benchmarks/gpu.py --out gpu_3b.json                        3B, every backend, 4k to 32k tokens
    python benchmarks/gpu.py --shapes 7b --layers 8 --out gpu_7b.json
    python benchmarks/gpu.py --device cpu --tiny                      the same code at a toy size

Samples: 1-6 spans, 200-1,500 text tokens, 100-1,300 visual tokens per image. Every engine (attention backend,
gradient checkpointing) runs in a process of its own, first the published schedule (one sample per micro-batch, the
teacher run once per span plus once; `schedule: published`), then the packed one at each token budget, on the same
optimizer steps. One JSON document: what was run on, and a row per configuration:

    samples_per_s, tokens_per_s    over all measured steps, a token being one of the packed text and image tokens
    over_published                 samples_per_s over that of the published schedule in the same engine
    mfu_student, mfu_teacher       model FLOPs of the student's forward and backward, and of one teacher forward,
                                   per second, over the device's dense bf16 peak (`ilvr_ds.model.flops`: attention
                                   and vision windows counted, recomputation and repeated teacher runs not); null
                                   for a device whose peak is not listed
    peak_memory_gib                of the allocator, measured steps only; null on a CPU
    ema_share                      time of the teacher's update over time of the step
    result                         ok, oom, or why it was not run

Configurations that would start after --limit-s are not run and say so; the file is written after every engine.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from published_schedule import one_each, repeated_teacher
from synthetic import QWEN_3B, QWEN_7B, TINY, Shape, lengths_of, random_network, random_samples

from ilvr_ds.config import Recipe, parse_recipe
from ilvr_ds.contracts import PackedBatch
from ilvr_ds.data.packing import pack
from ilvr_ds.data.plan import Planner
from ilvr_ds.model.backbone import Backbone
from ilvr_ds.model.flops import FlopsModel, peak_flops
from ilvr_ds.model.teacher import Teacher
from ilvr_ds.model.varlen_attention import REGISTERED_NAMES, missing_for
from ilvr_ds.objective.alignment import AlignmentObjective

SHAPES = {"3b": QWEN_3B, "7b": QWEN_7B}
# All 28 layers of the 7B model with fp32 masters, moments, gradients and average are about 190 GB: too many for a GPU.
DEFAULT_LAYERS = {"3b": None, "7b": 8}
PUBLISHED = "published"


@dataclass(frozen=True)
class Options:
    """What is measured."""

    shape: Shape
    layers: int | None  # None: the shape's own number
    device: str
    budgets: tuple[int, ...]
    samples_per_step: int
    steps: int  # measured, after the two different steps of warm-up
    zero_stage: int

    def recipe(self, backend: str, checkpointing: bool) -> Recipe:
        """A recipe with what the engine and the objective read; its paths lead nowhere."""
        model = {"path": "none", "attention": backend, "gradient_checkpointing": checkpointing}
        tree = {
            "name": "benchmark",
            "run": {"dir": "none"},
            "data": {"shards": "none", "samples_per_step": self.samples_per_step},
            "model": model,
            "engine": {"deepspeed": f"ds_configs/zero{self.zero_stage}.json"},
        }
        return parse_recipe(tree, "benchmarks/gpu.py")


# ------------------------------------------------------------------------------------- one engine
class Bench:
    """A built engine, and a pool of samples for two different optimizer steps."""

    def __init__(self, options: Options, backend: str, checkpointing: bool):
        # here, because the import chooses DeepSpeed's accelerator for the whole process
        from ilvr_ds.engine.build import build_engine
        from ilvr_ds.engine.distributed import init_distributed
        from ilvr_ds.engine.step import train_step

        self.options, self.train_step = options, train_step
        recipe = options.recipe(backend, checkpointing)
        _, _, self.device = init_distributed()
        config = options.shape.config(options.layers)
        network = random_network(config, device=self.device, dtype=torch.bfloat16)
        student = Backbone(network, attention=backend, device=self.device, gradient_checkpointing=checkpointing)
        self.objective = AlignmentObjective(student, Teacher.of(student, recipe.teacher), recipe.latent, recipe.loss)
        self.engine = build_engine(self.objective, recipe)
        self.flops = FlopsModel(config, train_vision=False)
        self.latents = recipe.latent.size
        self.samples = random_samples(2 * options.samples_per_step, options.shape, self.latents)
        self.lengths = lengths_of(self.samples)
        self._watch_update()

    def _watch_update(self) -> None:
        """Time the teacher's update where `train_step` calls it, without waiting for the device."""
        update, self.updates = self.engine.ema.update, []

        def watched() -> torch.Tensor:
            begin = _mark(self.device)
            sums = update()
            self.updates.append((begin, _mark(self.device)))
            return sums

        self.engine.ema.update = watched

    def batches(self, step: int, budget: int, schedule: str) -> list[PackedBatch]:
        """The micro-batches of a step (there are two different ones)."""
        planner = Planner(
            self.lengths, seed=0, samples_per_step=self.options.samples_per_step, token_budget=budget, world=1
        )
        plan = planner.step(step)
        bins = plan.of_rank(0)
        vocabulary = self.options.shape.vocabulary
        packed = [
            pack([self.samples[n] for n in numbers], vocabulary, self.latents, totals=plan.totals)
            for numbers in (one_each(bins) if schedule == PUBLISHED else bins)
        ]
        return [_pinned(batch) if self.device.type == "cuda" else batch for batch in packed]

    def measure(self, budget: int, schedule: str) -> dict:
        """One row."""
        steps = [self.batches(step, budget, schedule) for step in range(2)]
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.empty_cache()  # blocks shaped for the row before
        seconds, update_s, losses, applied = [], 0.0, [], 0
        samples = tokens = micro_batches = 0
        student = teacher = 0.0
        for number in range(2 + self.options.steps):
            if number == 2 and cuda:
                torch.cuda.reset_peak_memory_stats()
            batches = steps[number % 2]
            self.updates.clear()
            _wait(self.device)
            begin = time.perf_counter()
            with repeated_teacher(self.objective.teacher) if schedule == PUBLISHED else nullcontext():
                outcome = self.train_step(self.engine, batches, lr=1e-5, noise_seed=number)
            _wait(self.device)
            if number < 2:
                continue
            seconds.append(time.perf_counter() - begin)
            update_s += sum(_seconds_between(*pair) for pair in self.updates)
            losses.append(outcome.loss)
            applied += outcome.applied
            samples += sum(len(batch.sample_ids) for batch in batches)
            tokens += sum(len(batch.input_ids) for batch in batches)
            micro_batches += len(batches)
            of_batches = [self.flops.of_batch(batch) for batch in batches]
            student += sum(flops.student for flops in of_batches)
            teacher += sum(flops.teacher for flops in of_batches)
        total = sum(seconds)
        peak = peak_flops(_device_name(self.device))
        return {
            "result": "ok",
            "samples_per_s": samples / total,
            "tokens_per_s": tokens / total,
            "step_s": seconds,
            "micro_batches_per_step": micro_batches / len(seconds),
            "tokens_per_step": tokens / len(seconds),
            "student_tflops_per_s": student / total / 1e12,
            "teacher_tflops_per_s": teacher / total / 1e12,
            "mfu_student": None if peak is None else student / total / peak,
            "mfu_teacher": None if peak is None else teacher / total / peak,
            "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
            "ema_share": update_s / total,
            "applied_steps": applied,
            "losses": losses,
        }


def measure_engine(options: Options, backend: str, checkpointing: bool, deadline: float) -> list[dict]:
    """All rows of one engine, in a process of its own. After an out-of-memory error the engine is not used again."""
    configurations = [(max(options.budgets), PUBLISHED), *((budget, "packed") for budget in sorted(options.budgets))]
    rows, bench, published = [], None, None
    try:
        for budget, schedule in configurations:
            if time.time() > deadline:
                row = {"result": "not run: --limit-s was reached"}
            else:
                bench = bench or Bench(options, backend, checkpointing)
                row = bench.measure(budget, schedule)
                if schedule == PUBLISHED:
                    published = row["samples_per_s"]
                row["over_published"] = None if published is None else row["samples_per_s"] / published
            rows.append(row)
    except torch.cuda.OutOfMemoryError:
        rows.append({"result": "oom"})
    while len(rows) < len(configurations):
        rows.append({"result": "not run: out of memory before, with smaller micro-batches"})
    head = {"backend": backend, "gradient_checkpointing": checkpointing}
    return [
        {**head, "schedule": schedule, "token_budget": None if schedule == PUBLISHED else budget, **row}
        for (budget, schedule), row in zip(configurations, rows, strict=True)
    ]


# --------------------------------------------------------------------------------- device and clock
def _mark(device: torch.device) -> torch.cuda.Event | float:
    """Now, on the device's own clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds_between(begin: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    return begin.elapsed_time(end) / 1e3 if isinstance(begin, torch.cuda.Event) else end - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _pinned(batch: PackedBatch) -> PackedBatch:
    """The batch in page-locked memory, as the loader hands it over."""
    tensors = {name: value.pin_memory() for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return dataclasses.replace(batch, **tensors)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


# ----------------------------------------------------------------------------------- the command
def about(options: Options) -> dict:
    """What was run, on what."""
    device = torch.device(options.device)
    versions = {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    for name in ("torch", "transformers", "deepspeed", "flash-attn", "flash-attn-4"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    network = random_network(options.shape.config(options.layers), device="meta", dtype=torch.bfloat16)
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else None
    return {
        "benchmark": "gpu",
        "date": datetime.date.today().isoformat(),
        "device": _device_name(device),
        "device_memory_gib": memory,
        "peak_bf16_flops": peak_flops(_device_name(device)),
        "versions": versions,
        "shape": options.shape.name,
        "decoder_layers": options.shape.config(options.layers).text_config.num_hidden_layers,
        "parameters": sum(p.numel() for p in network.parameters()),
        "teacher_parameters": sum(p.numel() for p in network.model.language_model.parameters()),
        "lengths": dataclasses.asdict(options.shape.lengths),
        "samples_per_step": options.samples_per_step,
        "measured_steps": options.steps,
        "zero_stage": options.zero_stage,
    }


def run(options: Options, backends: list[str], checkpointing: list[bool], limit_s: float, out: Path | None) -> dict:
    """Measure every engine; returns (and, after each engine, writes) the document."""
    document, deadline = {**about(options), "rows": []}, time.time() + limit_s
    for backend in backends:
        for setting in checkpointing:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                rows = pool.submit(measure_engine, options, backend, setting, deadline).result()
            document["rows"] += rows
            for row in rows:
                speed = f"{row['samples_per_s']:.2f} samples/s" if row["result"] == "ok" else row["result"]
                print(backend, f"checkpointing={setting}", row["schedule"], row["token_budget"], speed, file=sys.stderr)
            if out is not None:
                out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=sorted(SHAPES), default="3b")
    parser.add_argument("--tiny", action="store_true", help="a toy shape with toy samples, in place of --shapes")
    parser.add_argument("--layers", type=int, help="decoder layers (default: 3b all, 7b 8)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backends", nargs="+", choices=sorted(REGISTERED_NAMES), help="default: all that can run")
    parser.add_argument("--budgets", type=int, nargs="+", help="tokens per micro-batch (default: 4096 to 32768)")
    parser.add_argument("--checkpointing", nargs="+", choices=("on", "off"), default=("on", "off"))
    parser.add_argument("--samples-per-step", type=int, default=20, help="about 1,660 tokens each (default: 20)")
    parser.add_argument("--steps", type=int, default=3, help="measured steps, after two of warm-up (default: 3)")
    parser.add_argument("--zero-stage", type=int, choices=(0, 3), default=3)
    parser.add_argument("--limit-s", type=float, default=480, help="start no configuration later (default: 480)")
    parser.add_argument("--out", type=Path, help="also write the document here")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device; --device cpu --tiny runs the same code at a toy size", file=sys.stderr)
        return 1
    os.environ["DS_ACCELERATOR"] = args.device  # before DeepSpeed is imported, and for the processes started here
    shape = TINY if args.tiny else SHAPES[args.shapes]
    layers = args.layers or (None if args.tiny else DEFAULT_LAYERS[args.shapes])
    options = Options(
        shape, layers, args.device, tuple(args.budgets or shape.budgets), args.samples_per_step, args.steps,
        args.zero_stage,
    )  # fmt: skip
    missing = {b: missing_for(b, torch.device(args.device), torch.bfloat16) for b in REGISTERED_NAMES}
    backends = args.backends or [backend for backend, what in missing.items() if what is None]
    for backend in backends:
        if missing[backend] is not None:
            print(f"error: --backends {backend}: {missing[backend]}", file=sys.stderr)
            return 1
    document = run(options, backends, [c == "on" for c in args.checkpointing], args.limit_s, args.out)
    print(json.dumps(document, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
