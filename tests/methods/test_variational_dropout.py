"""Variational dropout: its noise, its divergence and its cut, against the formulas and against an integral."""

import math

import pytest
import torch
from torch import nn

import sparing
from sparing import InputError, VariationalDropout


def layer_of(init=-10.0, size=(6, 4), **fields):
    model = nn.Linear(size[1], size[0], bias=False)
    sparsifier = sparing.sparsify_(model, VariationalDropout(**{"steps": 10, "kl_weight": 0.1, "init": init} | fields))
    return model, sparsifier, sparsifier.layers["weight"]


def log_alpha(weight, log_sigma2):
    return log_sigma2 - torch.log(weight**2 + 1e-8)


def test_divergence_agrees_with_the_integral_it_stands_for():
    """KL(α) = E log|1 + √α z| − ½ log α + (γ + log 2)/2, z normal; the approximation is good to 0.02."""
    z = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    part = layer_of(size=(1, 1))[2].parametrization
    for value in (-6.0, -3.0, -1.0, 0.0, 1.0, 3.0, 6.0):
        expected = (density * torch.log((1 + math.exp(value / 2) * z).abs() + 1e-12)).sum() - value / 2
        expected += (0.5772156649 + math.log(2)) / 2
        weight = torch.ones(1, 1)
        with torch.no_grad():
            part.log_sigma2.fill_(value)
        assert float(part.divergence(weight).detach()) == pytest.approx(float(expected), abs=0.02)


def test_training_adds_noise_of_the_learned_deviation_and_evaluation_none():
    model, _, layer = layer_of(init=-4.0)
    weight = layer.weight.detach()
    draws = torch.stack([layer.effective_weight.detach() for _ in range(4000)])
    torch.testing.assert_close(draws.mean(0), weight, atol=0.01, rtol=0)
    # log α is held within ±8: σ² is at most e⁸ (W² + 1e-8).
    deviation = torch.exp(0.5 * torch.minimum(torch.tensor(-4.0), torch.log(weight**2 + 1e-8) + 8))
    torch.testing.assert_close(draws.std(0), deviation, rtol=0.06, atol=0)
    model.eval()
    assert torch.equal(layer.effective_weight, layer.effective_weight)


def test_log_alpha_is_clipped_in_training():
    _, _, layer = layer_of(init=-40.0)
    weight = layer.weight.detach()
    draws = torch.stack([layer.effective_weight.detach() for _ in range(4000)])
    torch.testing.assert_close(draws.std(0), math.exp(-4) * weight.abs(), rtol=0.06, atol=1e-5)


def test_what_is_mostly_noise_is_zero_in_evaluation():
    model, _, layer = layer_of()
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.01, 0.24, 24).reshape(6, 4))
        layer.parametrization.log_sigma2.fill_(3.0 + math.log(0.105**2))
    expected = torch.where(layer.weight.detach() < 0.105, 0.0, layer.weight.detach())
    assert int((expected != 0).sum()) == 14
    assert torch.equal(model.eval().weight, expected)


def test_counts_and_conversion_in_training_mode_see_the_weights_of_evaluation():
    model, sparsifier, layer = layer_of()
    with torch.no_grad():
        layer.parametrization.log_sigma2.fill_(2.0)
        layer.weight[0] = 5.0
    assert layer.effective_weight.count_nonzero() == 24  # sampled
    assert layer.nonzero() == 4
    assert sparsifier.collapsed() == []
    plain = sparing.dense_state_dict(model)["weight"]
    assert torch.equal(sparing.densify_(model).weight, plain)
    assert model.weight.count_nonzero() == 4


@pytest.mark.parametrize(
    ("step", "begin", "end", "share"),
    [
        (0, 0, 10, 0.0),
        (4, 2, 6, 0.5),
        (2, 2, 6, 0.0),
        (6, 2, 6, 1.0),
        (9, 2, 6, 1.0),
        (5, 0.0, 1.0, 0.5),
        (9, 3, 3, 1.0),
    ],
)
def test_gradients_gain_the_ramped_gradient_of_the_divergence(step, begin, end, share):
    _, sparsifier, layer = layer_of(init=-5.0, begin=begin, end=end)
    part = layer.parametrization
    with torch.no_grad():
        layer.weight[0] = 1e-4  # log α is above 8 there, and its gradient cut off
    layer.effective_weight.sum().backward()
    before = layer.weight.grad.clone(), part.log_sigma2.grad.clone()
    sparsifier.step = step
    sparsifier.method.before_step(sparsifier)

    weight, noise = layer.weight.detach(), part.log_sigma2.detach()
    la = log_alpha(weight, noise)
    inside = (la.abs() < 8).float()
    s = torch.sigmoid(1.87320 + 1.48695 * la)
    slope = -(0.63576 * 1.48695 * s * (1 - s) + 0.5 * torch.sigmoid(-la)) * inside
    assert 0 < inside.sum() < 24
    assert (slope <= 0).all()
    torch.testing.assert_close(part.log_sigma2.grad - before[1], 0.1 * share * slope, rtol=1e-3, atol=1e-6)
    pull = slope * -2 * weight / (weight**2 + 1e-8)
    torch.testing.assert_close(layer.weight.grad - before[0], 0.1 * share * pull, rtol=1e-3, atol=1e-5)


def test_a_layer_that_is_not_trained_is_left_alone():
    _, sparsifier, layer = layer_of()
    sparsifier.step = 10
    sparsifier.method.before_step(sparsifier)
    assert layer.weight.grad is None
    assert layer.parametrization.log_sigma2.grad is None


def test_the_noise_of_a_frozen_weight_is_left_alone():
    _, sparsifier, layer = layer_of()
    layer.weight.requires_grad_(False)
    layer.effective_weight.sum().backward()
    before = layer.parametrization.log_sigma2.grad.clone()
    sparsifier.step = 10
    sparsifier.method.before_step(sparsifier)
    assert torch.equal(layer.parametrization.log_sigma2.grad, before)


def test_noise_stays_float32_beside_half_weights():
    model = nn.Linear(4, 4).to(torch.bfloat16)
    part = sparing.sparsify_(model, VariationalDropout(steps=10, kl_weight=1.0)).layers["weight"].parametrization
    assert part.log_sigma2.dtype == torch.float32
    assert model.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kl_weight": 0}, "kl_weight must be above 0, got 0"),
        ({"kl_weight": "small"}, "kl_weight must be a finite number, got 'small'"),
        ({"init": float("nan")}, "init must be a finite number, got nan"),
        ({"cut": True}, "cut must be a finite number, got True"),
        ({"begin": 8, "end": 5}, r"begin=8 \(step 8\) comes after end=5"),
        ({"end": 11}, "end must be a step from 0 to 10"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        VariationalDropout(**{"steps": 10, "kl_weight": 0.1} | arguments)
