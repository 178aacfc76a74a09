"""A build killed with SIGKILL at random moments and started again: are the final bytes those of an undisturbed one?

    python benchmarks/build_kill.py [--kills 50] [--seed 0] [--workers 4] [--out FILE.json]

Small synthetic records (duplicates, broken lines and missing images among them) are built by
`data_tools/build_shards.py`. Per kill, in turn:

    group     the whole process group dies, workers too; the same command again
    worker    one process below the build dies (a worker or the fork server); the build must go on by itself
    job       three jobs share one folder; one of them dies with its workers and is started again; then merged
    merge     three jobs share one folder; merge_shards dies and is started again

Moments are uniform over the last four fifths of the time that the same program took undisturbed (the first fifth
loads libraries); every second restart of `group` is killed as well. Prints JSON: per kind the runs, the kills that
hit a running program, and the folders that came out different or left a temporary file behind (both must be 0).
Exit code 1 if any did.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel

REPOSITORY = Path(__file__).resolve().parent.parent
JOBS = 3
CONTROL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def write_input(folder: Path, records: int) -> None:
    """`records` records with pictures of noise, a fifth of them not usable."""
    rng = np.random.default_rng(0)
    for number in range(8):
        pixels = rng.integers(0, 256, (200 + 20 * number, 240, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    lines = []
    for number in range(records):
        record = {
            "id": f"r{number - 7 if number % 20 == 9 else number}",
            "text_input": f"question {number}",
            "image_input": "none.png" if number % 20 == 3 else f"{number % 8}.png",
            "sequence_plan": [{"type": "latent", "helper_image": f"{(number + 1) % 8}.png"},
                              {"type": "text", "content": "The final answer is: A"}],
            "original_final_answer": "A",
        }  # fmt: skip
        lines.append("{" if number % 20 == 15 else json.dumps(record))
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with the tokens of Qwen's chat format."""
    vocab = {character: i for i, character in enumerate([*sorted(ByteLevel.alphabet()), "as", "assi", "assistant"])}
    for piece in ("ss", "ist", "is", "ant", "an", "st", "assist", "assis", "ass"):
        vocab.setdefault(piece, len(vocab))
    merges = ["a s", "as s", "ass i", "assi s", "assis t", "a n", "an t", "assist ant"]
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": len(vocab) + i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True} for i, token in enumerate(CONTROL)
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(spec))


class Trial:
    """Programs on one input, each build in a folder of its own."""

    def __init__(self, folder: Path, workers: int, per_shard: int, rng: random.Random):
        self.folder, self.workers, self.per_shard, self.rng = folder, workers, per_shard, rng

    def start(self, out: Path, *options: str, workers: int | None = None) -> subprocess.Popen:
        """A build, in a process group of its own."""
        command = [
            "data_tools/build_shards.py", "--input", self.folder / "records.jsonl", "--tokenizer", self.folder,
            "--out", out, "--samples-per-shard", self.per_shard, "--workers", workers or self.workers, *options,
        ]  # fmt: skip
        return self._start(command)

    def start_merge(self, out: Path) -> subprocess.Popen:
        """merge_shards, in a process group of its own."""
        return self._start(["data_tools/merge_shards.py", "--out", out])

    def _start(self, command: list) -> subprocess.Popen:
        with (self.folder / "log.txt").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, *map(str, command)], cwd=REPOSITORY, stdout=log, stderr=log, start_new_session=True
            )

    def finish(self, process: subprocess.Popen) -> None:
        """Wait for a program that must succeed."""
        code = process.wait(timeout=300)
        if code != 0:
            raise SystemExit(f"ended with {code}:\n{(self.folder / 'log.txt').read_text(errors='replace')[-3000:]}")

    def kill_group(self, process: subprocess.Popen, within: float) -> bool:
        """SIGKILL to everything, at a random moment; whether it was still running."""
        try:
            process.wait(timeout=self.rng.uniform(0.2 * within, within))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
        return False

    def kill_one_below(self, process: subprocess.Popen, within: float) -> bool:
        """SIGKILL to one process below it, at a random moment; whether there was one."""
        try:
            process.wait(timeout=self.rng.uniform(0.2 * within, within))
            return False
        except subprocess.TimeoutExpired:
            # The resource tracker of multiprocessing does no part of the build.
            below = [p for p in psutil.Process(process.pid).children(recursive=True) if "tracker" not in cmdline(p)]
        if not below:
            return False
        try:
            self.rng.choice(below).kill()
        except psutil.NoSuchProcess:
            return False
        return True

    def undisturbed(self, out: Path, jobs: bool) -> dict[str, float]:
        """Seconds that the programs take when nothing happens; `out` is then what a build by one job gives."""
        seconds = {}
        apart = out.with_name("apart")
        of_jobs = [("job", lambda index=index: self._job(apart, index)) for index in range(JOBS)]
        of_jobs.append(("merge", lambda: self.start_merge(apart)))
        for name, start in [("build", lambda: self.start(out)), *(of_jobs if jobs else [])]:
            begin = time.perf_counter()
            self.finish(start())
            seconds[name] = time.perf_counter() - begin
        return seconds

    def run(self, kind: str, out: Path, seconds: dict[str, float]) -> bool:
        """One disturbed build, brought to its end; whether the kill hit."""
        if kind == "worker":
            process = self.start(out)
            hit = self.kill_one_below(process, seconds["build"])
            self.finish(process)
            return hit
        if kind == "group":
            hit = self.kill_group(self.start(out), seconds["build"])
            if self.rng.random() < 0.5:
                self.kill_group(self.start(out), seconds["build"])
            self.finish(self.start(out))
            return hit
        hit = False
        for index in range(JOBS):
            process = self._job(out, index)
            if kind == "job" and index == 1:
                hit = self.kill_group(process, seconds["job"])
                process = self._job(out, index)
            self.finish(process)
        if kind == "merge":
            hit = self.kill_group(self.start_merge(out), seconds["merge"])
        self.finish(self.start_merge(out))
        return hit

    def _job(self, out: Path, index: int) -> subprocess.Popen:
        return self.start(out, "--job-index", str(index), "--job-count", str(JOBS), workers=1)


def cmdline(process: psutil.Process) -> str:
    """The command line of a process, empty when it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def contents(folder: Path) -> dict[str, str]:
    """sha256 of the files of a finished folder."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


def main() -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    kinds = ["group", "worker", "job", "merge"]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--records", type=int, default=160)
    parser.add_argument("--per-shard", type=int, default=8)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    counts = {kind: {"runs": 0, "hits": 0, "different": 0, "temporary_files_left": 0} for kind in options.kinds}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_input(folder, options.records)
        write_tokenizer(folder)
        trial = Trial(folder, options.workers, options.per_shard, random.Random(options.seed))
        seconds = trial.undisturbed(folder / "undisturbed", jobs=not {"job", "merge"}.isdisjoint(options.kinds))
        expected = contents(folder / "undisturbed")
        for number in range(options.kills):
            kind, out = options.kinds[number % len(options.kinds)], folder / "disturbed"
            count = counts[kind]
            count["hits"] += trial.run(kind, out, seconds)
            count["runs"] += 1
            count["different"] += contents(out) != expected
            count["temporary_files_left"] += len(list(out.rglob("*.tmp")))
            shutil.rmtree(out)
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "workers": options.workers,
        "records": options.records,
        "shards": len([name for name in expected if name.endswith(".tar")]),
        "seed": options.seed,
        "undisturbed_s": {name: round(value, 2) for name, value in seconds.items()},
        "kills": counts,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    return int(any(c["different"] or c["temporary_files_left"] for c in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
