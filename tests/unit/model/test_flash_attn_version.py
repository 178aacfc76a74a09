"""flash-attn before 2.1 aligns causal attention with the first key: cached calls would be wrong without a word."""

import pytest
import torch

from ilvr_ds.errors import AttentionError
from ilvr_ds.model import varlen_attention
from ilvr_ds.model.varlen_attention import REGISTERED_NAMES, missing_for, resolve_attention

CUDA = torch.device("cuda")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package of a version, found by Python's own import system; nothing of it is imported."""
    caches = (varlen_attention._flash_attn_module, varlen_attention._aligned_to_the_last_key)

    def install(version: str | None) -> None:
        (tmp_path / "flash_attn").mkdir()
        (tmp_path / "flash_attn/__init__.py").write_text("")
        if version is not None:
            (tmp_path / f"flash_attn-{version}.dist-info").mkdir()
            metadata = f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {version}\n"
            (tmp_path / f"flash_attn-{version}.dist-info/METADATA").write_text(metadata)
        monkeypatch.syspath_prepend(tmp_path)
        for cached in caches:
            cached.cache_clear()

    yield install
    monkeypatch.undo()
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize(
    ("version", "usable"),
    [("2.0.9", False), ("1.0.9", False), (None, False), ("2.1", True), ("2.8.3", True), ("2.1.0.post1", True)],
)
def test_only_versions_aligned_to_the_last_key(installed, version, usable):
    installed(version)
    assert (missing_for("flash_attn", CUDA, torch.bfloat16) is None) == usable
    if usable:
        assert resolve_attention("auto", CUDA, torch.bfloat16) == REGISTERED_NAMES["flash_attn"]
    else:
        assert resolve_attention("auto", CUDA, torch.bfloat16) != REGISTERED_NAMES["flash_attn"]
        with pytest.raises(AttentionError, match=r"older than 2\.1"):
            resolve_attention("flash_attn", CUDA, torch.bfloat16)
