"""Continuous sparsification: the soft mask, its temperature, and the hard mask it becomes."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

import sparing
from sparing import ContinuousSparsification, InputError
from sparing.methods.continuous_sparsification import SigmoidMask


def sparsified(steps=10, **settings):
    model = nn.Linear(6, 4, bias=False)
    sparsifier = sparing.sparsify_(model, ContinuousSparsification(**{"weight": 0.2} | settings), steps=steps)
    return model, sparsifier, sparsifier.layers["weight"]


@pytest.mark.parametrize("init", [0.05, 0.7])
def test_training_starts_from_the_dense_weight(init):
    model, _, layer = sparsified(init=init)
    torch.testing.assert_close(model.weight.clone(), layer.weight)


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


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_gradient_of_the_mask_is_that_of_autograd(dtype, finished):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(4, 6, generator=generator).to(dtype)
    m = torch.randn(4, 6, generator=generator).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    part = SigmoidMask(nn.Parameter(m.detach()), 1.7)
    part.temperature.fill_(3.0)
    part.finished.fill_(finished)

    def ours(weight, m):
        return functional_call(part, {"m": m}, (weight,))

    def plain(weight, m):
        mask = (m > 0).to(m.dtype) + 0 * m if finished else torch.sigmoid(3.0 * m)
        return weight * (1.7 * mask).to(weight.dtype)

    assert torch.equal(ours(weight, m), plain(weight, m))
    for found, expected in zip(
        torch.autograd.grad(ours(weight, m), [weight, m], upstream),
        torch.autograd.grad(plain(weight, m), [weight, m], upstream),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(ours, (weight, m))
        assert torch.autograd.gradgradcheck(ours, (weight, m))


def test_counts_and_conversion_in_training_mode_take_the_hard_mask():
    model, _, layer = sparsified()
    with torch.no_grad():
        layer.parametrization.m.view(-1)[:9] = -1.0
    assert model.weight.count_nonzero() == 24
    assert layer.nonzero() == 15
    assert sparing.report(model).total.nonzero == 15
    plain = sparing.dense_state_dict(model)["weight"]
    assert torch.equal(sparing.densify_(model).weight, plain)
    assert model.weight.count_nonzero() == 15


@pytest.mark.filterwarnings("ignore:.*the schedule has ended:sparing.SparsityWarning")
@pytest.mark.parametrize("finish", [False, True])
def test_the_temperature_rises_exponentially_from_1_to_its_final_value_and_stays(finish):
    model, sparsifier, layer = sparsified(final_temperature=81.0, steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    seen = []
    for _ in range(2 if finish else 6):
        seen.append(float(layer.parametrization.temperature))
        (model.weight.sum() + sparsifier.penalty()).backward()
        optimizer.step()
    sparsifier.finish()
    assert seen == pytest.approx([1, 3, 9, 27, 81, 81][: len(seen)])
    assert float(layer.parametrization.temperature) == pytest.approx(81)
    assert torch.equal(model.weight, model.eval().weight)


@pytest.mark.filterwarnings("ignore:.*the schedule has ended:sparing.SparsityWarning")
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_after_the_run_the_hard_mask_is_used_in_training_and_stays(kind):
    model, sparsifier, layer = sparsified(steps=5, weight=0.01)
    with torch.no_grad():
        layer.parametrization.m.copy_(torch.linspace(-0.5, 0.5, 24).reshape(4, 6))
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    # A parameter group of one's own, which decays m as well.
    optimizer = kind(model.parameters(), lr=0.05, weight_decay=0.1, **options)
    sparsifier.attach(optimizer)
    masks, weights = [], []
    for _ in range(9):
        optimizer.zero_grad()
        (model(torch.randn(8, 6)).square().mean() + sparsifier.penalty()).backward()
        optimizer.step()
        masks.append(layer.parametrization.m.detach().clone())
        weights.append(layer.weight.detach().clone())
    assert not torch.equal(masks[3], masks[4])
    assert not torch.equal(weights[7], weights[8])
    assert all(torch.equal(later, masks[4]) for later in masks[5:])
    training = model.weight.detach()
    assert 0 < training.count_nonzero() < 24
    assert torch.equal(training, model.eval().weight)


@pytest.mark.filterwarnings("ignore::sparing.SparsityWarning")
def test_an_init_of_zero_starts_with_an_empty_hard_mask():
    _, _, layer = sparsified(init=0.0)
    assert layer.nonzero() == 0
    assert layer.effective_weight.count_nonzero() == 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -1e-3}, r"weight must be a number in \[0, inf\), got -0.001"),
        ({"weight": True}, r"weight must be a number in \[0, inf\), got True"),
        ({"init": 11.0}, r"init must be a number in \[-10, 10\], got 11.0"),
        ({"final_temperature": 0.5}, r"final_temperature must be a number in \[1, inf\), got 0.5"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        ContinuousSparsification(**{"weight": 0.1} | arguments)
