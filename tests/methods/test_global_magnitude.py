"""GlobalMagnitude: one threshold over all layers, on the cubic ramp, with an exact total."""

import pytest
import torch
from harness import Run
from torch import nn

import sparing
from sparing import GlobalMagnitude


def flat(run, what):
    return torch.cat([what(layer).detach().flatten() for layer in run.sparsifier.layers.values()])


@pytest.mark.parametrize("model", ["linear", "lstm"])
def test_follows_the_ramp_with_an_exact_total_of_the_largest(model):
    run = Run(model, GlobalMagnitude(steps=20, sparsity=0.9, begin=4, end=16, every=4))
    total = flat(run, lambda layer: layer.weight).numel()
    sparsity = 0.0
    for step in range(1, 21):
        run.train(1)
        if step in (4, 8, 12, 16):
            sparsity = 0.9 * (1 - (1 - (step - 4) / 12) ** 3)
            sizes = flat(run, lambda layer: layer.weight.abs())
            mask = flat(run, lambda layer: layer.parametrization.mask)
            assert sizes[mask].min() >= sizes[~mask].max() if sparsity else mask.all()
        mask = flat(run, lambda layer: layer.parametrization.mask)
        assert int(mask.sum()) == total - round(total * sparsity)
        for layer in run.sparsifier.layers.values():
            assert int(layer.parametrization.keep) == int(layer.parametrization.mask.sum())


@pytest.mark.filterwarnings("ignore::sparing.SparsityWarning")
def test_a_layer_of_small_weights_loses_them_before_another_loses_one():
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 4, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -4.0, 3.0, -2.0]]))
        model[1].weight.copy_(torch.tensor([[-0.4], [0.3], [0.2], [0.1]]))
    sparsifier = sparing.sparsify_(model, GlobalMagnitude(steps=2, sparsity=0.625, begin=0, end=1, every=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier.attach(optimizer)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert model[0].weight.tolist() == [[0.0, -4.0, 3.0, -2.0]]
    assert sparsifier.collapsed() == ["1"]


def test_a_pruned_weight_may_come_back_while_the_ramp_runs_and_not_after():
    model = nn.Linear(4, 1, bias=False)
    sparsifier = sparing.sparsify_(model, GlobalMagnitude(steps=4, sparsity=0.75, begin=0, end=2, every=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier.attach(optimizer)
    layer = sparsifier.layers["weight"]
    # The ramp is at 0.65625 after step 1 and at 0.75 after step 2: three zeros of four both times.
    for weights, alive in (([1.0, 2.0, 3.0, 4.0], 3), ([9.0, 2.0, 3.0, 4.0], 0), ([1.0, 9.0, 3.0, 4.0], 0)):
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([weights]))
        optimizer.step()
        assert layer.parametrization.mask.flatten().nonzero().tolist() == [[alive]]


@pytest.mark.parametrize("sparsity", [None, 1.5])
def test_needs_a_sparsity(sparsity):
    with pytest.raises(sparing.InputError, match="GlobalMagnitude: "):
        GlobalMagnitude(steps=20, sparsity=sparsity, every=1)
