"""ST-3 and ST-3σ: soft thresholding and straight-through gradients under one threshold for the whole network.

    r_t  = p · (1 − (1 − (t − t0) / (t1 − t0))³)               the cubic ramp from 0 to p
    th   = the largest |W| / σ_l but for the (1 − r_t) share of largest, all layers at once
    th_l = th · σ_l,   M = 1{|W| > th_l}
    S    = c ⊙ sign(W) ⊙ (|W| − th_l) ⊙ M,   dW = dS           straight through
    c_f  = 1.01 / (q_f + 0.01),   q_f = mean |W ⊙ M| / mean |W|, per filter f

    σ_l = 1 in ST-3,   σ_l = 1 / √(Σ shape_l) in ST-3σ

σ_l is smaller where layers are wide, and so are their weights: under ST-3σ the sparsities of the layers end nearer to
one another than under one threshold for all.

Source: Vanderschueren & De Vleeschouwer, "Are Straight-Through gradients and Soft-Thresholding all you need for
Sparse Training?", WACV 2023, and its code (quantized.py, pruning.py), which alone gives σ_l (l1std).
Deviations: the code takes th from an interpolated quantile; here the count is exact, except for weights that tie with
th. The code's released configuration then trains on from its best checkpoint with fixed masks; here th is updated to
the end of the run, and that is all. The code updates th and c at every step (`every=1`); every 16 steps cost a
sixteenth. Between updates M follows the weights and th stays.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.budget import Budget
from sparing.group_threshold import Shape, group_norm
from sparing.layers import Layer
from sparing.method import Layers, Optimizers, Parametrizations, Plan, Ranking
from sparing.parametrizations import Sparse, straight_through
from sparing.patterns import Units
from sparing.sparsifier import Sparsifier


@dataclass(frozen=True, kw_only=True)
class _ST3(Ranking):
    """Abstract: both methods; a subclass gives σ_l."""

    takes_nm = False
    retargets = True
    after_ramp = True

    budget: Budget | str = "global"
    begin: int | float = 0.05
    end: int | float = 0.5
    every: int = 16

    @abstractmethod
    def sigma(self, shape: Shape) -> float:
        """Return σ_l for a weight of this shape."""

    def parametrizations(self, layers: Layers, plan: Plan) -> Parametrizations:
        return {
            name: RescaledSoftThreshold(layer.weight, plan.allocation.units[name]) for name, layer in layers.items()
        }

    @torch.no_grad()
    def after_step(self, sparsifier: Sparsifier, optimizers: Optimizers) -> None:
        plan: Plan = sparsifier.plan
        assert plan.updates is not None
        if not plan.updates.due(sparsifier.step):
            return
        thresholds = plan.allocation.thresholds(self._score, sparsifier.progress)
        for layer, part in sparsifier.each(RescaledSoftThreshold):
            part.update(layer.weight, thresholds[layer.name], self.sigma(layer.weight.shape))

    def _score(self, layer: Layer, units: Units) -> Tensor:
        sigma = self.sigma(layer.weight.shape)
        norm = units.norm(layer.weight)
        # At least float32: rounded to bf16, the quotients of different layers would tie.
        return norm if sigma == 1 else _wide(norm) / sigma


@dataclass(frozen=True, kw_only=True)
class ST3(_ST3):
    """Shrink every weight by one threshold, rescale the filters, and train the dense weights.

    A pruned weight goes on being trained by the gradient of its place, and returns when it has grown past the
    threshold. A filter is a slice of the weight's first dimension.

    `sparsity`, `budget` and `pattern` are those of `sparing.method.Ranking`.

    Args:
        begin: t0, start of the sparsity ramp, a step (int) or a fraction of the run (float).
        end: t1, end of the ramp, likewise.
        every: optimizer steps between two updates of threshold and scales.

    Examples:
        >>> ST3(sparsity=0.9).every
        16
    """

    name = "st3"

    def sigma(self, shape: Shape) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class ST3Sigma(_ST3):
    """Shrink the weights of each layer by th · σ_l, rescale the filters, and train the dense weights.

    `sparsity`, `budget`, `pattern`, `begin`, `end` and `every` are as of `ST3`.

    Examples:
        >>> ST3Sigma(sparsity=0.9).sigma((3, 13))
        0.25
    """

    name = "st3_sigma"

    def sigma(self, shape: Shape) -> float:
        return float(sum(shape) ** -0.5)


# --8<-- [start:rescaled]
class RescaledSoftThreshold(Sparse):
    """S = c ⊙ soft(W, th) forward, but dW = dS: one threshold th, and one scale c for each filter.

    Args:
        weight: gives shape, dtype and device.
        units: what is pruned together.
    """

    th: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, units: Units) -> None:
        super().__init__()
        self.units = units
        dtype = torch.promote_types(weight.dtype, torch.float32)
        per_filter = weight.shape[:1] + (1,) * (weight.dim() - 1)
        self.register_buffer("th", torch.zeros((), dtype=dtype, device=weight.device))
        self.register_buffer("scale", torch.ones(per_filter, dtype=dtype, device=weight.device))

    def update(self, weight: Tensor, th: Tensor, sigma: float) -> None:
        """Take a new threshold th · σ, and the scales that follow from it."""
        norm = _wide(self.units.norm(weight))
        active = norm / sigma > th if sigma != 1 else norm > th
        self.th.copy_(th if sigma == 1 else _between(th * sigma, norm, active, weight.dtype))
        size = _wide(weight.abs())
        kept = (size * self.units.expand(active)).reshape(len(size), -1)
        # The small number is the code's: it keeps a filter of zeros from dividing by zero.
        q = (kept.mean(1) + 1e-6) / (size.reshape(len(size), -1).mean(1) + 1e-6)
        self.scale.copy_((1.01 / (q + 0.01)).reshape(self.scale.shape))

    def threshold(self) -> Tensor:
        return self.th

    def forward(self, weight: Tensor) -> Tensor:
        return straight_through(weight, self._effective(weight.detach()))

    def _effective(self, weight: Tensor) -> Tensor:
        scale = self.scale.to(weight.dtype)
        if not self.units.dims:
            th = self.th.to(weight.dtype)
            return scale * (weight - weight.clamp(-th, th))
        view = self.units.view
        norm = group_norm(weight, view, self.units.dims)
        shrink = torch.where(norm > self.th, 1 - self.th / norm, 0.0).to(weight.dtype)
        return scale * (weight.reshape(view) * shrink).reshape(weight.shape)


# --8<-- [end:rescaled]


def _between(th: Tensor, size: Tensor, active: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the threshold rounded to the dtype of the weights, moved so that it still separates the same weights."""
    highest_out, lowest_in = size.masked_fill(active, 0).amax(), size.masked_fill(~active, torch.inf).amin()
    th = torch.maximum(th.to(dtype).to(size.dtype), highest_out)
    return torch.where(th < lowest_in, th, highest_out)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
