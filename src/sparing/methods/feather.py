"""Feather: a thresholding between soft and hard, straight-through gradients, one global threshold.

    r_t = r · (1 − (1 − (t − t0) / (t1 − t0))³)                the cubic ramp from 0 to r
    th  = the largest |W| of the smallest r_t share            all layers at once
    M   = 1{|W| > th}
    S   = sign(W) ⊙ (|W|³ − th³)^(1/3) ⊙ M
    dW  = dS ⊙ (M + θ (1 − M)),   θ = ½ for r > 0.95, else 1

With a target in MACs, th_l = th · cost_l^¼ in layer l, whose weights are applied cost_l times per forward pass.

Source: Glentis Georgoulakis, Retsinas & Maragos, "Feather: An Elegant Solution to Effective DNN Sparsification", BMVC
2023, and its code (sparse_utils.py).
Deviations: the code takes th from an interpolated quantile; here the count is exact, except for weights equal to th.
The code takes a new threshold at every step (`every=1`); 16 steps reduce the cost to a sixteenth.
"""

from dataclasses import dataclass

from torch import Tensor

from sparing.group_threshold import feather_threshold
from sparing.patterns import Units
from sparing.schedules import check_number
from sparing.thresholding import RankedThreshold, Thresholding


@dataclass(frozen=True, kw_only=True)
class Feather(Thresholding):
    """Zero the smallest weights of the whole network, shrink those near the threshold, train them all.

    S = sign(W) ⊙ (|W|³ − th³)^(1/3) is continuous, unlike the hard threshold, and leaves large weights almost as they
    are, unlike the soft one.

    `sparsity`, the r of the formula, `budget` and `pattern` are those of `sparing.method.Ranking`; `macs`,
    `input_size`, `begin`, `end` and `every` those of `sparing.thresholding.Thresholding`.

    Args:
        theta: θ in [0, 1], the factor on the gradient of pruned weights; with None it is ½ if more than 0.95 of the
            weights, or of the MACs, are pruned, and 1 otherwise.

    Examples:
        >>> Feather(sparsity=0.9).every
        16
    """

    name = "feather"

    theta: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.theta is not None:
            check_number(self, "theta", "[0, 1]")

    def ranked(self, weight: Tensor, units: Units, pruned: float) -> RankedThreshold:
        share = pruned if self.sparsity is None else self.sparsity
        theta = self.theta if self.theta is not None else 0.5 if share > 0.95 else 1.0
        return FeatherThreshold(weight, units, theta)


class FeatherThreshold(RankedThreshold):
    """S = sign(W) ⊙ (|W|³ − th³)^(1/3) ⊙ M forward, dW = dS ⊙ (M + θ (1 − M)) backward, M = 1{|W| > th}.

    `weight` and `units` are those of `RankedThreshold`.

    Args:
        theta: θ.
    """

    def __init__(self, weight: Tensor, units: Units, theta: float) -> None:
        super().__init__(weight, units)
        self.theta = theta

    def forward(self, weight: Tensor) -> Tensor:
        return feather_threshold(weight, self.th, self.theta, self.units.view, self.units.dims)
