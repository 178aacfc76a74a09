#!/usr/bin/env python
"""Stage 2, forward and backward: cached chain of latents against recomputing the prefix for each latent.

Same model, samples and loss in three ways, alternating in one process, for 1 to 6 spans in every sample:

- `chain`: this project's way; all samples packed, one cached step per latent over all of them.
- `recomputed`: the published way; one sample at a time, the whole prefix again for every latent.
- `recomputed_packed`: the same, but the n-th latents of all samples in one packed call, to show what packing gives
  and what the cache gives.

No optimizer step: it is the same for all. Memory is what autograd keeps for backward (all storages saved, weights
left out) and, on CUDA, the peak allocated above weights and gradients; where a way does not fit, its entry is null.

    python benchmarks/stage2.py                       a small model, on the CPU
    python benchmarks/stage2.py --shape 3b --device cuda --samples 4 --text 400 --image 300
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch
from recomputed_prefix import RecomputingObjective
from synthetic import QWEN_3B, QWEN_7B, TINY, random_network, random_samples

from ilvr_ds.config import LatentConfig, LossConfig
from ilvr_ds.contracts import PackedBatch, Sample
from ilvr_ds.data.packing import pack
from ilvr_ds.data.plan import StepTotals
from ilvr_ds.model.backbone import Backbone
from ilvr_ds.objective.relaxed import RelaxedObjective

SHAPES = {"tiny": TINY, "3b": QWEN_3B, "7b": QWEN_7B}
K = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--layers", type=int, help="decoder layers, in place of the shape's own number")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=16, help="samples in a micro-batch")
    parser.add_argument("--text", type=int, default=160, help="text tokens of a sample")
    parser.add_argument("--image", type=int, default=100, help="visual tokens of its input image")
    parser.add_argument("--spans", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--repeats", type=int, default=2, help="measured runs of each way, after a warm-up")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing in all ways")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = SHAPES[args.shape]
    network = random_network(shape.config(args.layers), device=device, dtype=dtype)
    student = Backbone(network, attention="auto", device=device, gradient_checkpointing=args.checkpointing)
    chain = RelaxedObjective(student, LatentConfig(size=K, source="self"), LossConfig(sim_weight=0.0)).train()
    recomputing = RecomputingObjective(student).train()

    results = []
    for spans in args.spans:
        lengths = dataclasses.replace(
            shape.lengths,
            spans=(spans, spans),
            text=(args.text // 2, args.text * 3 // 2),
            image=(args.image, args.image),
        )
        samples = random_samples(args.samples, dataclasses.replace(shape, lengths=lengths), K)
        packed, alone = [packed_of(samples, shape)], [packed_of([s], shape, len(samples)) for s in samples]
        ways = {
            "chain": lambda b=packed: run(chain, b),
            "recomputed": lambda b=alone: run(recomputing, b),
            "recomputed_packed": lambda b=packed: run(recomputing, b),
        }
        row = {"spans": spans, "tokens": len(packed[0].input_ids)}
        row |= measure(ways, student, len(samples), args.repeats, device)
        rates = row["samples_per_s"]
        for way in ("recomputed", "recomputed_packed"):
            row[f"chain_over_{way}"] = rates["chain"] / rates[way] if rates[way] else None
        results.append(row)
        print(json.dumps(row), flush=True)
    print(
        json.dumps(
            {
                "benchmark": "stage2", "shape": shape.name, "layers": network.config.text_config.num_hidden_layers,
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                "dtype": str(dtype), "attention": network.config._attn_implementation, "samples": args.samples,
                "checkpointing": args.checkpointing, "results": results,
            },
            indent=1,
        )
    )  # fmt: skip


def packed_of(samples: list[Sample], shape, of: int | None = None) -> PackedBatch:
    """One micro-batch of a step of `of` samples."""
    totals = StepTotals(samples=of or len(samples), supervised=1, spans=1, tokens=1)
    return pack(samples, shape.vocabulary, K, totals=totals)


def run(objective: torch.nn.Module, batches: list[PackedBatch]) -> float:
    """Forward and backward over the micro-batches; the loss."""
    loss = 0.0
    for batch in batches:
        terms = objective(batch, noise_seed=0)
        terms.loss.backward()
        loss += terms.loss.item()
    return loss


def measure(ways: dict[str, Callable], student: Backbone, samples: int, repeats: int, device: torch.device) -> dict:
    """Loss, samples per second and memory of each way; None where it does not fit into memory."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    losses, saved, peaks, failed = {}, {}, {}, set()
    weights = {p.untyped_storage().data_ptr() for p in student.parameters()}
    for repeat in range(repeats + 1):
        for way, function in ways.items():
            if way in failed:
                continue
            student.zero_grad(set_to_none=False)  # gradients are there from the second run on
            try:
                if repeat == 0:
                    with SavedBytes(weights) as kept:
                        losses[way] = function()
                    saved[way] = kept.largest / 2**20
                    continue
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                begin = clock(device)
                function()
                seconds[way].append(clock(device) - begin)
                if device.type == "cuda":
                    peaks[way] = torch.cuda.max_memory_allocated(device) / 2**30
            except torch.OutOfMemoryError:
                failed.add(way)
                torch.cuda.empty_cache()
    if device.type == "cuda":
        resident = sum(2 * p.nbytes if p.requires_grad else p.nbytes for p in student.parameters()) / 2**30
        peaks = {way: peak - resident for way, peak in peaks.items()}
    return {
        "loss": losses,
        "samples_per_s": {way: samples / statistics.median(s) if s else None for way, s in seconds.items()},
        "saved_mib": saved,
        "peak_gib": peaks,
    }


def clock(device: torch.device) -> float:
    """Seconds: the clock with nothing under way on CUDA; on a CPU this process's one thread, whoever else runs."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


class SavedBytes:
    """Bytes of distinct storages that autograd holds for backward: the most at one time, weights left out."""

    def __init__(self, weights: set[int]):
        self.weights = weights
        self.largest = 0

    def __enter__(self) -> "SavedBytes":
        self._held: dict[int, int] = {}
        self._users: dict[int, int] = {}
        self._now = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda packed: packed.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._hooks.__exit__(*exception)

    def _pack(self, tensor: torch.Tensor) -> "_Held":
        key = tensor.untyped_storage().data_ptr()
        if key not in self.weights:
            if key not in self._users:
                self._held[key] = tensor.untyped_storage().nbytes()
                self._now += self._held[key]
                self.largest = max(self.largest, self._now)
            self._users[key] = self._users.get(key, 0) + 1
        return _Held(tensor, key, self)

    def released(self, key: int) -> None:
        """One saved tensor of a storage is gone."""
        if key in self._users:
            self._users[key] -= 1
            if self._users[key] == 0:
                del self._users[key]
                self._now -= self._held.pop(key)


class _Held:
    """A saved tensor that reports its end."""

    def __init__(self, tensor: torch.Tensor, key: int, counter: SavedBytes):
        self.tensor, self.key, self.counter = tensor, key, counter

    def __del__(self) -> None:
        self.counter.released(self.key)


if __name__ == "__main__":
    main()
