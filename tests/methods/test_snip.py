"""SNIP: the connection sensitivity of the first mini-batch makes the masks, and its step moves no weight."""

import pytest
import torch
from harness import Run, batch, build
from torch import nn
from torch.nn import functional as F

import sparing
from sparing import SNIP
from sparing.patterns import Block


def sensitivities(model_name, accumulated=1):
    """|dL/dc| of a multiplier c = 1 on every weight, as the paper defines it."""
    model, shape = build(model_name)
    names = [key for key, parameter in model.named_parameters() if "weight" in key and parameter.dim() > 1]
    plain = {key: p.detach() for key, p in model.named_parameters()}
    c = {key: torch.ones_like(plain[key], requires_grad=True) for key in names}
    with torch.nn.utils.parametrize.cached():
        for step in range(accumulated):
            x, y = batch(shape, step)
            used = {**plain, **{key: c[key] * plain[key] for key in names}}
            F.cross_entropy(torch.func.functional_call(model, used, (x,)), y).backward()
    return torch.cat([c[key].grad.abs().flatten() for key in names])


def flat(run):
    return torch.cat([layer.parametrization.mask.flatten() for layer in run.sparsifier.layers.values()])


@pytest.mark.parametrize("model", ["linear", "conv2d"])
def test_keeps_exactly_the_most_sensitive_weights_of_all_layers(model):
    run = Run(model, SNIP(sparsity=0.75))
    assert flat(run).all()
    mask, scores = flat(run.train(1)), sensitivities(model)
    assert int(mask.sum()) == mask.numel() - round(0.75 * mask.numel())
    assert scores[mask].min() >= scores[~mask].max() * (1 - 1e-5)
    assert torch.equal(flat(run.train(10)), mask)


def test_keeps_the_blocks_of_largest_mean_sensitivity():
    run = Run("linear", SNIP(sparsity=0.75, pattern=Block(4))).train(1)

    def blocks(values, reduce):
        parts = zip(values.split([24 * 16, 4 * 24]), (16, 24), strict=True)
        return torch.cat([reduce(part.reshape(-1, 4, inputs), 1).flatten() for part, inputs in parts])

    mask, scores = blocks(flat(run), torch.any), blocks(sensitivities("linear"), torch.mean)
    assert torch.equal(mask, blocks(flat(run), torch.all))
    assert int(mask.sum()) == 30
    assert scores[mask].min() >= scores[~mask].max() * (1 - 1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_first_step_moves_no_parameter_and_the_second_does(optimizer):
    run = Run("linear", SNIP(sparsity=0.75), optimizer)
    start = [p.detach().clone() for p in run.model.parameters()]
    run.train(1)
    assert all(map(torch.equal, run.model.parameters(), start))
    run.train(1)
    assert not any(map(torch.equal, run.model.parameters(), start))


def test_accumulated_mini_batches_decide_together():
    run = Run("linear", SNIP(sparsity=0.75))
    for step in range(4):
        x, y = batch(run.shape, step)
        F.cross_entropy(run.model(x), y).backward()
    run.optimizer.step()
    mask, scores = flat(run), sensitivities("linear", accumulated=4)
    assert scores[mask].min() >= scores[~mask].max() * (1 - 1e-5)


# In both orders: if the scores tied, one of them would be wrong.
@pytest.mark.parametrize("weights", [[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])
def test_products_too_small_for_half_precision_are_ranked(weights):
    model = nn.Linear(4, 1, bias=False).half()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([weights]) * 1e-4)
    sparsifier = sparing.sparsify_(model, SNIP(sparsity=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    layer = sparsifier.layers["weight"]
    layer.weight.grad = torch.full_like(layer.weight, 1e-5)
    optimizer.step()
    assert layer.parametrization.mask.flatten().tolist() == [weight > 2 for weight in weights]


@pytest.mark.filterwarnings("ignore::sparing.SparsityWarning")
def test_a_layer_without_gradient_is_pruned_first_and_named():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    sparsifier = sparing.sparsify_(model, SNIP(sparsity=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    model[0](torch.ones(1, 4)).sum().backward()
    with pytest.warns(sparing.SparsityWarning, match="no gradient reached 1 of 2 layers in this step: 1, whose"):
        optimizer.step()
    assert sparsifier.collapsed() == ["1"]
    assert sparsifier.layers["0"].sparsity() == 0.0
