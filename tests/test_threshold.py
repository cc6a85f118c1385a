"""The soft threshold against its formula, its closed-form gradient, and finite differences."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

import sparing
from sparing.threshold import MAPS, soft_threshold
from tolerance import tolerance

SHAPES = {"layer": (1,), "scalar": (), "filter": (4, 1, 1, 1), "weight": (4, 3, 2, 2)}


def naive(weight, threshold):
    """Return the formula as the paper writes it."""
    return torch.sign(weight) * torch.relu(weight.abs() - threshold)


def pair(kind, dtype=torch.float64, device="cpu"):
    weight = torch.randn(4, 3, 2, 2, dtype=dtype, device=device)
    threshold = 0.2 + torch.rand(SHAPES[kind], dtype=dtype, device=device)
    return weight.requires_grad_(), threshold.requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", SHAPES)
def test_equals_the_formula_to_the_last_bit(kind, dtype, device):
    weight, threshold = pair(kind, dtype, device)
    effective = soft_threshold(weight, threshold)
    assert torch.equal(effective, naive(weight, threshold))
    assert effective.dtype == dtype
    assert 0 < (effective == 0).sum() < effective.numel()
    assert not torch.signbit(effective[effective == 0]).any()


@pytest.mark.parametrize("kind", SHAPES)
def test_gradients_equal_the_closed_form(kind, device):
    weight, threshold = pair(kind, device=device)
    effective = soft_threshold(weight, threshold)
    upstream = torch.randn_like(effective)
    effective.backward(upstream)
    active = weight.detach().abs() > threshold.detach()
    assert torch.equal(weight.grad, upstream * active)
    expected = -(upstream * weight.detach().sign() * active).sum_to_size(threshold.shape)
    close = {"rtol": 0.0, "atol": tolerance(weight.dtype, upstream.numel(), upstream.norm())}
    torch.testing.assert_close(threshold.grad, expected, **close)


@pytest.mark.parametrize("kind", SHAPES)
def test_gradients_equal_finite_differences_to_second_order(kind):
    inputs = pair(kind)
    assert torch.autograd.gradcheck(soft_threshold, inputs)
    assert torch.autograd.gradgradcheck(soft_threshold, inputs)


def test_a_weight_equal_to_its_threshold_is_pruned_and_gets_no_gradient():
    weight = torch.tensor([-0.5, 0.5, 0.75], requires_grad=True)
    effective = soft_threshold(weight, 0.5)
    effective.sum().backward()
    assert effective.tolist() == [0, 0, 0.25]
    assert weight.grad.tolist() == [0, 0, 1]


def test_a_frozen_threshold_or_weight_gets_no_gradient():
    weight, threshold = pair("layer")
    soft_threshold(weight, threshold.detach()).sum().backward()
    assert (weight.grad is None, threshold.grad is None) == (False, True)
    weight.grad = None
    soft_threshold(weight.detach(), threshold).sum().backward()
    assert (weight.grad is None, threshold.grad is None) == (True, False)


floats = st.floats(-4, 4, width=32)


@given(floats, floats, st.floats(0, 3, width=32), st.floats(0, 3, width=32))
def test_is_odd_monotone_and_a_contraction(a, b, low, high):
    low, high = sorted((low, high))
    first, second = torch.tensor(a), torch.tensor(b)
    assert soft_threshold(-first, low) == -soft_threshold(first, low)
    assert (soft_threshold(first, low) == 0) == (abs(a) <= low)
    # Each of the four subtractions is rounded, by at most ε/2 of the larger number.
    rounding = 2 * torch.finfo(torch.float32).eps * (abs(a) + abs(b))
    assert abs(soft_threshold(first, low) - soft_threshold(second, low)) <= abs(first - second) + rounding
    assert soft_threshold(first, high).abs() <= soft_threshold(first, low).abs()
    assert soft_threshold(first, 0.0) == first


def test_saves_nothing_but_its_own_output():
    weight, threshold = pair("layer")
    saved = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        effective = soft_threshold(weight, threshold)
    assert [t.data_ptr() for t in saved] == [effective.data_ptr()]


def test_nan_and_infinity_are_not_hidden():
    effective = soft_threshold(torch.tensor([float("nan"), float("inf"), -float("inf")]), 0.5)
    assert effective.isnan().tolist() == [True, False, False]
    assert effective[1:].tolist() == [float("inf"), -float("inf")]


def test_keeps_the_memory_format(device):
    weight = torch.randn(8, 4, 3, 3, device=device).to(memory_format=torch.channels_last).requires_grad_()
    threshold = torch.tensor([0.5], device=device, requires_grad=True)
    effective = soft_threshold(weight, threshold)
    assert effective.is_contiguous(memory_format=torch.channels_last)
    effective.square().sum().backward()
    assert weight.grad.is_contiguous(memory_format=torch.channels_last)
    assert (effective == 0).any()


def test_the_threshold_gradient_of_a_low_precision_weight_is_summed_in_float32():
    weight = torch.ones(1000, 7, dtype=torch.bfloat16, requires_grad=True)
    threshold = torch.tensor([0.5], requires_grad=True)
    effective = soft_threshold(weight, threshold)
    effective.backward(torch.full_like(effective, 1 / 3))
    third = float(torch.tensor(1 / 3, dtype=torch.bfloat16))
    assert threshold.grad.dtype == torch.float32
    # A bf16 sum would be off by up to 1 part in 256; the float32 sum is exact, since each term has 8 bits.
    assert float(threshold.grad) == -7000 * third


# torch.compile uses functions that torch itself deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_without_a_graph_break(device):
    weight, threshold = pair("layer", torch.float32, device)
    compiled = torch.compile(soft_threshold, fullgraph=True, backend="aot_eager")
    upstream = torch.randn_like(weight)
    gradients = []
    for function in (soft_threshold, compiled):
        effective = function(weight, threshold)
        gradients.append(torch.autograd.grad(effective, (weight, threshold), upstream))
    assert torch.equal(effective, naive(weight, threshold))
    close = {"rtol": 0.0, "atol": tolerance(torch.float32, upstream.numel(), upstream.norm())}
    torch.testing.assert_close(gradients[0], gradients[1], **close)


def test_works_under_functional_transforms():
    weights = torch.randn(5, 4, 3)
    threshold = torch.tensor([0.5])
    assert torch.equal(torch.vmap(lambda w: soft_threshold(w, threshold))(weights), naive(weights, threshold))
    gradient = torch.func.grad(lambda t: soft_threshold(weights, t).sum())(threshold)
    torch.testing.assert_close(gradient, -(weights.sign() * (weights.abs() > 0.5)).sum().reshape(1))


@pytest.mark.parametrize("shape", [(3,), (4, 1), (1, 4, 3, 2, 2), (5, 1, 1, 1)])
def test_a_threshold_of_the_wrong_shape_is_refused_with_both_shapes(shape):
    with pytest.raises(sparing.InputError, match=r"threshold of shape .* weight of shape \(4, 3, 2, 2\)") as error:
        soft_threshold(torch.randn(4, 3, 2, 2), torch.zeros(shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("name", MAPS)
def test_maps_are_positive_and_increasing(name):
    s = torch.linspace(-20, 3, 50, dtype=torch.float64)
    t = MAPS[name](s)
    assert (t > 0).all()
    assert (t.diff() > 0).all()
