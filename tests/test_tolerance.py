"""The tolerances of the other tests: rounding stays within them, and errors do not."""

import copy

import pytest
import torch
from torch import nn

from tolerance import near, tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_in_another_order_are_within_the_tolerance(dtype):
    drawn = torch.randn(300, 1000, dtype=dtype)
    for terms, scale in ((drawn, drawn.norm(dim=1).max()), (drawn.abs(), drawn.abs().sum(dim=1).max())):
        one_by_one = terms.cumsum(dim=1)[:, -1]
        atol = tolerance(dtype, terms=1000, scale=scale)
        torch.testing.assert_close(one_by_one, terms.sum(dim=1), rtol=0, atol=atol)


@pytest.fixture
def network():
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), torch.randn(16, 64)
    return model, x, model(x), near(model, x)


def test_hidden_units_in_another_order_are_within_the_tolerance(network):
    model, x, expected, close = network
    permuted, order = copy.deepcopy(model), torch.randperm(64)
    with torch.no_grad():
        permuted[0].weight.copy_(model[0].weight[order])
        permuted[0].bias.copy_(model[0].bias[order])
        permuted[2].weight.copy_(model[2].weight[:, order])
    torch.testing.assert_close(permuted(x), expected, **close)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("error", ["one weight is zero", "the weights are rounded to bfloat16"])
def test_other_weights_are_not_within_the_tolerance(network, layer, error):
    model, x, expected, close = network
    with torch.no_grad():
        if error == "one weight is zero":
            model[layer].weight[3, 5] = 0
        else:
            model[layer].weight.copy_(model[layer].weight.bfloat16())
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(model(x), expected, **close)
