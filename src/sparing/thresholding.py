"""Base of methods that prune the smallest weights by a threshold, and train all weights on."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparing.allocation import Allocation
from sparing.budget import Budget
from sparing.errors import InputError
from sparing.layers import Layer
from sparing.macs import Example
from sparing.macs_target import check_macs, resolve_macs
from sparing.method import Layers, Optimizers, Parametrizations, Plan, Ranking
from sparing.parametrizations import Sparse
from sparing.patterns import Units
from sparing.sparsifier import Sparsifier


class RankedThreshold(Sparse):
    """Abstract: a threshold `th`, of shape () in float32 or wider, above which the weights to keep lie.

    Args:
        weight: gives dtype and device.
        units: what is pruned together.
    """

    th: Tensor

    def __init__(self, weight: Tensor, units: Units) -> None:
        super().__init__()
        self.units = units
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.register_state("th", torch.zeros((), dtype=dtype, device=weight.device))

    def threshold(self) -> Tensor:
        return self.th

    def score(self, weight: Tensor) -> Tensor:
        """Return the score of each unit, ≥ 0; the largest are kept."""
        return self.units.norm(weight)

    def update(self, weight: Tensor, th: Tensor) -> None:
        """Set the threshold to a new value in units of the score."""
        self.th.copy_(th)


@dataclass(frozen=True, kw_only=True)
class Thresholding(Ranking):
    """Abstract: one threshold on the scores of all layers (with budget="global"), raised along the sparsity ramp.

    With a target in MACs, th_l = th · cost_l^¼, where a weight of layer l is applied cost_l times per forward pass.

    Args:
        begin: t0, start of the sparsity ramp, a step (int) or a fraction of the run (float).
        end: t1, end of the ramp, likewise. Updates continue to the end of the run.
        every: optimizer steps between two updates of the threshold; shortened in a short run.
        macs: instead of a sparsity, a target for the whole model as `report` counts it, layers that are not sparsified
            included: a fraction (float) of the dense model's MACs, or their number (int). The budget must be "global".
        input_size: of one input, as `report` takes it; for MACs.

    Raises:
        InputError: macs is given with a sparsity or another budget, or without input_size; it cannot be reached.
    """

    takes_nm = False
    retargets = True
    ramps = True
    after_ramp = True

    budget: Budget | str = "global"
    begin: int | float = 0.0
    end: int | float = 0.5
    every: int = 16
    macs: float | int | None = None
    input_size: Example | None = None

    @abstractmethod
    def ranked(self, weight: Tensor, units: Units, pruned: float) -> RankedThreshold:
        """Return the parametrization of one layer, of a network of which the share `pruned` is zero at the end."""

    def check_target(self) -> None:
        if self.macs is None:
            super().check_target()
            return
        who = type(self).__name__
        if self.sparsity is not None or self.budget != "global":
            raise InputError(f"{who}: give macs= alone, without sparsity= and another budget")
        check_macs(who, self.macs, self.input_size)

    def allocate(self, model: nn.Module, layers: Layers) -> Allocation:
        if self.macs is None:
            return super().allocate(model, layers)
        assert self.input_size is not None  # check_target has seen to it
        units = {name: self.pattern.units(layer) for name, layer in layers.items()}
        costs, kept = resolve_macs(type(self).__name__, model, layers, units, self.macs, self.input_size)
        return Allocation(layers, units, kept, costs)

    def parametrizations(self, layers: Layers, plan: Plan) -> Parametrizations:
        units, pruned = plan.allocation.units, plan.allocation.pruned
        return {name: self.ranked(layer.weight, units[name], pruned) for name, layer in layers.items()}

    @torch.no_grad()
    def after_step(self, sparsifier: Sparsifier, optimizers: Optimizers) -> None:
        if sparsifier.due or sparsifier.holds:
            thresholds = sparsifier.plan.allocation.thresholds(_score, sparsifier.progress)
            for layer, part in sparsifier.each(RankedThreshold):
                part.update(layer.weight, thresholds[layer.name])


def _score(layer: Layer, units: Units) -> Tensor:
    part = layer.parametrization
    assert isinstance(part, RankedThreshold)
    return part.score(layer.weight)
