"""ST-3σ: ST-3 with a threshold a layer, in proportion to the scale of the layer's weights.

    σ_l = 1 / √(Σ shape_l)                                     a constant of the layer
    th  = the largest |W_l| / σ_l but for the (1 − r_t) share of largest, all layers at once
    M   = 1{|W_l| > th_l},   th_l = th · σ_l
    S   = c ⊙ sign(W) ⊙ (|W| − th_l) ⊙ M,   dW = dS            straight through
    c_f = 1.01 / (q_f + 0.01),   q_f = mean |W ⊙ M| / mean |W|, a filter f

r_t is the cubic ramp from 0 to the final sparsity.

Source: Vanderschueren & De Vleeschouwer, "Are Straight-Through gradients and Soft-Thresholding all you
need for Sparse Training?", WACV 2023, and its code (pruning.py, l1std), which alone gives σ_l.
Deviations: σ_l is the code's constant, made of the dimensions of the weight, not a standard deviation
that is measured. The code takes th from an interpolated quantile; here the count is exact, but for weights that
tie with th_l. The code's released configuration then trains on from its best checkpoint with the masks frozen;
here th is renewed to the end of the run, and that is all. The code renews th and c at every step (`every=1`);
every 16 steps cost a sixteenth. In between, M follows the weights and th_l stands.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparing.budget import check_target
from sparing.layers import Layer
from sparing.masks import count_kept, largest_left_out
from sparing.parametrizations import RescaledSoftThreshold, Sparse
from sparing.schedules import check_schedule, cubic, is_update, to_step
from sparing.sparsify import Method, Sparsifier


@dataclass(frozen=True)
class ST3Sigma(Method):
    """Shrink the weights of each layer by th · σ_l, rescale the filters, and train the dense weights.

    σ_l = 1 / √(Σ shape_l) is smaller where layers are wide, and so are their weights: the layers end
    nearer to one another in sparsity than under one threshold for all. A filter is a slice of the
    weight's first dimension.

    Args:
        steps: optimizer steps of the whole run.
        sparsity: the final one, of all layers together.
        begin: where the ramp begins: a step (int) or a fraction of `steps` (float).
        end: where it ends, likewise.
        every: optimizer steps between two updates of thresholds and scales.

    Raises:
        InputError: a value is out of range; see `check_target` and `check_schedule`.

    Examples:
        >>> ST3Sigma(steps=1000, sparsity=0.9)
        ST3Sigma(steps=1000, sparsity=0.9, begin=0.05, end=0.5, every=16)
    """

    name: ClassVar[str] = "st3_sigma"

    steps: int
    sparsity: float
    begin: int | float = 0.05
    end: int | float = 0.5
    every: int = 16

    def __post_init__(self) -> None:
        check_target("ST3Sigma", self.sparsity, None)
        check_schedule("ST3Sigma", self.steps, self.begin, self.end, self.every)

    def parametrizations(self, layers: Mapping[str, Layer]) -> dict[str, Sparse]:
        return {name: RescaledSoftThreshold(layer.weight) for name, layer in layers.items()}

    @torch.no_grad()
    def after_step(self, sparsifier: Sparsifier) -> None:
        begin, end = to_step(self.begin, self.steps), to_step(self.end, self.steps)
        if not is_update(sparsifier.step, begin, self.steps, self.every):
            return
        layers, parts = zip(*sparsifier.parts(RescaledSoftThreshold), strict=True)
        sigmas = [sum(layer.weight.shape) ** -0.5 for layer in layers]
        # At least float32: rounded to bf16, the quotients of different layers would tie.
        sizes = [_at_least_float32(layer.weight.abs()) for layer in layers]
        scores = [size / sigma for size, sigma in zip(sizes, sigmas, strict=True)]
        sparsity = cubic(sparsifier.step, begin, end, self.sparsity)
        th = largest_left_out(scores, count_kept(sum(score.numel() for score in scores), sparsity))
        for layer, part, size, score, sigma in zip(layers, parts, sizes, scores, sigmas, strict=True):
            part.renew(_between(th * sigma, size, score > th, layer.weight.dtype), size)


def _between(th: Tensor, size: Tensor, live: Tensor, dtype: torch.dtype) -> Tensor:
    """The threshold as weights of this dtype can meet it: rounding may not move it past one of them."""
    highest_out, lowest_in = size.masked_fill(live, 0).amax(), size.masked_fill(~live, torch.inf).amin()
    th = torch.maximum(th.to(dtype).to(size.dtype), highest_out)
    return torch.where(th < lowest_in, th, highest_out)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
