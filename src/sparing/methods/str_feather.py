"""STR-Feather: the learned thresholds of STR under the curve and the gradients of Feather, with a target.

    t_l = sigmoid(s_l)                                              one s per layer
    S_l = sign(W) ⊙ (|W|³ − t_l³)^(1/3) ⊙ M,   M = 1{|W| > t_l}

    dW  = dS ⊙ (M + θ (1 − M))                                      pruned weights are trained, too
    s_l ← (1 − ηλ) s_l + η · sigmoid'(s_l) · Σ dS ⊙ sign(S)         as in STR
    s_l ← ρ · s_l            at every update, with the one factor ρ that the target needs (`sparing.target`)

Feather's one threshold for the whole network keeps many weights in early layers, where each weight costs a MAC for
every pixel. Learned thresholds keep fewer there.

Source: ours. STR is Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity", ICML 2020;
Feather is Glentis Georgoulakis, Retsinas & Maragos, "Feather: An Elegant Solution to Effective DNN Sparsification",
BMVC 2023.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparing.errors import InputError
from sparing.group_threshold import feather_threshold
from sparing.layers import Layer
from sparing.method import Layers, Optimizers, Parametrizations
from sparing.parametrizations import LearnedThreshold, learned_number
from sparing.patterns import Units
from sparing.schedules import check_number
from sparing.sparsifier import Sparsifier
from sparing.target import Rescaling, rescale


@dataclass(frozen=True, kw_only=True)
class STRFeather(Rescaling):
    """Learn a threshold for each layer, hardly shrink the weights above it, and train those below it as well.

    Clip the gradients at norm 3, as Feather's authors do: a run to 99 % sparsity diverged without it.

    `sparsity`, `macs`, `input_size`, `begin`, `end`, `every` and `pattern` are those of `sparing.target.Rescaling`.

    Args:
        theta: θ in [0, 1], the factor on the gradient of pruned weights.
        init: the value s starts from, in [-100, 0].

    Raises:
        InputError: there is no target, or a value is out of range.

    Examples:
        >>> STRFeather(sparsity=0.9).theta
        0.5
    """

    name = "str_feather"

    theta: float = 0.5
    init: float = -5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rescales:
            raise InputError("STRFeather: give sparsity=, a fraction in [0, 1), or macs=")
        check_number(self, "theta", "[0, 1]")
        check_number(self, "init", "[-100, 0]")

    def parametrizations(self, layers: Layers, plan: Any) -> Parametrizations:
        return {name: self._parametrization(layer) for name, layer in layers.items()}

    def after_step(self, sparsifier: Sparsifier, optimizers: Optimizers) -> None:
        if sparsifier.due or sparsifier.holds:
            target = sparsifier.plan
            rescale(sparsifier.layers, target, target.wanted(sparsifier.step, sparsifier.clock.start))

    def _parametrization(self, layer: Layer) -> LearnedThreshold:
        s = learned_number((1,), self.init, layer.weight)
        return FeatherLearnedThreshold(s, self.theta, self.pattern.units(layer))


class FeatherLearnedThreshold(LearnedThreshold):
    """S = sign(W) ⊙ (|W|³ − t³)^(1/3) ⊙ M with the gradients of Feather, and t = sigmoid(s).

    Args:
        s: shape (1,).
        theta: θ.
        units: what is pruned together.
    """

    def __init__(self, s: nn.Parameter, theta: float, units: Units) -> None:
        super().__init__(s, torch.sigmoid)
        self.theta, self.units = theta, units

    def forward(self, weight: Tensor) -> Tensor:
        return feather_threshold(weight, self.threshold(), self.theta, self.units.view, self.units.dims)
