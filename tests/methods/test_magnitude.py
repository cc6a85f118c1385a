"""Magnitude: the mask is made once, by the smallest weights of each layer."""

import pytest
import torch
from harness import Run
from torch import nn

import sparing
from sparing import Magnitude


def two_layers():
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 4, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -4.0, 3.0, -2.0]]))
        model[1].weight.copy_(torch.tensor([[-0.4], [0.3], [0.2], [0.1]]))
    return model


def masks(run):
    return {name: layer.parametrization.mask.clone() for name, layer in run.sparsifier.layers.items()}


def test_at_zero_the_smallest_of_each_layer_are_gone_before_training():
    model = two_layers()
    sparing.sparsify_(model, Magnitude(steps=10, sparsity=0.5))
    assert model[0].weight.tolist() == [[0.0, -4.0, 3.0, 0.0]]
    assert torch.equal(model[1].weight.flatten(), torch.tensor([-0.4, 0.3, 0.0, 0.0]))


@pytest.mark.parametrize("at", [6, 0.3])
def test_dense_until_the_step_then_the_largest_of_that_step_for_good(at):
    run = Run("linear", Magnitude(steps=20, sparsity=0.75, at=at)).train(5)
    assert all(mask.all() for mask in masks(run).values())
    made = masks(run.train(1))
    for name, layer in run.sparsifier.layers.items():
        size = layer.weight.detach().abs()
        assert made[name].sum() == layer.weight.numel() // 4
        assert size[made[name]].min() >= size[~made[name]].max()
    later = masks(run.train(14))
    assert all(torch.equal(later[name], made[name]) for name in made)


def test_the_weights_that_stay_train_on_and_the_others_only_decay():
    run = Run("linear", Magnitude(steps=20, sparsity=0.75))
    layer = run.sparsifier.layers["0"]
    mask, start = layer.parametrization.mask, layer.weight.detach().clone()
    run.train(1)
    assert torch.allclose(layer.weight[~mask], start[~mask] * (1 - 0.1 * 1e-2))
    assert (layer.weight[mask] != start[mask] * (1 - 0.1 * 1e-2)).any()


def test_a_model_without_data_gets_a_mask_of_the_right_shape():
    model = nn.Linear(16, 16, device="meta")
    layer = sparing.sparsify_(model, Magnitude(steps=10, sparsity=0.75)).layers["weight"]
    assert layer.parametrization.mask.is_meta
    assert layer.parametrization.mask.shape == (16, 16)


@pytest.mark.parametrize("at", [21, -1, 1.5, -0.1, True, "end", float("nan")])
def test_a_step_outside_the_run_is_refused(at):
    with pytest.raises(sparing.InputError, match="Magnitude: at must be a step from 0 to 20 or a fraction"):
        Magnitude(steps=20, sparsity=0.5, at=at)
