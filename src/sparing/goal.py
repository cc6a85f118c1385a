"""The target of a run: what its layers may cost at the end, and whether they do."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from sparing.errors import SparsityWarning
from sparing.layers import Layer, sparse_layers
from sparing.method import Method
from sparing.parametrizations import Clock

Goal = tuple[int, Mapping[str, int] | None]


def make_clock(method: Method, plan: Any, steps: int | None, start: float = 0.0) -> Clock:
    """Return the clock of a run that begins."""
    goal, costs = method.goal(plan) or (None, None)
    return Clock(method=method.describe(), steps=steps, start=start, goal=goal, costs=costs)


def goal_reached(layers: Mapping[str, Layer], goal: Goal | None) -> float:
    """Return the share of the way from dense to the goal that the layers have gone, in [0, 1]; 0 without a goal."""
    if goal is None:
        return 0.0
    allowed, costs = goal
    dense = sum(_cost(name, costs) * layer.weight.numel() for name, layer in layers.items())
    now = sum(_cost(name, costs) * layer.nonzero() for name, layer in layers.items())
    return min(max((dense - now) / max(dense - allowed, 1), 0.0), 1.0)


def missed_targets(model: nn.Module) -> list[str]:
    """Return a sentence for each sparsified part of a model that has not reached its target, with both numbers."""
    runs: dict[int, tuple[Clock, dict[str, Layer]]] = {}
    for name, layer in sparse_layers(model).items():
        clock = layer.parametrization.clock  # type: ignore[union-attr]
        if clock is not None and clock.goal is not None and not layer.weight.is_meta:
            runs.setdefault(id(clock), (clock, {}))[1][name] = layer
    return [text for clock, layers in runs.values() if (text := _missed(clock, layers))]


def warn_missed_target(model: nn.Module) -> None:
    """Warn if a sparsified part of the model has not reached its target."""
    for text in missed_targets(model):
        warnings.warn(text, SparsityWarning, stacklevel=3)


def _missed(clock: Clock, layers: Mapping[str, Layer]) -> str | None:
    assert clock.goal is not None
    costs = clock.costs
    dense = sum(_cost(name, costs) * layer.weight.numel() for name, layer in layers.items())
    now = sum(_cost(name, costs) * layer.nonzero() for name, layer in layers.items())
    if now <= clock.goal:
        return None
    unit = "weights" if costs is None else "MACs"
    wanted, has = (f"{1 - cost / dense:.2%} ({cost:,} of {dense:,} {unit})" for cost in (clock.goal, now))
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
    return "all steps were taken, but weights have grown past it; lower the learning rate or clip the gradients"


def _cost(name: str, costs: Mapping[str, int] | None) -> int:
    return 1 if costs is None else costs[name]
