"""ST-3 and ST-3σ: soft thresholding and straight-through gradients under one threshold for the whole network.

    r_t  = p · (1 − (1 − (t − t0) / (t1 − t0))³)               the cubic ramp from 0 to p
    th   = the largest |W| / σ_l of the smallest r_t share     all layers at once
    th_l = th · σ_l,   M = 1{|W| > th_l}
    S    = c ⊙ sign(W) ⊙ (|W| − th_l) ⊙ M,   dW = dS           straight through
    c_f  = 1.01 / (q_f + 0.01),   q_f = mean |W ⊙ M| / mean |W|, per filter f

    σ_l = 1 in ST-3,   σ_l = 1 / √(Σ shape_l) in ST-3σ

Wide layers have smaller weights, and a smaller σ_l. The sparsities of the layers differ less under ST-3σ than under
one threshold for all layers.

Source: Vanderschueren & De Vleeschouwer, "Are Straight-Through gradients and Soft-Thresholding all you need for
Sparse Training?", WACV 2023, and its code (quantized.py, pruning.py), the only source of σ_l (l1std).
Deviations: the code takes th from an interpolated quantile; here the count is exact, except for weights equal to th.
The code's released configuration then trains on from its best checkpoint with fixed masks; here th is updated to the
end of the run. The code updates th and c at every step (`every=1`); 16 steps reduce the cost to a sixteenth. Between
updates th is constant and M follows the weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.group_threshold import group_norm, wide
from sparing.parametrizations import straight_through
from sparing.patterns import Units
from sparing.threshold import shrink
from sparing.thresholding import RankedThreshold, Thresholding


@dataclass(frozen=True, kw_only=True)
class ST3(Thresholding):
    """Shrink every weight by one threshold, rescale the filters, and train the dense weights.

    A pruned weight is trained by the gradient of its place, and is active again when it has grown past the threshold.
    A filter is a slice of the weight's first dimension.

    `sparsity`, `budget` and `pattern` are those of `sparing.method.Ranking`; `macs`, `input_size`, `begin`, `end` and
    `every` those of `sparing.thresholding.Thresholding`.

    Examples:
        >>> ST3(sparsity=0.9).every
        16
    """

    name = "st3"

    begin: int | float = 0.05

    def ranked(self, weight: Tensor, units: Units, pruned: float) -> RankedThreshold:
        return RescaledSoftThreshold(weight, units, sigma=1.0)


@dataclass(frozen=True, kw_only=True)
class ST3Sigma(Thresholding):
    """Shrink the weights of each layer by th · σ_l, rescale the filters, and train the dense weights.

    `sparsity`, `macs`, `input_size`, `budget`, `pattern`, `begin`, `end` and `every` are as of `ST3`.

    Examples:
        >>> ST3Sigma(sparsity=0.9).begin
        0.05
    """

    name = "st3_sigma"

    begin: int | float = 0.05

    def ranked(self, weight: Tensor, units: Units, pruned: float) -> RankedThreshold:
        return RescaledSoftThreshold(weight, units, sigma=sum(weight.shape) ** -0.5)


# --8<-- [start:rescaled]
class RescaledSoftThreshold(RankedThreshold):
    """S = c ⊙ soft(W, th) forward, but dW = dS: one threshold th, and one scale c for each filter.

    `weight` and `units` are those of `RankedThreshold`.

    Args:
        sigma: σ.
    """

    scale: Tensor

    def __init__(self, weight: Tensor, units: Units, sigma: float) -> None:
        super().__init__(weight, units)
        self.sigma = sigma
        per_filter = weight.shape[:1] + (1,) * (weight.dim() - 1)
        self.register_state("scale", torch.ones(per_filter, dtype=self.th.dtype, device=weight.device))

    def score(self, weight: Tensor) -> Tensor:
        norm = self.units.norm(weight)
        # At least float32: rounded to bf16, the quotients of different layers would tie.
        return norm if self.sigma == 1 else wide(norm) / self.sigma

    def update(self, weight: Tensor, th: Tensor) -> None:
        """Set the threshold to th · σ, and update the scales."""
        norm, active = wide(self.units.norm(weight)), self.score(weight) > th
        self.th.copy_(th if self.sigma == 1 else _between(th * self.sigma, norm, active, weight.dtype))
        size = wide(weight.abs())
        kept = (size * self.units.expand(active)).reshape(len(size), -1)
        # The small number is the code's: it keeps a filter of zeros from dividing by zero.
        q = (kept.mean(1) + 1e-6) / (size.reshape(len(size), -1).mean(1) + 1e-6)
        self.scale.copy_((1.01 / (q + 0.01)).reshape(self.scale.shape))

    def forward(self, weight: Tensor) -> Tensor:
        return straight_through(weight, self._effective(weight.detach()))

    def _effective(self, weight: Tensor) -> Tensor:
        scale = self.scale.to(weight.dtype)
        if not self.units.dims:
            return scale * shrink(weight, self.th.to(weight.dtype))
        view = self.units.view
        norm = group_norm(weight, view, self.units.dims)
        factor = torch.where(norm > self.th, 1 - self.th / norm, 0.0).to(weight.dtype)
        return scale * (weight.reshape(view) * factor).reshape(weight.shape)


# --8<-- [end:rescaled]


def _between(th: Tensor, size: Tensor, active: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the threshold rounded to the dtype of the weights, changed if it would separate other weights."""
    highest_out, lowest_in = size.masked_fill(active, 0).amax(), size.masked_fill(~active, torch.inf).amin()
    th = torch.maximum(th.to(dtype).to(size.dtype), highest_out)
    return torch.where(th < lowest_in, th, highest_out)
