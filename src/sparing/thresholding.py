"""Base of methods that prune the smallest weights by a threshold, and train all weights on."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.budget import Budget
from sparing.layers import Layer
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

    Args:
        begin: t0, start of the sparsity ramp, a step (int) or a fraction of the run (float).
        end: t1, end of the ramp, likewise. Updates continue to the end of the run.
        every: optimizer steps between two updates of the threshold; shortened in a short run.
    """

    takes_nm = False
    retargets = True
    ramps = True
    after_ramp = True

    budget: Budget | str = "global"
    begin: int | float = 0.0
    end: int | float = 0.5
    every: int = 16

    @abstractmethod
    def ranked(self, weight: Tensor, units: Units) -> RankedThreshold:
        """Return the parametrization of one layer."""

    def parametrizations(self, layers: Layers, plan: Plan) -> Parametrizations:
        return {name: self.ranked(layer.weight, plan.allocation.units[name]) for name, layer in layers.items()}

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
