"""Several shard folders as one, blended by weight: what the loader and the planner ask of shards, for all of them.

Samples are numbered through the folders: the first one's rows of the index, then the second one's.
"""

from __future__ import annotations

import dataclasses
import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from ilvr_ds.config import DataConfig
from ilvr_ds.contracts import Sample
from ilvr_ds.data.order import PlanSource
from ilvr_ds.data.pixels import SampleRows
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.data.tokens import ChatTokenizer


class BlendedShards:
    """Shard folders with weights. Picklable, as its folders are."""

    def __init__(self, sets: Sequence[ShardSet], weights: Sequence[float]):
        self.sets = tuple(sets)
        self.weights = tuple(weights)
        self._starts = [0, *accumulate(len(shards) for shards in sets)]  # (sources + 1,)

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def fingerprint(self) -> str:
        """Of what is trained on: every index and its weight, in order."""
        text = "".join(f"{s.fingerprint} {w!r}\n" for s, w in zip(self.sets, self.weights, strict=True))
        return hashlib.sha256(text.encode()).hexdigest()

    def plan_sources(self, helpers: bool = True) -> list[PlanSource]:
        """What the planner blends, in the order of the folders; `helpers` as in `ShardSet.plan_sources`."""
        sources = [source for shards in self.sets for source in shards.plan_sources(helpers)]
        return [dataclasses.replace(s, weight=w) for s, w in zip(sources, self.weights, strict=True)]

    def require(self, tokenizer: ChatTokenizer, latent_size: int) -> None:
        """Raise ShardError unless every index was counted with this tokenizer and number of latents per span."""
        for shards in self.sets:
            shards.require(tokenizer, latent_size)

    def sample_id(self, number: int) -> str:
        """The record id of a sample, read from its tar."""
        shards, row = self._find(number)
        return shards.sample_id(row)

    def row(self, number: int) -> np.void:
        """The row of its index, () INDEX_DTYPE."""
        shards, row = self._find(number)
        return shards.row(row)

    def read_bytes(self, numbers: Sequence[int]) -> list[bytes]:
        """The bytes of samples, in the order asked for; raises as `ShardSet.read_bytes`."""
        found: dict[int, bytes] = {}
        for source, shards in enumerate(self.sets):
            own = [n for n in dict.fromkeys(numbers) if self._starts[source] <= n < self._starts[source + 1]]
            rows = [n - self._starts[source] for n in own]
            found.update(zip(own, shards.read_bytes(rows) if rows else [], strict=True))
        return [found[number] for number in numbers]

    def load_sample(
        self,
        number: int,
        tokenizer: ChatTokenizer,
        *,
        blob: bytes | None = None,
        decode_helpers: bool = True,
        into: SampleRows | None = None,
    ) -> Sample:
        """As `ShardSet.load_sample`; the sample carries the number it has here."""
        shards, row = self._find(number)
        sample = shards.load_sample(row, tokenizer, blob=blob, decode_helpers=decode_helpers, into=into)
        return dataclasses.replace(sample, number=number)

    def _find(self, number: int) -> tuple[ShardSet, int]:
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        source = bisect_right(self._starts, number) - 1
        return self.sets[source], number - self._starts[source]


def open_shards(data: DataConfig) -> ShardSet | BlendedShards:
    """The shards a recipe names, one folder or several blended; raises as `ShardSet.open`."""
    if not data.sources:
        return ShardSet.from_config(data)
    sets = [ShardSet.from_config(dataclasses.replace(data, shards=s.shards, sources=())) for s in data.sources]
    return BlendedShards(sets, [source.weight for source in data.sources])
