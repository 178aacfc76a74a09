"""The DeepSpeed configuration of a run: how memory is split (a file) plus what the recipe says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ilvr_ds.config import Recipe
from ilvr_ds.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]

# What a file in ds_configs/ may say. Everything else (learning rate, batch size, precision, clipping, ...)
# belongs to the recipe: two places for one number is how runs stop being reproducible.
ALLOWED_KEYS = (
    "zero_optimization",
    "communication_data_type",
    "comms_logger",
    "wall_clock_breakdown",
    "memory_breakdown",
    "aio",
)

# ZeRO options under which the teacher's local piece is no longer a plain slice of the parameter.
_UNSUPPORTED_ZERO = {
    "zero_quantized_nontrainable_weights": "it stores the frozen teacher as int8",
    "zenflow": "its masters are updated outside the step",
    "elastic_checkpoint": "its checkpoint drops the partition padding",
    "round_robin_gradients": "it reorders the fp32 masters",
}


def load_ds_config(path: str | Path) -> dict[str, Any]:
    """Read a ds_configs file; a relative path is tried from the current folder, then from the repository.

    Raises:
        ConfigError: missing file, broken JSON, a key that is the recipe's, or an unsupported ZeRO option.
    """
    file = next((p for p in (Path(path), REPOSITORY / path) if p.is_file()), None)
    if file is None:
        raise ConfigError(f"engine.deepspeed={str(path)!r}: no such file; ds_configs/ has zero0 to zero3 and offload")
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not a readable JSON file: {error}") from error
    check_ds_config(tree, str(file))
    return tree


def check_ds_config(tree: Any, origin: str) -> None:
    """Raise ConfigError unless `tree` says only how memory is split."""
    if not isinstance(tree, dict) or not isinstance(tree.get("zero_optimization"), dict):
        raise ConfigError(f"{origin}: expected an object with a 'zero_optimization' object")
    for key in tree:
        if key not in ALLOWED_KEYS:
            raise ConfigError(
                f"{origin}: key {key!r} does not belong here: a DeepSpeed file only says how memory is split "
                f"({', '.join(ALLOWED_KEYS)}); learning rate, batch size, precision and clipping are the recipe's"
            )
    zero = tree["zero_optimization"]
    stage = zero.get("stage")
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ConfigError(f"{origin}: zero_optimization.stage={stage!r}: allowed are 0, 1, 2, 3")
    for key, why in _UNSUPPORTED_ZERO.items():
        if zero.get(key):
            raise ConfigError(f"{origin}: zero_optimization.{key}={zero[key]!r} is not supported: {why}")
    for key in ("offload_optimizer", "offload_param"):
        if key not in zero:
            continue
        device = zero[key].get("device", "none")
        if device not in ("none", "cpu"):
            raise ConfigError(f"{origin}: zero_optimization.{key}.device={device!r}: allowed are 'none', 'cpu'")
        if device == "cpu" and stage != 3:
            raise ConfigError(f"{origin}: zero_optimization.{key} needs stage 3, got stage {stage}")


def offloads_optimizer(tree: dict[str, Any]) -> bool:
    """The fp32 masters and moments live in host memory."""
    return tree["zero_optimization"].get("offload_optimizer", {}).get("device", "none") == "cpu"


def compose_ds_config(tree: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The full DeepSpeed configuration: the memory split plus precision and clipping from the recipe.

    - `gradient_accumulation_steps` is 1 and the loss is never divided by it: the number of micro-batches
      changes from step to step and `ilvr_ds.engine.step` marks the boundary itself.
    - bfloat16: weights and gradients bf16, masters and moments fp32. Gradients are accumulated over
      micro-batches in fp32 at stages 1 to 3; stage 0 has no fp32 accumulator in DeepSpeed and accumulates in bf16.
    - gradients are reduced over ranks in fp32 unless the file sets `communication_data_type` (bf16 halves
      the traffic and rounds every partial sum).
    - fp32 clipping at stage 0 is done by our optimizer, see `ilvr_ds.engine.optimizer.GuardedAdamW`.
    """
    stage = tree["zero_optimization"]["stage"]
    bf16 = recipe.model.dtype == "bfloat16"
    config: dict[str, Any] = {"communication_data_type": "fp32", **tree}
    config.update(
        train_micro_batch_size_per_gpu=1,
        gradient_accumulation_steps=1,
        gradient_clipping=recipe.optimizer.grad_clip if bf16 or stage > 0 else 0.0,
        bf16={"enabled": bf16},
        steps_per_print=10**9,
        zero_force_ds_cpu_optimizer=True,
    )
    if stage > 0:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
