"""DST: its mask and the derivative it puts in place of the step's, against the closed form."""

import pytest
import torch
from torch import nn

import sparing
from sparing import DST, InputError


def tail(x):
    """The long-tailed estimate of the step's derivative, number by number."""
    slopes = [2 - 4 * abs(v) if abs(v) <= 0.4 else 0.4 if abs(v) <= 1 else 0.0 for v in x.flatten()]
    return torch.tensor(slopes).reshape(x.shape)


def sparsified(model, alpha=0.1):
    sparsifier = sparing.sparsify_(model, DST(alpha=alpha))
    return sparsifier, next(iter(sparsifier.layers.values()))


def test_a_weight_lives_if_it_is_larger_than_its_rows_threshold():
    model = nn.Linear(3, 2, bias=False)
    _, layer = sparsified(model)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.3, -0.1, 0.2], [0.3, -0.1, 0.2]]))
        layer.parametrization.t.copy_(torch.tensor([[0.15], [-0.5]]))
    assert torch.equal(model.weight, torch.tensor([[0.3, 0.0, 0.2], [0.3, -0.1, 0.2]]))
    assert layer.threshold.tolist() == [[pytest.approx(0.15)], [0.0]]


def test_gradients_are_the_closed_form():
    """dW = dS (M + |W| h(|W| − t)),  dt = −Σ dS W h(|W| − t), over all three pieces of h."""
    model = nn.Conv2d(5, 4, 3, bias=False)
    _, layer = sparsified(model)
    part = layer.parametrization
    assert part.t.shape == (4, 1, 1, 1)
    with torch.no_grad():
        layer.weight.normal_()
        part.t.copy_(torch.tensor([0.0, 0.1, 0.5, -0.2]).reshape(4, 1, 1, 1))
    upstream = torch.randn(4, 5, 3, 3)
    (layer.effective_weight * upstream).sum().backward()
    weight, x = layer.weight.detach(), layer.weight.detach().abs() - part.t.detach()
    assert all(((x.abs() > low) & (x.abs() <= high)).any() for low, high in ((0, 0.4), (0.4, 1), (1, 9)))
    torch.testing.assert_close(layer.weight.grad, upstream * ((x > 0) + weight.abs() * tail(x)))
    by_filter = -(upstream * weight * tail(x)).sum((1, 2, 3), keepdim=True)
    torch.testing.assert_close(part.t.grad, by_filter, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "slope"),
    [(0.0, 2.0), (0.1, 1.6), (0.4, 0.4), (0.99, 0.4), (1.01, 0.0), (-0.2, 1.2), (-2.0, 0.0)],
)
def test_the_tail_at_its_corners(x, slope):
    """Through t: dt = −w h(w − t) for one weight of 3, whose threshold puts it at x."""
    _, layer = sparsified(nn.Linear(1, 1, bias=False).double())
    with torch.no_grad():
        layer.weight.fill_(3.0)
        layer.parametrization.t.data = torch.full((1, 1), 3.0, dtype=torch.float64) - x
    layer.effective_weight.sum().backward()
    assert float(layer.parametrization.t.grad) == pytest.approx(-3 * slope, abs=1e-6)


def test_a_pruned_weight_is_still_moved():
    _, layer = sparsified(nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        layer.parametrization.t.fill_(0.6)
    assert layer.nonzero() == 0
    layer.effective_weight.sum().backward()
    assert layer.weight.grad.count_nonzero() == 16


def test_the_term_raises_thresholds_by_alpha_exp_minus_t():
    model = nn.Linear(3, 2, bias=False)
    sparsifier, layer = sparsified(model, alpha=0.3)
    part = layer.parametrization
    with torch.no_grad():
        part.t.copy_(torch.tensor([[0.05], [-0.1]]))
    (layer.effective_weight * 0).sum().backward()
    optimizer = torch.optim.SGD(sparing.param_groups(model, weight_decay=0.0), lr=1.0)
    sparsifier.attach(optimizer)
    t = part.t.detach().clone().requires_grad_()
    (0.3 * torch.exp(-t).sum()).backward()
    expected = t.detach() - t.grad
    with torch.no_grad():
        layer.weight.fill_(9.0)  # far above any threshold, so that nothing is reset
    optimizer.step()
    torch.testing.assert_close(part.t.detach(), expected)


@pytest.mark.parametrize(("live", "reset"), [(1, True), (2, True), (3, False)])
def test_thresholds_return_to_zero_at_one_percent_density(live, reset):
    model = nn.Linear(20, 10, bias=False)
    sparsifier, layer = sparsified(model)
    with torch.no_grad():
        layer.weight.fill_(0.1)
        layer.weight.view(-1)[:live] = 1.0
        layer.parametrization.t.fill_(0.5)
    sparsifier.method.after_step(sparsifier)
    assert layer.parametrization.t.unique().tolist() == ([0.0] if reset else [0.5])


def test_a_transposed_convolution_has_one_threshold_an_output_channel():
    _, layer = sparsified(nn.ConvTranspose2d(3, 5, 2))
    assert layer.parametrization.t.shape == (1, 5, 1, 1)
    with pytest.raises(InputError, match="layer 'weight' is a transposed convolution of 2 groups"):
        sparsified(nn.ConvTranspose2d(4, 4, 2, groups=2))


@pytest.mark.parametrize("alpha", [-1.0, "much", True, float("inf"), float("nan")])
def test_bad_alpha_is_refused(alpha):
    with pytest.raises(InputError, match="DST: alpha must be a finite number ≥ 0, got"):
        DST(alpha=alpha)
