"""DNW: discovering neural wirings. All weights are trained, the largest are used.

    M = the (1 − s) share of largest |W|, a layer       made anew after every step
    S = W ⊙ M,   dW = dS                                 straight through, to unused weights too

A weight outside the mask goes on being moved by the gradient it would have if it were used; once it
is among the largest it comes in, and another goes out.

Source: Wortsman, Farhadi, Rastegari, "Discovering Neural Wirings", NeurIPS 2019, and its code
(ChooseEdges).
Deviations: the code makes the mask in every forward pass, here it is made after every optimizer step;
between two steps the weights stand still, so the masks are the same. The code rounds the number of
zeros down, here it is rounded to the nearest.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from sparing.budget import Budget, check_target, kept_counts
from sparing.errors import InputError
from sparing.layers import Layer
from sparing.masks import keep_top
from sparing.parametrizations import DenseGradientMask, Sparse
from sparing.sparsify import Method, Sparsifier


@dataclass(frozen=True)
class DNW(Method):
    """Use the largest weights of each layer, and train all of them straight through the mask.

    S = W ⊙ M,   dW = dS

    Args:
        sparsity: from the first step on, of each layer; or of all together with budget="erk".
        budget: "uniform", "erk", a Budget, a budget file, or a published name.
        every: optimizer steps between two masks.

    Raises:
        InputError: a value is out of range; see `check_target`.

    Examples:
        >>> DNW(sparsity=0.9)
        DNW(sparsity=0.9, budget=None, every=1)
    """

    name: ClassVar[str] = "dnw"

    sparsity: float | None = None
    budget: Budget | str | None = None
    every: int = 1

    def __post_init__(self) -> None:
        check_target("DNW", self.sparsity, self.budget)
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise InputError(f"DNW: every must be a whole number of optimizer steps, at least 1, got {self.every!r}")

    def parametrizations(self, layers: Mapping[str, Layer]) -> dict[str, Sparse]:
        counts = kept_counts(layers, self.sparsity, self.budget)
        return {
            name: DenseGradientMask(keep_top(layer.weight.detach().abs(), counts[name]), counts[name])
            for name, layer in layers.items()
        }

    @torch.no_grad()
    def after_step(self, sparsifier: Sparsifier) -> None:
        if sparsifier.step % self.every != 0:
            return
        for layer, part in sparsifier.parts(DenseGradientMask):
            part.mask.copy_(keep_top(layer.weight.abs(), int(part.keep)))
