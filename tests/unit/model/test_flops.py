"""The analytic count against torch's own counter on the stock model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from ilvr_ds.model.flops import FlopsModel, peak_flops


@pytest.fixture(scope="module")
def model():
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 100,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
    )  # fmt: skip
    config._attn_implementation = "eager"
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def counted(function) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_language_model_and_head(model):
    flops = FlopsModel(model.config, train_vision=False)
    length, width, layers = 11, 32, 2
    embeds = torch.randn(1, length, width)
    language = counted(lambda: model.model.language_model(inputs_embeds=embeds, use_cache=False))
    unmasked = 4 * layers * width * (length**2 - length * (length + 1) / 2)  # eager computes the masked half, too
    rotary = language - flops.language_forward([length]) - unmasked
    assert rotary == 0
    assert counted(lambda: model.lm_head(embeds[0])) == flops.head_forward(length)


@pytest.mark.parametrize("grids", [[(1, 4, 6)], [(1, 8, 8), (1, 10, 18)], [(1, 2, 2), (1, 16, 8), (1, 30, 26)]])
def test_vision_tower_windows_and_full_blocks(model, grids):
    flops = FlopsModel(model.config, train_vision=False)
    patches = sum(t * h * w for t, h, w in grids)
    pixels = torch.randn(patches, 1176)
    seen = counted(lambda: model.model.visual(pixels, grid_thw=torch.tensor(grids)))
    assert seen == flops.vision_forward(grids)


def test_packing_costs_less_attention_than_one_long_sequence(model):
    flops = FlopsModel(model.config, train_vision=False)
    assert flops.language_forward([50, 50]) < flops.language_forward([100])


def test_peaks_by_device_name():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("some CPU") is None
