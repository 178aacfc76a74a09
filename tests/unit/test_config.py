import re

import pytest
import yaml

from ilvr_ds.config import Recipe, dump_recipe, load_recipe, parse_recipe
from ilvr_ds.errors import ConfigError

MINIMAL = {"name": "t", "run": {"dir": "runs/t"}, "data": {"shards": "s"}, "model": {"path": "m"}}


def write(tmp_path, tree):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_overrides_and_round_trip(tmp_path):
    recipe = load_recipe(
        write(tmp_path, MINIMAL), ["optimizer.lr=3e-4", "optimizer.betas=[0.8, 0.95]", "run.max_steps=7"]
    )
    assert recipe.optimizer.lr == 3e-4 and recipe.optimizer.betas == (0.8, 0.95) and recipe.run.max_steps == 7
    again = parse_recipe(yaml.safe_load(dump_recipe(recipe)), "dump")
    assert again == recipe


def test_a_float_written_as_integer_or_in_exponent_form_is_a_float(tmp_path):
    recipe = load_recipe(write(tmp_path, MINIMAL), ["optimizer.lr=1e-5", "optimizer.grad_clip=1"])
    assert recipe.optimizer.lr == 1e-5 and recipe.optimizer.grad_clip == 1.0


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optimizer.learning_rate=1", "optimizer.learning_rate"),
        ("optimzer.lr=1", "optimzer"),
        ("optimizer.lr=fast", "optimizer.lr='fast'"),
        ("optimizer.lr=.nan", "optimizer.lr"),
        ("run.epochs=1.5", "run.epochs=1.5: expected int"),
        ("run.epochs=true", "run.epochs=True: expected int"),
        ("model.attention=flashy", "allowed are 'auto'"),
        ("teacher.max_candidates=4", "teacher.max_candidates=4"),
        ("optimizer.betas=[0.9]", "expected a list of 2"),
        ("run=3", "run"),
        ("lr", "section.key=value"),
    ],
)
def test_a_wrong_override_names_the_key(tmp_path, override, named):
    with pytest.raises(ConfigError, match=re.escape(named)):
        load_recipe(write(tmp_path, MINIMAL), [override])


TWO = [{"shards": "a", "weight": 2}, {"shards": "b"}]


def test_sources_to_blend_are_read(tmp_path):
    recipe = load_recipe(write(tmp_path, MINIMAL | {"data": {"sources": TWO}}))
    assert recipe.data.shards is None
    assert [(s.shards, s.weight) for s in recipe.data.sources] == [("a", 2.0), ("b", 1.0)]
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe)), "dump") == recipe


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({}, "exactly one of data.shards and data.sources"),
        ({"shards": "s", "sources": TWO}, "exactly one of data.shards and data.sources"),
        ({"sources": [*TWO, {"shards": "c", "weight": 0}]}, "data.sources[2].weight=0.0: allowed: above 0"),
        ({"sources": [{"shards": "a", "weight": -1}]}, "data.sources[0].weight=-1.0"),
        ({"sources": [{"shards": "a", "weight": "much"}]}, "data.sources[0].weight='much': expected float"),
        ({"sources": [{"weight": 1}]}, "data.sources[0].shards is missing"),
        ({"sources": [{"shards": "a", "wieght": 1}]}, "data.sources[0].wieght"),
        ({"sources": ["a"]}, "data.sources[0]"),
        ({"sources": "a"}, "data.sources"),
        ({"shards": "s", "shuffle_window": 0}, "data.shuffle_window=0: allowed: 1 or more"),
    ],
)
def test_wrong_sources_are_named(tmp_path, data, named):
    with pytest.raises(ConfigError, match=re.escape(named)):
        load_recipe(write(tmp_path, MINIMAL | {"data": data}))


def test_a_close_key_is_suggested(tmp_path):
    with pytest.raises(ConfigError, match=r"did you mean data\.token_budget"):
        load_recipe(write(tmp_path, MINIMAL), ["data.token_budgets=1"])


def test_missing_key_missing_file_and_broken_yaml(tmp_path):
    with pytest.raises(ConfigError, match="key run is missing"):
        parse_recipe({"name": "t", "data": {"shards": "s"}, "model": {"path": "m"}}, "here")
    with pytest.raises(ConfigError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_recipe(broken)


def test_every_recipe_of_the_project_loads(repository):
    recipes = sorted((repository / "launch" / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        assert isinstance(load_recipe(path), Recipe)
        assert (repository / load_recipe(path).engine.deepspeed).is_file()
