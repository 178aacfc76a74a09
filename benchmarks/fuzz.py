"""Mutated images, records and input files through the readers: does each end built or rejected, and nothing else?

    python benchmarks/fuzz.py --tokenizer MODEL_DIR [--images DIR] [--count 10000] [--seed 0]

Every case takes a good image (of DIR, and made ones of every kind), a good record of any format or a good input file of
any layout, and flips, cuts, doubles or overwrites bytes. Prints JSON: `built + rejected + refused_files` must be
`count`; `crashes` (an exception that is no RecordError or ConfigError, or a process that died), `hangs` (a case over
--limit seconds) and `noise_bytes` (anything on stderr) must be 0. Case I depends on the seed and I alone.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import io
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ilvr_ds.contracts import ImageRef, Record
from ilvr_ds.data.encode import encode_record
from ilvr_ds.data.formats import FormatName
from ilvr_ds.data.formats.source import open_source
from ilvr_ds.data.images import ImageSettings
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.errors import ConfigError, RecordError

SMALL = ImageSettings(input_max_pixels=28 * 28 * 64, helper_max_pixels=28 * 28 * 64)
CHUNK = 250  # cases per process
LARGEST_SEED = 200_000  # bytes; larger real files add time, not paths


class Hang(Exception):
    """A case ran out of time."""


def seed_images(folder: Path | None) -> list[bytes]:
    """Made images of every kind, and those of `folder`."""
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)
    images = []
    for kind, mode, options in (
        ("PNG", "RGB", {}), ("PNG", "RGBA", {}), ("PNG", "P", {"transparency": 3}), ("PNG", "LA", {}),
        ("JPEG", "RGB", {"progressive": True}), ("JPEG", "CMYK", {}), ("GIF", "P", {}), ("WEBP", "RGBA", {}),
        ("BMP", "RGB", {}), ("TIFF", "RGB", {"compression": "tiff_lzw"}), ("TIFF", "CMYK", {}),
        ("PPM", "RGB", {}), ("JPEG2000", "RGB", {}),
    ):  # fmt: skip
        buffer = io.BytesIO()
        Image.fromarray(colour).convert(mode).save(buffer, format=kind, **options)
        images.append(buffer.getvalue())
    grey = io.BytesIO()
    Image.fromarray(rng.integers(0, 65536, (30, 30), dtype=np.uint16)).save(grey, format="PNG")
    images.append(grey.getvalue())
    if folder is not None:
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".json", ".md"))
        images += [path.read_bytes() for path in files if 0 < path.stat().st_size <= LARGEST_SEED]
    return images


def seed_records(picture: bytes) -> list[tuple[FormatName, dict[str, Any]]]:
    """A good record of every format, its images inside."""
    text = base64.b64encode(picture).decode()
    url = f"data:image/png;base64,{text}"
    plan = [{"type": "text", "content": "I look."}, {"type": "latent", "helper_image": url}]
    options = ["20°", "70°"]
    return [
        ("ilvr", {"id": "a", "text_input": "Q <image>", "image_input": [url], "sequence_plan": plan,
                  "original_final_answer": "B"}),
        ("mirage", {"text_input": "Q <image>", "image_input": url, "text_output": "I <output_image> see",
                    "image_output": {"bytes": text}}),
        ("comt", {"id": "c", "type": "creation", "question": "Q", "option": options, "answer": "B",
                  "rationale": "Draw <IMAGE1>.", "image": repr({"IMAGE0": url, "IMAGE1": url})}),
        ("zebra", {"Question": "Q <image_start>[problem_image_1]<image_end>", "problem_image_1": {"bytes": text},
                   "Text Reasoning Trace": "T <image_start>[reasoning_image_1]<image_end> U", "Final Answer": "C",
                   "reasoning_image_1": text}),
        ("vsp", {"text_input": "Plan <image>", "image_input": url, "map_desc": [[1, 0], [-1, 2]]}),
        ("m3cot", {"id": "m", "question": "Q", "choices": options, "answer": "A", "context": "", "image": url}),
        ("scienceqa", {"question": "Q", "choices": options, "answer": 1, "image": None, "lecture": "L"}),
    ]  # fmt: skip


def seed_files(record: dict[str, Any]) -> list[tuple[str, bytes]]:
    """Input files of every layout, each with four records."""
    lines = b"".join(json.dumps({**record, "id": str(i)}).encode() + b"\n" for i in range(4))
    array = json.dumps([{**record, "id": str(i)} for i in range(4)], indent=1).encode()
    files = [("x.jsonl", lines), ("x.jsonl.gz", gzip.compress(lines)), ("x.json", array)]
    try:
        import pyarrow
        import pyarrow.parquet
        import zstandard
    except ImportError as error:
        raise ConfigError("the fuzzer reads every layout: pip install 'ilvr_ds[formats]'") from error
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**record, "id": str(i)} for i in range(4)]), buffer)
    return [*files, ("x.jsonl.zst", zstandard.ZstdCompressor().compress(lines)), ("x.parquet", buffer.getvalue())]


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to three changes, never empty."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(data))
        # most of what a reader decides by is at the front, most of what it decodes is not
        at = at if rng.random() < 0.75 else rng.randrange(min(len(data), 64))
        length = rng.randint(1, 8)
        match rng.choice((0, 0, 0, 1, 1, 2, 3, 4, 5)):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + length] = rng.randbytes(length)
            case 2:
                del data[max(at, 1) :]
            case 3:
                data[at:at] = data[at : at + length]
            case 4:
                data[at : at + length] = bytes([rng.choice((0, 0xFF, 0x7F))]) * length
            case 5:
                del data[at : at + length]
        data = data or bytearray(b"x")
    return bytes(data)


def run_cases(start: int, stop: int, seed: int, tokenizer_folder: Path, images: Path | None, limit: int) -> dict:
    """Cases start..stop-1 in this process. Returns counts, and up to ten messages of what should not be."""
    tokenizer = ChatTokenizer.from_folder(tokenizer_folder)
    pictures = seed_images(images)
    records = seed_records(pictures[0])
    files = seed_files(records[0][1])
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    wrong: list[str] = []
    slowest = 0.0

    def ring(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, ring)
    with tempfile.TemporaryDirectory() as name:
        for case in range(start, stop):
            rng = random.Random(f"fuzz {seed} {case}")
            began = time.monotonic()
            signal.alarm(limit)
            try:
                outcome = _run_case(case, rng, Path(name), tokenizer, pictures, records, files)
            except Hang:
                counts["hangs"] += 1
                wrong.append(f"case {case}: no end after {limit} s")
            except Exception as error:  # what the fuzzer is looking for
                counts["crashes"] += 1
                wrong.append(f"case {case}: {type(error).__name__}: {error}"[:300])
            else:
                counts[outcome.partition(":")[0]] += 1
                reasons[outcome.partition(":")[2]] += 1
            finally:
                signal.alarm(0)
            slowest = max(slowest, time.monotonic() - began)
    del reasons[""]
    return {"counts": dict(counts), "reasons": dict(reasons), "wrong": wrong[:10], "slowest_s": round(slowest, 2)}


def _run_case(case: int, rng: random.Random, folder: Path, tokenizer: Any, pictures: Any, records: Any, files: Any):
    """ "built", "rejected:REASON" or "refused_files:"; anything else is raised."""
    if case % 2 == 0:
        picture = mutate(rng.choice(pictures), rng)
        record = Record("p", (ImageRef("p.img", picture), "Q"), ("I see",), None, None, "fuzz:1")
        return _encode(record, tokenizer)
    if case % 20 == 19:
        name, content = rng.choice(files)
        path, form = folder / name, "ilvr"
        path.write_bytes(mutate(content, rng))
    else:
        form, tree = rng.choice(records)
        path = folder / "x.jsonl"
        line = mutate(json.dumps(tree, ensure_ascii=False).encode(), rng).replace(b"\n", b" ")
        path.write_bytes((line if line.strip() else b"x") + b"\n")
    try:
        source = open_source(path, form, folder / f"scratch{case}")
    except ConfigError:
        return "refused_files:"
    items = list(source.read(0, len(source)))
    if len(items) != len(source) or (path.name == "x.jsonl" and case % 20 != 19 and len(items) != 1):
        raise AssertionError(f"{len(items)} records came out of {len(source)}")
    outcomes = [
        f"rejected:{item.reason}" if isinstance(item, RecordError) else _encode(item, tokenizer) for item in items
    ]
    return max(outcomes, default="rejected:empty")  # of a file of four records: the worst


def _encode(record: Record, tokenizer: Any) -> str:
    try:
        sample = encode_record(record, Path("."), tokenizer, 8, SMALL, max_tokens=100_000)
    except RecordError as error:
        return f"rejected:{error.reason}"
    if "json" not in sample.members:
        raise AssertionError("a sample without its JSON")
    return "built:"


def _child(start: int, stop: int, options: argparse.Namespace, out: str) -> None:
    """Run cases with stderr in a file, so that what C libraries print is seen too."""
    with Path(f"{out}.stderr").open("wb") as noise:
        os.dup2(noise.fileno(), 2)
    result = run_cases(start, stop, options.seed, options.tokenizer, options.images, options.limit)
    Path(out).write_text(json.dumps(result))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=30, help="seconds a case may take")
    options = parser.parse_args(arguments)
    totals: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    wrong, slowest, noise = [], 0.0, b""
    end = options.first + options.count
    with tempfile.TemporaryDirectory() as folder:
        for start in range(options.first, end, CHUNK):
            stop, out = min(start + CHUNK, end), f"{folder}/{start}.json"
            process = multiprocessing.get_context("fork").Process(target=_child, args=(start, stop, options, out))
            process.start()
            process.join()
            noise += Path(f"{out}.stderr").read_bytes()[:2000]
            if process.exitcode != 0:
                totals["crashes"] += stop - start  # which case it was: run this range again
                wrong.append(f"cases {start}..{stop - 1}: the process ended with {process.exitcode}")
                continue
            result = json.loads(Path(out).read_text())
            totals.update(result["counts"])
            reasons.update(result["reasons"])
            wrong += result["wrong"]
            slowest = max(slowest, result["slowest_s"])
    kinds = ("built", "rejected", "refused_files", "crashes", "hangs")
    report = {
        "count": options.count,
        **{kind: totals[kind] for kind in kinds},
        "lost": options.count - sum(totals[kind] for kind in kinds),
        "noise_bytes": len(noise),
        "noise": noise[:500].decode(errors="replace"),
        "slowest_s": slowest,
        "reasons": dict(sorted(reasons.items())),
        "wrong": wrong[:20],
        "seed": options.seed,
    }
    print(json.dumps(report, indent=1))
    return int(report["crashes"] or report["hangs"] or report["lost"] or report["noise_bytes"])


if __name__ == "__main__":
    sys.exit(main() and 1)
