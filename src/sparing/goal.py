"""The start and the target of a run, and warnings of what went wrong in it."""

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparing.errors import InputError, SparsityWarning, listed
from sparing.layers import Layer, sparse_layers
from sparing.method import Method
from sparing.missed import costs_of, missed_targets
from sparing.parametrizations import Clock, Mask, Masked, Sparse
from sparing.patterns import NM
from sparing.sharding import gathered

if TYPE_CHECKING:
    from sparing.target import ResolvedTarget

CHANCE = 0.02
"""A smaller share of zeros does not make a layer sparse: a uniform initialization in bfloat16 has 0.4 %."""

LONG, ALIKE = 100, 1.02
"""After a run of at least `LONG` steps, learned thresholds should differ by more than the factor `ALIKE`."""

SLACK = 0.95
"""Budgets round the counts of layers, so a model counts as being at its target down to this share of the weights."""


def make_clock(method: Method, plan: Any, steps: int | None, layers: int, start: float = 0.0) -> Clock:
    """Return the clock of a run that begins."""
    goal, costs = method.goal(plan) or (None, None)
    unit = "weights" if costs is None else "MACs"
    updates = getattr(plan, "updates", None)
    last = 0
    if method.acts:
        last = int(updates.end) if updates is not None else 1 if hasattr(plan, "updates") else steps or 0
    return Clock(method.describe(), steps, start=start, layers=layers, goal=goal, unit=unit, last_update=last)


def set_costs(layers: Mapping[str, Layer], method: Method, plan: Any) -> None:
    """Tell each parametrization what one of its weights costs, in the unit of the goal."""
    _, costs = method.goal(plan) or (None, None)
    for name, layer in layers.items():
        layer.parametrization.cost = 1 if costs is None else costs[name]


def goal_reached(layers: Mapping[str, Layer], goal: int | None) -> float:
    """Return the share of the way from dense to the goal that the layers have gone, in [0, 1]; 0 without a goal."""
    if goal is None:
        return 0.0
    dense, now = costs_of(layers.values())
    return min(max((dense - now) / max(dense - goal, 1), 0.0), 1.0)


@torch.no_grad()
def start_ramp(method: Method, plan: Any, weights: Mapping[str, Tensor], made: Mapping[str, Sparse]) -> float:
    """Let the ramp of a method start at the zeros of weights that are sparse already; masks keep these zeros.

    Args:
        method: that is to train them.
        plan: of the method.
        weights: dense weights, by layer.
        made: their parametrizations.

    Returns:
        The share of the way from dense to the goal that the zeros are; 0 for dense weights, and without a ramp.

    Raises:
        InputError: the weights are sparser than the target.
    """
    goal, costs = method.goal(plan) or (None, None)
    if goal is None or not method.ramps or any(weight.is_meta for weight in weights.values()):
        return 0.0
    kept = nonzero_masks(weights)
    if not kept:
        return 0.0
    dense = now = loose = 0
    for name in weights:
        units = getattr(plan, "allocation", plan).units[name]
        cost = 1 if costs is None else costs[name]
        active = units.count if name not in kept else _sum(units.active(kept[name]))
        dense, now = dense + cost * units.weights * units.count, now + cost * units.weights * active
        if name in kept and type(made.get(name)) is not Mask:
            loose += units.weights * active - _sum(kept[name])
    # N:M is no total: a group that has fewer than n weights satisfies it.
    if now < SLACK * goal and not isinstance(getattr(method, "pattern", None), NM):
        raise InputError(
            f"{type(method).__name__}: the layers have a sparsity of {1 - now / dense:.2%} already, above the target "
            f"of {1 - goal / dense:.2%}: give a higher target, or keep these zeros with sparing.FixedMask()"
        )
    if made and loose:
        warnings.warn(
            f"{type(method).__name__}: {loose:,} of the zeros are in groups that are not zero as a whole, and are "
            f"trained again, as {method.pattern} prunes whole groups",  # type: ignore[attr-defined]
            SparsityWarning,
            stacklevel=3,
        )
    for name, part in made.items():
        if isinstance(part, Masked) and name in kept:
            part.mask &= kept[name]
    return min((dense - now) / max(dense - goal, 1), 1.0)


@torch.no_grad()
def nonzero_masks(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return masks that are False at the zeros of the layers that are sparse already; none of dense layers.

    A layer of zeros alone, or of zeros and one other value, is an initialization: zero, identity or Dirac. Its zeros
    are trained, and so are the few that are there by chance.

    Examples:
        >>> nonzero_masks({"sparse": torch.tensor([0.0, 0.5, -0.3]), "new": torch.zeros(2)})
        {'sparse': tensor([False,  True,  True])}
    """
    zeros = {name: weight.numel() - _sum(weight != 0) for name, weight in weights.items()}
    return {
        name: weight != 0
        for name, weight in weights.items()
        if zeros[name] > CHANCE * weight.numel() and not _is_initialization(weight, zeros[name])
    }


def _is_initialization(weight: Tensor, zeros: int) -> bool:
    if weight.numel() - zeros == 1:
        return False  # one weight that is left
    zero = weight == 0
    return bool(weight.masked_fill(zero, torch.inf).amin() >= weight.masked_fill(zero, -torch.inf).amax())


def _sum(mask: Tensor) -> int:
    return int(gathered(mask.sum()))


@torch.no_grad()
def warn_unlearned(layers: Mapping[str, Layer], target: "ResolvedTarget", clock: Clock) -> None:
    """Warn if learned thresholds are nearly equal after a run, or if layers keep only the weights that always stay.

    Args:
        layers: sparsified with `LearnedThreshold`.
        target: of the run.
        clock: of the run, at its end.
    """
    if (clock.steps or 0) < LONG:
        return
    name = clock.method["method"]
    parts = {each: layer.parametrization for each, layer in layers.items()}
    learned = [float(part.g(part.s - target.offsets[each]).mean()) for each, part in parts.items()]  # type: ignore[operator]
    if len(learned) > 2 and max(learned) < ALIKE * min(learned):
        but = ", apart from the effect of the costs" if any(target.offsets.values()) else ""
        warnings.warn(
            f"{name}: the thresholds of {len(learned)} layers are nearly equal after the run{but}: the largest is "
            f"{max(learned) / min(learned) - 1:.2%} above the smallest. Give them a higher learning rate: build the "
            "optimizer with sparing.param_groups(..., threshold_lr=0.01)",
            SparsityWarning,
            stacklevel=4,
        )
    kept = {each: layer.nonzero() // target.units[each].weights for each, layer in layers.items()}
    few = [each for each in layers if kept[each] <= target.least[each] > 1]
    if few:
        shown = listed((f"{each!r} ({kept[each] / target.units[each].count:.2%})" for each in few), 4)
        warnings.warn(
            f"{name}: {len(few)} of {len(layers)} layers keep the least that is allowed, a tenth of the density of "
            f"all: {shown}. If their weights are smaller than those of the other "
            "layers, leave them out with select=, or use sparing.STRFeather",
            SparsityWarning,
            stacklevel=4,
        )


def warn_at_end(model: nn.Module) -> None:
    """Warn of layers without weights, and of training without the optimizer of a method, before a model is densified.

    A missed target has been told already.
    """
    layers = sparse_layers(model).values()
    runs = {id(run): run for layer in layers for run in layer.parametrization.sparsifier}
    for run in runs.values():
        run.warn_collapsed()
        trained = run.uncounted > 0 or any(map(_has_grad, run.layers.values()))
        if trained and run.forgotten is not None and not missed_targets(model, run.clock):
            warnings.warn(run.forgotten, SparsityWarning, stacklevel=3)
    _warn_copied(model, layers)


def _warn_copied(model: nn.Module, layers: Iterable[Layer]) -> None:
    """Warn if a copy of a model was trained alone, without its sparsifier."""
    parts = [layer.parametrization for layer in layers if _has_grad(layer)]
    clocks = {id(part.clock): part.clock for part in parts if not part.sparsifier}
    for clock in clocks.values():
        if clock is not None and clock.step < clock.last_update and not missed_targets(model, clock):
            warnings.warn(
                f"{clock.method['method']}: this copy of the model was trained without a sparsifier, so the method did "
                f"nothing after step {clock.step:,}: copy them together, copy.deepcopy((model, optimizer, sparsifier))",
                SparsityWarning,
                stacklevel=4,
            )


def _has_grad(layer: Layer) -> bool:
    return layer.weight.is_leaf and layer.weight.grad is not None


@torch.no_grad()
def collapsed(layers: Mapping[str, Layer]) -> list[str]:
    """Return the names of the layers in which every effective weight is zero; none on the meta device."""
    if not layers or any(layer.weight.is_meta for layer in layers.values()):
        return []
    found = [gathered((layer.effective_weight != 0).any()) for layer in layers.values()]
    # On one device and stacked, so that a GPU is waited for once, not for each layer.
    active = torch.stack([some.to(found[0].device, non_blocking=True) for some in found])
    return [name for name, some in zip(layers, active.tolist(), strict=True) if not some]


def warn_collapsed(step: int, layers: Mapping[str, Layer]) -> None:
    """Warn about layers that have lost every weight by a step."""
    described = []
    for name, layer in layers.items():
        largest, threshold = float(layer.weight.detach().abs().max()), layer.threshold
        over = "" if threshold is None else f", threshold {float(threshold.detach().min()):.3g}"
        described.append(f"{name!r} (largest |weight| {largest:.3g}{over})")
    warnings.warn(
        f"step {step}: every weight of {listed(described, 3)} is zero, so only biases pass. Lower the target sparsity "
        "(STR: the weight decay of the thresholds, or init), or leave layers out with select=",
        SparsityWarning,
        stacklevel=3,
    )


def warn_ended(method: Method, clock: Clock) -> None:
    """Warn that a step is beyond the run."""
    go_on = ", or call sparsifier.retarget() to go on" if method.retargets else ""
    warnings.warn(
        f"{method.name}: step {clock.step:,} of a run of {clock.steps:,} steps: the schedule has ended, so masks do "
        "not change any more, and learned thresholds can leave their target. Give sparsify_() all optimizer steps of "
        f"the run as steps={go_on}",
        SparsityWarning,
        stacklevel=3,
    )


def warn_pruned_at_once(method: Method, clock: Clock, missing: int) -> None:
    """Warn that a run is finished long before the last of the updates that prune."""
    warnings.warn(
        f"{method.name}: finish() prunes at once what should have been pruned in {missing:,} more steps, because "
        f"{clock.step:,} of {clock.steps:,} optimizer steps were taken; give sparsify_() the optimizer steps of the "
        "run as steps= (not its batches), or an earlier end of the ramp",
        SparsityWarning,
        stacklevel=3,
    )


def describe_uncounted(method: Method, clock: Clock, attached: bool, uncounted: int) -> str:
    """Return a sentence that says that a method cannot act, because an optimizer that is not attached trains."""
    if clock.step == 0:
        remedy = (
            "attach the optimizer that trains the model, and not another one"
            if attached
            else "call sparsifier.attach(optimizer) before training"
        )
        return f"{method.name}: the method did nothing, because no optimizer step was counted; {remedy}"
    return (
        f"{method.name}: {uncounted:,} steps of another optimizer followed the last step that was counted, which is "
        f"step {clock.step:,} of {clock.steps:,}; call sparsifier.attach() again whenever the optimizer is replaced"
    )
