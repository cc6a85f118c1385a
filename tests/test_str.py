"""STR itself: what one step does, what decides the sparsity, and what it refuses."""

import pytest
import torch
from torch import nn

import sparing
from sparing import STR, InputError


@pytest.mark.parametrize("g", ["sigmoid", "exp", lambda s: 0.5 * torch.sigmoid(s)])
def test_one_step_is_the_update_the_paper_gives(g):
    """W ← (1 − ηλ) W − η dS ⊙ 1{S≠0};  s ← (1 − ηλ) s + η k g'(s) Σ dS ⊙ sign(S)."""
    rate, decay, k, init = 0.1, 0.01, 0.7, -2.5
    model = nn.Linear(6, 4, bias=False).double()
    sparsifier = sparing.sparsify_(model, STR(init=init, g=g, scale=k))
    model.double()
    layer = sparsifier.layers["weight"]
    weight, upstream = layer.weight.detach().clone(), torch.randn(4, 6).double()
    optimizer = torch.optim.SGD(sparing.param_groups(model, weight_decay=decay), lr=rate)
    (layer.effective_weight * upstream).sum().backward()
    optimizer.step()

    s = torch.tensor(init, dtype=torch.float64, requires_grad=True)
    function = {"sigmoid": torch.sigmoid, "exp": torch.exp}.get(g, g)
    (slope,) = torch.autograd.grad(function(s), s)
    threshold = k * function(s).detach()
    live = weight.abs() > threshold
    assert 0 < live.sum() < live.numel()
    torch.testing.assert_close(layer.weight.detach(), (1 - rate * decay) * weight - rate * upstream * live)
    moved = (1 - rate * decay) * s.detach() + rate * k * slope * (upstream * weight.sign() * live).sum()
    torch.testing.assert_close(layer.parametrization.s.detach(), moved.reshape(1))


def test_sparsity_rises_with_s_and_decay_alone_raises_it():
    model = nn.Linear(64, 64)
    layer = sparing.sparsify_(model, STR(init=-8.0)).layers["weight"]
    optimizer = torch.optim.SGD(sparing.param_groups(model, weight_decay=0.0, threshold_weight_decay=0.1), lr=1.0)
    sparsity = []
    for _ in range(20):
        sparsity.append(layer.sparsity())
        optimizer.zero_grad()
        (0.0 * layer.effective_weight.sum()).backward()
        optimizer.step()
    assert sparsity == sorted(sparsity)
    assert sparsity[0] < 0.01
    assert sparsity[-1] > 0.9


def test_global_granularity_is_one_threshold_for_all_layers():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    sparsifier = sparing.sparsify_(model, STR(init=-3.0, granularity="global"))
    first, second = (layer.parametrization for layer in sparsifier.layers.values())
    assert first.s is second.s
    groups = {g["name"]: g["params"] for g in sparing.param_groups(model, weight_decay=0.1)}
    assert len(groups["thresholds"]) == 1
    model(torch.randn(3, 8)).sum().backward()
    # The gradient is the sum over both layers.
    total = sum((layer.weight.grad * layer.weight.sign()).sum() for layer in sparsifier.layers.values())
    slope = torch.sigmoid(torch.tensor(-3.0)) * (1 - torch.sigmoid(torch.tensor(-3.0)))
    torch.testing.assert_close(first.s.grad, (-slope * total).reshape(1))


def test_filters_can_differ_within_a_layer():
    model = nn.Linear(32, 2)
    sparsifier = sparing.sparsify_(model, STR(init=-6.0, granularity="filter"))
    layer = sparsifier.layers["weight"]
    with torch.no_grad():
        layer.parametrization.s[1] = 6.0
    assert layer.effective_weight[0].count_nonzero() > 0
    assert layer.effective_weight[1].count_nonzero() == 0


def test_an_untouched_init_far_below_zero_prunes_nothing():
    model = nn.Linear(64, 64)
    assert sparing.sparsify_(model, STR(init=-3200.0)).layers["weight"].sparsity() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init": "low"}, "init must be a finite number, got 'low'"),
        ({"init": float("nan")}, "init must be a finite number"),
        ({"init": True}, "init must be a finite number, got True"),
        ({"scale": 0}, "scale must be above 0, got 0"),
        ({"granularity": "filters"}, "unknown granularity 'filters'; did you mean 'filter'"),
        ({"g": "sigmoide"}, "unknown g 'sigmoide'; did you mean 'sigmoid'"),
        ({"g": lambda s: -s * s}, r"g\(init\) must be a finite threshold"),
        ({"g": torch.exp, "init": 1000.0}, r"g\(init\) must be a finite threshold"),
        ({"g": lambda s: s.sum()}, "g must return a tensor of the shape of s"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        STR(**arguments)


def test_a_method_is_its_own_configuration():
    assert STR(init=-5.0) == STR()
    assert sparing.METHODS["str"] is STR
    assert hash(STR()) == hash(STR())
