"""ST-3: soft thresholding and straight-through gradients under one threshold for the whole network.

    r_t = p · (1 − (1 − (t − t0) / (t1 − t0))³)                the cubic ramp from 0 to p
    th  = the largest |W| but for the (1 − r_t) share of largest, all layers at once
    M   = 1{|W| > th}
    S   = c ⊙ sign(W) ⊙ (|W| − th) ⊙ M,   dW = dS              straight through
    c_f = 1.01 / (q_f + 0.01),   q_f = mean |W ⊙ M| / mean |W|, a filter f

Source: Vanderschueren & De Vleeschouwer, "Are Straight-Through gradients and Soft-Thresholding all you
need for Sparse Training?", WACV 2023, and its code (quantized.py, pruning.py).
Deviations: the code takes th from an interpolated quantile; here the count is exact, but for weights that tie
with th. The code's released configuration then trains on from its best checkpoint with the masks frozen; here
th is renewed to the end of the run, and that is all. The code renews th and c at every step (`every=1`); every
16 steps cost a sixteenth. In between, M follows the weights and th stands.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from sparing.budget import check_target
from sparing.layers import Layer
from sparing.masks import count_kept, largest_left_out
from sparing.parametrizations import RescaledSoftThreshold, Sparse
from sparing.schedules import check_schedule, cubic, is_update, to_step
from sparing.sparsify import Method, Sparsifier


@dataclass(frozen=True)
class ST3(Method):
    """Shrink every weight by one global threshold, rescale the filters, and train the dense weights.

    A pruned weight goes on being trained by the gradient of its place, and comes back when it has
    grown past the threshold. A filter is a slice of the weight's first dimension.

    Args:
        steps: optimizer steps of the whole run.
        sparsity: the final one, p, of all layers together.
        begin: t0, where the ramp begins: a step (int) or a fraction of `steps` (float).
        end: t1, where it ends, likewise.
        every: optimizer steps between two updates of threshold and scales.

    Raises:
        InputError: a value is out of range; see `check_target` and `check_schedule`.

    Examples:
        >>> ST3(steps=1000, sparsity=0.9)
        ST3(steps=1000, sparsity=0.9, begin=0.05, end=0.5, every=16)
    """

    name: ClassVar[str] = "st3"

    steps: int
    sparsity: float
    begin: int | float = 0.05
    end: int | float = 0.5
    every: int = 16

    def __post_init__(self) -> None:
        check_target("ST3", self.sparsity, None)
        check_schedule("ST3", self.steps, self.begin, self.end, self.every)

    def parametrizations(self, layers: Mapping[str, Layer]) -> dict[str, Sparse]:
        return {name: RescaledSoftThreshold(layer.weight) for name, layer in layers.items()}

    @torch.no_grad()
    def after_step(self, sparsifier: Sparsifier) -> None:
        begin, end = to_step(self.begin, self.steps), to_step(self.end, self.steps)
        if not is_update(sparsifier.step, begin, self.steps, self.every):
            return
        layers, parts = zip(*sparsifier.parts(RescaledSoftThreshold), strict=True)
        sizes = [layer.weight.abs() for layer in layers]
        sparsity = cubic(sparsifier.step, begin, end, self.sparsity)
        th = largest_left_out(sizes, count_kept(sum(size.numel() for size in sizes), sparsity))
        for part, size in zip(parts, sizes, strict=True):
            part.renew(th, size)
