"""A run is a recipe: one YAML file, checked into frozen dataclasses before anything starts.

    recipe = load_recipe("launch/recipes/tiny_frozenlake.yaml", ["optimizer.lr=3e-4", "run.dir=runs/a"])

Unknown keys, wrong types and impossible combinations raise `ConfigError` naming the key, the value and
what is allowed. `dump_recipe` writes the resolved recipe back; loading that file gives an equal recipe.
How memory is split (ZeRO stage, offload, hpZ) is not here but in `ds_configs/*.json`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ilvr_ds.errors import ConfigError
from ilvr_ds.recipe_rules import check_ranges


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and how long it lasts."""

    dir: str  # run folder: metrics.jsonl, recipe.yaml, checkpoints/
    seed: int = 0
    epochs: int = 15
    max_steps: int | None = None  # stop the schedule here if the epochs are longer
    stop_after: int | None = None  # leave (with a checkpoint) after this step; the schedule is unchanged
    checkpoint_every: int = 500  # optimizer steps
    keep_checkpoints: int = 2
    resume: bool = True  # continue from the newest complete checkpoint in run.dir, if there is one
    tensorboard: bool = True  # also write TensorBoard events where tensorboard is installed


@dataclass(frozen=True)
class SourceConfig:
    """One of several shard folders that are blended."""

    shards: str  # as data.shards
    weight: float = 1.0  # its share of every step's samples, relative to the other weights


@dataclass(frozen=True)
class DataConfig:
    """Which shards, and how an optimizer step is cut from them."""

    shards: str | None = None  # folder written by data_tools/build_shards.py; or several, with weights, in sources
    samples_per_step: int = 64  # over all ranks; an optimizer step is this fixed set of samples
    token_budget: int = 8192  # tokens per rank and micro-batch, at most
    sources: tuple[SourceConfig, ...] = ()  # instead of shards: folders to blend; each goes through its own epochs
    shuffle_window: int = 65_536  # samples shuffled together; reads stay within the shards of one window
    workers: int = 1  # decoding processes per rank; 0 decodes in the training process
    prefetch_steps: int = 2  # steps decoded ahead
    max_bad_samples: int = 0  # samples of a run that may turn out unreadable and be left out; 0: the first ends the run
    cache_dir: str | None = None  # for shards behind a URL: folder on a local disk for their index and samples
    cache_gib: float = 20.0  # of samples in cache_dir, at most, whatever the number of processes


@dataclass(frozen=True)
class ModelConfig:
    """Which backbone, and how it is run."""

    path: str  # folder with config.json, weights and tokenizer
    attention: Literal["auto", "flash_attn", "torch_varlen", "sdpa"] = "auto"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    gradient_checkpointing: bool = True
    train_vision: bool = False


@dataclass(frozen=True)
class LatentConfig:
    """The latent spans; `size` must be what the shards were built with."""

    size: int = 8  # K
    # where the latents' inputs come from: "teacher": the teacher's targets (stage 1); "self": the student's own hidden
    # states, one after the other, with gradient (stage 2); controls: "pooled": the helper image pooled to K (Mirage's
    # stage 1); "pause": nothing, the pad token's embedding (and the source for shards without spans)
    source: Literal["teacher", "self", "pooled", "pause"] = "teacher"
    noise_std: float = 0.01  # sigma of the noise on alignment targets


@dataclass(frozen=True)
class TeacherConfig:
    """The momentum teacher and what it selects."""

    decay: float = 0.999
    coverage: float = 0.9  # keep the smallest prefix of candidates with this much probability mass
    temperature: float = 1.0  # of the softmax over cosine similarities
    max_candidates: int = 256  # pool a helper image's features to at most this many


@dataclass(frozen=True)
class LossConfig:
    """loss = ce_weight * CE + sim_weight * (1 - mean cos)."""

    ce_weight: float = 1.0
    sim_weight: float = 1.0
    reduction: Literal["sample", "token"] = "sample"


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a cosine schedule after a linear warm-up."""

    lr: float = 1e-5
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup_fraction: float = 0.03  # of all steps
    min_lr_fraction: float = 0.0  # the cosine ends at lr times this
    grad_clip: float = 1.0  # global norm; 0 switches clipping off


@dataclass(frozen=True)
class EngineConfig:
    """DeepSpeed."""

    deepspeed: str = "ds_configs/zero3.json"
    max_skipped_steps: int = 20  # consecutive steps the optimizer may skip before the run ends with an error


@dataclass(frozen=True)
class Recipe:
    """Everything a run needs. Resolved and written into the run folder as recipe.yaml."""

    name: str
    run: RunConfig
    data: DataConfig
    model: ModelConfig
    latent: LatentConfig = field(default_factory=LatentConfig)
    teacher: TeacherConfig | None = field(default_factory=TeacherConfig)  # null: no teacher
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        check_ranges(self)


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe, apply `key.sub=value` overrides (values are YAML) and check everything."""
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such recipe; recipes that come with the project are in launch/recipes/"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a readable YAML file: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of sections, got {type(tree).__name__}")
    for override in overrides or []:
        _apply_override(tree, override)
    return parse_recipe(tree, str(path))


def parse_recipe(tree: dict[str, Any], origin: str) -> Recipe:
    """Build a checked `Recipe` from nested dictionaries; `origin` names the source in errors."""
    return _build(Recipe, tree, "", origin)


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain dictionaries, lists and scalars: `parse_recipe` of it is an equal recipe."""
    tree = dataclasses.asdict(recipe)
    tree["optimizer"]["betas"] = list(recipe.optimizer.betas)
    tree["data"]["sources"] = list(tree["data"]["sources"])
    return tree


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, keys in the order of the dataclasses."""
    return yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"override {override!r}: write it as section.key=value, e.g. optimizer.lr=3e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from error
    node = tree
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {part!r} is not a section")
    node[parts[-1]] = value


def _build(cls: type, tree: Any, prefix: str, origin: str) -> Any:
    if not isinstance(tree, dict):
        raise ConfigError(f"{origin}: {prefix or 'recipe'}: expected a section with keys, got {tree!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in tree:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean {prefix}{close[0]}?" if close else ""
            raise ConfigError(
                f"{origin}: unknown key {prefix}{key} (value {tree[key]!r}){hint} Allowed: {', '.join(fields)}"
            )
    values = {}
    for name, f in fields.items():
        if name in tree:
            values[name] = _convert(hints[name], tree[name], f"{prefix}{name}", origin)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{origin}: key {prefix}{name} is missing; it has no default")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None


def _convert(kind: Any, value: Any, key: str, origin: str) -> Any:
    """`value` as `kind`, or ConfigError. Only int -> float and YAML's '1e-5' string -> float are converted."""
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, f"{key}.", origin)
    args = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        if value in args:
            return value
        raise ConfigError(f"{origin}: {key}={value!r}: allowed are {', '.join(map(repr, args))}")
    if isinstance(kind, types.UnionType):  # X | None
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, key, origin)
    if typing.get_origin(kind) is tuple and args[-1] is Ellipsis and isinstance(value, (list, tuple)):
        return tuple(_convert(args[0], v, f"{key}[{i}]", origin) for i, v in enumerate(value))
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(args):
            raise ConfigError(f"{origin}: {key}={value!r}: expected a list of {len(args)} values")
        return tuple(_convert(a, v, f"{key}[{i}]", origin) for i, (a, v) in enumerate(zip(args, value, strict=True)))
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-5 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ConfigError(f"{origin}: {key}={value!r}: expected {kind.__name__}, got {type(value).__name__}")
    return value
