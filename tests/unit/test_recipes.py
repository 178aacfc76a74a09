"""The recipes that come with the project: they load, and those for published models explain every key."""

import dataclasses
import re

import pytest
import yaml

from ilvr_ds.config import Recipe, load_recipe, recipe_to_dict
from ilvr_ds.engine.ds_config import load_ds_config


def test_every_recipe_loads(repository):
    recipes = sorted((repository / "launch" / "recipes").rglob("*.yaml"))
    assert recipes
    for file in recipes:
        load_ds_config(load_recipe(file).engine.deepspeed)


@pytest.mark.parametrize("size", ["3b", "7b"])
def test_published_models_have_every_key_with_a_comment(repository, size):
    file = repository / "launch" / "recipes" / f"qwen2_5_vl_{size}.yaml"
    recipe, written = load_recipe(file), yaml.safe_load(file.read_text())
    resolved = recipe_to_dict(recipe)
    assert set(written) == {f.name for f in dataclasses.fields(Recipe)}
    for section, keys in resolved.items():
        if isinstance(keys, dict):
            assert set(written[section]) == set(keys), section
    for line in file.read_text().splitlines():
        if re.match(r"\s+\w+:|name:", line):
            assert " # " in line, f"no comment: {line}"
    published = (recipe.optimizer.lr, recipe.optimizer.weight_decay, recipe.run.epochs, recipe.latent.size)
    assert published == (1e-5, 0.01, 15, 8)
