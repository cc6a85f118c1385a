"""STR-Feather: Feather's curve under a threshold a layer that learns, and the total."""

import pytest
import torch
from torch import nn

import sparing
from sparing.methods.str_feather import FeatherLearnedThreshold
from sparing.parametrizations import FeatherStraightThrough

WEIGHT = torch.tensor([[0.3, -0.1, 0.2], [0.05, 0.0, -0.4]])


def layer(t=0.1, theta=0.5):
    """A Linear layer of WEIGHT whose threshold is t."""
    model = nn.Linear(3, 2, bias=False)
    model.weight.data = WEIGHT.clone()
    sparsifier = sparing.sparsify_(model, sparing.STRFeather(steps=100, sparsity=0.5, theta=theta))
    part = sparsifier.layers["weight"].parametrization
    assert isinstance(part, FeatherLearnedThreshold)
    part.s.data.fill_(torch.logit(torch.tensor(t)).item())
    return model, part


def test_a_case_by_hand():
    model, part = layer()
    assert float(part.threshold().detach()) == pytest.approx(0.1)
    model.parametrizations.weight.original.data[0, 1] = -0.09
    expected = torch.tensor([[26.0, 0.0, 7.0], [0.0, 0.0, -63.0]])  # (|W|³ − 0.1³) · 1000, with the sign
    assert torch.allclose(1000 * model.weight**3, expected, rtol=1e-4)


@pytest.mark.parametrize("theta", [0.0, 0.5, 1.0])
def test_gradients_are_those_of_the_formula(theta):
    model, part = layer(t=0.15, theta=theta)
    gradient = torch.arange(1.0, 7.0).reshape(2, 3)
    (model.weight * gradient).sum().backward()
    live = WEIGHT.abs() > 0.15
    assert torch.equal(model.parametrizations.weight.original.grad, torch.where(live, gradient, theta * gradient))
    # sigmoid' = 0.15 · 0.85; dead weights have no say.
    assert part.s.grad.item() == pytest.approx(-0.15 * 0.85 * (1.0 + 3.0 - 6.0), rel=1e-5)


def test_the_gradient_of_the_threshold_is_that_of_the_soft_threshold():
    torch.manual_seed(0)
    weight, gradient = torch.randn(2, 8, 8, dtype=torch.float64)
    ours, soft = (torch.tensor([0.5], dtype=torch.float64, requires_grad=True) for _ in range(2))
    (FeatherStraightThrough.apply(weight, ours, 0.5) * gradient).sum().backward()
    (sparing.soft_threshold(weight, soft) * gradient).sum().backward()
    torch.testing.assert_close(ours.grad, soft.grad)


def test_the_operator_adds_nothing_to_what_a_layer_saves():
    model, _ = layer(theta=1)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        effective = model.weight
    assert [t.data_ptr() for t in saved if t.shape == WEIGHT.shape] == [effective.data_ptr()]


def test_thresholds_of_layers_part_and_macs_are_met():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 4))
    method = sparing.STRFeather(steps=40, macs=0.2, input_size=(1, 2, 6, 6), every=4)
    sparsifier = sparing.sparsify_(model, method)
    optimizer = torch.optim.SGD(sparing.param_groups(model, weight_decay=1e-3), lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(16, 2, 6, 6)), torch.randint(0, 4, (16,))).backward()
        optimizer.step()
    total = sparing.report(model, (1, 2, 6, 6)).total
    assert 0.19 < total.macs / total.dense_macs <= 0.2
    thresholds = [float(each.threshold.detach()) for each in sparsifier.layers.values()]
    assert thresholds[0] != pytest.approx(thresholds[1], rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"STRFeather: give sparsity=, a fraction in \[0, 1\), or macs=$"),
        ({"sparsity": 0.9, "macs": 0.1}, "STRFeather: give sparsity= or macs=, not both"),
        ({"macs": 0.1}, r"STRFeather: macs=0.1 needs input_size="),
        ({"sparsity": 0.9, "theta": 1.5}, "STRFeather: theta must be a number from 0 to 1, got 1.5"),
        ({"sparsity": 0.9, "theta": True}, "STRFeather: theta must be a number from 0 to 1, got True"),
        ({"sparsity": 0.9, "init": 2.0}, "STRFeather: init must be a number from -100 to 0, got 2.0"),
        ({"sparsity": 0.9, "init": float("nan")}, "STRFeather: init must be a number from -100 to 0, got nan"),
    ],
)
def test_bad_input(settings, message):
    with pytest.raises(sparing.InputError, match=message):
        sparing.STRFeather(steps=100, **settings)
