"""How good and how fast the plan is, on lengths like CoMT's, up to 100 million samples. Needs no data and no GPU.

    python benchmarks/plan.py [--samples 10000 1000000 100000000] [--worlds 2 8 64 1024 4096] [--scratch DIR]
                              [--out FILE]

Some minutes; the default needs 4.2 GB in --scratch while it runs.

Lengths: 1-6 spans, 200-1,500 text tokens and 100-1,300 visual tokens per image, all uniform; one input image, one
helper image per span (helpers cost vision patches, not sequence tokens). Shards of 1,000 samples; a sample's bytes are
300 per visual token. The index (42 bytes a sample) is written to --scratch, memory-mapped as a run does, and removed.
16 samples per rank and step, 8,192 tokens per micro-batch, shuffle window 65,536, cost of Qwen2.5-VL-7B.

One JSON line per (samples, world); times are processor time of one process, as other programs may share the machine:
    load_average      of the machine, last minute: above its number of cores, times are too long nevertheless
    first_step_s      verify the index's hash, find the longest sample, plan the first step for one rank
    peak_rss_mib      of that process, from start to end of its steps
    ms_per_step       one rank's plan of a step, amortised over consecutive steps, windows included
    against_heap      that over the time of the baseline for the same steps' samples: longest first onto the emptiest
                      bin, by a heap in Python, tokens only
    ms_per_window     reading and shuffling one window, first read from disk
    at_lower_bound    share of these steps with ceil(tokens / (world * budget)) micro-batches
    imbalance_*       sum over micro-steps of the dearest rank's cost / sum of the mean cost, over all ranks
    bytes_per_step    bytes of the samples of a step, all ranks
    sequential        share of a window's bytes in runs of 1 MiB or more of one shard; `full_shuffle` is the same for
                      as many samples of a shuffle of everything, the baseline
"""

from __future__ import annotations

import argparse
import heapq
import json
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from ilvr_ds.data.index import INDEX_DTYPE, file_sha256
from ilvr_ds.data.lengths import IndexColumns
from ilvr_ds.data.order import WINDOW, PlanSource, SourceOrder
from ilvr_ds.data.plan import Planner, imbalances

PER_RANK, BUDGET, SHARD, BYTES = 16, 8192, 1000, 300


def write_index(path: Path, samples: int) -> None:
    """An index of `samples` rows with CoMT-like lengths, a million rows in memory at a time."""
    index = np.lib.format.open_memmap(path, "w+", INDEX_DTYPE, (samples,))
    for begin in range(0, samples, 1_000_000):
        rng, n = np.random.default_rng(begin), min(1_000_000, samples - begin)
        rows, number = np.zeros(n, INDEX_DTYPE), np.arange(begin, begin + n)
        rows["spans"], rows["text_tokens"] = rng.integers(1, 7, n), rng.integers(200, 1501, n)
        rows["image_tokens"] = rng.integers(100, 1301, n)
        rows["helper_tokens"] = sum((rows["spans"] > k) * rng.integers(100, 1301, n) for k in range(6))
        rows["supervised"], rows["shard"] = rows["text_tokens"] // 2, number // SHARD
        rows["size"] = BYTES * (rows["image_tokens"] + rows["helper_tokens"])
        ends = np.cumsum(rows["size"])
        first = number // SHARD * SHARD - begin  # of the sample's shard; shards do not cross a million
        rows["offset"] = ends - rows["size"] - (ends - rows["size"])[first]
        index[begin : begin + n] = rows
    index.flush()


def shards_of(samples: int) -> tuple[int, ...]:
    """Samples of each shard."""
    return tuple(min(SHARD, samples - begin) for begin in range(0, samples, SHARD))


def sequential(index: np.ndarray, rows: np.ndarray, least: int = 1 << 20) -> float:
    """Share of the bytes of `rows` in runs of `least` or more bytes of one shard."""
    own = np.array(index[np.sort(rows)])
    joined = (own["shard"][1:] == own["shard"][:-1]) & (own["offset"][1:] == own["offset"][:-1] + own["size"][:-1])
    runs = np.bincount(np.concatenate([[0], np.cumsum(~joined)]), weights=own["size"])
    return float(runs[runs >= least].sum() / runs.sum())


def heap(tokens: np.ndarray, bins: int) -> int:
    """Tokens of the fullest bin when samples go longest first to the emptiest one."""
    loads = [0] * bins
    for length in sorted(tokens.tolist(), reverse=True):
        heapq.heapreplace(loads, loads[0] + length)
    return max(loads)


def one_rank(path: Path, samples: int, world: int, steps: int, send) -> None:
    """What a rank does, in a process of its own so that its memory is its own."""
    begin = time.process_time()
    file_sha256(path)
    hashed_s = time.process_time() - begin
    index = np.load(path, mmap_mode="r")
    sources = [PlanSource(IndexColumns(index), shards_of(samples))]
    planner = Planner(sources, seed=0, samples_per_step=PER_RANK * world, token_budget=BUDGET, world=world)
    planner.step(0, rank=world // 3)
    first = time.process_time() - begin
    begin = time.process_time()
    plans = [planner.step(step, rank=(7 * step) % world) for step in range(1, 1 + steps)]
    seconds = time.process_time() - begin
    some = range(1, 1 + min(steps, 8))
    samples_of = [planner.samples_of(step)[1].tokens for step in some]
    begin = time.process_time()
    for tokens, plan in zip(samples_of, plans, strict=False):
        heap(tokens, world * plan.lower_bound)
    baseline = (time.process_time() - begin) / len(some)
    # Not getrusage: its maximum counts the parent's memory at the fork.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
    send.send(
        {
            "first_step_s": first,
            "hash_s": hashed_s,
            "peak_rss_mib": peak,
            "ms_per_step": 1e3 * seconds / steps,
            "against_heap": seconds / steps / baseline,
            "at_lower_bound": sum(plan.n_micro == plan.lower_bound for plan in plans) / steps,
            "micro_batches": sum(plan.n_micro for plan in plans) / sum(plan.lower_bound for plan in plans),
        }
    )


def measure(path: Path, samples: int, world: int, steps: int) -> dict:
    """One row."""
    receive, send = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=one_rank, args=(path, samples, world, steps, send))
    process.start()
    send.close()
    row = {"samples": samples, "world": world, "steps": steps, "load_average": os.getloadavg()[0], **receive.recv()}
    process.join()
    index = np.load(path, mmap_mode="r")
    source = PlanSource(IndexColumns(index), shards_of(samples))
    order = SourceOrder(source, number=0, seed=0, window=WINDOW)
    begin = time.process_time()
    rows = order.window(0, 0)[0]
    row["ms_per_window"] = 1e3 * (time.process_time() - begin)
    row["sequential"] = sequential(index, rows)
    row["full_shuffle"] = sequential(index, np.random.default_rng(0).choice(samples, len(rows), replace=False))
    planner = Planner([source], seed=0, samples_per_step=PER_RANK * world, token_budget=BUDGET, world=world)
    plans = [planner.step(step) for step in range(max(2, min(steps, 4096 // world)))]  # all ranks
    balance = imbalances(plans)
    row["bytes_per_step"] = int(index["size"][planner.samples_of(0)[0]].sum())
    row["full_plans"] = len(plans)
    row |= {"imbalance": balance.total, "imbalance_text": balance.text, "imbalance_vision": balance.vision}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[10_000, 1_000_000, 100_000_000])
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 8, 64, 1024, 4096])
    parser.add_argument("--steps", type=int, default=100, help="consecutive steps of one rank, at most an epoch")
    parser.add_argument("--scratch", type=Path, help="folder for the index: 4.2 GB at 100 million (default: temporary)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the index is removed then, too
    begin, rows = time.time(), []
    for samples in args.samples:
        with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
            path = Path(folder) / "index.npy"
            write_index(path, samples)
            for world in args.worlds:
                if (steps := min(args.steps, samples // (PER_RANK * world))) >= 2:  # worlds the data is enough for
                    rows.append(measure(path, samples, world, steps))
                    print(json.dumps(rows[-1]), flush=True)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    about = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "wall_s": round(time.time() - begin)}
    print(json.dumps(about))
    if args.out:
        args.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
