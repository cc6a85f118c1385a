"""Feather: its thresholding, the factor θ on dead gradients, one threshold for all layers."""

import pytest
import torch
from harness import Run
from torch import nn

import sparing
from sparing.masks import count_kept
from sparing.schedules import cubic

WEIGHT = torch.tensor([[3.0, -1.0, 2.0], [0.5, 0.0, -4.0]])


def sparsified(weight, **settings):
    """A Linear layer of this weight after one step that moves nothing."""
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    model.weight.data = weight.clone()
    sparsifier = sparing.sparsify_(
        model, sparing.Feather(**{"steps": 10, "begin": 0, "end": 0, "every": 1, **settings})
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier.attach(optimizer)
    assert torch.equal(model.weight, weight)
    (0 * model.weight.sum()).backward()
    optimizer.step()
    return model


def test_a_case_by_hand():
    model = sparsified(WEIGHT, sparsity=0.5)
    expected = torch.tensor([[26.0, 0.0, 7.0], [0.0, 0.0, -63.0]])  # |W|³ − 1³, with the sign
    assert torch.allclose(model.weight**3, expected, rtol=1e-5)
    assert model.parametrizations.weight[0].threshold() == 1.0


def test_random_weights_follow_the_formula():
    weight = torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
    th = weight.abs().reshape(-1).sort().values[279]
    cube = (weight.abs() ** 3 - th**3).clamp_min(0)
    model = sparsified(weight, sparsity=0.7)
    assert torch.allclose(model.weight, weight.sign() * cube ** (1 / 3), atol=1e-5)
    assert int(model.weight.count_nonzero()) == 120


def test_weights_whose_cubes_underflow_in_half_precision_survive():
    weight = torch.tensor([[1e-3, 2e-3, 3e-3, 4e-3]], dtype=torch.float16)
    model = sparsified(weight, sparsity=0.5)
    exact = torch.tensor([0, 0, 27.0 - 8, 64.0 - 8]) ** (1 / 3) * 1e-3
    assert model.weight.dtype == torch.float16
    assert torch.allclose(model.weight[0].float(), exact, rtol=0.01)


@pytest.mark.parametrize(
    ("sparsity", "theta", "factor"), [(0.5, None, 1.0), (0.5, 0.5, 0.5), (0.5, 0.0, 0.0), (0.5, 1, 1.0)]
)
def test_the_gradient_of_dead_weights_is_scaled_by_theta(sparsity, theta, factor):
    model = sparsified(WEIGHT, sparsity=sparsity, theta=theta)
    gradient = torch.arange(1.0, 7.0).reshape(2, 3)
    (model.weight * gradient).sum().backward()
    live = torch.tensor([[True, False, True], [False, False, True]])
    assert torch.equal(model.parametrizations.weight.original.grad, torch.where(live, gradient, factor * gradient))


@pytest.mark.parametrize(("sparsity", "theta"), [(0.9, 1.0), (0.95, 1.0), (0.951, 0.5), (0.99, 0.5)])
def test_theta_is_a_half_above_95_percent(sparsity, theta):
    model = sparsified(torch.randn(20, 20), sparsity=sparsity)
    assert model.parametrizations.weight[0].theta == theta


def test_the_total_follows_the_cubic_ramp_of_half_the_run_and_the_threshold_is_one():
    run = Run("conv2d", sparing.Feather(steps=20, sparsity=0.75, every=1))
    thresholds = []
    for done in range(1, 21):
        run.train(1)
        parts = [layer.parametrization for layer in run.sparsifier.layers.values()]
        effective = [layer.effective_weight for layer in run.sparsifier.layers.values()]
        total = sum(weight.numel() for weight in effective)
        assert sum(int(weight.count_nonzero()) for weight in effective) == count_kept(total, cubic(done, 0, 10, 0.75))
        assert len({float(part.threshold()) for part in parts}) == 1
        thresholds.append(float(parts[0].threshold()))
    assert len(set(thresholds)) == 20


@pytest.mark.parametrize(("theta", "kept"), [(1.0, 0), (0.5, 1)])
def test_straight_through_keeps_nothing_for_its_backward(theta, kept):
    model = sparsified(WEIGHT, sparsity=0.5, theta=theta)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        effective = model.weight
    assert len(saved) == kept
    assert all(t.data_ptr() == effective.data_ptr() for t in saved)


def test_between_two_updates_a_weight_lives_while_it_is_above_the_threshold():
    model = sparsified(WEIGHT, sparsity=0.5)
    weight = model.parametrizations.weight.original
    weight.data[0] = torch.tensor([0.5, -2.0, 2.0])
    assert torch.allclose(model.weight[0] ** 3, torch.tensor([0.0, -7.0, 7.0]), rtol=1e-5)


@pytest.mark.filterwarnings("ignore::sparing.SparsityWarning")
def test_equal_weights_and_zeros_are_zero_together_and_stay_finite():
    for weight in (torch.ones(4, 4), torch.zeros(4, 4)):
        model = sparsified(weight, sparsity=0.5)
        assert model.parametrizations.weight[0].threshold() == weight.amax()
        assert torch.equal(model.weight, torch.zeros(4, 4))


def test_bad_input():
    for theta in (-0.1, 1.5, "half", True):
        with pytest.raises(sparing.InputError, match="theta must be None or a factor from 0 to 1, got"):
            sparing.Feather(steps=100, sparsity=0.9, theta=theta)
    with pytest.raises(sparing.InputError, match=r"Feather: begin=0.6 \(step 60\) comes after end=0.5 \(step 50\)"):
        sparing.Feather(steps=100, sparsity=0.9, begin=0.6)
