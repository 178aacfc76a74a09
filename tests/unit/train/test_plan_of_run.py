"""What a run makes of its plan: where it may go on, what it would be, what samples cost it."""

import dataclasses
import json

import pytest
from transformers import Qwen2_5_VLConfig

from ilvr_ds.config import parse_recipe, recipe_to_dict
from ilvr_ds.data.blended_shards import open_shards
from ilvr_ds.data.plan import PLAN_VERSION, Planner, imbalances
from ilvr_ds.errors import CheckpointError
from ilvr_ds.train.cost import cost_model, imbalance_of
from ilvr_ds.train.describe import describe
from ilvr_ds.train.loop import CHECKPOINTS, _find_start
from tests.unit.data.test_loader import K, byte_tokenizer, write_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two shard folders, a and b, and a model's config.json."""
    root, tokenizer = tmp_path_factory.mktemp("run"), byte_tokenizer()
    for name, samples in (("a", 5), ("b", 7)):
        write_shards(root / name, tokenizer, samples)
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 300}  # fmt: skip
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
    Qwen2_5_VLConfig(text_config=text, vision_config=vision).save_pretrained(root / "model")
    return root


def recipe_of(folder, run_dir="unused", **changes):
    sources = [{"shards": str(folder / "a"), "weight": 1.0}, {"shards": str(folder / "b"), "weight": 2.0}]
    tree = {
        "name": "t", "run": {"dir": str(run_dir)}, "model": {"path": str(folder / "model")}, "latent": {"size": K},
        "data": {"sources": sources, "samples_per_step": 4, "token_budget": 600},
    }  # fmt: skip
    for section, values in changes.items():
        tree[section] = None if values is None else tree.get(section, {}) | values
    return parse_recipe(tree, "test")


def checkpoint(run_dir, recipe, **state) -> None:
    path = run_dir / CHECKPOINTS / "step-00000003"
    path.mkdir(parents=True)
    tree = {"step": 3, "recipe": recipe_to_dict(recipe), "index_sha256": open_shards(recipe.data).fingerprint} | state
    (path / "state.json").write_text(json.dumps(tree))
    (path / "COMPLETE").touch()


def test_a_run_goes_on_where_the_plan_is_the_same(folder, tmp_path):
    recipe = recipe_of(folder, tmp_path)
    checkpoint(tmp_path, recipe, plan_version=PLAN_VERSION)
    assert _find_start(recipe, open_shards(recipe.data)).step == 3


@pytest.mark.parametrize("state", [{"plan_version": PLAN_VERSION - 1}, {}])
def test_a_run_planned_otherwise_is_not_gone_on_with(folder, tmp_path, state):
    recipe = recipe_of(folder, tmp_path)
    checkpoint(tmp_path, recipe, **state)
    error = _find_start(recipe, open_shards(recipe.data))
    assert isinstance(error, CheckpointError)
    assert "step-00000003: field 'plan_version' is 1" in str(error) and f"has {PLAN_VERSION}" in str(error)


def test_other_weights_are_other_data(folder, tmp_path):
    recipe = recipe_of(folder, tmp_path)
    checkpoint(tmp_path, recipe, plan_version=PLAN_VERSION)
    heavier = tuple(dataclasses.replace(s, weight=2.0) for s in recipe.data.sources)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, sources=heavier))
    assert "other shards or weights" in str(_find_start(recipe, open_shards(recipe.data)))


def test_describe_plans_the_blend(folder):
    recipe = recipe_of(folder)
    facts, shards = describe(recipe, world=2), open_shards(recipe.data)
    assert (facts["samples"], facts["steps_per_epoch"], facts["steps_planned"]) == (12, 3, 3)
    planner = Planner(
        shards.plan_sources(), seed=0, samples_per_step=4, token_budget=600, world=2, cost=cost_model(recipe)
    )
    plans = [planner.step(step) for step in range(3)]
    tokens = sum(plan.totals.tokens for plan in plans)
    assert facts["tokens_per_epoch"] == tokens  # steps are whole: a source may come round again
    assert facts["micro_batches_per_step"] == sum(plan.n_micro for plan in plans) / 3
    assert facts["fill"] == tokens / (sum(plan.n_micro for plan in plans) * 2 * 600)
    balance = imbalances(plans)
    assert (facts["imbalance"], facts["imbalance_vision"]) == (balance.total, balance.vision)
    assert describe(recipe_of(folder, run={"max_steps": 2}), world=2)["total_steps"] == 2


def test_describe_of_a_stage_without_helper_images(folder):
    with_helpers = describe(recipe_of(folder), world=2)
    second = {"latent": {"source": "self"}, "teacher": None, "loss": {"sim_weight": 0.0}}
    without = describe(recipe_of(folder, **second), world=2)
    assert without["tokens_per_epoch"] == with_helpers["tokens_per_epoch"]
    assert without["imbalance_vision"] != with_helpers["imbalance_vision"]


def test_a_stage_without_a_teacher_costs_one_pass_less(folder):
    second = recipe_of(folder, latent={"source": "self"}, teacher=None, loss={"sim_weight": 0.0})
    assert 4 * cost_model(recipe_of(folder)).per_token == 5 * cost_model(second).per_token


def test_imbalance_of_what_ranks_paid():
    assert imbalance_of([[1.0, 1.0], [2.0, 2.0]]) == 1.0
    assert imbalance_of([[1.0, 3.0], [3.0, 1.0]]) == 1.5  # ranks meet in every micro-step: 6 paid, 4 on average
    assert imbalance_of([[0.0, 8.0], [1.0, 1.0]]) == pytest.approx(9 / 5)
    assert imbalance_of([[0.0, 0.0]]) == imbalance_of([]) == 1.0
