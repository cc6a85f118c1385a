"""Rescale learned thresholds to reach a target sparsity or MAC count.

    s_l − o_l ← ρ · (s_l − o_l)      at every update; one ρ for all layers, such that  Σ cost_l · ‖S_l‖₀ = wanted(t)
    o_l = ¼ ln(cost_l / mean cost)   0 for a target sparsity

Weight decay does the same to s in STR, s ← (1 − ηλ) s, with a λ that has to be found by trial. Here the factor is
solved for. What each layer makes of it stays learned: between updates its s moves by the gradient. s − o is negative,
so a smaller ρ makes all thresholds higher. ρ is found by bisection: unit i of layer l is active while
‖W_i‖ > k · g(s_l) with the new s_l, and the active ones are counted. If ρ = 0 is not enough, s goes on above o:
s_l ← o_l − ρ for ρ ≤ 0.

A weight costs 1 where a sparsity is asked for, and its applications per forward pass (`sparing.macs`) where MACs
are. With g = exp, thresholds then begin in proportion to cost_l^¼, as those of `Feather(macs=)` are.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparing.budget import check_target
from sparing.errors import InputError
from sparing.goal import warn_unlearned
from sparing.layers import Layer
from sparing.macs import Example
from sparing.macs_target import COST_POWER, check_macs, dense_cost, resolve_macs
from sparing.masks import count_kept
from sparing.method import Layers, Method, Optimizers
from sparing.parametrizations import LearnedThreshold
from sparing.patterns import NM, Pattern, Units, Unstructured
from sparing.schedules import Updates, check_positions

if TYPE_CHECKING:
    from sparing.sparsifier import Sparsifier

FLOOR = 0.1
"""No layer keeps a smaller share of its weights than a tenth of the share that all of them keep together."""

NEARLY_ZERO = -1e-3
"""Upper clamp on s − o: scaling cannot move 0."""

FARTHEST = 16.0
"""As far as s is moved either way; sigmoid(16) is within 2e-7 of one."""

LOWEST = -64.0
"""Lower clamp on s: its threshold of 1e-28 prunes nothing, and from further below s would not return in time."""

NEAR = 1 / 64
"""ρ is first looked for within this of one: from one update to the next the counts change little."""


@dataclass(frozen=True)
class ResolvedTarget:
    """What a target means for one network, in units of cost, over the sparsified layers.

    Attributes:
        units: what is pruned together, by layer.
        costs: of one unit, by layer.
        least: units that stay active whatever the other layers need, by layer.
        offsets: o, by layer.
        dense: cost of all layers without zeros.
        final: cost at the end.
        updates: when the thresholds are rescaled.
    """

    units: Mapping[str, Units]
    costs: Mapping[str, int]
    least: Mapping[str, int]
    offsets: Mapping[str, float]
    dense: int
    final: int
    updates: Updates

    def wanted(self, step: int, start: float) -> int:
        """Return the cost to have after `step` steps of a run that started at a share of the way."""
        # The small number is for 119.99999 of 120 weights, where a run starts on the way.
        return self.dense - math.floor(self.updates.progress(step, start) * (self.dense - self.final) + 1e-6)


@dataclass(frozen=True, kw_only=True)
class Rescaling(Method):
    """Abstract: a method of learned thresholds, which can be rescaled to reach a target.

    The target follows the ramp of `sparing.schedules.cubic` from `begin` to `end`. The thresholds are rescaled from
    then on to the end of the run, where the target is met exactly.

    Args:
        sparsity: target sparsity of the sparsified layers together, a fraction in [0, 1).
        macs: or a target for the whole model as `report` counts it, layers that are not sparsified included: a
            fraction (float) of the dense model's MACs, or their number (int).
        input_size: of one input, as `report` takes it; for MACs.
        begin: start of the sparsity ramp, a step (int) or a fraction of the run (float).
        end: end of the ramp, likewise.
        every: optimizer steps between two updates.
        pattern: weights that are pruned together by the norm of their group; `NM` has no threshold to learn.

    Raises:
        InputError: both sparsity and macs are given; macs without input_size; a value is out of range; the target
            cannot be reached.
    """

    retargets = True
    ramps = True

    sparsity: float | None = None
    macs: float | int | None = None
    input_size: Example | None = None
    begin: int | float = 0.2
    end: int | float = 0.8
    every: int = 16
    pattern: Pattern = Unstructured()

    def start(self, name: str, plan: ResolvedTarget | None) -> float:
        """Return the value that s of a layer starts from, by the field `init` of the method."""
        init: float = self.init  # type: ignore[attr-defined]
        return init if plan is None else init + plan.offsets[name]

    @property
    def rescales(self) -> bool:
        """Whether a target is given."""
        return self.sparsity is not None or self.macs is not None

    @property
    def acts(self) -> bool:
        return self.rescales

    def __post_init__(self) -> None:
        super().__post_init__()
        who, macs = type(self).__name__, self.macs
        if isinstance(self.pattern, NM) or not isinstance(self.pattern, Pattern):
            raise InputError(
                f"{who}: pattern must be Unstructured(), Block(n) or Filters(), got {self.pattern!r}. N:M fixes how "
                "many weights a group keeps and leaves no threshold to learn; GMP and DNW take it"
            )
        check_positions(self, "begin", "end")
        if self.sparsity is not None and macs is not None:
            raise InputError(f"{who}: give sparsity= or macs=, not both")
        if self.sparsity is not None:
            check_target(who, self.sparsity, "uniform")
        if macs is not None:
            check_macs(who, macs, self.input_size)

    def prepare(self, model: nn.Module, layers: Layers, steps: int | None) -> ResolvedTarget | None:
        units = {name: self.pattern.units(layer) for name, layer in layers.items()}
        if not self.rescales:
            return None
        updates = Updates.resolve(self, self.begin, self.end, self.every, steps, after_ramp=True)
        if self.macs is not None:
            assert self.input_size is not None  # __post_init__ has seen to it
            costs, final = resolve_macs(type(self).__name__, model, layers, units, self.macs, self.input_size)
        else:
            costs = {name: each.weights for name, each in units.items()}
            weights, least_cost = dense_cost(units, costs), sum(costs.values())
            final = count_kept(weights, self.sparsity or 0)
            if final < least_cost:
                raise InputError(
                    f"{type(self).__name__}: sparsity={self.sparsity!r} leaves less than one weight or group for each "
                    f"of {len(layers)} layers; with {weights:,} weights in them it can be from 0 to "
                    f"{1 - least_cost / max(weights, 1):.6g}"
                )
        dense = dense_cost(units, costs)
        least = {name: max(1, math.floor(FLOOR * final / dense * each.count)) for name, each in units.items()}
        if sum(costs[name] * count for name, count in least.items()) > final:
            least = dict.fromkeys(units, 1)  # rounded up to one, the floors of many small layers came to more
        mean = dense / max(sum(each.count * each.weights for each in units.values()), 1)
        relative = {name: max(costs[name] / each.weights, 1) / mean for name, each in units.items()}
        offsets = {name: COST_POWER * math.log(cost) for name, cost in relative.items()}
        return ResolvedTarget(units, costs, least, offsets, dense, final, updates)

    def goal(self, plan: Any) -> tuple[int, Mapping[str, int] | None] | None:
        if plan is None:
            return None
        per_weight = {name: cost // plan.units[name].weights for name, cost in plan.costs.items()}
        return plan.final, None if self.macs is None else per_weight

    def after_step(self, sparsifier: "Sparsifier", optimizers: Optimizers) -> None:
        target: ResolvedTarget | None = sparsifier.plan
        if target is not None and target.updates.due(sparsifier.step):
            rescale(sparsifier.layers, target, target.wanted(sparsifier.step, sparsifier.clock.start))
        if target is not None and sparsifier.step == sparsifier.steps:
            warn_unlearned(sparsifier.layers, target, sparsifier.clock)


# --8<-- [start:rescale]
@torch.no_grad()
def rescale(layers: Layers, target: ResolvedTarget, wanted: int) -> None:
    """Rescale all s − o, s_l − o_l ← ρ · (s_l − o_l), so that the layers have the wanted cost.

    Args:
        layers: sparsified with `LearnedThreshold`, each with its own s.
        target: of these layers.
        wanted: the cost. If all units cost the same it is met to the last unit that fits, else to a thousandth.
            Weights of equal size are pruned together; in bf16, where many are equal, that is a few tenths of a
            percent of all.
    """
    for layer in layers.values():
        layer.parametrization.measure(layer.weight)  # type: ignore[operator]
    counts = {
        name: _Count(layer, target.units[name], target.offsets[name], target.costs[name], target.least[name])
        for name, layer in layers.items()
    }
    factor = _last_affordable(list(counts.values()), wanted)
    for name, count in counts.items():
        # A layer on its floor is rescaled no further than to it.
        if int(count.active(factor)) < count.least:
            own = _last_affordable([_Count(layers[name], count.units, count.offset)], count.least)
        else:
            own = factor
        count.part.s.copy_(_moved(count.part.s, own, count.offset))


def _moved(s: Tensor, factor: float, offset: float) -> Tensor:
    if factor <= 0:
        return torch.full_like(s, offset - factor)
    return (factor * (s - offset).clamp(max=NEARLY_ZERO) + offset).clamp(min=LOWEST)


# --8<-- [end:rescale]


class _Count:
    """How many units of a layer are active under any factor.

    Attributes:
        s: of the units of which that is not yet known for every factor that is still possible; or one for all.
        certain: how many others are active.

    Args:
        layer: sparsified with `LearnedThreshold`.
        units: of the layer.
        offset: o of the layer.
        cost: of one unit.
        least: how many are paid for if fewer are active.
    """

    def __init__(self, layer: Layer, units: Units, offset: float, cost: int = 1, least: int = 0) -> None:
        assert isinstance(layer.parametrization, LearnedThreshold)
        self.part, self.cost, self.least = layer.parametrization, cost, least
        self.layer, self.units, self.offset = layer, units, offset
        self._norms: Tensor | None = None
        s = self.part.s
        self.s = s if s.numel() == 1 else s.expand(units.unit_shape).flatten()
        self.certain = torch.zeros((), dtype=torch.int64, device=s.device)

    def active(self, factor: float) -> Tensor:
        """Return how many are active, without waiting for a GPU to count them."""
        return self.certain + self._above(factor).count_nonzero()

    def narrow(self, low: float, high: float) -> None:
        """Drop the units that are active, or not, under every factor between `low` and `high`."""
        sure = self._above(low)
        self.certain += sure.count_nonzero()
        unsure = self._above(high) & ~sure
        self._norms = self.norms[unsure]
        self.s = self.s if self.s.numel() == 1 else self.s[unsure]

    @property
    def norms(self) -> Tensor:
        """Norms of the units that are left, flat; computed anew until most are dropped, to save memory."""
        return self.units.norm(self.layer.weight).flatten() if self._norms is None else self._norms

    def _above(self, factor: float) -> Tensor:
        # As the operator has it, to the last bit.
        threshold = self.part.threshold_at(_moved(self.s, factor, self.offset))
        norms = self.norms
        return norms > threshold.to(norms.dtype)


def _last_affordable(counts: Sequence[_Count], budget: int) -> float:
    """Return the factor under which as many units are active as the budget buys; by bisection.

    If all cost the same, exactly as many, else to a thousandth of the budget or to the next of them. Leaves the
    counts with what lies near that factor.

    Args:
        counts: of the layers.
        budget: ≥ 0.
    """
    dearest = max(count.cost for count in counts)
    nearest_to_zero = torch.stack([(count.s - count.offset).clamp(max=NEARLY_ZERO).amax() for count in counts]).amax()
    low, high = -FARTHEST, max(FARTHEST / -float(nearest_to_zero), 1.0)
    # More halvings than this cannot tell two float32 apart.
    for turn in range(64):
        factor = (low + high) / 2
        if turn < 2 and low < 1 < high:
            factor = 1 - NEAR if turn == 0 else 1 + NEAR
        active = torch.stack([count.active(factor) for count in counts]).tolist()
        left = budget - sum(c.cost * max(c.least, number) for c, number in zip(counts, active, strict=True))
        if 0 <= left < dearest and 1000 * left <= budget:
            return factor
        low, high = (factor, high) if left > 0 else (low, factor)
        if turn % 4 == 1:
            for count in counts:
                count.narrow(low, high)
    return low
