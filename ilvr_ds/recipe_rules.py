"""What the values of a recipe may be: ranges and combinations, one line each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ilvr_ds.errors import ConfigError

if TYPE_CHECKING:
    from ilvr_ds.config import Recipe


def check_ranges(r: Recipe) -> None:
    """Impossible values and combinations, one line each: (key, value, holds, what is allowed)."""
    rules = [
        ("run.epochs", r.run.epochs, r.run.epochs >= 1, "1 or more"),
        ("run.max_steps", r.run.max_steps, r.run.max_steps is None or r.run.max_steps >= 1, "1 or more, or null"),
        ("run.stop_after", r.run.stop_after, r.run.stop_after is None or r.run.stop_after >= 1, "1 or more, or null"),
        ("run.seed", r.run.seed, 0 <= r.run.seed < 2**63, "0 to 2**63 - 1"),
        ("run.checkpoint_every", r.run.checkpoint_every, r.run.checkpoint_every >= 1, "1 or more"),
        ("run.keep_checkpoints", r.run.keep_checkpoints, r.run.keep_checkpoints >= 1, "1 or more"),
        ("data", {"shards": r.data.shards, "sources": len(r.data.sources)},
         (r.data.shards is None) == bool(r.data.sources), "exactly one of data.shards and data.sources"),
        *((f"data.sources[{i}].weight", s.weight, s.weight > 0, "above 0") for i, s in enumerate(r.data.sources)),
        ("data.shuffle_window", r.data.shuffle_window, r.data.shuffle_window >= 1, "1 or more"),
        ("data.samples_per_step", r.data.samples_per_step, r.data.samples_per_step >= 1, "1 or more"),
        ("data.token_budget", r.data.token_budget, r.data.token_budget >= 1, "1 or more"),
        ("data.workers", r.data.workers, r.data.workers >= 0, "0 or more"),
        ("data.max_bad_samples", r.data.max_bad_samples, r.data.max_bad_samples >= 0, "0 or more"),
        ("data.cache_gib", r.data.cache_gib, r.data.cache_gib > 0, "above 0"),
        ("data.prefetch_steps", r.data.prefetch_steps, r.data.prefetch_steps >= 1, "1 or more"),
        ("latent.size", r.latent.size, r.latent.size >= 1, "1 or more"),
        ("latent.noise_std", r.latent.noise_std, r.latent.noise_std >= 0, "0 or more"),
        *_teacher_rules(r),
        ("loss.ce_weight", r.loss.ce_weight, r.loss.ce_weight >= 0, "0 or more"),
        ("loss.sim_weight", r.loss.sim_weight, r.loss.sim_weight >= 0, "0 or more"),
        ("loss", (r.loss.ce_weight, r.loss.sim_weight), r.loss.ce_weight + r.loss.sim_weight > 0,
         "ce_weight and sim_weight must not both be 0"),
        ("optimizer.lr", r.optimizer.lr, r.optimizer.lr > 0, "above 0"),
        ("optimizer.weight_decay", r.optimizer.weight_decay, r.optimizer.weight_decay >= 0, "0 or more"),
        ("optimizer.betas", r.optimizer.betas, all(0 <= b < 1 for b in r.optimizer.betas), "0 to below 1, twice"),
        ("optimizer.eps", r.optimizer.eps, r.optimizer.eps > 0, "above 0"),
        ("optimizer.warmup_fraction", r.optimizer.warmup_fraction, 0 <= r.optimizer.warmup_fraction < 1,
         "0 to below 1"),
        ("optimizer.min_lr_fraction", r.optimizer.min_lr_fraction, 0 <= r.optimizer.min_lr_fraction <= 1, "0 to 1"),
        ("optimizer.grad_clip", r.optimizer.grad_clip, r.optimizer.grad_clip >= 0, "0 (off) or more"),
        ("engine.max_skipped_steps", r.engine.max_skipped_steps, r.engine.max_skipped_steps >= 0, "0 or more"),
    ]  # fmt: skip
    for key, value, holds, allowed in rules:
        if not holds:
            raise ConfigError(f"{key}={value!r}: allowed: {allowed}")


def _teacher_rules(r: Recipe) -> list[tuple[str, Any, bool, str]]:
    """What the teacher's section may hold, and that it is there exactly when latents come from it."""
    t, source = r.teacher, r.latent.source
    if t is None:
        aligned = source == "pooled"
        return [
            ("teacher", None, source != "teacher",
             "a section, as latent.source='teacher'; for stage 2 set latent.source=self"),
            ("loss.sim_weight", r.loss.sim_weight, aligned or r.loss.sim_weight == 0,
             f"0 with latent.source={source!r}: nothing to align with"),
            ("loss.ce_weight", r.loss.ce_weight, aligned or r.loss.ce_weight > 0,
             f"above 0 with latent.source={source!r}: it is the only loss"),
        ]  # fmt: skip
    return [
        ("teacher", "a section", source == "teacher", f"null, as latent.source={source!r}: no teacher is asked"),
        ("teacher.decay", t.decay, 0 <= t.decay <= 1, "0 to 1"),
        ("teacher.coverage", t.coverage, 0 < t.coverage <= 1, "above 0, at most 1"),
        ("teacher.temperature", t.temperature, t.temperature > 0, "above 0"),
        ("teacher.max_candidates", t.max_candidates, t.max_candidates >= r.latent.size,
         f"latent.size ({r.latent.size}) or more"),
    ]  # fmt: skip
