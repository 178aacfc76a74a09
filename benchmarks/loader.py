"""Loading samples: ours against decoding and resizing the originals each time, and against plain webdataset.

    python benchmarks/loader.py --records records.jsonl --model MODEL_DIR [--shards DIR] [--rounds 3]

One process, one core, alternating rounds on the same samples in the same run; prints JSON:

- `loader`: what a decoding worker does per sample: read by offset, check the checksum, decode, patches, tokenise;
- `originals`: the same from the records' own files: read, decode, turn, resize by Qwen's rule, patches, tokenise;
- `webdataset`: `webdataset.WebDataset(tars).decode("pil")`, every image turned into an array (no patches, no tokens);
- `crc32_share`: share of the loader's time that goes into checksums.

Claims (medians of the rounds' ratios): loader / originals >= 5 on photographs, loader / webdataset >= 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import zlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import webdataset

from ilvr_ds.contracts import ImageRef
from ilvr_ds.data.formats.source import open_source
from ilvr_ds.data.image_files import read_image_file
from ilvr_ds.data.images import image_to_patches, merged_tokens, read_image, resize_image
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.errors import RecordError


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, required=True, help="JSONL the shards were built from")
    parser.add_argument("--format", default="ilvr", help="its format (default: ilvr)")
    parser.add_argument("--model", type=Path, required=True, help="folder with the tokenizer")
    parser.add_argument("--shards", type=Path, required=True, help="folder built from the records")
    parser.add_argument("--samples", type=int, default=64, help="samples of a round (default: 64)")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds (default: 3)")
    options = parser.parse_args()
    shards, tokenizer = ShardSet.open(options.shards), ChatTokenizer.from_folder(options.model)
    count = min(options.samples, len(shards))
    numbers = np.arange(count)
    source = open_source(options.records, options.format, options.shards)
    records = [r for r in source.read(0, len(source)) if not isinstance(r, RecordError)][:count]
    tars = [str(options.shards / entry.name) for entry in shards.manifest.shards]
    bounds = {role: shards.manifest.images.bounds(role) for role in ("input", "helper")}
    latent_size = shards.manifest.latent_size

    def ours() -> None:
        for group in np.array_split(numbers, max(1, count // 8)):  # a step's samples are read together
            wanted = [int(n) for n in group]
            for number, blob in zip(wanted, shards.read_bytes(wanted), strict=True):
                shards.load_sample(number, tokenizer, blob=blob)

    def originals() -> None:
        for record in records:
            counts = []
            for role, parts in (("input", record.prompt), ("helper", record.steps)):
                for part in parts:
                    if isinstance(part, ImageRef):
                        image = read_image(read_image_file(part, options.records.parent))
                        _, grid = image_to_patches(np.asarray(resize_image(image, *bounds[role])))
                        if role == "input":
                            counts.append(merged_tokens(grid))
            tokenizer.encode_sample(record.prompt, record.steps, counts, latent_size)

    def plain_webdataset() -> None:
        for sample in islice(webdataset.WebDataset(tars, shardshuffle=False).decode("pil"), count):
            for value in sample.values():
                if hasattr(value, "mode"):
                    np.asarray(value)

    def checksums() -> None:
        for blob in blobs:
            zlib.crc32(blob)

    blobs = shards.read_bytes([int(n) for n in numbers])
    rows = []
    for _ in range(options.rounds):
        rows.append([cpu_seconds(work) for work in (ours, originals, plain_webdataset, checksums)])
    seconds = np.array(rows)  # (rounds, 4)
    rates = count / np.median(seconds, axis=0)
    print(json.dumps({
        "samples": count, "rounds": options.rounds, "machine": platform.processor() or platform.machine(),
        "samples_per_s_per_core": {"loader": rates[0], "originals": rates[1], "webdataset": rates[2]},
        "loader_to_originals": statistics.median(seconds[:, 1] / seconds[:, 0]),
        "loader_to_webdataset": statistics.median(seconds[:, 2] / seconds[:, 0]),
        "crc32_share": statistics.median(seconds[:, 3] / seconds[:, 0]),
    }, indent=1))  # fmt: skip


def cpu_seconds(work: Callable[[], None]) -> float:
    """Processor time of this process: a neighbour on the machine does not count."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


if __name__ == "__main__":
    main()
