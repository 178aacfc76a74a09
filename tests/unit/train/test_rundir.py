import dataclasses

import pytest

from ilvr_ds.config import parse_recipe, recipe_to_dict
from ilvr_ds.errors import ConfigError
from ilvr_ds.train.rundir import check_resumable, read_recipe, write_recipe

RECIPE = parse_recipe({"name": "t", "run": {"dir": "r"}, "data": {"shards": "s"}, "model": {"path": "m"}}, "test")


def changed(section: str, **values):
    return dataclasses.replace(RECIPE, **{section: dataclasses.replace(getattr(RECIPE, section), **values)})


def test_what_decides_the_numbers_must_not_change():
    saved = recipe_to_dict(RECIPE)
    for section, key, value in [
        ("optimizer", "lr", 1e-3), ("teacher", "decay", 0.5), ("data", "samples_per_step", 7), ("run", "seed", 3),
        ("loss", "reduction", "token"), ("model", "dtype", "float32"), ("latent", "noise_std", 0.0),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=f"{section}.{key}="):
            check_resumable(saved, changed(section, **{key: value}), "checkpoint")


def test_how_it_is_run_may_change():
    saved = recipe_to_dict(RECIPE)
    check_resumable(saved, changed("data", workers=4, token_budget=99, shards="moved"), "checkpoint")
    check_resumable(saved, changed("run", stop_after=3, checkpoint_every=1), "checkpoint")
    check_resumable(saved, changed("engine", deepspeed="ds_configs/zero2.json"), "checkpoint")


def test_the_resolved_recipe_reads_back_equal(tmp_path):
    write_recipe(tmp_path / "run", RECIPE)
    assert read_recipe(tmp_path / "run") == RECIPE
    with pytest.raises(ConfigError, match="not the folder of a run"):
        read_recipe(tmp_path)
