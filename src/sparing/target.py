"""A total for learned thresholds: all of them are pulled as hard as the network needs to end as it is asked to.

    s_l ← ρ · s_l        every so many steps; one ρ for all layers, such that  Σ cost_l · ‖S_l‖₀ = wanted(t)

Weight decay does the same to s in STR, s ← (1 − ηλ) s, with a λ that somebody has to find by trial. Here the
strength of the pull is solved for. What each layer makes of it stays learned: in between, its s moves by the
gradient. s is negative, so a smaller ρ makes all thresholds higher. It is found by bisection: weight i of layer l
lives while |W_i| > k · g(ρ · s_l), and the weights that do are counted. Should ρ = 0 not be enough, s goes on above
zero, alike in all layers: s_l ← −ρ for ρ ≤ 0.

A weight costs 1 where a number of weights is asked for, and its layer's uses (see `sparing.macs`) where MACs are.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparing.budget import check_target
from sparing.errors import InputError, SparsityWarning
from sparing.layers import Layer, find_layers
from sparing.macs import Example, count_uses
from sparing.masks import count_kept
from sparing.parametrizations import LearnedThreshold
from sparing.schedules import check_schedule, cubic, is_update, to_step
from sparing.sparsify import Sparsifier

FLOOR = 0.1
"""No layer keeps a smaller share of its weights than a tenth of the share that all of them keep together."""

NEARLY_ZERO = -1e-3
"""Where s is kept from zero, from which no factor would bring it back."""

FARTHEST = 16.0
"""As far as s is moved either way; sigmoid(16) is within 2e-7 of one."""

LOWEST = -64.0
"""Where s is kept from below: a threshold of 1e-28 is none, and s would not be back in time."""

NEAR = 1 / 64
"""ρ is looked for within this of one first: from one pull to the next the total changes little."""


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
        method: the name of the method that aims at it, for messages.
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

    method: str
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
            raise InputError(f"{self.method}: give sparsity= or macs=, not both")
        if macs is None and sparsity is None:
            raise InputError(f"{self.method}: give sparsity=, a fraction in [0, 1), or macs=")
        if macs is None:
            check_target(self.method, sparsity, None)
        elif isinstance(macs, bool) or not (
            (isinstance(macs, int) and macs > 0) or (isinstance(macs, float) and 0 < macs < 1)
        ):
            raise InputError(
                f"{self.method}: macs must be a number (int) above 0, or a fraction (float) of the dense model's "
                f"between 0 and 1, got {macs!r}"
            )
        elif self.input_size is None:
            raise InputError(
                f"{self.method}: macs={macs!r} needs input_size=, the shape of one input such as (1, 3, 224, 224)"
            )
        if self.steps is None:
            asked = f"sparsity={sparsity!r}" if macs is None else f"macs={macs!r}"
            raise InputError(f"{self.method}: {asked} needs steps=, the optimizer steps of the whole run")
        check_schedule(self.method, self.steps, self.begin, self.end, self.every)

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
                f"{self.method}: sparsity={self.sparsity!r} leaves less than one weight for each of {layers} layers; "
                f"with {highest:,} weights in them it can be from 0 to {1 - lowest / highest:.6g}"
            )
        unselected = f", {beside:,} of them in layers that are not sparsified" if beside else ""
        return (
            f"{self.method}: macs={self.macs!r} is out of reach: the model has {highest:,} MACs{unselected}, and "
            f"{lowest:,} with one weight left in each sparsified layer; give a number between, or a fraction above "
            f"{lowest / max(highest, 1):.3g}"
        )

    def after_step(self, sparsifier: Sparsifier) -> None:
        """Pull, where a pull is due.

        Raises:
            InputError: after the first step, under FSDP2, whose shards nobody here counts together.
        """
        if any(hasattr(layer.weight, "full_tensor") for layer in sparsifier.layers.values()):
            raise InputError(
                f"{self.method}: a total does not run under FSDP2; use DistributedDataParallel, or STR with a weight "
                "decay on s instead"
            )
        assert self.steps is not None  # __post_init__ has seen to it
        begin, end = to_step(self.begin, self.steps), to_step(self.end, self.steps)
        if is_update(sparsifier.step, begin, self.steps, self.every):
            goal: Goal = sparsifier.plan
            gone = math.floor(cubic(sparsifier.step, begin, end, goal.dense - goal.final))
            pull(sparsifier.layers, goal, goal.dense - gone)
            if sparsifier.step == self.steps:
                self._warn_if_missed(goal, sparsifier.layers)

    def _warn_if_missed(self, goal: Goal, layers: Mapping[str, Layer]) -> None:
        costs = {name: goal.costs[name] * layer.nonzero() for name, layer in layers.items()}
        if sum(costs.values()) <= goal.final:
            return
        largest = {name: float(layer.weight.detach().abs().amax()) for name, layer in layers.items()}
        name = max(largest, key=largest.__getitem__)
        unit = "weights" if self.macs is None else "MACs"
        warnings.warn(
            f"{self.method}: the run ends at {sum(costs.values()):,} {unit} in sparsified layers, where {goal.final:,} "
            f"were asked for: weights have outgrown the highest threshold (layer {name!r} has one of "
            f"{largest[name]:.3g}). Clip the gradients, lower the learning rate, or decay weights more",
            SparsityWarning,
            stacklevel=2,
        )


# --8<-- [start:pull]
@torch.no_grad()
def pull(layers: Mapping[str, Layer], goal: Goal, wanted: int) -> None:
    """Move all s, s_l ← ρ · s_l, so that the layers cost what is wanted.

    Args:
        layers: sparsified with `LearnedThreshold`, s of their own.
        goal: of these layers.
        wanted: the cost. If all weights cost the same it is met to the last weight that is affordable, else to a
            thousandth. Weights of equal size live or die together; in bf16, where many are equal, that is some
            tenths of a percent of all.
    """
    tallies = {name: _Tally(layer, goal.costs[name], goal.least[name]) for name, layer in layers.items()}
    rho = _last_affordable(list(tallies.values()), wanted)
    for name, tally in tallies.items():
        # A layer on its floor is pulled no further than to it.
        enough = int(tally.living(rho)) >= tally.least
        own = rho if enough else _last_affordable([_Tally(layers[name], cost=1)], tally.least)
        tally.part.s.copy_(_moved(tally.part.s, own))


def _moved(s: Tensor, rho: float) -> Tensor:
    return (rho * s.clamp(max=NEARLY_ZERO)).clamp(min=LOWEST) if rho > 0 else torch.full_like(s, -rho)


# --8<-- [end:pull]


class _Tally:
    """How many weights of a layer live under any ρ.

    Attributes:
        sizes: of the weights of which that is not yet known for every ρ that is still possible; flat.
        s: theirs, or one for all of them.
        certain: how many others live.

    Args:
        layer: sparsified with `LearnedThreshold`.
        cost: of one weight.
        least: how many are paid for, should fewer live.
    """

    def __init__(self, layer: Layer, cost: int, least: int = 0) -> None:
        assert isinstance(layer.parametrization, LearnedThreshold)
        self.part, self.cost, self.least = layer.parametrization, cost, least
        self.sizes = layer.weight.abs().flatten()
        s = self.part.s
        self.s = s if s.numel() == 1 else s.expand_as(layer.weight).flatten()
        self.certain = torch.zeros((), dtype=torch.int64, device=s.device)

    def living(self, rho: float) -> Tensor:
        """How many live, without waiting for a GPU to count them."""
        return self.certain + self._above(rho).count_nonzero()

    def narrow(self, low: float, high: float) -> None:
        """Have only values between `low` and `high` to answer for, and weights that live under one of them alone."""
        sure = self._above(low)
        self.certain += sure.count_nonzero()
        unsure = self._above(high) & ~sure
        self.sizes = self.sizes[unsure]
        self.s = self.s if self.s.numel() == 1 else self.s[unsure]

    def _above(self, rho: float) -> Tensor:
        # As the operator has it, to the last bit.
        threshold = self.part.scale * self.part.g(_moved(self.s, rho))
        return self.sizes > threshold.to(self.sizes.dtype)


def _last_affordable(tallies: Sequence[_Tally], budget: int) -> float:
    """The ρ under which so many weights live as the budget buys; by bisection.

    If all cost the same, exactly as many, else to a thousandth of the budget or to the next of them. Leaves the
    tallies with what lies near that ρ.

    Args:
        tallies: of the layers.
        budget: ≥ 0.
    """
    dearest = max(tally.cost for tally in tallies)
    nearest_to_zero = torch.stack([tally.s.clamp(max=NEARLY_ZERO).amax() for tally in tallies]).amax()
    low, high = -FARTHEST, max(FARTHEST / -float(nearest_to_zero), 1.0)
    # More halvings than this tell no two float32 apart.
    for turn in range(64):
        rho = (low + high) / 2
        if turn < 2 and low < 1 < high:
            rho = 1 - NEAR if turn == 0 else 1 + NEAR
        counts = torch.stack([tally.living(rho) for tally in tallies]).tolist()
        left = budget - sum(tally.cost * max(tally.least, count) for tally, count in zip(tallies, counts, strict=True))
        if 0 <= left < dearest and 1000 * left <= budget:
            return rho
        low, high = (rho, high) if left > 0 else (low, rho)
        if turn % 4 == 1:
            for tally in tallies:
                tally.narrow(low, high)
    return low
