"""STR-Feather: the curve of Feather under a learned threshold per layer, and the target."""

import pytest
import torch
from torch import nn

import sparing
from sparing import InputError, STRFeather
from sparing.patterns import Block, Filters, Unstructured
from sparing.target import rescale

WEIGHT = torch.tensor([[0.3, -0.09, 0.2], [0.05, 0.0, -0.4]])


def sparsified(weight=WEIGHT, t=0.1, **settings):
    """A Linear layer of this weight whose threshold is t."""
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    model.weight.data = weight.clone()
    sparsifier = sparing.sparsify_(model, STRFeather(sparsity=0.5, **settings), steps=100)
    part = sparsifier.layers["weight"].parametrization
    part.measure(sparsifier.layers["weight"].weight)
    part.s.data.fill_(torch.log(t / part.unit).item())
    return model, part


def test_a_case_by_hand():
    model, part = sparsified()
    assert float(part.threshold().detach()) == pytest.approx(0.1)
    expected = torch.tensor([[26.0, 0.0, 7.0], [0.0, 0.0, -63.0]])  # (|W|³ − 0.1³) · 1000, with the sign
    assert torch.allclose(1000 * model.weight**3, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("pattern", "view", "theta"),
    [
        (Unstructured(), (4, 1, 6), 0.0),
        (Unstructured(), (4, 1, 6), 1.0),
        (Block(2), (2, 2, 6), 0.5),
        (Filters(), (4, 6, 1), 0.5),
    ],
    ids=str,
)
def test_gradients_are_those_of_the_formula(pattern, view, theta):
    """dW = dS (M + θ (1 − M)),  ds = −dt/ds Σ dS ⊙ sign(S); the middle dimension of `view` is the group."""
    weight, gradient = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    model, part = sparsified(weight, t=0.9, theta=theta, pattern=pattern)
    model.weight.backward(gradient)
    norm = weight.reshape(view).square().mean(1, keepdim=True).sqrt()
    mask = (norm > 0.9).expand(view).reshape(4, 6)
    assert 0 < int(mask.sum()) < 24
    assert torch.equal(model.parametrizations.weight.original.grad, torch.where(mask, gradient, theta * gradient))
    expected = -0.9 * (gradient * weight.sign() * mask).sum()
    assert part.s.grad.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_operator_saves_nothing_but_the_effective_weight():
    model, _ = sparsified(theta=1)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        effective = model.weight
    assert [t.data_ptr() for t in saved if t.shape == WEIGHT.shape] == [effective.data_ptr()]


@pytest.mark.parametrize("pattern", [Unstructured(), Block(4)])
def test_thresholds_rise_with_the_cost_of_a_weight(pattern):
    """t ∝ √‖W‖ · cost^¼ before s is trained: here a weight of the convolution is applied 16 times."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 4))
    method = STRFeather(macs=0.2, input_size=(1, 4, 6, 6), pattern=pattern)
    sparsifier = sparing.sparsify_(model, method, steps=40)
    rescale(sparsifier.layers, sparsifier.plan, sparsifier.plan.final)
    units = [float(each.threshold.detach() / each.weight.detach().norm().sqrt()) for each in sparsifier.layers.values()]
    assert units[0] == pytest.approx(2 * units[1])


@pytest.mark.parametrize(("macs", "theta"), [(0.1, 1.0), (0.04, 0.5)])
def test_theta_depends_on_the_share_of_pruned_macs(macs, theta):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 4))
    sparsifier = sparing.sparsify_(model, STRFeather(macs=macs, input_size=(1, 4, 6, 6)), steps=40)
    assert {each.parametrization.theta for each in sparsifier.layers.values()} == {theta}


@pytest.mark.parametrize("pattern", [Unstructured(), Block(4)])
def test_thresholds_of_layers_differ_and_macs_are_met(pattern):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 4))
    method = STRFeather(macs=0.2, input_size=(1, 2, 6, 6), every=4, pattern=pattern)
    sparsifier = sparing.sparsify_(model, method, steps=40)
    optimizer = torch.optim.SGD(sparing.param_groups(model, weight_decay=1e-3), lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(16, 2, 6, 6)), torch.randint(0, 4, (16,))).backward()
        optimizer.step()
    total = sparing.report(model, (1, 2, 6, 6)).total
    # The next block of the convolution, of 4 · 16 MACs, would be too much.
    assert 0 <= 0.2 * total.dense_macs - total.macs < 64
    thresholds = [float(each.threshold.detach()) for each in sparsifier.layers.values()]
    assert thresholds[0] != pytest.approx(thresholds[1], rel=1e-3)


def test_thresholds_are_in_units_of_each_layer():
    """√‖W‖ of the dense weight, measured at each update."""
    model = nn.Sequential(nn.Linear(40, 10), nn.Linear(10, 40))
    with torch.no_grad():
        model[1].weight.copy_(9 * model[0].weight.T)
    sparsifier = sparing.sparsify_(model, STRFeather(sparsity=0.6), steps=100)
    assert sparsifier.sparsity() == 0
    first, second = sparsifier.layers.values()
    rescale(sparsifier.layers, sparsifier.plan, sparsifier.plan.final)
    assert float(second.threshold.detach()) == pytest.approx(3 * float(first.threshold.detach()))
    expected = first.weight.detach().norm().sqrt() * first.parametrization.s.detach().exp()
    assert torch.allclose(first.threshold.detach(), expected)
    with torch.no_grad():
        second.weight.div_(9)
    rescale(sparsifier.layers, sparsifier.plan, sparsifier.plan.final)
    assert first.sparsity() == second.sparsity() == pytest.approx(0.6, abs=0.002)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"STRFeather: give sparsity=, a fraction in \[0, 1\), or macs=$"),
        ({"sparsity": 0.9, "theta": 1.5}, r"STRFeather: theta must be a number in \[0, 1\], got 1.5"),
        ({"sparsity": 0.9, "init": 2.0}, r"STRFeather: init must be a number in \[-64, 0\], got 2.0"),
    ],
)
def test_bad_arguments_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        STRFeather(**settings)
