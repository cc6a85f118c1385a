"""Continuous sparsification: the soft mask, its temperature, and the hard mask it ends as."""

import math

import pytest
import torch
from torch import nn

import sparing
from sparing import ContinuousSparsification, InputError


def sparsified(size=(4, 6), **fields):
    model = nn.Linear(size[1], size[0], bias=False)
    method = ContinuousSparsification(**{"steps": 10, "penalty": 0.2} | fields)
    sparsifier = sparing.sparsify_(model, method)
    return model, sparsifier, sparsifier.layers["weight"]


@pytest.mark.parametrize("init", [0.05, 0.7])
def test_training_starts_from_the_dense_weight(init):
    model, _, layer = sparsified(init=init)
    torch.testing.assert_close(model.weight, layer.weight)


def test_effective_weights_and_gradients_are_the_formulas():
    model, _, layer = sparsified(init=0.3)
    part = layer.parametrization
    with torch.no_grad():
        part.m.normal_()
        part.temperature.fill_(3.0)
    weight, m = (tensor.detach().clone().requires_grad_() for tensor in (layer.weight, part.m))
    soft = weight / (1 + torch.exp(-3.0 * m)) * (1 + math.exp(-0.3))
    hard = torch.where(m > 0, weight, 0.0) * (1 + math.exp(-0.3))
    torch.testing.assert_close(model.weight, soft)
    upstream = torch.randn_like(weight)
    (model.weight * upstream).sum().backward()
    (soft * upstream).sum().backward()
    torch.testing.assert_close(layer.weight.grad, weight.grad)
    torch.testing.assert_close(part.m.grad, m.grad)
    torch.testing.assert_close(model.eval().weight, hard)


def test_counts_and_conversion_in_training_mode_see_the_hard_mask():
    model, _, layer = sparsified()
    with torch.no_grad():
        layer.parametrization.m.view(-1)[:9] = -1.0
    assert model.weight.count_nonzero() == 24
    assert layer.nonzero() == 15
    assert sparing.report(model).total.nonzero == 15
    plain = sparing.dense_state_dict(model)["weight"]
    assert torch.equal(sparing.densify_(model).weight, plain)
    assert model.weight.count_nonzero() == 15


def test_the_temperature_rises_exponentially_from_1_to_its_final_value():
    _, sparsifier, layer = sparsified(final_temperature=81.0, steps=4)
    seen = [float(layer.parametrization.temperature)]
    for step in range(1, 6):
        sparsifier.step = step
        sparsifier.method.after_step(sparsifier)
        seen.append(float(layer.parametrization.temperature))
    assert seen == pytest.approx([1, 3, 9, 27, 81, 81])


def test_the_penalty_adds_the_gradient_of_the_sum_of_the_soft_mask():
    _, sparsifier, layer = sparsified()
    part = layer.parametrization
    with torch.no_grad():
        part.m.normal_()
        part.temperature.fill_(5.0)
    layer.effective_weight.sum().backward()
    before = part.m.grad.clone()
    sparsifier.method.before_step(sparsifier)
    m = part.m.detach().clone().requires_grad_()
    (0.2 * torch.sigmoid(5.0 * m).sum()).backward()
    torch.testing.assert_close(part.m.grad - before, m.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_after_the_run_the_hard_mask_is_trained_and_stays(kind):
    model, sparsifier, layer = sparsified(steps=5, penalty=0.01)
    with torch.no_grad():
        layer.parametrization.m.copy_(torch.linspace(-0.5, 0.5, 24).reshape(4, 6))
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(sparing.param_groups(model, weight_decay=0.1), lr=0.05, **options)
    sparsifier.attach(optimizer)
    masks, weights = [], []
    for _ in range(9):
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
        masks.append(layer.parametrization.m.detach().clone())
        weights.append(layer.weight.detach().clone())
    assert not torch.equal(masks[3], masks[4])
    assert not torch.equal(weights[7], weights[8])
    for later in masks[5:]:
        assert torch.equal(later, masks[4])
    training = model.weight.detach()
    assert 0 < training.count_nonzero() < 24
    assert torch.equal(training, model.eval().weight)


def test_the_soft_mask_tends_to_the_hard_one():
    model, _, layer = sparsified(init=0.05)
    with torch.no_grad():
        layer.parametrization.m.copy_(torch.linspace(-0.92, 0.92, 24).reshape(4, 6))
        layer.parametrization.temperature.fill_(200.0)
    soft = model.weight.detach()
    torch.testing.assert_close(soft, model.eval().weight.detach(), atol=1e-3, rtol=0)


@pytest.mark.filterwarnings("ignore::sparing.SparsityWarning")
def test_an_init_at_zero_starts_with_an_empty_hard_mask():
    _, _, layer = sparsified(init=0.0)
    assert layer.nonzero() == 0
    assert layer.effective_weight.count_nonzero() == 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"penalty": -1e-3}, "penalty must be a finite number from 0 to inf, got -0.001"),
        ({"penalty": float("inf")}, "penalty must be a finite number from 0 to inf, got inf"),
        ({"penalty": True}, "penalty must be a finite number from 0 to inf, got True"),
        ({"init": 11.0}, "init must be a finite number from -10 to 10, got 11.0"),
        ({"init": "zero"}, "init must be a finite number from -10 to 10, got 'zero'"),
        ({"final_temperature": 0.5}, "final_temperature must be a finite number from 1 to inf, got 0.5"),
        ({"final_temperature": float("nan")}, "final_temperature must be a finite number from 1 to inf, got nan"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        ContinuousSparsification(**{"steps": 10, "penalty": 0.1} | arguments)
