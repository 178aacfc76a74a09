"""The order of epochs: each sample once, windows that stand alone, reads that stay together."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilvr_ds.data.index import INDEX_DTYPE
from ilvr_ds.data.lengths import IndexColumns, Lengths, check_fits
from ilvr_ds.data.order import PlanSource, SourceOrder
from ilvr_ds.errors import PlanError


def lengths_of(n: int) -> Lengths:
    rows = np.arange(n)
    return Lengths(rows + 1, rows + 2, rows + 3, rows + 4)


def order_of(shards, window, seed=0, number=0) -> SourceOrder:
    return SourceOrder(PlanSource(lengths_of(sum(shards)), tuple(shards)), number=number, seed=seed, window=window)


shard_lists = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum)


@settings(deadline=None, max_examples=100)
@given(shards=shard_lists, window=st.integers(1, 40), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2))
def test_every_sample_once_an_epoch_with_its_own_lengths(shards, window, seed, epoch):
    n = sum(shards)
    rows, lengths = order_of(shards, window, seed).take(epoch * n, n)
    assert sorted(rows.tolist()) == list(range(n))
    assert (lengths.tokens == rows + 1).all() and (lengths.patches == rows + 2).all()
    assert (lengths.supervised == rows + 3).all() and (lengths.spans == rows + 4).all()


@settings(deadline=None, max_examples=60)
@given(shards=shard_lists, window=st.integers(1, 40), data=st.data())
def test_any_stretch_alone_equals_the_line(shards, window, data):
    n = sum(shards)
    whole, _ = order_of(shards, window).take(0, 3 * n)
    begin = data.draw(st.integers(0, 3 * n - 1))
    count = data.draw(st.integers(1, 3 * n - begin))
    assert order_of(shards, window).take(begin, count)[0].tolist() == whole[begin : begin + count].tolist()


@settings(deadline=None, max_examples=60)
@given(shards=st.lists(st.integers(1, 9), min_size=1, max_size=12), window=st.integers(1, 40))
def test_a_window_touches_few_shards(shards, window):
    order = order_of(shards, window)
    for number in range(-(-sum(shards) // window)):
        rows, _, _ = order.window(0, number)
        owners = np.searchsorted(np.cumsum(shards), rows, "right")
        touched = len(set(owners.tolist()))
        assert len(order.slices(0, number)) == touched <= 2 + window // min(shards)
        # whole shards, but for the two that the window's edges cut
        cut = [s for s in set(owners.tolist()) if (owners == s).sum() < shards[s]]
        assert len(cut) <= 2


def test_shards_and_samples_are_shuffled_and_differ_by_epoch_seed_and_source():
    shards = [10] * 20
    takes = [order_of(shards, 50, seed, number).take(epoch * 200, 200)[0].tolist()
             for seed, number, epoch in ((0, 0, 0), (0, 0, 1), (1, 0, 0), (0, 1, 0), (2**63 - 1, 0, 0))]  # fmt: skip
    assert len({tuple(t) for t in takes}) == 5
    first = np.array(takes[0])
    assert len(set((first[:50] // 10).tolist())) <= 6  # five shards, not neighbours
    assert not np.array_equal(np.unique(first[:50] // 10), np.arange(5))
    assert (np.diff(first[:50]) == 1).sum() < 10


def test_the_order_never_changes():
    # Recorded: a run started with an older version must resume on the same samples (or PLAN_VERSION is raised).
    assert order_of([3, 4, 5], 8, seed=5).take(24, 12)[0].tolist() == [11, 2, 8, 9, 7, 0, 1, 10, 6, 5, 3, 4]


def write_index(path, n: int) -> np.ndarray:
    index = np.zeros(n, dtype=INDEX_DTYPE)
    index["text_tokens"], index["image_tokens"], index["helper_tokens"] = np.arange(n) % 90, 5, 7
    index["spans"], index["supervised"] = 2, 3
    np.save(path, index)
    return np.load(path, mmap_mode="r")


def test_columns_of_a_mapped_index_travel_as_a_file_name(tmp_path):
    index = write_index(tmp_path / "index.npy", 50_000)
    columns = IndexColumns(index)
    data = pickle.dumps(columns)
    assert len(data) < 2000  # the map itself would be two megabytes
    again = pickle.loads(data)
    assert len(again) == 50_000
    part, whole = again.slices([slice(100, 300)]), Lengths.from_index(index)
    assert (part.tokens == whole.tokens[100:300]).all() and (part.patches == 48).all()
    assert part.tokens.dtype == np.int64  # unsigned columns would wrap around in differences
    assert len(pickle.dumps(SourceOrder(PlanSource(columns), number=0, seed=0, window=9))) < 5000
    in_memory = pickle.loads(pickle.dumps(IndexColumns(np.array(index[:10]))))
    assert in_memory.slices([slice(0, 10)]).tokens.tolist() == whole.tokens[:10].tolist()


@settings(deadline=None, max_examples=30)
@given(data=st.data(), cuts=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=5))
def test_slices_of_an_index_are_its_rows(data, cuts):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    index = rng.integers(0, 256, 20 * INDEX_DTYPE.itemsize, dtype=np.uint8).view(INDEX_DTYPE)
    slices, every = [slice(a, b) for a, b in cuts], Lengths.from_index(index)
    for table in (IndexColumns(index), every):
        joined = table.slices(slices)
        backwards = np.arange(len(joined))[::-1]
        assert joined.take(backwards).spans.tolist() == joined.take(slice(None)).spans.tolist()[::-1]
        joined = joined.take(slice(None))
        assert joined.tokens.tolist() == [n for cut in slices for n in every.tokens[cut]]
        assert joined.patches.tolist() == [n for cut in slices for n in every.patches[cut]]


def test_a_mapped_index_is_read_as_a_file(tmp_path):
    """Its pages would stay in memory: 2.4 GB after 25 windows of 100 million samples."""
    index = write_index(tmp_path / "index.npy", 5000)
    slices, every = [slice(7, 900), slice(5, 5), slice(4990, 5010)], Lengths.from_index(index)
    read = IndexColumns(index).slices(slices).take(slice(None))
    assert read.tokens.tolist() == [n for piece in slices for n in every.tokens[piece]]
    part = IndexColumns(index[100:200])  # a part of a map says it begins where the map does
    assert part.slices([slice(0, 9)]).take(slice(None)).tokens.tolist() == every.tokens[100:109].tolist()
    assert max(next(part.longest_pieces())) == every.tokens[100:200].max()
    assert pickle.loads(pickle.dumps(part)).slices([slice(0, 9)]).tokens.tolist() == every.tokens[100:109].tolist()


def test_an_index_cut_while_in_use_is_named(tmp_path):
    columns = IndexColumns(write_index(tmp_path / "index.npy", 5000))
    with (tmp_path / "index.npy").open("r+b") as file:
        file.truncate(4000 * INDEX_DTYPE.itemsize)
    columns.slices([slice(0, 3000)])
    for read in (lambda: columns.slices([slice(3900, 4100)]), lambda: list(columns.longest_pieces())):
        with pytest.raises(PlanError, match=r"index\.npy: ends within rows .*check_shards"):
            read()


@pytest.mark.parametrize("mapped", [True, False])
def test_the_longest_is_found_in_pieces(tmp_path, monkeypatch, mapped):
    monkeypatch.setattr("ilvr_ds.data.lengths._PIECE", 7)
    index = write_index(tmp_path / "index.npy", 100)
    columns = IndexColumns(index if mapped else np.array(index))
    assert np.concatenate(list(columns.longest_pieces())).tolist() == Lengths.from_index(index).tokens.tolist()
    assert check_fits(columns, 94) == 94


def test_shards_that_do_not_add_up():
    with pytest.raises(PlanError, match="counts 7 samples, the index has 8"):
        SourceOrder(PlanSource(lengths_of(8), (3, 4)), number=0, seed=0, window=4)
