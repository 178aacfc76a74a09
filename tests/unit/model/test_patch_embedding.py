import pytest
import torch
from torch import nn

from ilvr_ds.model.patch_embedding import PatchProjection, replace_patch_embedding


def test_same_parameter_same_output_same_gradient():
    torch.manual_seed(0)
    tower = nn.Module()
    tower.patch_embed = nn.Module()
    tower.patch_embed.proj = nn.Conv3d(3, 16, (2, 14, 14), (2, 14, 14), bias=False)
    conv = tower.patch_embed.proj
    patches = torch.randn(5, 3, 2, 14, 14)
    expected = conv(patches)
    expected.square().sum().backward()
    gradient = conv.weight.grad.clone()
    conv.weight.grad = None

    replace_patch_embedding(tower)
    assert isinstance(tower.patch_embed.proj, PatchProjection) and tower.patch_embed.proj.weight is conv.weight
    assert list(tower.state_dict()) == ["patch_embed.proj.weight"]
    output = tower.patch_embed.proj(patches)
    assert output.shape == expected.shape
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    output.square().sum().backward()
    torch.testing.assert_close(conv.weight.grad, gradient, rtol=1e-4, atol=1e-4)


def test_an_input_larger_than_the_kernel_is_refused():
    with pytest.raises(ValueError, match="kernel"):
        PatchProjection(3, 4, (2, 14, 14), (2, 14, 14), bias=False)(torch.zeros(1, 3, 2, 28, 14))
