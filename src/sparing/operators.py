"""Base class of differentiable functions with a backward pass of their own.

Their backward passes compute surrogate gradients, or save less memory than autograd would. Forward mode
(`torch.func.jvp`, `torch.func.jacfwd`, `torch.autograd.forward_ad`) applies their transpose:

    ⟨jvp(v), u⟩ = ⟨v, backward(u)⟩          for all tangents v and gradients u

So the tangent of a straight-through estimator is the tangent of the weight, and Hessians computed by forward over
reverse mode, reverse over forward mode, and two backward passes are equal.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sparing.errors import InputError


class Operator(torch.autograd.Function):
    """Abstract: a differentiable function; its output has shape and dtype of the first input that is a tensor.

    A subclass defines `forward`, `setup_context`, which keeps tensors with `save`, and `backward`. Call it with
    `apply_operator`.
    """

    generate_vmap_rule = True
    with_jvp: "type[Operator]"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "jvp" not in vars(cls):
            # torch.compile refuses functions with a jvp, so that it is in a class of its own.
            cls.with_jvp = type(cls.__name__, (cls,), {"jvp": classmethod(_transposed)})


def apply_operator(operator: type[Operator], *inputs: Any) -> Tensor:
    """Apply an operator to its inputs.

    Raises:
        InputError: torch.compile compiles a transform of torch.func, and would ignore the backward pass.
    """
    if not torch.compiler.is_compiling():
        return operator.with_jvp.apply(*inputs)  # type: ignore[no-any-return, no-untyped-call]
    if is_transformed() and (torch.is_grad_enabled() or in_forward_mode()):
        raise InputError(
            "torch.compile ignores the gradients of the sparsified layers in grad, vmap and jvp of torch.func. Call "
            "these outside of torch.compile, or compile with fullgraph=False"
        )
    return operator.apply(*inputs)  # type: ignore[no-any-return, no-untyped-call]


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors for the backward pass, and for forward mode, which releases them at once."""
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def in_forward_mode() -> bool:
    """Return whether forward mode is active."""
    return forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Return whether forward mode or a transform of torch.func is active."""
    return in_forward_mode() or torch._C._are_functorch_transforms_active()


def _transposed(operator: type[Operator], ctx: Any, *tangents: Tensor | None) -> Tensor:
    """Return the tangent of the output, from those of the inputs: the transpose of `backward`, which is linear."""
    ctx.needs_input_grad = tuple(tangent is not None for tangent in tangents)  # torch sets it for reverse mode only

    def product(gradient: Tensor) -> Any:
        pairs = zip(operator.backward(ctx, gradient), tangents, strict=True)
        return sum((each * tangent).sum() for each, tangent in pairs if each is not None)

    first = next(tangent for tangent in tangents if tangent is not None)
    return torch.func.grad(product)(torch.zeros_like(first))  # type: ignore[no-any-return]
