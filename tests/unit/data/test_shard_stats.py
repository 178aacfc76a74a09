"""shard_stats: counts of the index are those of numpy, chunks do not matter, plans are the planner's."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import ilvr_ds.data.stats as stats_module
from data_tools.build_shards import main as build_main
from data_tools.shard_stats import main
from ilvr_ds.data.index import INDEX_DTYPE, ShardEntry, read_index, read_manifest, write_index, write_text
from ilvr_ds.data.lengths import Lengths
from ilvr_ds.data.plan import Planner, imbalances, run_imbalance
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.data.stats import CELLS, ValueCounts, read_stats


def random_index(rows: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    index = np.zeros(rows, INDEX_DTYPE)
    index["text_tokens"] = rng.integers(50, 4000, rows)
    index["image_tokens"] = rng.integers(0, 3000, rows)
    index["spans"] = rng.integers(0, 6, rows)
    index["helper_tokens"] = index["spans"].astype(np.int64) * rng.integers(4, 700, rows)
    index["supervised"] = rng.integers(1, 900, rows)
    index["size"] = 512 * rng.integers(3, 2**20, rows)
    return index


@pytest.fixture
def folder(write_records, good_record, tokenizer_folder, tmp_path):
    records = [good_record(f"r{i}", text_input="word " * (3 * i)) for i in range(12)]
    plan = [{"type": "text", "content": "The final answer is: A"}]
    records += [good_record("plain", sequence_plan=plan), b"{"]
    options = ["--input", write_records(records), "--tokenizer", tokenizer_folder, "--out", tmp_path / "out"]
    assert build_main([str(option) for option in (*options, "--workers", 0)]) == 0
    return tmp_path / "out"


def test_counts_are_numpys(monkeypatch):
    index = random_index(5000)
    whole = read_stats(index)
    monkeypatch.setattr(stats_module, "CHUNK", 700)
    seen = []
    chunked = read_stats(index, seen.append)
    assert sum(seen) == 5000 and max(seen) == 700
    tokens = index["text_tokens"].astype(np.int64) + index["image_tokens"]
    with_spans = index["spans"] > 0
    candidates = index["helper_tokens"][with_spans] // index["spans"][with_spans]
    for stats in (whole, chunked):
        for name, values in (("tokens", tokens), ("candidates", candidates), ("spans", index["spans"])):
            counts = stats.columns[name]
            assert (counts.samples, counts.total) == (len(values), int(values.sum(dtype=np.int64)))
            assert (counts.least, counts.greatest, counts.width) == (values.min(), values.max(), 1)
            for share in (0.5, 0.9, 0.999):
                assert counts.quantile(share) == np.quantile(values, share, method="inverted_cdf")
        assert stats.spans_total == int(index["spans"].sum())
        assert stats.without_spans == int((~with_spans).sum())
        sizes = stats.columns["bytes"]  # past CELLS: cells are joined
        assert sizes.width > 1 and sizes.greatest == index["size"].max()
        assert abs(sizes.quantile(0.5) - np.quantile(index["size"], 0.5, method="inverted_cdf")) <= sizes.width


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.one_of(st.integers(0, 50), st.integers(0, 2**33)), max_size=20), min_size=1, max_size=4))
def test_value_counts_lose_nothing(chunks):
    counts = ValueCounts()
    for chunk in chunks:
        counts.add(np.array(chunk, np.int64))
    values = [value for chunk in chunks for value in chunk]
    assert counts.samples == len(values) == counts.cells.sum()
    assert counts.total == sum(values)
    if values:
        assert (counts.least, counts.greatest) == (min(values), max(values))
        assert counts.greatest // counts.width < CELLS
        edges, bins = counts.bins(10)
        assert sum(bins) == len(values) and len(bins) <= 10
        assert edges[0] <= min(values) and edges[-1] > max(values)
        limit = values[0]
        exact = sum(value > limit for value in values)
        assert counts.above(limit) >= exact and (counts.width > 1 or counts.above(limit) == exact)


def test_negative_values_are_refused():
    with pytest.raises(ValueError, match="-1"):
        ValueCounts().add(np.array([3, -1]))


def test_the_command(folder, tmp_path, capsys):
    out = [str(tmp_path / "stats.json"), str(tmp_path / "stats.png")]
    options = ["--token-budget", "200", "600", "--samples-per-step", "4", "--world", "1", "2"]
    assert main([str(folder), *options, "--json", out[0], "--png", out[1]]) == 0
    text = capsys.readouterr().out
    assert "13 samples, 1 shards" in text and "1 records rejected" in text
    assert "12 spans of 8 latents, 1 samples without a span" in text
    report = json.loads((tmp_path / "stats.json").read_text())
    assert report["reject_reasons"] == {"broken_json": 1}
    shards = ShardSet.open(folder)
    lengths = Lengths.from_index(shards.index)
    for plan in report["plans"]:
        budget, world = plan["token_budget"], plan["world"]
        if (lengths.tokens > budget).any():
            assert plan["too_long"] == int((lengths.tokens > budget).sum()) and "imbalance" not in plan
            continue
        planner = Planner(shards.plan_sources(), seed=0, samples_per_step=4, token_budget=budget, world=world)
        plans = [planner.step(step) for step in range(planner.steps_per_epoch)]
        assert plan["steps_per_epoch"] == plan["steps_planned"] == 4
        assert plan["micro_batches_per_step"] == sum(p.n_micro for p in plans) / 4
        assert plan["imbalance"] == run_imbalance(plans)
        assert min(plan["imbalance_text"], plan["imbalance_vision"]) >= 1
        assert plan["fill"] == pytest.approx(lengths.tokens.sum() / (sum(p.n_micro for p in plans) * world * budget))
    assert {plan["token_budget"] for plan in report["plans"] if not plan["too_long"]} == {600}
    assert "samples are longer than the budget" in text
    with Image.open(out[1]) as picture:
        assert picture.format == "PNG" and picture.width > 1000


def test_steps_are_spread_over_the_epoch(folder, capsys, tmp_path):
    options = ["--token-budget", "600", "--samples-per-step", "1", "--steps", "3", "--world", "1"]
    assert main([str(folder), *options, "--json", str(tmp_path / "s.json")]) == 0
    plan = json.loads((tmp_path / "s.json").read_text())["plans"][0]
    assert (plan["steps_per_epoch"], plan["steps_planned"]) == (13, 3)


@pytest.fixture
def many(folder, tmp_path):
    """A finished folder whose index says 600 samples in three shards; of the tars only the sizes are true."""
    index, manifest = random_index(600), read_manifest(folder)
    index["shard"] = np.arange(600) // 200
    entries = tuple(ShardEntry(f"shard-{i:06d}.tar", 1024, "0" * 64, 200) for i in range(3))
    (tmp_path / "many").mkdir()
    for entry in entries:
        (tmp_path / "many" / entry.name).write_bytes(bytes(1024))
    changed = {"index_sha256": write_index(tmp_path / "many", index), "built": 600, "shards": entries}
    write_text(tmp_path / "many" / "manifest.json", dataclasses.replace(manifest, **changed).to_json())
    return tmp_path / "many"


@pytest.mark.parametrize("window", [64, 65_536])
@pytest.mark.parametrize("helpers", [True, False])
def test_the_plans_are_those_training_will_see(many, tmp_path, window, helpers):
    options = ["--token-budget", "8192", "--samples-per-step", "32", "--world", "2", "--seed", "3"]
    options += ["--shuffle-window", str(window), "--json", str(tmp_path / "s.json"), *["--no-helpers"][: not helpers]]
    assert main([str(many), *options]) == 0
    plan = json.loads((tmp_path / "s.json").read_text())["plans"][0]
    sources = ShardSet.open(many).plan_sources(helpers)
    planner = Planner(sources, seed=3, samples_per_step=32, token_budget=8192, world=2, window=window)
    balance = imbalances([planner.step(step) for step in range(planner.steps_per_epoch)])
    assert (plan["imbalance"], plan["imbalance_text"]) == (balance.total, balance.text)
    assert plan["imbalance_vision"] == balance.vision


def test_errors(folder, tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "manifest.json: no such file" in capsys.readouterr().err
    assert main([str(folder), "--json", str(tmp_path / "no" / "s.json")]) == 1
    assert "does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(folder), "--token-budget", "600"])
    assert "go together" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(folder), "--token-budget", "0", "--samples-per-step", "4"])


def test_the_index_is_mapped_not_read(folder):
    assert isinstance(read_index(folder, read_manifest(folder)), np.memmap)
