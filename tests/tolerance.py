"""Tolerances for comparing two ways to compute the same numbers, from dtype, size and condition.

Kernels differ between processors, numbers of threads and batch sizes: they add in another order, and some fuse a
multiplication with an addition. The rounding error of a sum of n terms aᵢ is about √n · ε · Σ|aᵢ| at most, and about
√n · ε · √Σaᵢ² if the signs are random. Therefore

    tolerance = SAFETY · ε(dtype) · √terms · scale

where scale is one of these two for a sum. For a network it is `condition`: the change of the outputs per relative
change of all weights and inputs, because an error in one layer or time step passes through all that follow.

Source: Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput. 41, 2019.
"""

import copy

import torch
from torch.utils._pytree import tree_leaves

SAFETY = 4
STEP = 2.0**-32  # far above the rounding of float64, and too small to change the sign of an input of a ReLU


def tolerance(dtype, terms=1, scale=1.0):
    """The largest difference that rounding explains.

    Examples:
        >>> tolerance(torch.float32, terms=100) / torch.finfo(torch.float32).eps
        40.0
    """
    return SAFETY * torch.finfo(dtype).eps * terms**0.5 * float(scale)


def random_signs(tensor, generator):
    """A float64 tensor of the same shape, of 1 and −1."""
    return 2 * torch.randint(2, tensor.shape, generator=generator).double() - 1


def condition(model, *inputs, of=None, draws=3):
    """The largest change of each output per relative change, of random signs, of every parameter and input.

    It is measured in float64. `of(model, *inputs)` returns the outputs; the default calls the model.

    Examples:
        >>> embedding = torch.nn.Embedding.from_pretrained(torch.tensor([[2.0]]))
        >>> condition(embedding, torch.tensor([0]))
        [2.0]
    """
    generator = torch.Generator().manual_seed(0)
    of = of or (lambda model, *inputs: model(*inputs))

    def outputs(step):
        def changed(tensor):
            if not tensor.is_floating_point():
                return tensor
            return tensor.detach().cpu().double() * (1 + step * random_signs(tensor, generator))

        other = copy.deepcopy(model).cpu().double()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.copy_(changed(parameter))
        found = of(other, *map(changed, inputs))
        return [leaf.detach() for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor) and leaf.numel()]

    before = outputs(0.0)
    after = [outputs(STEP) for _ in range(draws)]
    return [
        max(float((new - old).abs().max()) for new in others) / STEP
        for old, *others in zip(before, *after, strict=True)
    ]


def fan_in(model):
    """The number of terms of the longest sum in a model: the inputs of a neuron, or the weights of a filter."""
    return max(parameter[0].numel() for parameter in model.parameters() if parameter.dim() > 1)


def near(model, *inputs, dtype=None, terms=None, of=None, draws=3):
    """Arguments of `torch.testing.assert_close` for comparing two ways to compute the outputs of a model.

    The default `dtype` is that of the parameters, and the default `terms` is `fan_in`.
    """
    dtype, terms = dtype or next(model.parameters()).dtype, terms or fan_in(model)
    scale = max(condition(model, *inputs, of=of, draws=draws), default=0.0)
    return {"rtol": 0.0, "atol": tolerance(dtype, terms, scale)}


def relative_error(model, *inputs):
    """The same as a bound for `max_relative_error` of `sparing.export.network`: relative to each output's maximum."""
    with torch.no_grad():
        found = [leaf for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, torch.Tensor)]
    scales = condition(model, *inputs)
    scale = max(scale / float(leaf.abs().max()) for scale, leaf in zip(scales, found, strict=True))
    return tolerance(found[0].dtype, fan_in(model), scale)


def gradients(loss):
    """For `of`: the gradients of loss(model, *inputs) for every parameter and every floating-point input."""

    def of(model, *inputs):
        leaves = [tensor.requires_grad_() for tensor in inputs if tensor.is_floating_point()]
        leaves += [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.autograd.grad(loss(model, *inputs), leaves, materialize_grads=True)

    return of
