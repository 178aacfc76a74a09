#!/usr/bin/env python
"""Train the method and its controls on FrozenLake puzzles with equal tokens and seeds; compare them on held-out maps.

    STYLE="--wording brief --cell 28"
    python data_tools/make_frozenlake.py --out held_out --maps vsp_planning_test/test.jsonl $STYLE
    python data_tools/make_frozenlake.py --out puzzles --count 6000 --seed 0 --exclude held_out/records.jsonl $STYLE
    python benchmarks/frozenlake.py --puzzles puzzles --test held_out/records.jsonl --out runs/controls \\
        --tokens 1000000 --seeds 0 1 2 --jobs 2

Methods: direct answers (sft), reasoning in words (text), pause tokens (pause), Mirage (mirage), ILVR with a teacher
that never moves (ilvr_frozen), ILVR (ilvr); recipes in launch/recipes/controls/. Each run: stage 1, stage 2 where the
method has one, export, evaluation with greedy decoding (Mirage's goal rule).

What is equal: training maps, model size, images, samples per step, optimizer, and the number of sequence tokens trained
on (text, image and latent positions alike; a method of two stages shares them, --stage2-share going to stage 2). So a
method with shorter samples sees more of them in more steps. Within a seed the starting weights are equal; order and
noise are drawn from the same seed. Not equal: compute (the teacher's forward, helper images in the vision tower).

Reference rows: the untrained models, and for each level the one plan that solves most training maps (blind).

A finished run is kept in OUT/runs; the same command goes on where it was stopped. OUT/results.json holds every run and
the table, OUT/results.md the table. Exit code 1 when a run failed (its log is named); the others are still reported;
75 when it was told to stop.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frozenlake_commands import Commands, RunFailed
from frozenlake_table import markdown, summarise

from ilvr_ds.data.frozenlake import read_maps
from ilvr_ds.data.index import file_sha256, read_index, read_manifest, write_text
from ilvr_ds.errors import ConfigError, IlvrError
from ilvr_ds.inference.scoring.blind import best_blind_plan
from ilvr_ds.inference.scoring.vsp import score_plan

RECIPES = Path("launch/recipes/controls")
RESULT = "result.json"  # of a finished run
EXIT_STOPPED = 75  # as launch/train.py


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    label: str
    shards: str  # build_shards --assistant
    recipes: tuple[str, ...]  # in launch/recipes/controls, stage after stage


METHODS = (
    Method("untrained", "untrained", "interleaved", ()),
    Method("sft", "direct answer (SFT)", "answer", ("sft",)),
    Method("text", "text-only reasoning", "text", ("text",)),
    Method("pause", "pause tokens", "interleaved", ("pause",)),
    Method("mirage", "Mirage, stages 1 + 2", "interleaved", ("mirage", "mirage_stage2")),
    Method("ilvr_frozen", "ILVR, frozen teacher, stages 1 + 2", "interleaved", ("ilvr_frozen", "ilvr_stage2")),
    Method("ilvr", "ILVR, stages 1 + 2", "interleaved", ("ilvr", "ilvr_stage2")),
    Method("mirage_stage1", "Mirage, stage 1 only", "interleaved", ("mirage",)),
    Method("ilvr_stage1", "ILVR, stage 1 only", "interleaved", ("ilvr",)),
)
DEFAULT = ("untrained", "sft", "text", "pause", "mirage", "ilvr_frozen", "ilvr")


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        return _benchmark(args)
    except IlvrError as error:
        print(f"frozenlake: {error}", file=sys.stderr)
        return 1


def _benchmark(args: argparse.Namespace) -> int:
    begin = time.time()
    commands = Commands()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a job that is told to stop, stops like Ctrl-C
    args.out, args.test, args.puzzles = args.out.resolve(), args.test.resolve(), args.puzzles.resolve()
    blind = _blind(args.puzzles / "records.jsonl", args.test)
    _claim(args)
    methods = [m for m in METHODS if m.name in args.methods]
    try:
        _prepare(args, commands, methods)
    except RunFailed as error:
        raise ConfigError(f"preparing data and models: {error}") from error
    # the methods of a seed side by side: what an interruption leaves is comparable
    jobs = [(method, seed) for seed in args.seeds for method in methods]
    failed: list[str] = []
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [(job, pool.submit(_run, args, commands, *job)) for job in jobs]
        try:
            for (method, seed), future in futures:
                try:
                    share = 100 * future.result()["accuracy"]
                    print(f"[{time.time() - begin:6.0f} s] {method.name}, seed {seed}: {share:.1f} %", flush=True)
                except RunFailed as error:
                    failed.append(f"{method.name}, seed {seed}: {error}")
                    print(f"frozenlake: {failed[-1]}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            commands.stop()
            print(f"frozenlake: stopped; the same command goes on ({args.out})", file=sys.stderr)
            return EXIT_STOPPED
    runs = [json.loads(path.read_text()) for m, s in jobs if (path := _folder(args, m, s) / RESULT).is_file()]
    tree = {
        "settings": _settings(args),
        "methods": {m.name: m.label for m in methods},
        "seeds": args.seeds,
        "blind": blind,
        "summary": summarise(runs, [m.name for m in methods]),
        "runs": runs,
        "failed": failed,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "wall_s": round(time.time() - begin, 1),
    }
    table = markdown(tree)
    write_text(args.out / "results.json", json.dumps(tree, indent=1) + "\n")
    write_text(args.out / "results.md", table)
    print(table)
    return 1 if failed else 0


# ------------------------------------------------------------------------------------------ before
def _blind(training: Path, test: Path) -> dict[str, dict[str, Any]]:
    """Per level: the plan that solves most training maps, and how many maps of the test it solves.

    Raises ConfigError for a test with maps that are trained on, or of a size that is not.
    """
    known, held_out = read_maps(training), read_maps(test)
    shared = set(known) & set(held_out)
    if shared:
        raise ConfigError(
            f"{test}: {len(shared)} of its maps are in {training} too; make the puzzles with --exclude {test}"
        )
    rows = {}
    for size in sorted({len(lake) for lake in held_out}):
        maps = [lake for lake in known if len(lake) == size]
        if not maps:
            raise ConfigError(
                f"{test}: has maps of {size}x{size} cells, {training} has none; train on --sizes {size} too"
            )
        found, asked = best_blind_plan(maps), [lake for lake in held_out if len(lake) == size]
        solved = sum(score_plan(lake, found.plan).correct for lake in asked)
        rows[f"level {size}"] = {"plan": found.plan, "training_share": found.solved / len(maps),
                                 "correct": solved, "total": len(asked)}  # fmt: skip
    return rows


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What two commands must share for one to keep the other's runs."""
    return {
        "puzzles_sha256": file_sha256(args.puzzles / "records.jsonl"),
        "test": args.test.name,
        "test_sha256": file_sha256(args.test),
        "limit": args.limit,
        "tokens": args.tokens,
        "stage2_share": args.stage2_share,
        "samples_per_step": args.samples_per_step,
        "max_pixels": args.max_pixels,
        "max_new_tokens": args.max_new_tokens,
        "set": args.set,
    }


def _claim(args: argparse.Namespace) -> None:
    """Make OUT, or accept it as begun with the same settings. Raises ConfigError naming what differs."""
    path, now = args.out / "settings.json", _settings(args)
    if path.is_file():
        there = json.loads(path.read_text())
        changed = [
            f"{key}: {there.get(key)!r} there, {value!r} now" for key, value in now.items() if there.get(key) != value
        ]
        if changed:
            raise ConfigError(f"{args.out} holds runs of other settings; give another --out. {'; '.join(changed)}")
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(now, indent=1) + "\n")


def _prepare(args: argparse.Namespace, commands: Commands, methods: list[Method]) -> None:
    """One starting model per seed, one folder of shards per view; what is there is kept."""
    log = args.out / "prepare.log"
    for seed in args.seeds:
        commands.call(log, "launch/make_tiny_model.py", "--out", _start(args, seed), "--seed", seed)
    for view in sorted({m.shards for m in methods if m.recipes}):
        commands.call(log, "data_tools/build_shards.py", "--input", args.puzzles / "records.jsonl", "--assistant", view,
              "--tokenizer", _start(args, args.seeds[0]), "--out", _shards(args, view), "--max-reject-fraction", 0,
              "--input-max-pixels", args.max_pixels, "--helper-max-pixels", args.max_pixels)  # fmt: skip


# --------------------------------------------------------------------------------------------- run
def _run(args: argparse.Namespace, commands: Commands, method: Method, seed: int) -> dict[str, Any]:
    """One method with one seed, or its result from an earlier command. Raises RunFailed."""
    folder = _folder(args, method, seed)
    if (folder / RESULT).is_file():
        return json.loads((folder / RESULT).read_text())
    folder.mkdir(parents=True, exist_ok=True)
    model, stages = _start(args, seed), []
    for number, recipe in enumerate(method.recipes, start=1):
        share = 1.0 if len(method.recipes) == 1 else (1 - args.stage2_share, args.stage2_share)[number - 1]
        run, exported = folder / f"stage{number}", folder / f"model{number}"
        shards = _shards(args, method.shards)
        steps, epochs = _length(shards, args.tokens * share, args.samples_per_step)
        commands.call(folder / "log.txt", "launch/train.py", "--recipe", RECIPES / f"{recipe}.yaml", f"run.dir={run}",
              f"run.seed={seed}", f"run.max_steps={steps}", f"run.epochs={epochs}", "run.tensorboard=false",
              "data.workers=0", f"data.shards={shards}", f"data.samples_per_step={args.samples_per_step}",
              f"model.path={model}", f"engine.deepspeed={args.deepspeed}", *args.set)  # fmt: skip
        if not exported.exists():
            commands.call(folder / "log.txt", "launch/export.py", "--run", run, "--out", exported)
        stages.append({"recipe": recipe, **_seen(run / "metrics.jsonl")})
        model = exported
    limit = [] if args.limit is None else ["--limit", args.limit]
    commands.call(folder / "log.txt", "launch/evaluate.py", "--task", "vsp", "--file", args.test, "--checkpoint", model,
          "--out", folder / "evaluation", "--batch-size", 64, "--max-new-tokens", args.max_new_tokens,
          "--latent-size", 8, "--max-pixels", args.max_pixels, *limit)  # fmt: skip
    summary = json.loads((folder / "evaluation" / "results.json").read_text())["summary"]
    result = {
        "method": method.name,
        "seed": seed,
        "stages": stages,
        "training_s": sum(s["step_s"] for s in stages),
        **summary,
    }
    write_text(folder / RESULT, json.dumps(result, indent=1) + "\n")
    return result


def _length(shards: Path, tokens: float, samples_per_step: int) -> tuple[int, int]:
    """Optimizer steps that see about `tokens` tokens, and the epochs they need."""
    manifest = read_manifest(shards)
    index = read_index(shards, manifest)
    mean = float((index["text_tokens"].astype(float) + index["image_tokens"]).mean())
    steps = max(1, round(tokens / (mean * samples_per_step)))
    per_epoch = -(-len(index) // samples_per_step)
    return steps, -(-steps // per_epoch)


def _seen(metrics: Path) -> dict[str, Any]:
    """What a stage did, from its metrics."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    last = rows[-20:]
    return {
        "steps": len(rows),
        "samples": sum(row["samples"] for row in rows),
        "tokens": sum(row["tokens"] for row in rows),
        "skipped": sum(not row["applied"] for row in rows),
        "ce": sum(row["ce"] for row in last) / len(last),
        "align": sum(row["align"] for row in last) / len(last),
        "step_s": round(sum(row["step_s"] for row in rows), 1),
    }


def _start(args: argparse.Namespace, seed: int) -> Path:
    return args.out / f"start-seed{seed}"


def _shards(args: argparse.Namespace, view: str) -> Path:
    return args.out / f"shards-{view}"


def _folder(args: argparse.Namespace, method: Method, seed: int) -> Path:
    return args.out / "runs" / f"{method.name}-seed{seed}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--puzzles", type=Path, required=True, metavar="DIR", help="of data_tools/make_frozenlake.py, to train on")
    add("--test", type=Path, required=True, metavar="FILE", help="JSONL of maps none of which is in --puzzles")
    add("--out", type=Path, required=True, metavar="DIR", help="runs, results.json, results.md")
    add("--tokens", type=int, required=True, help="sequence tokens every run trains on, all its stages together")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="weights, order, noise (default: 0 1 2)")
    add("--methods", nargs="+", choices=[m.name for m in METHODS], default=list(DEFAULT), metavar="NAME",
        help=f"default: {' '.join(DEFAULT)}; also: mirage_stage1 ilvr_stage1")  # fmt: skip
    add("--stage2-share", type=float, default=0.1, help="of the tokens of a method of two stages (default: 0.1)")
    add("--samples-per-step", type=int, default=32)
    add("--max-pixels", type=int, default=28224, help="of every image (default: 28224, 168x168)")
    add("--max-new-tokens", type=int, default=192, help="of an answer, latents counted (default: 192)")
    add("--limit", type=int, help="only the first N examples of --test")
    add("--deepspeed", default="ds_configs/zero0.json", help="one rank: how memory is split changes no result")
    add("--set", nargs="*", default=[], metavar="section.key=value", help="overrides for every recipe, stage 2 too")
    add("--jobs", type=int, default=1, help="runs side by side, one rank each (default: 1)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
