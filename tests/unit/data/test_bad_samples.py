"""A bad sample left out: the step is the one that never had it, on every rank; a helper image nobody looks at."""

import dataclasses
import json
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_loader import K, byte_tokenizer, write_shards

from ilvr_ds.config import DataConfig
from ilvr_ds.data.bad_samples import lost_totals, remaining, reweighted
from ilvr_ds.data.index import write_index
from ilvr_ds.data.loader import StepLoader
from ilvr_ds.data.packing import pack
from ilvr_ds.data.plan import StepTotals
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.errors import BatchError, ReadError, TrainingError
from ilvr_ds.train.bad_samples import BadSamples, truncate_bad_samples

BAD = 5


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(params=["bytes", "picture", "count"])
def broken(request, tmp_path, tokenizer):
    """Eleven samples, number 5 bad: wrong bytes, right bytes of a broken picture, or an index that counts wrongly."""
    shards = write_shards(tmp_path / "shards", tokenizer)
    index, tar = np.array(shards.index), tmp_path / "shards" / "shard-000000.tar"
    content = bytearray(tar.read_bytes())
    begin, size = int(index[BAD]["offset"]), int(index[BAD]["size"])
    if request.param == "count":
        index[BAD]["supervised"] += 1
    else:
        content[begin + 532 : begin + 562] = b"\xff" * 30
        tar.write_bytes(content)
        if request.param == "picture":
            index[BAD]["crc32"] = zlib.crc32(content[begin : begin + size])
    manifest = tmp_path / "shards" / "manifest.json"
    tree = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**tree, "index_sha256": write_index(tmp_path / "shards", index)}))
    return ShardSet.open(tmp_path / "shards")


def steps_of(shards, tokenizer, rank, world=2, reduction="sample", allowed=3, **options):
    data = DataConfig(shards="", samples_per_step=11, token_budget=2048, workers=0, max_bad_samples=allowed)
    loader = StepLoader(
        shards, tokenizer, data, latent_size=K, reduction=reduction, seed=0, rank=rank, world=world, start_step=0,
        total_steps=1, **options,
    )  # fmt: skip
    with loader:
        return [(plan, batches, loader.last_bad) for _, plan, batches in loader]


@pytest.mark.parametrize("reduction", ["sample", "token"])
def test_the_step_is_the_one_without_the_sample(broken, tokenizer, reduction):
    ranks = [steps_of(broken, tokenizer, rank, reduction=reduction)[0] for rank in range(2)]
    bad = [b for _, _, lost in ranks for b in lost]
    assert [b.number for b in bad] == [BAD] and "shard" in bad[0].error
    planned = ranks[0][0].totals
    left = remaining(planned, lost_totals(bad))
    assert left.samples == planned.samples - 1
    fixed = [b for _, batches, _ in ranks for b in reweighted(batches, planned, left, reduction)]
    good = [broken.load_sample(n, tokenizer) for n in range(len(broken)) if n != BAD]
    whole = pack(good, tokenizer.vocabulary, K, totals=left, reduction=reduction)
    expected = {n: w for n, w in zip(whole.sample_numbers, whole.align_weights.tolist(), strict=True)}
    seen = {n: w for b in fixed for n, w in zip(b.sample_numbers, b.align_weights.tolist(), strict=True) if n >= 0}
    assert seen == pytest.approx(expected, rel=1e-6)
    total = sum(float(b.ce_weights.double().sum()) for b in fixed)
    if broken.index[BAD]["supervised"] == bad[0].supervised and reduction == "sample":
        assert total == pytest.approx(1, abs=1e-6)
    assert sum(b.align_weights.double().sum() for b in fixed) == pytest.approx(1, abs=1e-6)


def test_a_shard_that_cannot_be_read_is_not_a_bad_sample(broken, tokenizer):
    (broken.folder / "shard-000000.tar").rename(broken.folder / "gone.tar")
    with pytest.raises(ReadError, match=r"shard-000000.tar"):
        steps_of(broken, tokenizer, 0)


def make(folder, allowed, known=(), ranks=lambda value: [value]):
    return BadSamples(allowed, known, folder / "bad.jsonl", list, ranks)


def test_counted_once_written_and_fatal_above_the_number(broken, tokenizer, tmp_path):
    plan, batches, bad = steps_of(broken, tokenizer, 0, world=1)[0]
    log = make(tmp_path, allowed=1)
    for step in (1, 2):  # the same sample in the next epoch
        fixed, totals = log.settle(step, plan.totals, batches, bad, "sample")
        assert totals.samples == plan.totals.samples - 1 and len(log) == 1
        assert float(sum(b.align_weights.sum() for b in fixed)) == pytest.approx(1)
    assert [json.loads(line)["step"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()] == [1, 2]
    other = [dataclasses.replace(bad[0], number=7)]
    with pytest.raises(TrainingError, match=r"2 bad samples, data.max_bad_samples is 1.*shard"):
        log.settle(3, plan.totals, batches, other, "sample")
    (tmp_path / "bad.jsonl").rename(tmp_path / "bad_samples.jsonl")
    assert truncate_bad_samples(tmp_path, 3) == (BAD, 7)
    assert truncate_bad_samples(tmp_path, 1) == (BAD,)
    assert len((tmp_path / "bad_samples.jsonl").read_text().splitlines()) == 1


def test_without_the_key_no_rank_asks_another():
    def never(_):
        raise AssertionError

    log = BadSamples(0, (), None, never, never)
    totals = StepTotals(samples=1, supervised=1, spans=0, tokens=1)
    assert log.settle(1, totals, [], (), "sample") == ([], totals)
    with pytest.raises(BatchError, match="all 1 samples"):
        remaining(totals, totals)


def test_helper_images_nobody_looks_at_are_not_decoded(tmp_path, tokenizer):
    shards = write_shards(tmp_path / "shards", tokenizer)
    ((_, with_helpers, _),) = steps_of(shards, tokenizer, 0, world=1)
    ((_, without, _),) = steps_of(shards, tokenizer, 0, world=1, decode_helpers=False)
    for a, b in zip(with_helpers, without, strict=True):
        inputs = sum(t * h * w for t, h, w in a.grids[: a.num_input_images])
        assert b.grids == a.grids[: a.num_input_images] and len(a.grids) > len(b.grids)
        assert torch.equal(b.pixels, a.pixels[:inputs])
        for field in dataclasses.fields(a):
            if field.name not in ("grids", "pixels"):
                left, right = getattr(a, field.name), getattr(b, field.name)
                assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
