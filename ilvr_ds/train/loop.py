"""The training run: plan → batches → step → EMA → report → checkpoint, and back in after a stop."""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ilvr_ds.config import Recipe, recipe_to_dict
from ilvr_ds.contracts import PackedBatch, StepReport
from ilvr_ds.data.blended_shards import BlendedShards, open_shards
from ilvr_ds.data.loader import LoadedStep, StepLoader
from ilvr_ds.data.plan import PLAN_VERSION, StepPlan, steps_per_epoch
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.data.tokens import ChatTokenizer
from ilvr_ds.engine.agree import from_rank_zero, gather_numbers, gather_objects, largest_over_ranks, sum_over_ranks
from ilvr_ds.engine.build import Engine, build_engine
from ilvr_ds.engine.checkpoint import latest_checkpoint, load_checkpoint, prune_checkpoints, read_state, save_checkpoint
from ilvr_ds.engine.distributed import init_distributed
from ilvr_ds.engine.partitioned_load import reads_partitions
from ilvr_ds.engine.step import train_step
from ilvr_ds.errors import CheckpointError, ConfigError, IlvrError, TrainingError
from ilvr_ds.model.flops import FlopsModel, peak_flops
from ilvr_ds.objective.build import build_objective, reads_helpers
from ilvr_ds.train.bad_samples import BAD_SAMPLES_FILE, BadSamples, truncate_bad_samples
from ilvr_ds.train.cost import cost_model, imbalance_of
from ilvr_ds.train.metrics import METRICS_FILE, MetricsWriter, truncate_metrics
from ilvr_ds.train.rundir import check_resumable, write_recipe
from ilvr_ds.train.schedule import learning_rate
from ilvr_ds.train.signals import StopRequest

CHECKPOINTS = "checkpoints"  # in the run folder
_Shards = ShardSet | BlendedShards
EXIT_STOPPED = 75  # EX_TEMPFAIL: told to stop by a signal; a checkpoint is there, submit the job again


@dataclass(frozen=True)
class Schedule:
    """How many optimizer steps a run has; all numbers follow from the index and the recipe."""

    steps_per_epoch: int
    total_steps: int

    @staticmethod
    def of(recipe: Recipe, samples: int) -> Schedule:
        """Epochs times steps per epoch, cut at run.max_steps."""
        per_epoch = steps_per_epoch(samples, recipe.data.samples_per_step)
        total = recipe.run.epochs * per_epoch
        return Schedule(per_epoch, total if recipe.run.max_steps is None else min(total, recipe.run.max_steps))

    def last_step(self, recipe: Recipe) -> int:
        """Where this run pauses: the end, or run.stop_after if that comes first."""
        return self.total_steps if recipe.run.stop_after is None else min(self.total_steps, recipe.run.stop_after)


def train(recipe: Recipe) -> int:
    """Run (or resume) a recipe on this rank. Returns the exit code: 0, or EXIT_STOPPED after a signal.

    Raises IlvrError subclasses for anything the user can mend.
    """
    with StopRequest() as stop:
        rank, world, device = init_distributed()
        shards = open_shards(recipe.data)
        tokenizer = ChatTokenizer.from_folder(Path(recipe.model.path))
        schedule = Schedule.of(recipe, len(shards))
        found = from_rank_zero(_find_start(recipe, shards) if rank == 0 else None)
        if isinstance(found, IlvrError):  # rank 0 found a reason not to start; every rank leaves with it
            raise found
        start: _Start = found
        with StepLoader(
            shards, tokenizer, recipe.data, latent_size=recipe.latent.size, reduction=recipe.loss.reduction,
            seed=recipe.run.seed, rank=rank, world=world, start_step=start.step,
            total_steps=schedule.last_step(recipe), cost=cost_model(recipe), pin_memory=device.type == "cuda",
            decode_helpers=reads_helpers(recipe),
        ) as loader:  # fmt: skip
            steps = iter(loader)  # the workers start now, while the model is being loaded
            objective = build_objective(
                recipe,
                tokenizer.vocabulary,
                device,
                agree=largest_over_ranks(device),
                read_weights=not reads_partitions(recipe),
            )
            engine = build_engine(objective, recipe)
            if start.checkpoint is not None:
                load_checkpoint(engine, start.checkpoint)
            return _Run(recipe, schedule, engine, shards, start).go(loader, steps, stop)


@dataclass(frozen=True)
class _Start:
    """Where a run begins."""

    step: int  # optimizer steps already done
    checkpoint: str | None
    bad_samples: tuple[int, ...] = ()  # met before


def _find_start(recipe: Recipe, shards: _Shards) -> _Start | IlvrError:
    """On rank 0: where to go on from; an error is returned, not raised, so that every rank can leave with it."""
    run_dir = Path(recipe.run.dir)
    try:
        newest = latest_checkpoint(run_dir / CHECKPOINTS)
        if not recipe.run.resume and (newest is not None or (run_dir / METRICS_FILE).exists()):
            raise ConfigError(
                f"run.resume=False, but {run_dir} already holds a run; choose another run.dir or remove it"
            )
        if newest is None:
            return _Start(0, None, truncate_bad_samples(run_dir, 0))
        state = read_state(newest)
        check_resumable(state["recipe"], recipe, str(newest))
        if state.get("plan_version", 1) != PLAN_VERSION:  # the first version did not write one
            raise CheckpointError(
                f"{newest}: field 'plan_version' is {state.get('plan_version', 1)}, this version of ilvr_ds has "
                f"{PLAN_VERSION}: other samples per step. Finish that run with the version it was started with"
            )
        if state["index_sha256"] != shards.fingerprint:
            raise CheckpointError(
                f"{newest}: was trained on other shards or weights than the recipe's (the index differs); "
                "resume with the shards of that run, or start a new run in another run.dir"
            )
        return _Start(state["step"], str(newest), truncate_bad_samples(run_dir, state["step"]))
    except IlvrError as error:
        return error


class _Run:
    """State of a running training job on one rank."""

    def __init__(self, recipe: Recipe, schedule: Schedule, engine: Engine, shards: _Shards, start: _Start):
        self.recipe, self.schedule, self.engine, self.shards, self.start = recipe, schedule, engine, shards, start
        self.run_dir = Path(recipe.run.dir)
        self.flops = FlopsModel(
            engine.module.student.config,
            recipe.model.train_vision,
            has_teacher=recipe.teacher is not None,
            reads_helpers=reads_helpers(recipe),
        )
        on_gpu = engine.device.type == "cuda"
        self.peak = peak_flops(torch.cuda.get_device_name(engine.device)) if on_gpu else None
        self.writer: MetricsWriter | None = None
        self.skipped_in_a_row = 0
        self.bad = BadSamples(
            recipe.data.max_bad_samples,
            start.bad_samples,
            self.run_dir / BAD_SAMPLES_FILE if engine.rank == 0 else None,
            sum_over_ranks(engine.device),
            gather_objects,
        )

    def go(self, loader: StepLoader, steps: Iterator[LoadedStep], stop: StopRequest) -> int:
        """Train to the end of the schedule, the pause the recipe asks for, or a signal."""
        total, last, done = self.schedule.total_steps, self.schedule.last_step(self.recipe), self.start.step
        if self.engine.rank == 0:
            write_recipe(self.run_dir, self.recipe)
            truncate_metrics(self.run_dir, done)
            self.writer = MetricsWriter(self.run_dir, total, done, self.recipe.run.tensorboard)
            self._introduce(done, last)
        stopped = False
        try:
            begin = time.perf_counter()
            for step, plan, planned in steps:
                batches, totals = self.bad.settle(
                    step + 1, plan.totals, planned, loader.last_bad, self.recipe.loss.reduction
                )
                plan = dataclasses.replace(plan, totals=totals)  # what is trained on
                stopped = self._one_step(step, plan, batches, loader.last_wait_s, begin, stop)
                done = step + 1
                if done % self.recipe.run.checkpoint_every == 0 or done == last or stopped:
                    self._save(done)
                if stopped:
                    break
                begin = time.perf_counter()
            if self.writer is not None and done < total:
                self.writer.say(f"stopped after step {done} of {total}; start the same command again to go on")
        finally:
            if self.writer is not None:
                self.writer.close()
        return EXIT_STOPPED if stopped and done < total else 0

    def _introduce(self, done: int, last: int) -> None:
        assert self.writer is not None
        engine, recipe = self.engine, self.recipe
        parameters = sum(
            p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in engine.module.student.parameters()
        )
        self.writer.say(
            f"{recipe.name}: {len(self.shards)} samples, {self.schedule.steps_per_epoch} steps an epoch, "
            f"{self.schedule.total_steps} steps in all; {engine.world} rank(s) on {engine.device.type}, "
            f"ZeRO-{engine.stage}, {recipe.model.dtype}, {parameters / 1e6:.2f} M parameters, "
            f"attention {engine.module.student.config._attn_implementation}"
        )
        if self.start.checkpoint is not None:
            self.writer.say(f"resumed after step {done} from {self.start.checkpoint}")
        if last < self.schedule.total_steps:
            self.writer.say(f"will pause after step {last} (run.stop_after)")

    def _one_step(
        self, step: int, plan: StepPlan, batches: list[PackedBatch], wait_s: float, begin: float, stop: StopRequest
    ) -> bool:
        """One optimizer step and its report. True: a signal asked to stop (on any rank)."""
        recipe, engine = self.recipe, self.engine
        lr = learning_rate(step, self.schedule.total_steps, recipe.optimizer)
        noise_seed = recipe.run.seed * 1_000_003 + step
        outcome = train_step(engine, batches, lr=lr, noise_seed=noise_seed)
        flops = [self.flops.of_batch(batch) for batch in batches]
        step_s = time.perf_counter() - begin
        mine = [float(stop.asked), wait_s, step_s, _memory_gib(engine.device),
                sum(f.student for f in flops), sum(f.teacher for f in flops),
                *plan.costs_of_rank(engine.rank)]  # fmt: skip
        everyone = list(zip(*gather_numbers(mine, engine.device), strict=True))
        step_s = max(everyone[2])
        report = StepReport(
            step=step + 1,
            epoch=step // self.schedule.steps_per_epoch,
            loss=outcome.loss,
            ce=outcome.ce,
            align=outcome.align,
            lr=lr,
            grad_norm=outcome.grad_norm,
            applied=outcome.applied,
            samples=plan.totals.samples,
            tokens=plan.totals.tokens,
            micro_batches=plan.n_micro,
            micro_batches_lower_bound=plan.lower_bound,
            imbalance=imbalance_of(everyone[6:]),
            latents_per_span=outcome.latents / outcome.spans if outcome.spans else 0.0,
            coverage_bound_fraction=outcome.coverage_bound / outcome.spans if outcome.spans else 0.0,
            teacher_drift=outcome.teacher_drift,
            data_wait_s=max(everyone[1]),
            step_s=step_s,
        )
        if self.writer is not None:
            student_rate = sum(everyone[4]) / step_s / engine.world
            self.writer.write(
                dataclasses.asdict(report)
                | {
                    "samples_per_s": plan.totals.samples / step_s,
                    "tokens_per_s": plan.totals.tokens / step_s,
                    "tflops_per_rank": student_rate / 1e12,
                    "teacher_tflops_per_rank": sum(everyone[5]) / step_s / engine.world / 1e12,
                    "mfu": None if self.peak is None else student_rate / self.peak,
                    "memory_gib": max(everyone[3]),
                    "bad_samples": len(self.bad),
                    "eta_s": (self.schedule.total_steps - step - 1) * step_s,
                }
            )
        self._guard(report)
        return max(everyone[0]) > 0

    def _guard(self, report: StepReport) -> None:
        """End the run when the optimizer skips too many steps in a row; every rank sees the same report."""
        self.skipped_in_a_row = 0 if report.applied else self.skipped_in_a_row + 1
        if not report.applied and self.writer is not None:
            self.writer.say(f"step {report.step} was skipped: loss {report.loss}, gradient norm {report.grad_norm}")
        if self.skipped_in_a_row > self.recipe.engine.max_skipped_steps:
            raise TrainingError(
                f"{self.skipped_in_a_row} steps in a row had a loss or gradient that is not finite (last: step "
                f"{report.step}); the newest checkpoint is in {self.run_dir / CHECKPOINTS}. Lower optimizer.lr or look "
                "at the data of these steps"
            )

    def _save(self, done: int) -> None:
        state = {
            "step": done,
            "recipe": recipe_to_dict(self.recipe),
            "plan_version": PLAN_VERSION,
            "index_sha256": self.shards.fingerprint,
            "input_pixels": list(self.shards.manifest.images.bounds("input")),  # what an exported model is asked with
        }
        checkpoints = self.run_dir / CHECKPOINTS
        save_checkpoint(self.engine, checkpoints / f"step-{done:08d}", state)
        if self.engine.rank == 0:
            prune_checkpoints(checkpoints, self.recipe.run.keep_checkpoints)


def _memory_gib(device: torch.device) -> float:
    """Peak memory of this rank so far, GiB: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
