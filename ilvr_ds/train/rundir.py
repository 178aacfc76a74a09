"""The run folder: recipe.yaml (resolved), metrics.jsonl, checkpoints/. What may differ on resume is decided here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from ilvr_ds.config import Recipe, dump_recipe, parse_recipe, recipe_to_dict
from ilvr_ds.errors import ConfigError

RECIPE_FILE = "recipe.yaml"

# What decides the numbers of a run. All else (where it lies, how long it runs before it pauses, how
# memory is split, how many workers decode, how samples are packed into micro-batches) may change.
_FIXED = {
    "run": ("seed", "epochs", "max_steps"),
    "data": ("samples_per_step", "shuffle_window"),
    "model": ("dtype", "train_vision"),
    "latent": ("size", "noise_std", "source"),
    "teacher": ("decay", "coverage", "temperature", "max_candidates"),
    "loss": ("ce_weight", "sim_weight", "reduction"),
    "optimizer": ("lr", "weight_decay", "betas", "eps", "warmup_fraction", "min_lr_fraction", "grad_clip"),
}


def check_resumable(saved: dict[str, Any], recipe: Recipe, origin: str) -> None:
    """Raise ConfigError naming the first key that decides a run's numbers and differs from the checkpoint's.

    `saved` is `recipe_to_dict` of the checkpoint's recipe, `origin` the checkpoint's path.
    """
    now = recipe_to_dict(recipe)
    before = recipe_to_dict(parse_recipe(saved, origin))
    for section, keys in _FIXED.items():
        if before[section] is None or now[section] is None:  # a section that is null as a whole
            if before[section] != now[section]:
                raise ConfigError(
                    f"{section}={'null' if now[section] is None else 'a section'}, but the run being resumed "
                    f"({origin}) has {'null' if before[section] is None else 'a section'}; use the same, or start a "
                    "new run in another run.dir"
                )
            continue
        for key in keys:
            if before[section][key] != now[section][key]:
                raise ConfigError(
                    f"{section}.{key}={now[section][key]!r}, but the run being resumed ({origin}) has "
                    f"{before[section][key]!r}; use the same value, or start a new run in another run.dir"
                )


def write_recipe(run_dir: Path, recipe: Recipe) -> None:
    """Write the resolved recipe into the run folder, atomically."""
    run_dir.mkdir(parents=True, exist_ok=True)
    temporary = run_dir / (RECIPE_FILE + ".tmp")
    temporary.write_text(
        "# The resolved recipe of this run: every key, defaults included.\n" + dump_recipe(recipe), "utf-8"
    )
    os.replace(temporary, run_dir / RECIPE_FILE)


def read_recipe(run_dir: Path) -> Recipe:
    """The resolved recipe of a run folder."""
    path = run_dir / RECIPE_FILE
    if not path.is_file():
        raise ConfigError(f"{path}: not there; {run_dir} is not the folder of a run")
    return parse_recipe(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
