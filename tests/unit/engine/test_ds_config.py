"""ds_configs files say how memory is split and nothing else."""

import json

import pytest

from ilvr_ds.engine.ds_config import check_ds_config, compose_ds_config, load_ds_config
from ilvr_ds.engine.testing.toy import toy_recipe
from ilvr_ds.errors import ConfigError


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "zero3_offload"])
def test_shipped_files_are_accepted(repository, name):
    tree = load_ds_config(f"ds_configs/{name}.json")
    assert tree == json.loads((repository / f"ds_configs/{name}.json").read_text())
    assert tree["zero_optimization"]["stage"] == int(name[4])


@pytest.mark.parametrize(
    "key",
    ["optimizer", "scheduler", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
     "gradient_clipping", "bf16", "fp16", "lr", "data_types", "elasticity", "zero_optimisation"],
)  # fmt: skip
def test_other_keys_are_refused_by_name(key):
    with pytest.raises(ConfigError, match=rf"here\.json: key '{key}' does not belong here"):
        check_ds_config({"zero_optimization": {"stage": 3}, key: {}}, "here.json")


@pytest.mark.parametrize(
    ("zero", "words"),
    [
        ({"stage": 4}, "stage=4"),
        ({}, "stage=None"),
        ({"stage": True}, "stage=True"),
        ({"stage": 3, "zero_quantized_nontrainable_weights": True}, "int8"),
        ({"stage": 2, "round_robin_gradients": True}, "reorders"),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, "'nvme'"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "needs stage 3"),
    ],
)
def test_unsupported_zero_options_are_refused(zero, words):
    with pytest.raises(ConfigError, match=words):
        check_ds_config({"zero_optimization": zero}, "here.json")


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        load_ds_config("nowhere.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ConfigError, match=r"a\.json: not a readable JSON"):
        load_ds_config(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"b\.json: expected an object"):
        load_ds_config(tmp_path / "b.json")


def test_precision_and_clipping_come_from_the_recipe():
    tree = {"zero_optimization": {"stage": 3}}
    config = compose_ds_config(tree, toy_recipe("bfloat16", grad_clip=0.7))
    assert config["bf16"] == {"enabled": True} and config["gradient_clipping"] == 0.7
    assert config["data_types"] == {"grad_accum_dtype": "fp32"} and config["communication_data_type"] == "fp32"
    assert (
        compose_ds_config({**tree, "communication_data_type": "bf16"}, toy_recipe())["communication_data_type"]
        == "bf16"
    )
    assert tree == {"zero_optimization": {"stage": 3}}
