"""Images per second and core: build_shards against a plain Pillow loop over the same files. Needs no data.

    python benchmarks/shards.py [--kinds KIND ...] [--photographs 240] [--drawings 240] [--repeats 3] [--workers 2]
                                [--out FILE.json]

One image per record, eight different ones of a kind:

    photographs              1008x756 JPEG (noise at five scales): of the size that is wanted, stored as they came
    photographs_resized      1000x750 JPEG: decoded, resized to 1008x756, encoded
    photographs_progressive  1008x756 progressive JPEG: decoded and encoded
    drawings                 384x384 PNG (lines, boxes, circles, text): resized to 392x392

Per kind:

    loop          images/s of CPU time: open, decode, convert to RGB, resize with Qwen's rule, encode as the build would
                  (PNG, or JPEG at the same quality, Pillow's defaults otherwise), write one file per image
    same_choice   the same loop, choosing PNG or JPEG as the build does (estimate of the PNG, error of the JPEG)
    build         images/s of CPU time of the whole build in one process: survey, text, tar, hashes, index, every fsync
    per_core      build / loop: the target is 0.9 or more
    pipeline      build / same_choice: what is left when the choice of PNG or JPEG is in both
    bytes         stored per image, by the loop and by the build (text and tar headers included)
    two_workers   images/s of wall time by --workers processes / by one, from the first image to the last

Loop and build take turns in one process; medians over the repeats. From the first build on that process keeps freed
memory (`kept_memory.py`), which helps the loop too. CPU time, so that other programs on the machine do not count, but
for the last line, which needs a quiet one (the load average is printed).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from build_kill import write_tokenizer
from pictures import drawing, file_bytes, photograph, photograph_progressive, photograph_resized
from PIL import Image

from ilvr_ds.data.build import BuildSettings, Progress, build
from ilvr_ds.data.image_codec import encode_image
from ilvr_ds.data.images import ImageSettings, smart_resize
from ilvr_ds.data.tokens import ChatTokenizer

SETTINGS = ImageSettings()


KINDS = {
    "photographs": photograph,
    "photographs_resized": photograph_resized,
    "photographs_progressive": photograph_progressive,
    "drawings": drawing,
}


def plain_loop(files: list[Path], out: Path, encode: Callable[[Image.Image], bytes]) -> None:
    """What one would write without this package."""
    out.mkdir(exist_ok=True)
    for number, path in enumerate(files):
        with Image.open(path) as image:
            image = image.convert("RGB")
        height, width = smart_resize(image.height, image.width)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        (out / f"{number}.bin").write_bytes(encode(image))


def measure(kind: str, count: int, repeats: int, workers: int, folder: Path, tokenizer: ChatTokenizer) -> dict:
    """The numbers of one kind of image."""
    rng = np.random.default_rng(0)
    make, ending = KINDS[kind], "png" if kind == "drawings" else "jpg"
    files = [folder / f"{number}.{ending}" for number in range(count)]
    lines = []
    different = [make(rng) for _ in range(8)]
    for number, path in enumerate(files):
        path.write_bytes(different[number % len(different)])
        steps = [{"type": "text", "content": "The final answer is: A"}]
        record = {"text_input": "What is it?", "image_input": path.name, "sequence_plan": steps}
        lines.append(json.dumps({**record, "id": path.stem, "original_final_answer": "A"}) + "\n")
    (folder / "records.jsonl").write_text("".join(lines))
    with Image.open(files[0]) as image:
        height, width = smart_resize(image.height, image.width)
        stored = encode_image(image.convert("RGB").resize((width, height)), SETTINGS)[0]
    times: dict[str, list[float]] = {name: [] for name in ("loop", "same_choice", "build")}
    walls: dict[int, list[float]] = {1: [], workers: []}
    for repeat in range(repeats):
        for name in times:
            begin = time.process_time()
            if name == "build":
                _build(folder, folder / f"built-{repeat}", tokenizer, 0, count)
            elif name == "loop":
                plain_loop(files, folder / "plain", lambda image: _encoded(image, stored))
            else:
                plain_loop(files, folder / "plain", lambda image: encode_image(image, SETTINGS)[1])
            times[name].append(count / (time.process_time() - begin))
        for number in walls:
            walls[number].append(_build(folder, folder / f"by-{number}-{repeat}", tokenizer, number, count))
    plain_loop(files, folder / "plain", lambda image: _encoded(image, stored))
    stored_bytes = {"loop": sum(path.stat().st_size for path in (folder / "plain").iterdir()) // count}
    stored_bytes["build"] = sum(path.stat().st_size for path in (folder / "built-0").glob("*.tar")) // count
    rates = {name: statistics.median(values) for name, values in times.items()}
    pairs = list(zip(times["build"], times["loop"], strict=True))
    return {
        "images": count,
        "loop_stores": stored,
        "bytes": stored_bytes,
        **{name: round(value, 1) for name, value in rates.items()},
        "per_core": round(statistics.median(build / loop for build, loop in pairs), 3),
        "pipeline": round(
            statistics.median(b / c for b, c in zip(times["build"], times["same_choice"], strict=True)), 3
        ),
        "two_workers": round(statistics.median(b / a for a, b in zip(walls[1], walls[workers], strict=True)), 2),
    }


def _build(folder: Path, out: Path, tokenizer: ChatTokenizer, workers: int, count: int) -> float:
    """Build; images per second of wall time between the first report with an image done and the last."""
    reports: list[tuple[float, int]] = []

    def note(progress: Progress) -> None:
        if progress.stage == "shards" and progress.records > 0:
            reports.append((time.perf_counter(), progress.records))

    settings = BuildSettings((folder / "records.jsonl",), "ilvr", folder, out, samples_per_shard=max(1, count // 12))
    build(settings, tokenizer, note, workers=workers)
    (begin, first), (end, last) = reports[0], reports[-1]
    return (last - first) / max(end - begin, 1e-9)


def _encoded(image: Image.Image, stored: str) -> bytes:
    if stored == "png":
        return file_bytes(image, "PNG")
    return file_bytes(image, "JPEG", quality=SETTINGS.jpeg_quality, subsampling=0)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=int, default=240, help="of each kind; 12 or more")
    parser.add_argument("--drawings", type=int, default=240)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result: dict = {"machine": f"{platform.machine()}, {os.cpu_count()} CPUs", "load": list(os.getloadavg())}
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as name:
            write_tokenizer(Path(name))
            tokenizer = ChatTokenizer.from_folder(name)
            count = options.drawings if kind == "drawings" else options.photographs
            result[kind] = measure(kind, count, options.repeats, options.workers, Path(name), tokenizer)
    text = json.dumps(result, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
