"""Magnitude: one-shot magnitude pruning. The smallest weights of each layer are removed at one step, for good.

    M = 1                                                    before the step `at`
    M = the (1 − s) share of largest |W|, a layer            at that step, and fixed from then on
    S = W ⊙ M,   dW = dS ⊙ M

Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015,
section 3: train, prune, fine-tune.
Deviations: the paper removes |W| below a multiple of the layer's standard deviation, in several rounds;
here a layer keeps an exact count, in one. Dropout and regularization are left to the user.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from sparing.budget import Budget, check_target, kept_counts
from sparing.errors import InputError
from sparing.layers import Layer
from sparing.masks import keep_top
from sparing.parametrizations import Mask, Sparse
from sparing.schedules import check_schedule, to_step
from sparing.sparsify import Method, Sparsifier


@dataclass(frozen=True)
class Magnitude(Method):
    """Remove the smallest weights of each layer at once; the others train on.

    With `at` 0 the mask is made by `sparsify_` itself: the way to prune a trained model and then
    fine-tune it. Later, the network is dense until so many optimizer steps are done.

    Args:
        steps: optimizer steps of the whole run.
        sparsity: of each layer; or of all together with budget="erk".
        budget: "uniform", "erk", a Budget, a budget file, or a published name.
        at: when the mask is made: after a number of steps (int) or a fraction of `steps` (float).

    Raises:
        InputError: a value is out of range; see `check_target` and `check_schedule`.

    Examples:
        >>> model = nn.Linear(100, 10)
        >>> _ = sparsify_(model, Magnitude(steps=1000, sparsity=0.9))
        >>> report(model).total.nonzero
        100
    """

    name: ClassVar[str] = "magnitude"

    steps: int
    sparsity: float | None = None
    budget: Budget | str | None = None
    at: int | float = 0.0

    def __post_init__(self) -> None:
        check_target("Magnitude", self.sparsity, self.budget)
        check_schedule("Magnitude", self.steps, 0, 1.0, 1)
        latest = self.steps if isinstance(self.at, int) else 1.0
        if isinstance(self.at, bool) or not isinstance(self.at, (int, float)) or not 0 <= self.at <= latest:
            allowed = f"a step from 0 to {self.steps} or a fraction (float) from 0.0 to 1.0"
            raise InputError(f"Magnitude: at must be {allowed}, got {self.at!r}")

    @torch.no_grad()
    def parametrizations(self, layers: Mapping[str, Layer]) -> dict[str, Sparse]:
        counts = kept_counts(layers, self.sparsity, self.budget)
        at_once = to_step(self.at, self.steps) == 0
        return {
            name: Mask(keep_top(layer.weight.abs(), counts[name] if at_once else layer.weight.numel()), counts[name])
            for name, layer in layers.items()
        }

    @torch.no_grad()
    def after_step(self, sparsifier: Sparsifier) -> None:
        if sparsifier.step != to_step(self.at, self.steps):
            return
        for layer, part in sparsifier.parts(Mask):
            part.mask.copy_(keep_top(layer.weight.abs(), int(part.keep)))
