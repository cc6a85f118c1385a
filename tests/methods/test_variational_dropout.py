"""Variational dropout: noise, divergence and cut, against formulas and an integral. `test_penalties` has the rest."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import sparing
from sparing import InputError, VariationalDropout
from sparing.methods.variational_dropout import GaussianNoise


def layer_of(init=-10.0, size=(6, 4)):
    model = nn.Linear(size[1], size[0], bias=False)
    sparsifier = sparing.sparsify_(model, VariationalDropout(kl_weight=0.1, init=init), steps=10)
    return model, sparsifier, sparsifier.layers["weight"]


def test_the_divergence_agrees_with_the_integral_it_approximates():
    """KL(α) = E log|1 + √α z| − ½ log α + (γ + log 2)/2, z normal; the approximation is good to 0.02."""
    z = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    _, sparsifier, layer = layer_of(size=(1, 1))
    sparsifier.clock.step = 10
    for value in (-6.0, -3.0, -1.0, 0.0, 1.0, 3.0, 6.0):
        expected = (density * torch.log((1 + math.exp(value / 2) * z).abs() + 1e-12)).sum() - value / 2
        expected += (0.5772156649 + math.log(2)) / 2
        with torch.no_grad():
            layer.weight.fill_(1.0)
            layer.parametrization.log_sigma2.fill_(value)
        assert float(sparsifier.penalty().detach()) == pytest.approx(0.1 * float(expected), abs=0.002)


@pytest.mark.parametrize("init", [-4.0, -40.0])
def test_training_adds_noise_of_the_learned_deviation_with_log_alpha_held_within_8(init):
    _, _, layer = layer_of(init)
    weight = layer.weight.detach()
    draws = torch.stack([layer.effective_weight.detach() for _ in range(4000)])
    deviation = torch.exp(0.5 * (init - torch.log(weight**2 + 1e-8)).clamp(-8, 8)) * (weight**2 + 1e-8).sqrt()
    torch.testing.assert_close(draws.std(0), deviation, rtol=0.06, atol=0)
    assert ((draws.mean(0) - weight).abs() < 5 * deviation / 4000**0.5).all()


def noise_inputs(dtype=torch.float64):
    """Return W and log σ² with log α near −10, −2, 2 and 10: beyond either bound, and within both."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, generator=generator).to(dtype)
    log_alpha = torch.tensor([-10.0, -2.0, 2.0, 10.0])[:, None] + torch.rand(4, 6, generator=generator)
    log_sigma2 = (log_alpha + torch.log(weight.double() ** 2 + 1e-8)).to(torch.promote_types(dtype, torch.float32))
    return weight.requires_grad_(), log_sigma2.requires_grad_()


def sample(weight, log_sigma2):
    """Return the effective weight in training, with the same noise whenever it is computed."""
    torch.manual_seed(0)
    return functional_call(GaussianNoise(nn.Parameter(log_sigma2.detach()), 3.0), {"log_sigma2": log_sigma2}, (weight,))


def plain_sample(weight, log_sigma2):
    torch.manual_seed(0)
    signal = weight.to(log_sigma2.dtype) ** 2 + 1e-8
    ratio = torch.exp(0.5 * (log_sigma2 - torch.log(signal)).clamp(-8, 8))
    return weight + (ratio * signal.sqrt() * torch.randn_like(log_sigma2)).to(weight.dtype)


def gradients_of(function, *inputs):
    upstream = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    result = function(*inputs)
    return result, *torch.autograd.grad((result * upstream).sum(), inputs)


def test_the_gradient_of_the_noise_is_that_of_autograd():
    inputs = noise_inputs()
    for ours, plain in zip(gradients_of(sample, *inputs), gradients_of(plain_sample, *inputs), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-11)
    assert torch.autograd.gradcheck(sample, inputs)
    assert torch.autograd.gradgradcheck(sample, inputs)


def test_in_bfloat16_the_gradient_of_the_noise_is_that_of_the_noise_as_rounded():
    weight, log_sigma2 = noise_inputs(torch.bfloat16)
    effective, grad_weight, grad_log_sigma2 = gradients_of(sample, weight, log_sigma2)
    plain, plain_weight, plain_log_sigma2 = gradients_of(plain_sample, weight, log_sigma2)
    assert torch.equal(effective, plain)
    torch.testing.assert_close(grad_weight, plain_weight, rtol=0.02, atol=0.02)
    # S has 8 bits, so that S − W and σ ε differ by up to 2^-8 of the larger of S and W.
    larger = torch.maximum(effective.abs(), weight.abs()).float()
    assert ((grad_log_sigma2 - plain_log_sigma2).abs() <= 4 * 2**-8 * larger).all()
    assert torch.corrcoef(torch.stack([grad_log_sigma2.flatten(), plain_log_sigma2.flatten()]))[0, 1] > 0.999


def test_the_gradient_of_the_divergence_is_that_of_autograd():
    weight, log_sigma2 = noise_inputs()
    model, sparsifier, layer = layer_of()
    model.double()
    sparsifier.clock.step = 10
    with torch.no_grad():
        layer.weight.data, layer.parametrization.log_sigma2.data = weight.data, log_sigma2.data
    ours = sparsifier.penalty()
    log_alpha = (log_sigma2 - torch.log(weight**2 + 1e-8)).clamp(-8, 8)
    plain = 0.1 * (0.63576 * (1 - torch.sigmoid(1.8732 + 1.48695 * log_alpha)) + 0.5 * F.softplus(-log_alpha)).sum()
    torch.testing.assert_close(ours, plain)
    found, expected = [], []
    for total, inputs, gradients in (
        (ours, [layer.weight, layer.parametrization.log_sigma2], found),
        (plain, [weight, log_sigma2], expected),
    ):
        gradients += torch.autograd.grad(total, inputs, create_graph=True)
        gradients += torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), inputs)
    for gradient, right in zip(found, expected, strict=True):
        assert right[1:3].all()
        assert not right[[0, 3]].any()
        torch.testing.assert_close(gradient, right, rtol=1e-9, atol=1e-12)


def test_a_weight_that_is_mostly_noise_is_zero_in_evaluation():
    model, _, layer = layer_of()
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.01, 0.24, 24).reshape(6, 4))
        layer.parametrization.log_sigma2.fill_(3.0 + math.log(0.105**2))
    expected = torch.where(layer.weight.detach() < 0.105, 0.0, layer.weight.detach())
    assert int((expected != 0).sum()) == 14
    assert torch.equal(model.eval().weight, expected)


def test_counts_and_conversion_in_training_mode_take_the_weights_of_evaluation():
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
    ("arguments", "message"),
    [
        ({"kl_weight": 0}, r"kl_weight must be a number in \(0, inf\), got 0"),
        ({"init": float("nan")}, r"init must be a number in \(-inf, inf\), got nan"),
        ({"cut": True}, r"cut must be a number in \(-inf, inf\), got True"),
        ({"begin": 8, "end": 5}, r"begin=8 \(step 8\) comes after end=5"),
        ({"end": 11}, "end=11 is step 11, beyond the 10 steps of the run"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        sparing.sparsify_(nn.Linear(2, 2), VariationalDropout(**{"kl_weight": 0.1} | arguments), steps=10)
