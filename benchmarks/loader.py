"""Loading samples: ours against decoding and resizing the originals each time, and against plain webdataset.

    python benchmarks/loader.py [--samples 32] [--rounds 5]                       # needs no data: makes its pictures
    python benchmarks/loader.py --records R.jsonl --format ilvr --model MODEL_DIR --shards DIR     # your own
    python benchmarks/loader.py --wait runs/my/metrics.jsonl                      # what a run waited for its data

A sample of the made ones has a question, two steps of text, one input and one helper image:

- `photographs_12mp`: 4032x3024 JPEG, shards built with at most 401,408 pixels an image (512 visual tokens);
- `photographs`: 1008x756 JPEG, bounds as they come: nothing to resize, stored as they came;
- `photographs_resized`: 1000x750 JPEG, resized to 1008x756 and encoded;
- `drawings`: 384x384 PNG, bounds as they come.

Per kind, CPU time per sample of a process that works alone on the same samples; prints JSON:

- `samples`: what a decoding worker does per sample: read by offset, checksum, decode, tokens;
- `loader`: all of a `StepLoader` under way in one process: the plan before it, and packing the step after it;
- `worker`: the same in a worker process of a running `StepLoader`, all that it spends on sending steps included;
- `originals`: as `samples` from the records' own files: read, decode, turn, resize by Qwen's rule, tokens;
- `webdataset`: `webdataset.WebDataset(tars).decode("rgb8")`: every image an array, no tokens, packs or sending;
- `crc32`, `tokens`, `parse` (which holds crc32): shares of the time of `samples`.

Two processes take turns, round by round: one set up as our workers are (freed memory is kept, `kept_memory.py`), one as
Python comes. `samples` and `loader` are the first's; `originals` and `webdataset` of the ratios are the second's, and
`loader_to_webdataset_with_kept_memory` gives webdataset the same setting.

Targets (medians of the rounds' ratios): loader to originals >= 5 for photographs_12mp, loader to webdataset >= 1.

With --wait: the share of the time of steps 3 and later that the slowest rank waited for its batch, and the slowest
single wait; the first steps wait for the workers to start. The claim is < 0.02 for the tiny recipe with one worker:
`launch/quickstart.sh` writes runs/quickstart/stage1/metrics.jsonl.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import webdataset
from build_kill import write_tokenizer
from pictures import drawing, photograph, photograph_12mp, photograph_resized

from ilvr_ds.config import DataConfig
from ilvr_ds.contracts import ImageRef
from ilvr_ds.data.build import BuildSettings, build
from ilvr_ds.data.formats.source import open_source
from ilvr_ds.data.image_files import read_image_file
from ilvr_ds.data.images import ImageSettings, merged_tokens, read_image, resize_image
from ilvr_ds.data.kept_memory import keep_freed_memory
from ilvr_ds.data.loader import StepLoader
from ilvr_ds.data.pixels import image_pixels
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.errors import RecordError

PER_STEP, BUDGET = 8, 65536
DIFFERENT = 4  # pictures of a kind; a cache of the disk holds them all, so no side waits for it
MAX_PIXELS = 401_408
STEPS_SKIPPED = 2


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of the made pictures")
    parser.add_argument("--records", type=Path, help="JSONL that --shards were built from")
    parser.add_argument("--format", default="ilvr", help="its format (default: ilvr)")
    parser.add_argument("--model", type=Path, help="folder with the tokenizer")
    parser.add_argument("--shards", type=Path, help="folder built from the records")
    parser.add_argument("--samples", type=int, default=32, help="samples of a round (default: 32)")
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds (default: 5)")
    parser.add_argument("--wait", type=Path, help="metrics.jsonl of a run")
    options = parser.parse_args()
    if options.wait is not None:
        print(json.dumps(wait_share(options.wait), indent=1))
        return
    own = (options.records, options.model, options.shards)
    if any(own) and not all(own):
        parser.error("--records, --model and --shards belong together")
    found = {"machine": platform.processor() or platform.machine(), "load": os.getloadavg()[0]}
    if all(own):
        job = Job(options.records, options.format, options.model, options.shards, options.samples)
        found["own"] = measure(job, options.rounds)
    else:
        for kind in options.kinds:
            with tempfile.TemporaryDirectory() as folder:
                job = make(kind, Path(folder), options.samples)
                found[kind] = measure(job, options.rounds)
    print(json.dumps(found, indent=1))


def wait_share(metrics: Path) -> dict:
    """What a run waited for its data."""
    steps = [json.loads(line) for line in metrics.read_text().splitlines()][STEPS_SKIPPED:]
    waits = [step["data_wait_s"] for step in steps]
    return {
        "steps": len(steps),
        "data_wait_share": sum(waits) / sum(step["step_s"] for step in steps),
        "longest_wait_s": max(waits),
        "median_step_s": statistics.median(step["step_s"] for step in steps),
    }


# kind -> what draws one, file ending, how shards are built from them
KINDS: dict[str, tuple[Callable[[np.random.Generator], bytes], str, ImageSettings]] = {
    "photographs_12mp": (
        photograph_12mp,
        "jpg",
        ImageSettings(input_max_pixels=MAX_PIXELS, helper_max_pixels=MAX_PIXELS),
    ),
    "photographs": (photograph, "jpg", ImageSettings()),
    "photographs_resized": (photograph_resized, "jpg", ImageSettings()),
    "drawings": (drawing, "png", ImageSettings()),
}


def make(kind: str, folder: Path, count: int) -> Job:
    """Records, pictures, tokenizer and shards in a folder."""
    rng, (draw, ending, images) = np.random.default_rng(0), KINDS[kind]
    for number in range(DIFFERENT):
        (folder / f"{number}.{ending}").write_bytes(draw(rng))
    steps = [
        {
            "type": "text",
            "content": "The door is left of the table, and behind it the path turns towards the lake. " * 2,
        },
        {"type": "latent", "helper_image": None},
        {"type": "text", "content": "So the path that is marked in red leads there. The final answer is: A"},
    ]
    lines = []
    for number in range(count):
        steps[1] = {"type": "latent", "helper_image": f"{(number + 1) % DIFFERENT}.{ending}"}
        record = {"id": str(number), "text_input": "Which of the paths leads to the lake? A: red. B: blue. <image>"}
        record |= {"image_input": [f"{number % DIFFERENT}.{ending}"], "sequence_plan": steps}
        lines.append(json.dumps({**record, "original_final_answer": "A"}) + "\n")
    records = folder / "records.jsonl"
    records.write_text("".join(lines))
    write_tokenizer(folder)
    settings = BuildSettings((records,), "ilvr", folder, folder / "shards", samples_per_shard=count, images=images)
    build(settings, ChatTokenizer.from_folder(folder), lambda _: None)
    return Job(records, "ilvr", folder, folder / "shards", count)


def measure(job: Job, rounds: int) -> dict:
    """The numbers of one kind: two processes, one set up as a decoding worker, take turns at everything."""
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, context, keep_freed_memory) as kept,
        ProcessPoolExecutor(1, context) as plain,
    ):
        sizes = plain.submit(facts, job).result()
        found = [[{work: pool.submit(seconds, job, work).result() for work in WORKS} for pool in (kept, plain)]
                 for _ in range(rounds)]  # fmt: skip

    def ratio(slow: tuple[int, str], fast: tuple[int, str]) -> float:
        values = [turn[slow[0]][slow[1]] / turn[fast[0]][fast[1]] for turn in found]
        return round(statistics.median(values), 3)

    worker, usual = 0, 1
    rates = {work: [1 / statistics.median(turn[side][work] for turn in found) for side in (worker, usual)]
             for work in ("loader", "samples", "worker", "originals", "webdataset")}  # fmt: skip
    return {
        **sizes,
        "samples_per_s_per_core": {work: round(rate[worker], 1) for work, rate in rates.items()},
        "without_kept_memory": {work: round(rate[usual], 1) for work, rate in rates.items()},
        **{
            f"{ours}_to_{theirs}": ratio((usual, theirs), (worker, ours))
            for theirs in ("originals", "webdataset")
            for ours in ("samples", "loader", "worker")
        },
        "loader_to_webdataset_with_kept_memory": ratio((worker, "webdataset"), (worker, "loader")),
        "shares": {work: ratio((worker, work), (worker, "samples")) for work in ("crc32", "tokens", "parse")},
    }


@dataclass(frozen=True)
class Job:
    """What is loaded."""

    records: Path
    format: str
    model: Path
    shards: Path
    samples: int


class Loaded:
    """A job's files opened; every method below works through `count` samples and returns how many it did."""

    def __init__(self, job: Job):
        self.job, self.shards = job, ShardSet.open(job.shards)
        self.tokenizer = ChatTokenizer.from_folder(job.model)
        self.count = min(job.samples, len(self.shards))
        with tempfile.TemporaryDirectory() as scratch:
            source = open_source(job.records, job.format, Path(scratch))
            records = [r for r in source.read(0, len(source)) if not isinstance(r, RecordError)]
        self.records = records[: self.count]
        self.blobs = self.shards.read_bytes(range(self.count))
        self.under_way: Iterator | None = None  # a run's steps, as far as they were asked for
        self.raws = [self.shards.parse(number, blob) for number, blob in enumerate(self.blobs)]

    def steps(self, total: int, workers: int) -> StepLoader:
        data = DataConfig(shards=str(self.job.shards), samples_per_step=PER_STEP, token_budget=BUDGET, workers=workers)
        return StepLoader(
            self.shards, self.tokenizer, data, latent_size=self.shards.manifest.latent_size, reduction="sample",
            seed=0, rank=0, world=1, start_step=0, total_steps=total,
        )  # fmt: skip

    def loader(self) -> int:
        if self.under_way is None:
            self.under_way = iter(self.steps(1 << 30, workers=0))
            self.loader()  # the memory of the first steps is new
        steps = islice(self.under_way, max(1, self.count // PER_STEP))
        return sum(plan.totals.samples for _, plan, _ in steps)

    def worker_s(self) -> float:
        """Processor time of a worker process a sample, once it is in its stride; the batches are looked at and dropped.

        What it decodes ahead is counted at the beginning and at the end alike.
        """
        warm, timed = 10, max(16, 2 * self.count // PER_STEP)
        known, begin = set(psutil.Process().children()), 0.0
        with self.steps(warm + timed + 10, workers=1) as steps:
            for step, _, batches in steps:
                assert all(batch.pixels[0, 0] >= 0 for batch in batches)
                if step == warm:
                    (process,) = (
                        p for p in set(psutil.Process().children()) - known if "spawn_main" in str(p.cmdline())
                    )
                    begin = sum(process.cpu_times()[:2])
                if step == warm + timed:
                    return (sum(process.cpu_times()[:2]) - begin) / (timed * PER_STEP)
        raise AssertionError("not reached")

    def samples(self) -> int:
        for begin in range(0, self.count, PER_STEP):
            numbers = range(begin, min(self.count, begin + PER_STEP))
            for number, blob in zip(numbers, self.shards.read_bytes(numbers), strict=True):
                self.shards.load_sample(number, self.tokenizer, blob=blob)
        return self.count

    def originals(self) -> int:
        for record in self.records:
            counts = []
            for role, parts in (("input", record.prompt), ("helper", record.steps)):
                bounds = self.shards.manifest.images.bounds(role)
                for part in parts:
                    if isinstance(part, ImageRef):
                        image = read_image(read_image_file(part, self.job.records.parent))
                        _, grid = image_pixels(resize_image(image, *bounds))
                        if role == "input":
                            counts.append(merged_tokens(grid))
            self.tokenizer.encode_sample(record.prompt, record.steps, counts, self.shards.manifest.latent_size)
        return len(self.records)

    def webdataset(self) -> int:
        tars = [str(self.job.shards / entry.name) for entry in self.shards.manifest.shards]
        return sum(1 for _ in islice(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"), self.count))

    def crc32(self) -> int:
        return len([zlib.crc32(blob) for blob in self.blobs])

    def tokens(self) -> int:
        for raw in self.raws:
            counts = [merged_tokens(raw.grids[member]) for member in raw.input_members]
            self.tokenizer.encode_sample(raw.record.prompt, raw.record.steps, counts, self.shards.manifest.latent_size)
        return self.count

    def parse(self) -> int:
        return len([self.shards.parse(number, blob) for number, blob in enumerate(self.blobs)])


WORKS = ("loader", "samples", "worker", "originals", "webdataset", "crc32", "tokens", "parse")
_loaded = functools.cache(Loaded)  # once in a process


def facts(job: Job) -> dict:
    """What a sample of the job is."""
    loaded = _loaded(job)
    index = loaded.shards.index
    return {
        "samples": loaded.count,
        "bytes_per_sample": round(sum(map(len, loaded.blobs)) / loaded.count),
        "tokens_per_sample": int(np.mean(index["text_tokens"]) + np.mean(index["image_tokens"])),
    }


def seconds(job: Job, work: str) -> float:
    """Processor time of this process a sample: a neighbour on the machine does not count."""
    if work == "worker":
        return _loaded(job).worker_s()
    do = getattr(_loaded(job), work)
    begin = time.process_time()
    done = do()
    return (time.process_time() - begin) / done


if __name__ == "__main__":
    main()
