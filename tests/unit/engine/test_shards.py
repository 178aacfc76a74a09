"""Pieces written by any number of ranks are read back by any other, or refused by name."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ilvr_ds.engine.partition import Piece
from ilvr_ds.engine.shards import ShardReader, shard_path, write_shard
from ilvr_ds.errors import CheckpointError


def cut(numel: int, borders: list[int]) -> list[tuple[int, int]]:
    """(start, length) of the ranges between sorted borders; empty ones included."""
    points = [0, *sorted(min(b, numel) for b in borders), numel]
    return [(a, b - a) for a, b in itertools.pairwise(points)]


def write_cut(folder, values: dict[str, torch.Tensor], cuts: dict[str, list[tuple[int, int]]]) -> None:
    world = len(next(iter(cuts.values())))
    for rank in range(world):
        pieces = [(n, Piece(n, n, tuple(v.shape), *cuts[n][rank])) for n, v in values.items()]
        tensors = [values[n].view(-1)[p.start : p.start + p.numel] for n, p in pieces]
        write_shard(shard_path(folder, "x", rank, world), pieces, {"k": tensors}, {"step": "3"})


@settings(deadline=None, max_examples=25)
@given(
    data=st.data(),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 7)),
    saved=st.integers(1, 4),
    loaded=st.integers(1, 5),
)
def test_any_cut_is_read_as_any_other(tmp_path_factory, data, shape, saved, loaded):
    folder = tmp_path_factory.mktemp("shards")
    values = {"a": torch.randn(shape), "b.c": torch.randn(3)}
    borders = {
        n: data.draw(st.lists(st.integers(0, v.numel()), min_size=saved - 1, max_size=saved - 1))
        for n, v in values.items()
    }
    write_cut(folder, values, {n: cut(v.numel(), borders[n]) for n, v in values.items()})
    reader = ShardReader(folder, "x")
    assert reader.world == saved and reader.extra["step"] == "3"
    for name, value in values.items():
        others = data.draw(st.lists(st.integers(0, value.numel()), min_size=loaded - 1, max_size=loaded - 1))
        for start, numel in cut(value.numel(), others):
            out = torch.full((numel,), float("nan"))
            reader.read("k", name, Piece(name, name, tuple(value.shape), start, numel), out)
            assert torch.equal(out, value.view(-1)[start : start + numel])


def test_gaps_shapes_and_missing_files_are_named(tmp_path):
    values = {"a": torch.arange(6.0).view(2, 3)}
    write_cut(tmp_path, values, {"a": [(0, 2), (4, 2)]})
    reader = ShardReader(tmp_path, "x")
    with pytest.raises(CheckpointError, match="k/a has 4 of elements 0 to 6"):
        reader.read("k", "a", Piece("a", "a", (2, 3), 0, 6), torch.empty(6))
    with pytest.raises(CheckpointError, match=r"'a' has shape \(2, 3\), the model's is \(3, 2\)"):
        reader.read("k", "a", Piece("a", "a", (3, 2), 0, 6), torch.empty(6))
    with pytest.raises(CheckpointError, match="k/z has 0 of elements 0 to 1"):
        reader.read("k", "z", Piece("z", "z", (1,), 0, 1), torch.empty(1))
    with pytest.raises(CheckpointError, match="no y file"):
        ShardReader(tmp_path, "y")
    shard_path(tmp_path, "x", 0, 2).unlink()
    with pytest.raises(CheckpointError, match=r"x-00000-of-00002\.safetensors: missing"):
        ShardReader(tmp_path, "x")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_cut_off_file_is_refused(tmp_path, keep):
    write_cut(tmp_path, {"a": torch.arange(6.0)}, {"a": [(0, 6)]})
    path = shard_path(tmp_path, "x", 0, 1)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"x-00000-of-00001\.safetensors: cut short or damaged"):
        ShardReader(tmp_path, "x")
