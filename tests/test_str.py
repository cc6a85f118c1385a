"""STR: the update of one step, granularities, groups, and what it refuses. `test_target` has the target."""

import pytest
import torch
from torch import nn

import sparing
from sparing import STR, InputError
from sparing.patterns import Block


@pytest.mark.parametrize("g", ["sigmoid", "exp", lambda s: 0.5 * torch.sigmoid(s)])
def test_one_step_is_the_update_of_the_paper(g):
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
    active = weight.abs() > threshold
    assert 0 < active.sum() < active.numel()
    torch.testing.assert_close(layer.weight.detach(), (1 - rate * decay) * weight - rate * upstream * active)
    moved = (1 - rate * decay) * s.detach() + rate * k * slope * (upstream * weight.sign() * active).sum()
    torch.testing.assert_close(layer.parametrization.s.detach(), moved.reshape(1))


def test_weight_decay_on_s_alone_raises_the_sparsity():
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


def test_global_granularity_is_one_threshold_with_the_summed_gradient_of_all_layers():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    sparsifier = sparing.sparsify_(model, STR(init=-3.0, granularity="global"))
    first, second = (layer.parametrization for layer in sparsifier.layers.values())
    assert first.s is second.s
    groups = {g["name"]: g["params"] for g in sparing.param_groups(model, weight_decay=0.1)}
    assert len(groups["thresholds"]) == 1
    model(torch.randn(3, 8)).sum().backward()
    total = sum((layer.weight.grad * layer.weight.sign()).sum() for layer in sparsifier.layers.values())
    slope = torch.sigmoid(torch.tensor(-3.0)) * (1 - torch.sigmoid(torch.tensor(-3.0)))
    torch.testing.assert_close(first.s.grad, (-slope * total).reshape(1))


@pytest.mark.parametrize(
    ("module", "shape"),
    [(nn.Linear(32, 2), (2, 1)), (nn.Conv1d(4, 2, 3), (2, 1, 1)), (nn.ConvTranspose1d(4, 2, 3), (1, 2, 1))],
)
def test_the_granularity_filter_has_one_threshold_per_output_channel(module, shape):
    layer = sparing.sparsify_(module, STR(init=-6.0, granularity="filter")).layers["weight"]
    assert layer.parametrization.s.shape == shape
    with torch.no_grad():
        layer.parametrization.s.view(-1)[1] = 6.0
    channel = 1 if isinstance(module, nn.ConvTranspose1d) else 0
    first, second = layer.effective_weight.unbind(channel)
    assert first.any()
    assert not second.any()


def test_groups_shrink_by_their_norm_and_the_gradients_are_those_of_the_formula():
    """S_G = W_G · relu(1 − t / ‖W_G‖), by autograd, with t = sigmoid(s)."""
    model = nn.Linear(5, 8, bias=False)
    layer = sparing.sparsify_(model, STR(init=-1.4, pattern=Block(4))).layers["weight"]
    with torch.no_grad():
        layer.weight.copy_(0.2 * torch.randn(8, 5))
    weight, s = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.parametrization.s))
    blocks = weight.reshape(2, 4, 5)
    norm = blocks.square().mean(1, keepdim=True).sqrt()
    expected = (blocks * torch.relu(1 - torch.sigmoid(s) / norm)).reshape(8, 5)
    assert 0 < int((expected != 0).sum()) < 40
    upstream = torch.randn(8, 5)
    torch.testing.assert_close(model.weight, expected)
    model.weight.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(layer.weight.grad, weight.grad)
    torch.testing.assert_close(layer.parametrization.s.grad, s.grad)


def test_an_init_far_below_zero_prunes_nothing():
    model = nn.Linear(64, 64)
    assert sparing.sparsify_(model, STR(init=-3200.0)).layers["weight"].sparsity() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init": "low"}, r"init must be a number in \(-inf, inf\), got 'low'"),
        ({"scale": 0}, r"scale must be a number in \(0, inf\), got 0"),
        ({"granularity": "filters"}, "unknown granularity 'filters'; did you mean 'filter'"),
        ({"g": "sigmoide"}, "unknown g 'sigmoide'; did you mean 'sigmoid'"),
        ({"g": lambda s: -s * s}, r"g\(init\) must be a finite threshold"),
        ({"g": torch.exp, "init": 1000.0}, r"g\(init\) must be a finite threshold"),
        ({"g": lambda s: s.sum()}, "g must return a tensor of the shape of s"),
        (
            {"granularity": "filter", "pattern": Block(2)},
            r"pattern=Block\(n=2\) needs granularity 'layer', got 'filter'",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        STR(**arguments)
