"""DST: the mask, the derivative in place of that of the step, and the reset. `test_penalties` has the penalty."""

import pytest
import torch
from torch import nn

import sparing
from sparing import DST, InputError


def tail(x):
    """The long-tailed estimate of the derivative of the step, number by number."""
    slopes = [2 - 4 * abs(v) if abs(v) <= 0.4 else 0.4 if abs(v) <= 1 else 0.0 for v in x.flatten()]
    return torch.tensor(slopes, dtype=x.dtype).reshape(x.shape)


def sparsified(model):
    sparsifier = sparing.sparsify_(model, DST(alpha=0.1))
    return sparsifier, next(iter(sparsifier.layers.values()))


def test_a_weight_is_active_if_it_is_larger_than_the_threshold_of_its_row():
    model = nn.Linear(3, 2, bias=False)
    _, layer = sparsified(model)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.3, -0.1, 0.2], [0.3, -0.1, 0.2]]))
        layer.parametrization.t.copy_(torch.tensor([[0.15], [-0.5]]))
    assert torch.equal(model.weight, torch.tensor([[0.3, 0.0, 0.2], [0.3, -0.1, 0.2]]))
    assert layer.threshold.tolist() == [[pytest.approx(0.15)], [0.0]]


@pytest.mark.parametrize("build", [lambda: nn.Conv2d(5, 4, 3, bias=False), lambda: nn.ConvTranspose2d(5, 4, 3)])
def test_gradients_are_the_closed_form_with_one_threshold_per_output_channel(build):
    """dW = dS (M + |W| h(|W| − t)),  dt = −Σ dS W h(|W| − t), over all three pieces of h; pruned weights have one."""
    _, layer = sparsified(build())
    part = layer.parametrization
    output = 1 if isinstance(layer.module, nn.ConvTranspose2d) else 0
    with torch.no_grad():
        layer.weight.normal_()
        part.t.copy_(torch.tensor([0.0, 0.1, 0.5, -0.2]).reshape(part.t.shape))
    assert part.t.shape[output] == 4
    upstream = torch.randn(layer.weight.shape)
    (layer.effective_weight * upstream).sum().backward()
    weight, x = layer.weight.detach(), layer.weight.detach().abs() - part.t.detach()
    assert all(((x.abs() > low) & (x.abs() <= high)).any() for low, high in ((0, 0.4), (0.4, 1), (1, 9)))
    torch.testing.assert_close(layer.weight.grad, upstream * ((x > 0) + weight.abs() * tail(x)))
    assert layer.weight.grad[x <= 0].any()
    others = [d for d in range(4) if d != output]
    expected = -(upstream * weight * tail(x)).sum(others, keepdim=True)
    torch.testing.assert_close(part.t.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("x", "slope"), [(0.0, 2.0), (0.4, 0.4), (0.99, 0.4), (1.01, 0.0), (-0.2, 1.2), (-2.0, 0.0)])
def test_the_derivative_at_its_corners(x, slope):
    """Through t: dt = −w h(w − t) for one weight of 3, whose threshold puts it at x."""
    _, layer = sparsified(nn.Linear(1, 1, bias=False).double())
    with torch.no_grad():
        layer.weight.fill_(3.0)
        layer.parametrization.t.data = torch.full((1, 1), 3.0, dtype=torch.float64) - x
    layer.effective_weight.sum().backward()
    assert float(layer.parametrization.t.grad) == pytest.approx(-3 * slope, abs=1e-6)


@pytest.mark.parametrize(("active", "reset"), [(1, True), (2, True), (3, False)])
def test_thresholds_of_a_layer_return_to_zero_at_one_percent_density(active, reset):
    model = nn.Sequential(nn.Linear(20, 10, bias=False), nn.Linear(10, 10, bias=False))
    sparsifier, layer = sparsified(model)
    sparsifier.attach(torch.optim.SGD(model.parameters(), lr=1e-9))
    with torch.no_grad():
        layer.weight.fill_(0.1)
        layer.weight.view(-1)[:active] = 1.0
        sparsifier.layers["1"].weight.fill_(1.0)
        for each in sparsifier.layers.values():
            each.parametrization.t.fill_(0.5)
    sparsifier.penalty().backward()
    sparsifier.optimizers[0].step()
    first, second = (each.parametrization.t.unique().tolist() for each in sparsifier.layers.values())
    assert first == [0.0 if reset else pytest.approx(0.5)]
    assert second == [pytest.approx(0.5)]


def test_bad_arguments_are_refused():
    with pytest.raises(InputError, match="layer 'weight' is a transposed convolution of 2 groups"):
        sparsified(nn.ConvTranspose2d(4, 4, 2, groups=2))
    for alpha in (-1.0, "much", True, float("inf"), float("nan")):
        with pytest.raises(InputError, match=r"DST: alpha must be a number in \[0, inf\), got"):
            DST(alpha=alpha)
