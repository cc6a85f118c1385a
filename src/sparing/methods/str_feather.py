"""STR-Feather: the learned thresholds of STR under the curve and the gradients of Feather, to a total.

    t_l = sigmoid(s_l)                                              one s a layer
    S_l = sign(W) ⊙ (|W|³ − t_l³)^(1/3) ⊙ M,   M = 1{|W| > t_l}

    dW  = dS ⊙ (M + θ (1 − M))                                      dead weights are trained, too
    s_l ← (1 − ηλ) s_l + η · sigmoid'(s_l) · Σ dS ⊙ sign(S)         as in STR
    s_l ← ρ · s_l            every so many steps, with the one ρ that the total needs (`sparing.target`)

Feather has one threshold for the whole network, which spends weights in early layers, where each is used at
every pixel. Learned thresholds spend fewer there, and are what STR has; the rest is Feather's.

Source: ours. STR is Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity",
ICML 2020; Feather is Glentis Georgoulakis, Retsinas & Maragos, "Feather: An Elegant Solution to Effective DNN
Sparsification", BMVC 2023.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from sparing.errors import InputError
from sparing.layers import Layer
from sparing.macs import Example
from sparing.parametrizations import FeatherStraightThrough, LearnedThreshold, Sparse, learned_number
from sparing.sparsify import Method, Sparsifier
from sparing.target import Goal, Target


@dataclass(frozen=True)
class STRFeather(Method):
    """Learn a threshold for each layer, hardly shrink what is above it, and train what is below it as well.

    Clip the gradients, as Feather's authors do, at norm 3: a run to 99 % went astray without.

    Args:
        steps: optimizer steps of the whole run.
        sparsity: end with this share of zeros, in all layers together; see `sparing.target.Target`.
        macs: or with this share (float) or number (int) of the model's MACs.
        input_size: of one input, for MACs.
        begin: where the way there begins: a step (int) or a fraction of `steps` (float).
        end: where it ends, likewise.
        every: optimizer steps between two pulls.
        theta: θ in [0, 1], the factor on the gradient of dead weights.
        init: the value s starts from.

    Raises:
        InputError: a value is out of range; a total that cannot be reached.

    Examples:
        >>> STRFeather(steps=1000, sparsity=0.9).theta
        0.5
    """

    name: ClassVar[str] = "str_feather"

    steps: int
    sparsity: float | None = None
    macs: float | int | None = None
    input_size: Example | None = None
    begin: int | float = 0.2
    end: int | float = 0.8
    every: int = 16
    theta: float = 0.5
    init: float = -5.0

    def __post_init__(self) -> None:
        self._target()
        for field, low, high in (("theta", 0, 1), ("init", -100, 0)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise InputError(f"STRFeather: {field} must be a number from {low} to {high}, got {value!r}")

    def parametrizations(self, layers: Mapping[str, Layer]) -> dict[str, Sparse]:
        return {
            name: FeatherLearnedThreshold(learned_number((1,), self.init, layer.weight), self.theta)
            for name, layer in layers.items()
        }

    def plan(self, model: nn.Module, layers: Mapping[str, Layer]) -> Goal:
        return self._target().goal(model, layers)

    def after_step(self, sparsifier: Sparsifier) -> None:
        self._target().after_step(sparsifier)

    def _target(self) -> Target:
        return Target(
            "STRFeather", self.sparsity, self.macs, self.steps, self.input_size, self.begin, self.end, self.every
        )


class FeatherLearnedThreshold(LearnedThreshold):
    """The formula of the module, with t = sigmoid(s).

    Args:
        s: shape (1,).
        theta: θ.
    """

    def __init__(self, s: nn.Parameter, theta: float) -> None:
        super().__init__(s, torch.sigmoid)
        self.theta = theta

    def forward(self, weight: Tensor) -> Tensor:
        result: Tensor = FeatherStraightThrough.apply(weight, self.threshold(), self.theta)
        return result

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, theta={self.theta}"
