"""Fixtures shared by all tests: where the external test data lies, when it is there at all."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def _external(variable: str, folder: str) -> Path:
    path = Path(os.environ.get(variable, REPOSITORY.parent / "shared" / folder))
    if not path.is_dir():
        beside = f"{path.parent.name}/{path.name} beside the repository"
        pytest.skip(f"external test data not found: set {variable} or provide {beside}")
    return path


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the working tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def realdata() -> Path:
    """Other people's records and images (see its own README); skips where missing."""
    return _external("ILVR_REALDATA", "realdata")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Outputs of the published implementation; skips where missing."""
    return _external("ILVR_GOLDEN", "golden")
