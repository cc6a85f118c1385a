"""A total for learned thresholds: all of them are pulled as hard as the network needs to end as it is asked to.

    s_l ← ρ · s_l        every so many steps; one ρ for all layers, such that  Σ cost_l · ‖S_l‖₀ = wanted(t)

Weight decay does the same to s in STR, s ← (1 − ηλ) s, with a λ that somebody has to find by trial. Here the
strength of the pull is solved for. What each layer makes of it stays learned: in between, its s moves by the
gradient. s is negative, so a smaller ρ makes all thresholds higher, and weight i of layer l lives while

    ρ > ρ_i = g⁻¹(|W_i| / k) / s_l

These numbers are computed once, and ρ is found among them by counting. Should ρ = 0 not be enough, s goes on
above zero, alike in all layers: s_l ← −ρ for ρ ≤ 0.

A weight costs 1 where a number of weights is asked for, and its layer's uses (see `sparing.macs`) where MACs are.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparing.budget import check_target
from sparing.errors import InputError
from sparing.macs import Example, count_uses
from sparing.masks import count_kept
from sparing.parametrizations import SoftThreshold
from sparing.schedules import check_schedule, cubic, is_update, to_step
from sparing.select import Layer, find_layers
from sparing.sparsify import Sparsifier
from sparing.threshold import INVERSES

FLOOR = 0.1
"""No layer keeps a smaller share of its weights than a tenth of the share that all of them keep together."""

NEARLY_ZERO = -1e-3
"""Where s is kept from zero, from which no factor would bring it back."""


@dataclass(frozen=True)
class Goal:
    """What a target means for one network, in units of cost; of the layers that are sparsified.

    Attributes:
        costs: of one weight, by layer.
        least: how many weights live whatever the other layers need, by layer.
        dense: what all layers cost when nothing is zero.
        final: what they are to cost in the end.
    """

    costs: Mapping[str, int]
    least: Mapping[str, int]
    dense: int
    final: int


@dataclass(frozen=True)
class Target:
    """A total, and the ramp down to it.

    The total follows the ramp of `sparing.schedules.cubic` from `begin` to `end`, and is renewed from then on
    to the last step, after which it is met; a run that is longer than `steps` drifts from it.

    Args:
        sparsity: of the sparsified layers together, in [0, 1); or None.
        macs: of the whole model as `report` counts them, the layers that are not sparsified included: a fraction
            (float) of the dense model's, or their number (int); or None.
        steps: optimizer steps of the whole run.
        input_size: of one input, as `report` takes it; for MACs.
        begin: where the ramp begins: a step (int) or a fraction of `steps` (float).
        end: where it ends, likewise.
        every: optimizer steps between two pulls.

    Raises:
        InputError: both or none of sparsity and macs; no steps; MACs without input_size; a value out of range.
    """

    sparsity: float | None
    macs: float | int | None
    steps: int | None
    input_size: Example | None
    begin: int | float
    end: int | float
    every: int

    def __post_init__(self) -> None:
        sparsity, macs = self.sparsity, self.macs
        if sparsity is not None and macs is not None:
            raise InputError("STR: give sparsity= or macs=, not both")
        if macs is None:
            check_target("STR", sparsity, None)
        elif isinstance(macs, bool) or not (
            (isinstance(macs, int) and macs > 0) or (isinstance(macs, float) and 0 < macs < 1)
        ):
            raise InputError(
                "STR: macs must be a number (int) above 0, or a fraction (float) of the dense model's between 0 and 1, "
                f"got {macs!r}"
            )
        elif self.input_size is None:
            raise InputError(f"STR: macs={macs!r} needs input_size=, the shape of one input such as (1, 3, 224, 224)")
        if self.steps is None:
            asked = f"sparsity={sparsity!r}" if macs is None else f"macs={macs!r}"
            raise InputError(f"STR: {asked} needs steps=, the optimizer steps of the whole run")
        check_schedule("STR", self.steps, self.begin, self.end, self.every)

    def goal(self, model: nn.Module, layers: Mapping[str, Layer]) -> Goal:
        """What it means for a network.

        Args:
            model: the whole of it.
            layers: the ones that are to be sparsified.

        Raises:
            InputError: the target cannot be reached; the message says what can.
        """
        weights = {name: layer.weight.numel() for name, layer in layers.items()}
        if self.macs is None:
            costs, beside, wanted = dict.fromkeys(weights, 1), 0, count_kept(sum(weights.values()), self.sparsity or 0)
        else:
            assert self.input_size is not None  # __post_init__ has seen to it
            costs = count_uses(model, self.input_size)
            every = {name: costs[name] * layer.weight.numel() for name, layer in find_layers(model).items()}
            beside = sum(cost for name, cost in every.items() if name not in weights)
            wanted = self.macs if isinstance(self.macs, int) else round(self.macs * sum(every.values()))
        dense = sum(costs[name] * count for name, count in weights.items())
        # A layer without weights would let nothing through.
        lowest, highest = beside + sum(costs[name] for name in weights), beside + dense
        if not lowest <= wanted <= highest or not dense:
            raise InputError(self._out_of_reach(lowest, highest, beside, len(weights)))
        final = wanted - beside
        least = {name: max(1, math.floor(FLOOR * final / dense * count)) for name, count in weights.items()}
        if sum(costs[name] * count for name, count in least.items()) > final:
            least = dict.fromkeys(weights, 1)  # rounded up to one, the floors of many small layers came to more
        return Goal({name: costs[name] for name in weights}, least, dense, final)

    def _out_of_reach(self, lowest: int, highest: int, beside: int, layers: int) -> str:
        if self.macs is None:
            return (
                f"STR: sparsity={self.sparsity!r} leaves less than one weight for each of {layers} layers; with "
                f"{highest:,} weights in them it can be from 0 to {1 - lowest / highest:.6g}"
            )
        unselected = f", {beside:,} of them in layers that are not sparsified" if beside else ""
        return (
            f"STR: macs={self.macs!r} is out of reach: the model has {highest:,} MACs{unselected}, and {lowest:,} with "
            f"one weight left in each sparsified layer; give a number between, or a fraction above "
            f"{lowest / max(highest, 1):.3g}"
        )

    def after_step(self, sparsifier: Sparsifier) -> None:
        """Pull, where a pull is due."""
        assert self.steps is not None  # __post_init__ has seen to it
        begin, end = to_step(self.begin, self.steps), to_step(self.end, self.steps)
        if is_update(sparsifier.step, begin, self.steps, self.every):
            goal: Goal = sparsifier.plan
            gone = math.floor(cubic(sparsifier.step, begin, end, goal.dense - goal.final))
            pull(sparsifier.layers, goal, goal.dense - gone)


# --8<-- [start:pull]
@torch.no_grad()
def pull(layers: Mapping[str, Layer], goal: Goal, wanted: int) -> None:
    """Move all s, s_l ← ρ · s_l, so that the layers cost what is wanted.

    Args:
        layers: sparsified with `SoftThreshold`, s of their own.
        goal: of these layers.
        wanted: the cost, met to the last weight that is affordable. Rounding of s, and weights of equal size, can
            add or take a few; in bf16, where many are equal, some tenths of a percent of all.
    """
    if any(hasattr(layer.weight, "full_tensor") for layer in layers.values()):
        raise InputError("STR: a total does not run under FSDP2; use DistributedDataParallel, or a weight decay on s")
    factors = {name: _last_factors(layer) for name, layer in layers.items()}
    # What lives in any case is paid for first; the rest goes to the weights that die last.
    floors = {name: _above_smallest(each, goal.least[name]) for name, each in factors.items()}
    pools: dict[int, list[Tensor]] = {}
    for name, each in factors.items():
        others = each[each >= floors[name]]
        pools.setdefault(goal.costs[name], []).append(others)
        wanted -= goal.costs[name] * (len(each) - len(others))
    rho = _last_affordable({cost: torch.cat(each) for cost, each in pools.items()}, wanted)
    for name, layer in layers.items():
        part = layer.parametrization
        assert isinstance(part, SoftThreshold)
        own = floors[name].clamp_min(rho)
        part.s.copy_(torch.where(own > 0, own * part.s.clamp(max=NEARLY_ZERO), -own))


def _last_factors(layer: Layer) -> Tensor:
    """ρ_i of every weight of a layer, the factor down to which it lives; flat."""
    part = layer.parametrization
    assert isinstance(part, SoftThreshold)
    size = layer.weight.abs().to(torch.promote_types(layer.weight.dtype, torch.float32))
    alone = INVERSES[part.g](size / part.scale)
    return torch.where(alone < 0, alone / part.s.clamp(max=NEARLY_ZERO), -alone).flatten()


# --8<-- [end:pull]


def _above_smallest(values: Tensor, count: int) -> Tensor:
    """A number above the `count` smallest values, and halfway to the next."""
    if count == len(values):
        return values.amax() + 1
    return values.topk(count + 1, largest=False).values[-2:].mean()


def _last_affordable(pools: Mapping[int, Tensor], budget: int) -> float:
    """The ρ under which there are as many factors as the budget buys; by bisection.

    Of one cost, exactly as many. Of several, to a thousandth of the budget or to the next one of them.

    Args:
        pools: cost → the factors of all weights of that cost.
        budget: ≥ 0.
    """
    filled = {cost: pool for cost, pool in pools.items() if len(pool)}
    lowest = min((float(pool.amin()) for pool in filled.values()), default=0.0) - 1
    highest = max((float(pool.amax()) for pool in filled.values()), default=0.0) + 1
    low, rho, high = lowest, highest, highest
    # More halvings than this tell no two float32 apart.
    for _ in range(64):
        left = budget - sum(cost * int((pool < rho).count_nonzero()) for cost, pool in filled.items())
        low, high = (rho, high) if left >= 0 else (low, rho)
        if low == high or (0 <= left < max(filled) and 1000 * left <= budget):
            break
        rho = (low + high) / 2
    # Halfway to the neighbours, so that the rounding of s moves neither across.
    below = max(float(pool.masked_fill(pool >= low, lowest).amax()) for pool in filled.values()) if filled else lowest
    above = min(float(pool.masked_fill(pool < low, highest).amin()) for pool in filled.values()) if filled else highest
    return (below + above) / 2
