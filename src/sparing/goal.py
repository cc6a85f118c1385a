"""The target of a run, and whether it was reached."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from sparing.errors import SparsityWarning
from sparing.layers import Layer, sparse_layers
from sparing.method import Method
from sparing.parametrizations import Clock


def make_clock(method: Method, plan: Any, steps: int | None, layers: int, start: float = 0.0) -> Clock:
    """Return the clock of a run that begins."""
    goal, costs = method.goal(plan) or (None, None)
    unit = "weights" if costs is None else "MACs"
    return Clock(method=method.describe(), steps=steps, start=start, layers=layers, goal=goal, unit=unit)


def set_costs(layers: Mapping[str, Layer], method: Method, plan: Any) -> None:
    """Tell each parametrization what one of its weights costs, in the unit of the goal."""
    _, costs = method.goal(plan) or (None, None)
    for name, layer in layers.items():
        layer.parametrization.cost = 1 if costs is None else costs[name]  # type: ignore[union-attr]


def goal_reached(layers: Mapping[str, Layer], goal: int | None) -> float:
    """Return the share of the way from dense to the goal that the layers have gone, in [0, 1]; 0 without a goal."""
    if goal is None:
        return 0.0
    dense, now = _costs(layers.values())
    return min(max((dense - now) / max(dense - goal, 1), 0.0), 1.0)


def missed_targets(model: nn.Module, only: Clock | None = None) -> list[str]:
    """Return a sentence for each run in a model that has not reached its target, with both numbers.

    A target holds for all layers of a run together, so a part of them is not judged.

    Args:
        model: the whole model.
        only: the clock of the one run to look at; None looks at all of them.
    """
    runs: dict[int, tuple[Clock, list[Layer]]] = {}
    for layer in sparse_layers(model).values():
        clock = layer.parametrization.clock  # type: ignore[union-attr]
        if clock is not None and clock.goal is not None and not layer.weight.is_meta and only in (None, clock):
            runs.setdefault(id(clock), (clock, []))[1].append(layer)
    whole = [(clock, layers) for clock, layers in runs.values() if len(layers) == clock.layers]
    return [text for clock, layers in whole if (text := _missed(clock, layers))]


def warn_missed_target(model: nn.Module, only: Clock | None = None) -> None:
    """Warn if a run in the model has not reached its target."""
    for text in missed_targets(model, only):
        warnings.warn(text, SparsityWarning, stacklevel=3)


def _missed(clock: Clock, layers: Iterable[Layer]) -> str | None:
    assert clock.goal is not None
    dense, now = _costs(layers)
    if now <= clock.goal:
        return None
    wanted, has = (
        f"{100 * (1 - cost / dense):.2f} % ({cost:,} of {dense:,} {clock.unit})" for cost in (clock.goal, now)
    )
    name = clock.method["method"]
    return f"{name}: the sparsity of the sparsified layers is {has}, the target {wanted}: {_reason(clock)}"


def _reason(clock: Clock) -> str:
    if clock.step == 0:
        return "no optimizer step was counted; call sparsifier.attach(optimizer) before training"
    if clock.steps is not None and clock.step < clock.steps:
        return (
            f"{clock.step:,} of {clock.steps:,} optimizer steps were taken; give sparsify_() the optimizer steps of "
            "the run as steps= (not its batches), and call sparsifier.finish() if a gradient scaler skipped some"
        )
    return (
        "all steps were taken, but weights are larger than the threshold can become, or have grown past it; clip the "
        "gradients or lower the learning rate (STR: raise scale, or g='exp')"
    )


def _costs(layers: Iterable[Layer]) -> tuple[int, int]:
    """Return the cost of the layers if no weight were zero, and what they cost."""
    layers = list(layers)
    costs = [layer.parametrization.cost for layer in layers]  # type: ignore[union-attr]
    dense = sum(cost * layer.weight.numel() for cost, layer in zip(costs, layers, strict=True))
    return dense, sum(cost * layer.nonzero() for cost, layer in zip(costs, layers, strict=True))
