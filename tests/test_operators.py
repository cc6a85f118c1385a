"""The fast paths of operators have the bits, derivatives and transforms of the plain operations of torch."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from sparing.operators import SMALL
from sparing.parametrizations import DenseGradientMask, Mask
from sparing.threshold import soft_threshold
from tolerance import tolerance

BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16, torch.float16: torch.int16}
INF, NAN = float("inf"), float("nan")
SPECIAL = [0.0, -0.0, 0.25, -0.25, 1e-40, -1e-40, 1e-7, -1e-7, INF, -INF, NAN, 3e38, -3e38]
SHAPE = (130, 65, 3, 3)
LAYOUTS = {
    "contiguous": lambda tensor: tensor,
    "channels_last": lambda tensor: tensor.to(memory_format=torch.channels_last),
    "transposed": lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1),
}


def tensor(dtype, seed, layout="contiguous"):
    """Return random numbers, among them special ones at many positions, also in the last elements."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(SHAPE, generator=generator, dtype=torch.float64).flatten()
    special = torch.tensor(SPECIAL, dtype=torch.float64)
    places = torch.randint(len(values), (999,), generator=generator)
    values[places] = special.repeat(100)[: len(places)]
    values[-2 * len(special) :] = special.repeat(2)[torch.randperm(2 * len(special), generator=generator)]
    return LAYOUTS[layout](values.reshape(SHAPE).to(dtype))


def equal_bits(a, b):
    nan = a.isnan() & b.isnan()
    return a.dtype == b.dtype and torch.equal(a.view(BITS[a.dtype])[~nan], b.view(BITS[b.dtype])[~nan])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("t", [0.0, 1e-40, 0.25, INF, NAN])
def test_soft_threshold_and_its_gradient_have_the_bits_of_the_formula(dtype, layout, t):
    weight, upstream = tensor(dtype, 0, layout).requires_grad_(), tensor(dtype, 1, layout)
    threshold = torch.tensor([t], dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    effective = soft_threshold(weight, threshold)
    effective.backward(upstream)
    w, bound = weight.detach(), threshold.detach().to(dtype)
    expected = w - torch.clamp(w, -bound, bound)
    assert equal_bits(effective.detach(), expected)
    defined = ~expected.isnan()  # torch's kernel passes the gradient of some NaN on, and not of others
    assert equal_bits(weight.grad[defined], torch.where(expected == 0, 0.0, upstream)[defined])
    assert effective.stride() == weight.grad.stride() == weight.stride()
    signed = weight.grad * expected.sign()
    torch.testing.assert_close(threshold.grad, -signed.to(threshold.dtype).sum().reshape(1), equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", BITS)
def test_masks_have_the_bits_of_where(dtype, layout):
    weight, upstream = tensor(dtype, 0, layout).requires_grad_(), tensor(dtype, 1, layout)
    mask = LAYOUTS[layout](torch.rand(SHAPE, generator=torch.Generator().manual_seed(2)) < 0.5)
    for kind, of_gradient in ((Mask, mask), (DenseGradientMask, torch.ones_like(mask))):
        weight.grad = None
        effective = kind(mask)(weight)
        effective.backward(upstream)
        assert equal_bits(effective.detach(), torch.where(mask, weight.detach(), 0.0))
        assert equal_bits(weight.grad, torch.where(of_gradient, upstream, 0.0))
        assert effective.stride() == weight.grad.stride() == weight.stride()


@pytest.mark.parametrize("t", [0.1, 1e-3])
def test_the_gradient_of_the_threshold_is_the_sum_in_float64(t):
    weight, upstream = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    threshold = torch.tensor([t], requires_grad=True)
    soft_threshold(weight, threshold).backward(upstream)
    signed = weight.grad.double() * weight.detach().sign()
    assert abs(threshold.grad.double() + signed.sum()) < tolerance(torch.float32, signed.numel(), signed.norm())


LARGE = (SMALL // 64, 64)


def functions():
    mask = torch.rand(LARGE, generator=torch.Generator().manual_seed(0), dtype=torch.float64) < 0.5
    threshold = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    return {"soft_threshold": lambda w: soft_threshold(w, threshold), "mask": Mask(mask)}


# Forward mode and torch.compile use functions that torch itself deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:vmap maps over weights")  # here it maps over copies of one weight
@pytest.mark.parametrize("name", functions())
def test_large_tensors_have_second_derivatives_and_transforms(name):
    function = functions()[name]
    weight = torch.randn(LARGE, dtype=torch.float64, requires_grad=True)
    cube = lambda w: function(w).pow(3).sum()  # noqa: E731
    (gradient,) = torch.autograd.grad(cube(weight), weight, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), weight)
    effective = function(weight).detach()
    assert torch.equal(gradient.detach(), 3 * effective.square())
    assert torch.equal(second, 6 * effective)
    plain = weight.detach()
    assert torch.equal(torch.func.grad(cube)(plain), gradient)
    assert torch.equal(torch.vmap(function)(torch.stack([plain, -plain])), torch.stack([effective, -effective]))
    value, tangent = torch.func.jvp(function, (plain,), (torch.ones_like(plain),))
    assert torch.equal(value, effective)
    assert torch.equal(tangent, (effective != 0).double())
    outputs = function(weight)
    batched = torch.autograd.grad(outputs, weight, torch.stack([plain, 2 * plain]), is_grads_batched=True)[0]
    assert torch.equal(batched, torch.stack([plain, 2 * plain]) * (effective != 0))


def test_a_mask_saves_nothing_but_itself():
    mask, saved = torch.rand(LARGE) < 0.5, []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        Mask(mask)(torch.randn(LARGE, requires_grad=True))
    assert [tensor.data_ptr() for tensor in saved] == [mask.data_ptr()]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", functions())
def test_large_tensors_compile_without_a_graph_break(name):
    function = functions()[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    weight, upstream = torch.randn(LARGE, dtype=torch.float64, requires_grad=True), torch.randn(LARGE).double()
    gradients = [torch.autograd.grad(each(weight), weight, upstream)[0] for each in (function, compiled)]
    assert torch.equal(function(weight), compiled(weight))
    assert torch.equal(*gradients)
