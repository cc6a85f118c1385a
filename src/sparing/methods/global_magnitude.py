"""GlobalMagnitude: gradual magnitude pruning with one threshold over all layers.

    s_t = s_f · (1 − (1 − (t − t0) / (t1 − t0))³)          the cubic ramp from 0 to s_f
    M   = the (1 − s_t) share of largest |W|, all layers     every so many steps
    S   = W ⊙ M,   dW = dS ⊙ M

Source: Zhu & Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model
compression", 2017, for the ramp; Frankle & Carbin, "The Lottery Ticket Hypothesis", ICLR 2019,
section 4, for comparing the weights of all layers with one another.
Deviations: the ramp and the comparison are combined here; neither paper has both. Dead weights keep
their value and decay, as in GMP, so one may come back while the ramp runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from sparing.budget import check_target
from sparing.layers import Layer
from sparing.masks import count_kept, keep_top_together
from sparing.parametrizations import Mask, Sparse
from sparing.schedules import check_schedule, cubic, is_update, to_step
from sparing.sparsify import Method, Sparsifier


@dataclass(frozen=True)
class GlobalMagnitude(Method):
    """Prune the smallest weights of the whole network, more and more of them, while training.

    How sparse each layer becomes follows from its weights; only the total is given, and it is met
    exactly. A layer of small weights can lose all of them, of which a warning tells. The `keep` of
    a mask is what its layer has now, as no layer has a number of its own to arrive at.

    Args:
        steps: optimizer steps of the whole run.
        sparsity: the final one, of all layers together.
        begin: where the ramp begins: a step (int) or a fraction of `steps` (float).
        end: where it ends, likewise.
        every: optimizer steps between two updates of the masks.

    Raises:
        InputError: a value is out of range; see `check_target` and `check_schedule`.

    Examples:
        >>> GlobalMagnitude(steps=1000, sparsity=0.9)
        GlobalMagnitude(steps=1000, sparsity=0.9, begin=0.2, end=0.8, every=100)
    """

    name: ClassVar[str] = "global_magnitude"

    steps: int
    sparsity: float
    begin: int | float = 0.2
    end: int | float = 0.8
    every: int = 100

    def __post_init__(self) -> None:
        check_target("GlobalMagnitude", self.sparsity, None)
        check_schedule("GlobalMagnitude", self.steps, self.begin, self.end, self.every)

    def parametrizations(self, layers: Mapping[str, Layer]) -> dict[str, Sparse]:
        return {
            name: Mask(torch.ones_like(layer.weight, dtype=torch.bool), layer.weight.numel())
            for name, layer in layers.items()
        }

    @torch.no_grad()
    def after_step(self, sparsifier: Sparsifier) -> None:
        begin, end = to_step(self.begin, self.steps), to_step(self.end, self.steps)
        if not is_update(sparsifier.step, begin, end, self.every):
            return
        layers, parts = zip(*sparsifier.parts(Mask), strict=True)
        scores = [layer.weight.abs() for layer in layers]
        count = count_kept(sum(score.numel() for score in scores), cubic(sparsifier.step, begin, end, self.sparsity))
        for part, mask in zip(parts, keep_top_together(scores, count), strict=True):
            part.mask.copy_(mask)
            part.keep.copy_(mask.sum())
