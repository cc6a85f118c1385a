"""GlobalMagnitudeOneShot: the smallest weights of the whole network are removed at one step, for good.

    M = 1                                                    before the step `at`
    M = the (1 − s) share of largest |W|, all layers         at that step, and fixed from then on
    S = W ⊙ M,   dW = dS ⊙ M

Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015,
section 3, for train, prune, fine-tune; Frankle & Carbin, "The Lottery Ticket Hypothesis", ICLR 2019,
section 4, for comparing the weights of all layers with one another.
Deviations: one round of pruning, where both papers prune in several; the weights that stay are not put
back to their first values.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from sparing.budget import check_target
from sparing.errors import InputError
from sparing.layers import Layer
from sparing.masks import count_kept, keep_top_together
from sparing.parametrizations import Mask, Sparse
from sparing.schedules import check_schedule, to_step
from sparing.sparsify import Method, Sparsifier


@dataclass(frozen=True)
class GlobalMagnitudeOneShot(Method):
    """Remove the smallest weights of the whole network at once; the others train on.

    With `at` 0 the masks are made by `sparsify_` itself: the way to prune a trained model and then
    fine-tune it. Only the total is given, and it is met exactly; the `keep` of a mask is what its
    layer has now.

    Args:
        steps: optimizer steps of the whole run.
        sparsity: of all layers together.
        at: when the masks are made: after a number of steps (int) or a fraction of `steps` (float).

    Raises:
        InputError: a value is out of range; see `check_target` and `check_schedule`.

    Examples:
        >>> model = nn.Sequential(nn.Linear(100, 10), nn.Linear(10, 10))
        >>> _ = sparsify_(model, GlobalMagnitudeOneShot(steps=1000, sparsity=0.9))
        >>> report(model).total.nonzero
        110
    """

    name: ClassVar[str] = "global_magnitude_one_shot"

    steps: int
    sparsity: float
    at: int | float = 0.0

    def __post_init__(self) -> None:
        check_target("GlobalMagnitudeOneShot", self.sparsity, None)
        check_schedule("GlobalMagnitudeOneShot", self.steps, 0, 1.0, 1)
        latest = self.steps if isinstance(self.at, int) else 1.0
        if isinstance(self.at, bool) or not isinstance(self.at, (int, float)) or not 0 <= self.at <= latest:
            allowed = f"a step from 0 to {self.steps} or a fraction (float) from 0.0 to 1.0"
            raise InputError(f"GlobalMagnitudeOneShot: at must be {allowed}, got {self.at!r}")

    @torch.no_grad()
    def parametrizations(self, layers: Mapping[str, Layer]) -> dict[str, Sparse]:
        at_once = to_step(self.at, self.steps) == 0
        weights = [layer.weight.abs() for layer in layers.values()]
        total = sum(weight.numel() for weight in weights)
        masks = keep_top_together(weights, count_kept(total, self.sparsity) if at_once else total)
        return {name: _mask(mask) for name, mask in zip(layers, masks, strict=True)}

    @torch.no_grad()
    def after_step(self, sparsifier: Sparsifier) -> None:
        if sparsifier.step != to_step(self.at, self.steps):
            return
        layers, parts = zip(*sparsifier.parts(Mask), strict=True)
        scores = [layer.weight.abs() for layer in layers]
        count = count_kept(sum(score.numel() for score in scores), self.sparsity)
        for part, mask in zip(parts, keep_top_together(scores, count), strict=True):
            part.mask.copy_(mask)
            part.keep.copy_(mask.sum())


def _mask(mask: torch.Tensor) -> Mask:
    # A mask without data (meta device) cannot be counted; loading a checkpoint brings the number.
    return Mask(mask, mask.numel() if mask.is_meta else int(mask.sum()))
