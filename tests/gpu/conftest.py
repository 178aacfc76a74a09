"""These tests need a CUDA device: `ILVR_TEST_GPU=1 bash tests/run.sh tests/gpu`. They skip where there is none.

What they do is in checks.py and engine_checks.py, which the CPU runs too (tests/unit/test_gpu_benchmark.py).
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def device() -> torch.device:
    """The CUDA device; skips every test of this folder where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device (tests/run.sh hides them unless ILVR_TEST_GPU=1)")
    return torch.device("cuda", torch.cuda.current_device())


def load(name: str) -> ModuleType:
    """A Python file of this folder as a module."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def checks() -> ModuleType:
    """tests/gpu/checks.py"""
    return load("checks")


@pytest.fixture(scope="session")
def engine_checks() -> ModuleType:
    """tests/gpu/engine_checks.py"""
    return load("engine_checks")
