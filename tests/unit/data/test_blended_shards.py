"""Two shard folders as one: numbers, bytes and samples are those of the folders."""

import dataclasses
import pickle

import numpy as np
import pytest

from ilvr_ds.config import DataConfig, SourceConfig
from ilvr_ds.data.blended_shards import BlendedShards, open_shards
from ilvr_ds.data.loader import StepLoader
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.errors import ShardError
from tests.unit.data.test_loader import K, byte_tokenizer, write_shards


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, tokenizer = tmp_path_factory.mktemp("blend"), byte_tokenizer()
    for name, samples in (("a", 5), ("b", 7)):
        write_shards(root / name, tokenizer, samples)
    return root


@pytest.fixture
def data(folders) -> DataConfig:
    sources = (SourceConfig(str(folders / "a"), 1.0), SourceConfig(str(folders / "b"), 2.0))
    return DataConfig(sources=sources, samples_per_step=6, token_budget=600, workers=0)


def test_samples_of_both_folders(data, folders):
    both, tokenizer = open_shards(data), byte_tokenizer()
    second = ShardSet.open(folders / "b")
    assert isinstance(both, BlendedShards) and len(both) == 12
    sample, own = both.load_sample(5 + 3, tokenizer), second.load_sample(3, tokenizer)
    assert sample.number == 8 and sample.id == own.id and np.array_equal(sample.input_ids, own.input_ids)
    assert both.sample_id(8) == own.id and both.row(8) == second.row(3)
    assert both.read_bytes([8, 0, 8]) == [second.read_bytes([3])[0], both.read_bytes([0])[0], second.read_bytes([3])[0]]
    for outside in (-1, 12):
        with pytest.raises(IndexError):
            both.row(outside)


def test_the_fingerprint_is_that_of_indices_and_weights(data):
    both = open_shards(data)
    assert pickle.loads(pickle.dumps(both)).fingerprint == both.fingerprint
    heavier = dataclasses.replace(data, sources=(data.sources[0], dataclasses.replace(data.sources[1], weight=3.0)))
    other = dataclasses.replace(data, sources=data.sources[::-1])
    assert len({both.fingerprint, open_shards(heavier).fingerprint, open_shards(other).fingerprint}) == 3


def test_a_folder_counted_for_another_latent_size_is_named(data):
    with pytest.raises(ShardError, match="latent"):
        open_shards(data).require(byte_tokenizer(), K + 1)


def test_the_loader_takes_its_share_of_each(data):
    options = {"latent_size": K, "reduction": "sample", "seed": 0, "rank": 0, "world": 1}
    with StepLoader(open_shards(data), byte_tokenizer(), data, start_step=0, total_steps=5, **options) as loader:
        seen = [[n for batch in batches for n in batch.sample_numbers] for _, _, batches in loader]
    assert [sum(n < 5 for n in numbers) for numbers in seen] == [2] * 5  # a third of six
    assert [len(numbers) for numbers in seen] == [6] * 5


@pytest.mark.parametrize("helpers", [True, False])
def test_helper_images_nobody_encodes_cost_nothing(data, helpers):
    both = open_shards(data)
    options = {"latent_size": K, "reduction": "sample", "seed": 0, "rank": 0, "world": 1, "decode_helpers": helpers}
    with StepLoader(both, byte_tokenizer(), data, start_step=0, total_steps=1, **options) as loader:
        numbers, lengths = loader.planner.samples_of(0)
    rows = [both.row(n) for n in numbers.tolist()]
    assert sum(int(row["helper_tokens"]) for row in rows) > 0
    counted = [4 * (int(row["image_tokens"]) + helpers * int(row["helper_tokens"])) for row in rows]
    assert lengths.patches.tolist() == counted
