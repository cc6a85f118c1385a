"""Feather: a thresholding between soft and hard, straight-through gradients, one global threshold.

    r_t = r · (1 − (1 − (t − t0) / (t1 − t0))³)                the cubic ramp from 0 to r
    th  = the largest |W| but for the (1 − r_t) share of largest, all layers at once
    M   = 1{|W| > th}
    S   = sign(W) ⊙ (|W|³ − th³)^(1/3) ⊙ M
    dW  = dS ⊙ (M + θ (1 − M)),   θ = ½ for r > 0.95, else 1

Source: Glentis Georgoulakis, Retsinas & Maragos, "Feather: An Elegant Solution to Effective DNN Sparsification", BMVC
2023, and its code (sparse_utils.py).
Deviations: the code takes th from an interpolated quantile; here the count is exact, except for weights that tie with
th. The code takes a new threshold at every step (`every=1`); every 16 steps cost a sixteenth.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.budget import Budget, magnitude
from sparing.group_threshold import feather_threshold
from sparing.method import Layers, Optimizers, Parametrizations, Plan, Ranking
from sparing.parametrizations import Sparse
from sparing.patterns import Units
from sparing.schedules import check_number
from sparing.sparsifier import Sparsifier


@dataclass(frozen=True, kw_only=True)
class Feather(Ranking):
    """Zero the smallest weights of the whole network, shrink those near the threshold, train them all.

    S = sign(W) ⊙ (|W|³ − th³)^(1/3) is continuous, unlike the hard threshold, and leaves large weights almost as they
    are, unlike the soft one.

    `sparsity`, `budget` and `pattern` are those of `sparing.method.Ranking`: the target r.

    Args:
        begin: t0, start of the sparsity ramp, a step (int) or a fraction of the run (float).
        end: t1, end of the ramp, likewise.
        every: optimizer steps between two updates of the threshold.
        theta: θ in [0, 1], the factor on the gradient of pruned weights; None takes ½ above a sparsity of 0.95 and 1
            up to it, and 1 for a Budget.

    Examples:
        >>> Feather(sparsity=0.9).every
        16
    """

    name = "feather"
    retargets = True
    takes_nm = False
    after_ramp = True

    budget: Budget | str = "global"
    begin: int | float = 0.0
    end: int | float = 0.5
    every: int = 16
    theta: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.theta is not None:
            check_number(self, "theta", "[0, 1]")

    def parametrizations(self, layers: Layers, plan: Plan) -> Parametrizations:
        theta = self.theta if self.theta is not None else 0.5 if (self.sparsity or 0) > 0.95 else 1.0
        units = plan.allocation.units
        return {name: FeatherThreshold(layer.weight, theta, units[name]) for name, layer in layers.items()}

    @torch.no_grad()
    def after_step(self, sparsifier: Sparsifier, optimizers: Optimizers) -> None:
        plan: Plan = sparsifier.plan
        assert plan.updates is not None
        if plan.updates.due(sparsifier.step):
            thresholds = plan.allocation.thresholds(magnitude, sparsifier.progress)
            for layer, part in sparsifier.each(FeatherThreshold):
                part.th.copy_(thresholds[layer.name])


class FeatherThreshold(Sparse):
    """S = sign(W) ⊙ (|W|³ − th³)^(1/3) ⊙ M forward, dW = dS ⊙ (M + θ (1 − M)) backward, M = 1{|W| > th}.

    Args:
        weight: gives dtype and device.
        theta: θ.
        units: what is pruned together.
    """

    th: Tensor

    def __init__(self, weight: Tensor, theta: float, units: Units) -> None:
        super().__init__()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.register_buffer("th", torch.zeros((), dtype=dtype, device=weight.device))
        self.theta, self.units = theta, units

    def threshold(self) -> Tensor:
        return self.th

    def forward(self, weight: Tensor) -> Tensor:
        return feather_threshold(weight, self.th, self.theta, self.units.view, self.units.dims)
