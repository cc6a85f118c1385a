"""Feather: a thresholding between soft and hard, straight-through gradients, one global threshold.

    r_t = r · (1 − (1 − (t − t0) / (t1 − t0))³)                the cubic ramp from 0 to r
    th  = the largest |W| but for the (1 − r_t) share of largest, all layers at once
    M   = 1{|W| > th}
    S   = sign(W) ⊙ (|W|³ − th³)^(1/3) ⊙ M
    dW  = dS ⊙ (M + θ (1 − M)),   θ = ½ for r > 0.95, else 1

Source: Glentis Georgoulakis, Retsinas & Maragos, "Feather: An Elegant Solution to Effective DNN
Sparsification", BMVC 2023, and its code (sparse_utils.py).
Deviations: the code takes th from an interpolated quantile; here the count is exact, but for weights that tie
with th. When training is over the code replaces S by the hard threshold W ⊙ M; here the network stays the one
that was trained. The code takes a new threshold every step (`every=1`); see ST-3.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparing.budget import check_target
from sparing.errors import InputError
from sparing.layers import Layer
from sparing.masks import count_kept, largest_left_out
from sparing.parametrizations import FeatherStraightThrough, Sparse
from sparing.schedules import check_schedule, cubic, is_update, to_step
from sparing.sparsify import Method, Sparsifier


@dataclass(frozen=True)
class Feather(Method):
    """Zero the smallest weights of the whole network, shrink those near the threshold, train them all.

    S = sign(W) ⊙ (|W|³ − th³)^(1/3) is continuous, unlike the hard threshold, and leaves large weights
    almost as they are, unlike the soft one.

    Args:
        steps: optimizer steps of the whole run.
        sparsity: the final one, r, of all layers together.
        begin: t0, where the ramp begins: a step (int) or a fraction of `steps` (float).
        end: t1, where it ends, likewise.
        every: optimizer steps between two updates of the threshold.
        theta: θ in [0, 1], the factor on the gradient of dead weights; None takes ½ above a sparsity of
            0.95 and 1 up to it.

    Raises:
        InputError: a value is out of range; see `check_target` and `check_schedule`.

    Examples:
        >>> Feather(steps=1000, sparsity=0.9)
        Feather(steps=1000, sparsity=0.9, begin=0.0, end=0.5, every=16, theta=None)
    """

    name: ClassVar[str] = "feather"

    steps: int
    sparsity: float
    begin: int | float = 0.0
    end: int | float = 0.5
    every: int = 16
    theta: float | None = None

    def __post_init__(self) -> None:
        check_target("Feather", self.sparsity, None)
        check_schedule("Feather", self.steps, self.begin, self.end, self.every)
        theta = self.theta
        if theta is None:
            return
        if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 <= theta <= 1:
            raise InputError(f"Feather: theta must be None or a factor from 0 to 1, got {theta!r}")

    def parametrizations(self, layers: Mapping[str, Layer]) -> dict[str, Sparse]:
        theta = self.theta if self.theta is not None else 0.5 if self.sparsity > 0.95 else 1.0
        return {name: FeatherThreshold(layer.weight, theta) for name, layer in layers.items()}

    @torch.no_grad()
    def after_step(self, sparsifier: Sparsifier) -> None:
        begin, end = to_step(self.begin, self.steps), to_step(self.end, self.steps)
        if not is_update(sparsifier.step, begin, self.steps, self.every):
            return
        layers, parts = zip(*sparsifier.parts(FeatherThreshold), strict=True)
        sizes = [layer.weight.abs() for layer in layers]
        sparsity = cubic(sparsifier.step, begin, end, self.sparsity)
        th = largest_left_out(sizes, count_kept(sum(size.numel() for size in sizes), sparsity))
        for part in parts:
            part.th.copy_(th)


class FeatherThreshold(Sparse):
    """S = sign(W) ⊙ (|W|³ − th³)^(1/3) ⊙ M forward, dW = dS ⊙ (M + θ (1 − M)) backward, M = 1{|W| > th}.

    Args:
        weight: gives dtype and device.
        theta: θ.
    """

    th: Tensor

    def __init__(self, weight: Tensor, theta: float) -> None:
        super().__init__()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.register_buffer("th", torch.zeros((), dtype=dtype, device=weight.device))
        self.theta = theta

    def threshold(self) -> Tensor:
        return self.th

    def forward(self, weight: Tensor) -> Tensor:
        result: Tensor = FeatherStraightThrough.apply(weight, self.th, self.theta)
        return result

    def extra_repr(self) -> str:
        return f"theta={self.theta}"
