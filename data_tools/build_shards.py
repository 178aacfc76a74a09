"""Build a folder of shards from a file of records.

    python -m data_tools.build_shards --input train.jsonl --format ilvr --tokenizer MODEL_FOLDER --out data/train

Records that cannot be used go to OUT/rejects.jsonl with the reason; the others are built. Run the same command
again after an interruption: finished shards are kept. Exit code 1 when nothing was built, when more than
--max-reject-fraction of the records are refused (the build stops as soon as that is certain), or on an error (the
message says which).

Several jobs build one folder together, on one file system or each into its own --out; merge_shards finishes it:

    python -m data_tools.build_shards ... --out OUT --job-index 0 --job-count 4      # 1, 2, 3 likewise, anywhere
    python -m data_tools.merge_shards --out OUT
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import get_args

from tqdm import tqdm

from ilvr_ds.data.assistant_view import ASSISTANT_VIEWS
from ilvr_ds.data.build import BuildSettings, Job, Progress, build, build_job, survey_only
from ilvr_ds.data.formats import FormatName
from ilvr_ds.data.formats.input_files import input_files
from ilvr_ds.data.images import MAX_PIXELS, MIN_PIXELS, ImageSettings
from ilvr_ds.data.index import REJECTS_NAME, Manifest
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.errors import ConfigError, IlvrError

STORAGE = ImageSettings()  # its defaults


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except IlvrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    inputs = input_files([path for given in options.input for path in given])
    folders = sorted({path.parent for path in inputs})
    if options.image_root is None and len(folders) > 1:
        raise ConfigError(
            f"--input: files in several folders ({folders[0]}, {folders[-1]}): give the --image-root that relative "
            f"image paths start from"
        )
    settings = BuildSettings(
        inputs=inputs,
        source_format=options.format,
        image_root=options.image_root or folders[0],
        out=options.out,
        latent_size=options.latent_size,
        samples_per_shard=options.samples_per_shard,
        max_tokens=options.max_tokens,
        assistant=options.assistant,
        images=ImageSettings(
            input_min_pixels=options.input_min_pixels,
            input_max_pixels=options.input_max_pixels,
            helper_min_pixels=options.helper_min_pixels,
            helper_max_pixels=options.helper_max_pixels,
            jpeg_quality=options.jpeg_quality or None,
            jpeg_saving=options.jpeg_saving,
            jpeg_max_error=options.jpeg_max_error,
        ),
    )
    job = Job(options.job_index, options.job_count)
    tokenizer = ChatTokenizer.from_folder(options.tokenizer)
    with _Bar() as bar:
        if options.survey_only:
            survey = survey_only(settings, tokenizer, bar.show, options.workers)
        elif job.count > 1:
            job_build = (job, options.workers, options.max_reject_fraction)
            summaries = build_job(settings, tokenizer, bar.show, *job_build)
        else:
            manifest = build(settings, tokenizer, bar.show, options.workers, options.max_reject_fraction)
    if options.survey_only:
        print(f"{settings.out}: surveyed; {survey.bad} bad records, {len(survey.duplicates)} duplicates")
        return 0
    if job.count > 1:
        samples, rejected = sum(s.samples for s in summaries), sum(s.reasons.total() for s in summaries)
        print(f"{settings.out}: job {job.index} of {job.count}: {samples} samples, {rejected} records rejected")
        print(f"when all jobs are done: python -m data_tools.merge_shards --out {settings.out}")
        return 0
    return report(settings.out, manifest)


def report(out: Path, manifest: Manifest) -> int:
    """Print what a finished folder holds; returns the exit code."""
    megabytes = sum(entry.bytes for entry in manifest.shards) / 1e6
    print(f"{out}: {manifest.built} samples in {len(manifest.shards)} shards, {megabytes:.1f} MB")
    print(f"{manifest.rejected} of {manifest.built + manifest.rejected} records rejected")
    for reason, count in manifest.reject_reasons.items():
        print(f"  {reason}: {count}")
    if manifest.rejected:
        print(f"  each with its reason in {out / REJECTS_NAME}")
    if manifest.built == 0:
        print("error: nothing was built", file=sys.stderr)
        return 1
    return 0


class _Bar:
    """A progress bar per stage: records, records/s, time left, MB/s of shards, rejects."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._stage = ""

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, progress: Progress) -> None:
        """Draw how far the build is."""
        if self._bar is None or progress.stage != self._stage:
            self.__exit__()
            self._stage = progress.stage
            name = "build_shards" if progress.stage == "shards" else "survey"
            self._bar = tqdm(total=progress.total, unit="record", desc=name, file=sys.stderr)
        if progress.stage == "shards":
            seconds = max(self._bar.format_dict["elapsed"], 1e-9)
            rate = f"{progress.bytes / 1e6 / seconds:.1f}"
            self._bar.set_postfix({"MB/s": rate, "rejected": progress.rejected}, refresh=False)
        self._bar.update(progress.records - self._bar.n)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_tools.build_shards", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--input", type=Path, required=True, nargs="+", action="append", metavar="FILE",
        help=".jsonl, .json (also .gz, .zst) or .parquet; several, a folder or a 'pattern*' are read in their order, "
        "folders and patterns sorted by name")  # fmt: skip
    add("--format", choices=get_args(FormatName), default="ilvr", help="schema of the records (default: ilvr)")
    add("--image-root", type=Path, metavar="DIR", help="where relative image paths start (default: the input's folder)")
    add("--tokenizer", type=Path, required=True, metavar="DIR", help="folder with the model's tokenizer.json")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--workers", type=_count, default=len(os.sched_getaffinity(0)), metavar="N",
        help="processes; 0: all in this one, for a debugger (default: one per CPU of this job)")  # fmt: skip
    add("--job-index", type=int, default=0, metavar="J", help="which of the jobs this is, from 0 (default: 0)")
    add("--job-count", type=int, default=1, metavar="M", help="jobs that build OUT together (default: 1)")
    add("--survey-only", action="store_true", help="read the records once ahead of the jobs, build nothing")
    add("--latent-size", type=int, default=8, metavar="K", help="latents per helper image (default: 8)")
    add("--samples-per-shard", type=int, default=1000, metavar="N", help="input records per shard (default: 1000)")
    add(
        "--assistant", choices=ASSISTANT_VIEWS, default="interleaved",
        help="what of the assistant turn is kept: all, its text only, its final answer only (default: interleaved)",
    )  # fmt: skip
    add("--max-tokens", type=int, metavar="N", help="refuse records with a longer sequence (default: no limit)")
    for role in ("input", "helper"):
        add(f"--{role}-min-pixels", type=int, default=MIN_PIXELS, metavar="N", help=f"smaller {role} images grow")
        add(f"--{role}-max-pixels", type=int, default=MAX_PIXELS, metavar="N", help=f"larger {role} images shrink")
    add("--jpeg-quality", type=int, default=STORAGE.jpeg_quality, metavar="Q",
        help="of photographs, 1 to 100; 0: every image is a PNG (default: %(default)s)")  # fmt: skip
    add("--jpeg-saving", type=float, default=STORAGE.jpeg_saving, metavar="F",
        help="JPEG only where a PNG would be more than so many times as large (default: %(default)s)")  # fmt: skip
    add("--jpeg-max-error", type=float, default=STORAGE.jpeg_max_error, metavar="E",
        help="JPEG only where pixels are off by no more than this, mean of 0..255 (default: %(default)s)")  # fmt: skip
    add("--max-reject-fraction", type=float, default=1.0, metavar="F",
        help="stop with an error above this share of the records (default: 1.0)")  # fmt: skip
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value}: 0 or more")
    return value


if __name__ == "__main__":
    sys.exit(main())
