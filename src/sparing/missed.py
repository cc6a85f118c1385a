"""Whether a run has reached its target, and why it has not."""

import math
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from sparing.errors import SparsityWarning
from sparing.layers import Layer, sparse_layers
from sparing.parametrizations import Clock, Masked, Sparse

SPARSER, POINT = 0.05, 0.01
"""A run has missed its target if it ends with this share fewer of the weights to keep, or of all weights, as well."""


def missed_targets(model: nn.Module, only: Clock | None = None) -> list[str]:
    """Return a sentence for each run in a model that has not reached its target, with both numbers.

    A target holds for all layers of a run together, so a part of them is not judged.

    Args:
        model: the whole model.
        only: the clock of the one run to look at; None looks at all of them.
    """
    runs: dict[int, tuple[Clock, list[Layer]]] = {}
    for layer in sparse_layers(model).values():
        clock = layer.parametrization.clock
        if clock is not None and clock.goal is not None and not layer.weight.is_meta and only in (None, clock):
            runs.setdefault(id(clock), (clock, []))[1].append(layer)
    whole = [(clock, layers) for clock, layers in runs.values() if len(layers) == clock.layers]
    return [text for clock, layers in whole if (text := _missed(clock, layers))]


def warn_missed_target(model: nn.Module, only: Clock | None = None) -> None:
    """Warn if a run in the model has not reached its target."""
    for text in missed_targets(model, only):
        warnings.warn(text, SparsityWarning, stacklevel=3)


def costs_of(layers: Iterable[Layer]) -> tuple[int, int]:
    """Return the cost of the layers if no weight were zero, and what they cost."""
    layers = list(layers)
    costs = [layer.parametrization.cost for layer in layers]
    dense = sum(cost * layer.weight.numel() for cost, layer in zip(costs, layers, strict=True))
    return dense, sum(cost * layer.nonzero() for cost, layer in zip(costs, layers, strict=True))


def _missed(clock: Clock, layers: Sequence[Layer]) -> str | None:
    assert clock.goal is not None
    dense, now = costs_of(layers)
    exceeded = now < _least(clock, layers, dense)
    if now <= clock.goal and not exceeded:
        return None
    wanted, has = (
        f"{100 * (1 - cost / dense):.2f} % ({cost:,} of {dense:,} {clock.unit})" for cost in (clock.goal, now)
    )
    name = clock.method["method"]
    reason = _reason(clock, layers, exceeded)
    return f"{name}: the sparsity of the sparsified layers is {has}, the target {wanted}: {reason}"


def _least(clock: Clock, layers: Sequence[Layer], dense: int) -> float:
    """Return the cost below which a run has missed its target; 0 while it lasts, and where masks choose the zeros."""
    parts = [layer.parametrization for layer in layers]
    if clock.goal is None or clock.step < (clock.steps or math.inf) or any(isinstance(p, Masked) for p in parts):
        return 0
    unit = max(part.cost * getattr(getattr(part, "units", None), "weights", 1) for part in parts)
    return clock.goal - unit - min(SPARSER * clock.goal, POINT * dense)


def _reason(clock: Clock, layers: Sequence[Layer], exceeded: bool) -> str:
    if clock.step == 0:
        return "no optimizer step was counted; call sparsifier.attach(optimizer) before training"
    if clock.steps is not None and clock.step < clock.steps:
        return (
            f"{clock.step:,} of {clock.steps:,} optimizer steps were counted, or a checkpoint of that step was loaded; "
            "give sparsify_() the optimizer steps of the run as steps= (not its batches), call sparsifier.attach() "
            "again if the optimizer was replaced, and sparsifier.finish() if a gradient scaler skipped some"
        )
    if clock.steps is not None and clock.step > clock.steps:
        return (
            f"{clock.step:,} optimizer steps were taken, more than the {clock.steps:,} of the run; give sparsify_() "
            "all of them as steps=, or call sparsifier.retarget() to go on"
        )
    if diverged := [layer.name for layer in layers if not bool(torch.isfinite(layer.weight).all())]:
        return f"the weights of {', '.join(map(repr, diverged[:3]))} are NaN or infinite; lower the learning rate"
    for layer in layers:
        last = layer.places[0].parametrizations[-1]  # type: ignore[index]
        if not isinstance(last, Sparse):
            return (
                f"{type(last).__name__} was put on {layer.name!r} after sparsify_() and changes its zeros; densify_() "
                "the model first, or put it on before sparsify_()"
            )
    if exceeded:
        return (
            "all steps were taken, but weights became smaller or thresholds higher than they were after the last step, "
            "as by clamp_() of all parameters, or this is an average of several steps"
        )
    masked = any(isinstance(layer.parametrization, Masked) for layer in layers)
    if masked and clock.reduced:
        return (
            "layers left the run after these masks were made, so the others keep more than their share; call "
            "densify_(), and sparsify_() with the target again"
        )
    if masked:
        return (
            "the masks for it were not made in the steps that were taken; take more of them, since finish() has no "
            "gradients to rank by"
        )
    return (
        "all steps were taken, but weights are larger than the threshold can become, or have become larger than it, or "
        "this is an average of several steps; clip the gradients or lower the learning rate (STR: raise scale, or "
        "g='exp')"
    )
