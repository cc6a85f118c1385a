"""Helpers for torch's optimizers: look through wrappers, recognize steps that are not taken, reset state."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparing.errors import InputError


def unwrap(optimizer: Any) -> Optimizer:
    """Return the optimizer that torch's hooks run on: the innermost `.optimizer` of wrappers such as accelerate's.

    Raises:
        InputError: there is no torch optimizer inside.
    """
    inner = optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, Optimizer) or not hasattr(inner, "_optimizer_step_pre_hooks"):
        raise InputError(
            f"attach() needs a torch.optim.Optimizer or a wrapper that holds one as `.optimizer`, got {optimizer!r}"
        )
    return inner


def is_nested(optimizer: Optimizer) -> bool:
    """Return whether the hook that asks was run by `super().step()`, within another step() of the same optimizer.

    torch runs the hooks for both. What tells them apart is on the call stack: counting calls would go wrong after a
    step that ended in an exception.
    """
    step = sys._getframe(2)  # torch's wrapper around step(), which runs the hooks
    outer = step.f_back
    while outer is not None:
        if outer.f_code is step.f_code and outer.f_locals.get("self") is optimizer:
            return True
        outer = outer.f_back
    return False


def is_skipped(optimizer: Optimizer) -> bool:
    """Return whether a fused optimizer is about to skip its step: a GradScaler hands it the number of overflows."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def is_priming(optimizer: Optimizer) -> bool:
    """Return whether a step is one that only creates optimizer state: learning rate 0 and gradients all 0.

    torch.distributed.checkpoint takes such a step before it saves or loads.
    """
    if any(group["lr"] != 0 for group in optimizer.param_groups):
        return False
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return not any(bool(gradient.any()) for gradient in gradients)


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
def reset_state(optimizers: Iterable[Optimizer], parameter: Tensor, where: Tensor | None = None) -> None:
    """Zero the state of the optimizers for some weights, momentum and second moments alike.

    A regrown weight starts without momentum: what is stored belongs to the weight that was pruned there.

    Args:
        optimizers: those that may hold the parameter.
        parameter: the weight.
        where: boolean, of its shape; None for all of it.
    """
    for optimizer in optimizers:
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value.zero_() if where is None else value.masked_fill_(where, 0)
