"""How much memory does a rank need to load a model? Straight into ZeRO-3 partitions against the stock loader.

    python benchmarks/load_memory.py [--ranks 2] [--layers 20] [--folder DIR] [--json FILE]

Writes a random model in the published 7B layout (names, bf16, weight files with an index, 152,064 rows, untied; 0.54
billion parameters with the default settings) and loads it on gloo ranks of this machine, each time in fresh processes:

- `partitioned`: the student, as training loads it
- `partitioned with teacher`: student and teacher
- `stock`: `from_pretrained` on every rank, what ZeRO-0 to 2 do

`peak` is the growth of a rank's peak resident memory (VmHWM) over what it had before the load, imports and process
group included in the latter; `ratio` is `peak` less CONSTANT over one unsharded copy of what is loaded. Exits with 1
if a partitioned load's ratio is above 0.65 at two ranks (or 0.5 * 1.3 * 2 / ranks).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig

from ilvr_ds.config import TeacherConfig
from ilvr_ds.engine.testing.ranks import run_ranks
from ilvr_ds.model.backbone import Backbone
from ilvr_ds.model.folder import ModelFolder, empty_network
from ilvr_ds.model.folder_write import write_model
from ilvr_ds.model.latent_settings import LatentSettings
from ilvr_ds.model.safetensors_stream import CHUNK, TensorSource
from ilvr_ds.model.teacher import Teacher

MIB = 2**20
CONSTANT = 16 * MIB  # what a process takes beside the pieces: buffers of the process group and of the reader
LIMIT = 0.65  # of one unsharded copy, at two ranks


def write_random_model(folder: Path, layers: int) -> int:
    """A random model in the published layout; returns its parameters."""
    tree = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "torch_dtype": "bfloat16",
        "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": layers, "num_attention_heads": 8,
        "num_key_value_heads": 2, "vocab_size": 152064, "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "max_position_embeddings": 128000, "bos_token_id": 151643, "eos_token_id": 151645, "image_token_id": 151655,
        "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
        "vision_config": {
            "depth": 4, "hidden_size": 320, "intermediate_size": 860, "num_heads": 4, "out_hidden_size": 1024,
            "window_size": 112, "fullatt_block_indexes": [1, 3],
        },
    }  # fmt: skip
    network = empty_network(Qwen2_5_VLConfig(**tree))
    generator = torch.Generator().manual_seed(0)

    def chunks(numel: int) -> Iterator[Tensor]:
        for start in range(0, numel, CHUNK):
            yield torch.randn(min(CHUNK, numel - start), generator=generator) * 0.02

    sources = [
        TensorSource(name, torch.bfloat16, tuple(p.shape), lambda p=p: chunks(p.numel()))
        for name, p in network.named_parameters()
    ]
    nothing = folder.with_name("nothing")
    nothing.mkdir()
    latent = LatentSettings(8, {"<|latent_pad|>": 151665, "<|latent_start|>": 151666, "<|latent_end|>": 151667})
    write_model(folder, sources, tree, latent, copy_from=nothing, texts={}, made_with={}, shard_bytes=3 * 10**8)
    return sum(p.numel() for p in network.parameters())


class Loaded(nn.Module):
    """A student, and a teacher if asked for, under the names an objective has them."""

    def __init__(self, student: Backbone, with_teacher: bool):
        super().__init__()
        self.student = student
        self.teacher = Teacher.of(student, TeacherConfig()) if with_teacher else None

    def pairs(self) -> list[tuple[str, str]]:
        names = [] if self.teacher is None else [n for n, _ in self.teacher.language_model.named_parameters()]
        return [(f"teacher.language_model.{n}", f"student.network.model.language_model.{n}") for n in names]


def load(folder: str, what: str) -> dict[str, float]:
    """On one rank: load, and say how far resident memory rose. MiB and seconds."""
    from ilvr_ds.engine.distributed import init_distributed
    from ilvr_ds.engine.partitioned_load import load_partitioned

    init_distributed()
    config = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 1}
    empty_network(ModelFolder(folder).config)  # torch and transformers import on first use
    torch.distributed.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, begin = status("VmRSS"), time.perf_counter()
    partitioned = what != "stock"
    student = Backbone.load(folder, dtype=torch.bfloat16, attention="sdpa", read_weights=not partitioned)
    loaded = Loaded(student, with_teacher=what.endswith("teacher"))
    if partitioned:
        load_partitioned(loaded, loaded.pairs(), config)
        elements = sum(p.ds_numel for p in loaded.parameters())
    else:
        elements = sum(p.numel() for p in loaded.parameters())
        assert all(bool(torch.isfinite(p).all()) for p in loaded.parameters())  # mapped files count once read
    seconds = time.perf_counter() - begin
    return {"peak": status("VmHWM") - before, "kept": status("VmRSS") - before, "copy": 2 * elements, "s": seconds}


def status(field: str) -> int:
    """A field of this process's memory status, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=20, help="decoder layers of 11.3 million parameters each")
    parser.add_argument("--folder", type=Path, help="where to write the model (default: temporary)")
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.folder is not None:
        Path(options.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as parent:
        folder = Path(parent) / "model"
        parameters = write_random_model(folder, options.layers)
        rows: list[dict[str, Any]] = []
        for what in ("partitioned", "partitioned with teacher", "stock"):
            ranks = run_ranks(load, options.ranks, str(folder), what, timeout_s=300)
            worst = max(ranks, key=lambda r: r["peak"])
            rows.append(
                {
                    "load": what,
                    "unsharded_mib": round(worst["copy"] / MIB, 1),
                    "peak_mib": round(worst["peak"] / MIB, 1),
                    "kept_mib": round(max(r["kept"] for r in ranks) / MIB, 1),
                    "ratio": round((worst["peak"] - CONSTANT) / worst["copy"], 3),
                    "seconds": round(max(r["s"] for r in ranks), 1),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    limit = LIMIT * 2 / options.ranks
    result = {
        "parameters": parameters,
        "ranks": options.ranks,
        "constant_mib": CONSTANT / MIB,
        "limit": limit,
        "rows": rows,
        "holds": all(row["ratio"] <= limit for row in rows if row["load"] != "stock"),
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
