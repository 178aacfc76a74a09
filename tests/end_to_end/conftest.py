"""The real programs, started as a user starts them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def run_program(*command: str, expect: int = 0, timeout: int = 240) -> str:
    """Run a command in the repository root on the CPU; returns stdout + stderr, checks the exit code."""
    environment = dict(
        os.environ, DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false"
    )
    environment["PATH"] = str(Path(sys.executable).parent) + os.pathsep + environment["PATH"]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == expect, (
        f"{' '.join(command)} ended with {done.returncode}, expected {expect}:\n{done.stdout[-6000:]}"
    )
    return done.stdout


@pytest.fixture(scope="session")
def program():
    """`program("data_tools/build_shards.py", "--input", ...)`: run one of the project's scripts."""

    def run(script: str, *arguments: object, expect: int = 0, timeout: int = 240) -> str:
        return run_program(sys.executable, script, *map(str, arguments), expect=expect, timeout=timeout)

    return run


@pytest.fixture(scope="session")
def train():
    """`train(ranks, recipe, "run.dir=...")`: launch/train.py under the deepspeed launcher; 1 rank is plain python."""

    def run(ranks: int, recipe: Path, *overrides: str, expect: int = 0, timeout: int = 280) -> str:
        arguments = ["launch/train.py", "--recipe", str(recipe), *overrides]
        if ranks == 1:
            return run_program(sys.executable, *arguments, expect=expect, timeout=timeout)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher = ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(port)]
        return run_program(*launcher, *arguments, expect=expect, timeout=timeout)

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, program):
    """A folder with model/, puzzles/ and shards/ of 40 small puzzles."""
    root = tmp_path_factory.mktemp("tiny")
    program("launch/make_tiny_model.py", "--out", root / "model", "--seed", 0)
    program("data_tools/make_frozenlake.py", "--out", root / "puzzles", "--count", 40, "--sizes", 3, "--seed", 1)
    program(
        "data_tools/build_shards.py", "--input", root / "puzzles" / "records.jsonl", "--format", "ilvr",
        "--tokenizer", root / "model", "--out", root / "shards", "--samples-per-shard", 16,
    )  # fmt: skip
    program("data_tools/check_shards.py", root / "shards", "--tokenizer", root / "model")
    return root


@pytest.fixture(scope="session")
def metrics():
    """`metrics(run_dir)`: the lines of metrics.jsonl."""

    def read(run_dir: Path) -> list[dict]:
        return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]

    return read
