"""Helpers for torch's optimizers: look through wrappers, recognize steps that are not taken, reset state."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from traceback import walk_stack
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparing.errors import InputError

_INNER = ("optimizer", "base_optimizer", "_base_optimizer", "original_optimizer")
"""Names under which wrappers hold the optimizer whose step() they call."""

_COPYING = ("lookahead", "ranger", "schedulefree")
"""Parts of the names of optimizers that keep a copy of the weights, and mix it into them later."""

_RUNS_HOOKS = Optimizer.profile_hook_step(lambda: None).__code__
"""The code of torch's wrapper around every step()."""


def parts(optimizer: Any) -> list[Any]:
    """Return an optimizer, or those that it holds as `.optimizers` and steps one after the other."""
    held = getattr(optimizer, "optimizers", None)
    held = list(held.values()) if isinstance(held, Mapping) else held
    if isinstance(held, (list, tuple)) and held and all(hasattr(each, "step") for each in held):
        return [part for each in held for part in parts(each)]
    within = [part for inner in _held_by(optimizer) for part in parts(inner)]
    return within if len(within) > 1 else [optimizer]


def _held_by(wrapper: Any) -> list[Any]:
    return [each for name in _INNER if hasattr(each := getattr(wrapper, name, None), "step")][:1]


def chain(optimizer: Any) -> list[Any]:
    """Return an optimizer and those that it wraps; torch's hooks run on the last one.

    Hooks of a wrapper would run too often or never: step() of accelerate and opacus may only accumulate gradients, the
    two calls of sharpness-aware minimization have other names, and timm's Lookahead runs no hooks.

    Raises:
        InputError: torch runs no hooks around the step() of the last one.
    """
    found = [optimizer]
    while inner := _held_by(found[-1]):
        found += inner
    if not hasattr(found[-1], "_optimizer_step_pre_hooks") or not getattr(type(found[-1]).step, "hooked", False):
        raise InputError(
            "attach() needs a torch.optim.Optimizer or a wrapper that holds one as "
            f"{', '.join(f'`.{name}`' for name in _INNER)}; torch runs no hooks around the step() of "
            f"{type(found[-1]).__name__}"
        )
    if getattr(found[-1], "_overlap_with_ddp", False):
        raise InputError(
            "ZeroRedundancyOptimizer takes its steps in the backward pass, where a method cannot act: build it with "
            "overlap_with_ddp=False"
        )
    return found


def holders(optimizer: Any) -> list[Any]:
    """Return all that hold state: the optimizer that hooks run on, its wrappers, and the shard of a sharded one."""
    *wrappers, inner = chain(optimizer)
    others = [*wrappers, getattr(inner, "optim", None)]  # the shard of a ZeroRedundancyOptimizer
    states = [(each, getattr(each, "state", None)) for each in others]
    return [inner, *(each for each, state in states if isinstance(state, Mapping) and state is not inner.state)]


def copying(optimizers: Iterable[Any]) -> str | None:
    """Return the name of an optimizer or wrapper that keeps a copy of the weights; None if there is none.

    An optimizer with a method eval() puts other weights into the model, as schedule-free ones do; accelerate's wrapper
    only passes the call on.
    """
    for optimizer in optimizers:
        for each in (found := chain(optimizer)):
            name = type(each).__name__
            if any(part in name.lower() for part in _COPYING) or (each is found[-1] and hasattr(each, "eval")):
                return name
    return None


def parameters_of(optimizers: Iterable[Optimizer]) -> Iterator[Tensor]:
    """Iterate over the parameters that optimizers hold."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield from group["params"]


def in_backward() -> bool:
    """Return whether a backward pass is running on this thread."""
    return torch._C._current_graph_task_id() != -1


def is_nested(optimizer: Optimizer) -> bool:
    """Return whether the hook that asks was run by `super().step()`, within another step() of the same optimizer.

    torch runs the hooks for both. What tells them apart is on the call stack: counting calls would go wrong after a
    step that ended in an exception.
    """
    frames = (frame for frame, _ in walk_stack(sys._getframe()) if frame.f_code is _RUNS_HOOKS)
    return sum(frame.f_locals.get("self") is optimizer for frame in frames) > 1


def is_skipped(optimizer: Optimizer) -> bool:
    """Return whether a fused optimizer is about to skip its step: a GradScaler hands it the number of overflows."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def is_idle(optimizer: Optimizer) -> bool:
    """Return whether a step moves nothing: without any gradient, or with learning rate 0 and gradients all 0.

    torch.distributed.checkpoint takes such a step before it saves or loads, to create optimizer state.
    """
    if all(parameter.grad is None for parameter in parameters_of([optimizer])):
        return True
    if any(group.get("lr") != 0 for group in optimizer.param_groups):
        return False
    return not any(p.grad is not None and bool(p.grad.any()) for p in parameters_of([optimizer]))


def gradient_scale(optimizers: Iterable[Optimizer]) -> Tensor | None:
    """Return the factor by which gradients are still scaled: a GradScaler leaves it to fused optimizers to unscale."""
    scales = [getattr(optimizer, "grad_scale", None) for optimizer in optimizers]
    return next((scale for scale in scales if scale is not None), None)


def with_hook(closure: Callable[[], Any], hook: Callable[[], None]) -> Callable[[], Any]:
    """Return a closure that runs the hook once, right after the first call of `closure`."""
    pending = [hook]

    def run() -> Any:
        result = closure()
        while pending:
            pending.pop()()
        return result

    return run


@torch.no_grad()
def reset_state(optimizers: Iterable[Any], parameter: Tensor, where: Tensor | None = None) -> None:
    """Zero the state of the optimizers for some weights, momentum and second moments alike.

    A regrown weight starts without momentum: what is stored belongs to the weight that was pruned there. State of the
    shape of the weight is taken for one number per weight. State of fewer numbers, such as the factors of Adafactor,
    the preconditioners of Shampoo, the step sizes of Rprop and the averages of ASGD stay as they are. A quantized
    tensor is rounded again, and a code without a zero becomes the smallest.

    Args:
        optimizers: those that may hold the parameter.
        parameter: the weight.
        where: boolean, of its shape; None for all of it.

    Raises:
        InputError: the state is stored in a form in which the number of one weight cannot be set to zero.
    """
    where = torch.ones_like(parameter, dtype=torch.bool) if where is None else where
    for optimizer in optimizers:
        for key, value in optimizer.state.get(parameter, {}).items():
            try:
                # These have the shape of the weight too, as a preconditioner of a square matrix: only names tell.
                kept = key in ("step_size", "ax") or "precond" in str(key).replace("_", "")
                part = None if kept or is_itself(value, parameter) else _per_weight(value, parameter)
                if part is not None:
                    _zero(part, where.to(part.device))
            except (RuntimeError, TypeError, ValueError, AssertionError) as error:
                stored = (
                    f"{type(value).__name__} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
                )
                raise InputError(
                    f"{type(optimizer).__name__}: the state {key!r} of a weight of shape {tuple(parameter.shape)} is a "
                    f"{stored}, in which regrown weights cannot be set to zero: {error}. Use an optimizer that stores "
                    "a floating-point number for each weight, such as torch.optim.AdamW"
                ) from error


def is_itself(value: Any, parameter: Tensor) -> bool:
    """Return whether a state is the parameter: sharpness-aware minimization restores weights by `p.data = old_p`."""
    return type(value) is Tensor and value.shape == parameter.shape and value.data_ptr() == parameter.data_ptr()


def _zero(part: Tensor, where: Tensor) -> None:
    try:
        part.masked_fill_(where, 0)
    except NotImplementedError:  # a quantized tensor, such as torchao's, can only be read and written as a whole
        plain = part.dequantize()
        if bool(where.any()):  # writing rounds all numbers again
            part.copy_(plain.masked_fill(where, 0))


def _per_weight(value: Any, parameter: Tensor) -> Tensor | None:
    """Return a state as a tensor of the shape of the weight, or a stack of such; None if it has fewer numbers.

    Raises:
        TypeError: it has about as many numbers, but it is not known where that of a weight is, or what stands for zero.
    """
    if isinstance(value, (Mapping, list, tuple)):
        values = value.values() if isinstance(value, Mapping) else value
        if any(_per_weight(each, parameter) is not None for each in values):
            raise TypeError("it is a container of tensors")
        return None
    if not isinstance(value, Tensor):
        return None
    numbers, weights = value.numel(), parameter.numel()
    if not value.is_floating_point() and not value.is_complex():
        if numbers > 1 and weights <= 2 * numbers:  # two codes of four bits may share a byte
            raise TypeError("its integers are codes, and the code 0 may stand for another number")
        return None
    if value.shape == parameter.shape or (parameter.dim() > 1 and value.shape[1:] == parameter.shape):
        return value
    if not 1 < numbers == weights:
        return None
    if sorted(value.shape) == sorted(parameter.shape):
        raise TypeError(f"its shape is {tuple(value.shape)}")
    return value.view(parameter.shape)
