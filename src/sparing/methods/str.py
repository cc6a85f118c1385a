"""STR: soft threshold weight reparameterization for learnable sparsity.

    S(W, s) = sign(W) · relu(|W| − k · g(s))           g = sigmoid, k = 1 in the paper

    W ← (1 − ηλ) W − η · dL/dS ⊙ 1{S ≠ 0}
    s ← (1 − ηλ) s + η · k g'(s) · Σ dL/dS ⊙ sign(S)   η learning rate, λ weight decay

s starts far below zero, where the threshold is nearly 0. Weight decay raises s toward zero, and the loss lowers it
where weights matter, so each layer reaches its own sparsity. The total follows from λ and the start of s. Two things
are not in the paper: a target, for which all s are rescaled by one factor (`sparing.target`), and groups of weights
that share one norm (`sparing.group_threshold`).

Source: Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity", ICML 2020, section 3 and
Algorithm 1.
Deviations: s has shape (1,) where the paper's code has (1, 1); it is kept in float32.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparing.decay import warn_if_nothing_prunes, weight_decay_for
from sparing.errors import InputError, nearest
from sparing.group_threshold import group_soft_threshold
from sparing.layers import Layer, filter_shape
from sparing.method import Layers, Parametrizations
from sparing.parametrizations import LearnedThreshold, SoftThreshold, learned_number
from sparing.patterns import Units, Unstructured
from sparing.target import Rescaling
from sparing.threshold import MAPS

GRANULARITIES = ("layer", "filter", "weight", "global")


@dataclass(frozen=True, kw_only=True)
class STR(Rescaling):
    """Learn a threshold for each layer, together with the weights.

    S(W, s) = sign(W) · relu(|W| − scale · g(s))

    `sparsity`, `macs`, `input_size`, `begin`, `end`, `every` and `pattern` are those of `sparing.target.Rescaling`.
    Without a target the sparsity follows from `init` and the weight decay on s (see `param_groups`): with decay 0
    nothing raises the thresholds.

    Args:
        init: the value s starts from. Lower starts pruning later and ends less sparse.
        g: "sigmoid", "exp", or a callable from a tensor s to a tensor of the same shape, ≥ 0.
        scale: a constant factor of the threshold, the k of k · sigmoid.
        granularity: one s per "layer", per "filter" (output channel or row), per "weight", or one for all layers
            ("global").

    Raises:
        InputError: a value is of the wrong type or out of range; granularity or pattern is not defined for a layer;
            the target cannot be reached.

    Examples:
        >>> STR(sparsity=0.9).g
        'sigmoid'
    """

    name = "str"
    ranges: ClassVar = {"init": "(-inf, inf)", "scale": "(0, inf)"}

    init: float = -5.0
    g: str | Callable[[Tensor], Tensor] = "sigmoid"
    scale: float = 1.0
    granularity: str = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity not in GRANULARITIES:
            raise InputError(
                f"STR: unknown granularity {self.granularity!r}; {nearest(str(self.granularity), GRANULARITIES)}"
            )
        if not callable(self.g) and not (isinstance(self.g, str) and self.g in MAPS):
            raise InputError(f"STR: unknown g {self.g!r}; {nearest(str(self.g), MAPS)} (or give a callable)")
        at_start = self._map(torch.full((1,), float(self.init), device="cpu"))
        if not isinstance(at_start, Tensor) or at_start.shape != (1,):
            raise InputError(f"STR: g must return a tensor of the shape of s; for shape (1,) it returned {at_start!r}")
        if not float(at_start) >= 0 or not math.isfinite(float(at_start)):
            raise InputError(f"STR: g(init) must be a finite threshold ≥ 0; g({self.init}) is {float(at_start)}")
        if self.pattern != Unstructured() and self.granularity != "layer":
            raise InputError(f"STR: pattern={self.pattern} needs granularity 'layer', got {self.granularity!r}")
        if self.rescales and (self.granularity == "global" or callable(self.g)):
            raise InputError("STR: a target needs a granularity other than 'global', and a g known by name")

    @classmethod
    def for_schedule(
        cls, sparsity: float, learning_rates: Sequence[float], momentum: float, init: float = -20.0, **arguments: Any
    ) -> tuple["STR", float]:
        """Return the method, and the weight decay on s that takes a run to about this sparsity.

        λ = (ln(|init| / 7) + 0.75 · (1 − sparsity)^−0.85) · (1 − μ) / Σ η

        A rule of thumb; sparsity, errors and source are those of `sparing.decay.weight_decay_for`.

        Examples:
            >>> method, decay = STR.for_schedule(0.9, [0.1] * 1000, momentum=0.9)
            >>> method.init, round(decay, 4)
            (-20.0, 0.0064)
        """
        return cls(init=init, **arguments), weight_decay_for(sparsity, learning_rates, momentum, init)

    def check_schedule(self, learning_rates: Sequence[float], weight_decay: float, momentum: float) -> None:
        if not self.rescales and isinstance(self.g, str):
            warn_if_nothing_prunes(self.init, self.g, self.scale, learning_rates, weight_decay, momentum)

    def parametrizations(self, layers: Layers, plan: Any) -> Parametrizations:
        if self.granularity == "global":
            # One module, not only one parameter: moving or loading a model may replace parameters.
            first = next(iter(layers.values()))
            return dict.fromkeys(
                layers, SoftThreshold(learned_number((1,), self.init, first.weight), self._map, self.scale)
            )
        return {name: self._parametrization(layer, self.start(name, plan)) for name, layer in layers.items()}

    def _parametrization(self, layer: Layer, start: float) -> LearnedThreshold:
        s, units = learned_number(self._shape(layer), start, layer.weight), self.pattern.units(layer)
        if not units.dims:
            return SoftThreshold(s, self._map, self.scale)
        return GroupSoftThreshold(s, self._map, self.scale, units)

    @property
    def _map(self) -> Callable[[Tensor], Tensor]:
        return MAPS[self.g] if isinstance(self.g, str) else self.g

    def _shape(self, layer: Layer) -> tuple[int, ...]:
        if self.granularity == "filter":
            return filter_shape(layer)
        return tuple(layer.weight.shape) if self.granularity == "weight" else (1,)


class GroupSoftThreshold(LearnedThreshold):
    """S_G = W_G · relu(1 − t / ‖W_G‖), with ‖·‖ the root mean square over the group G.

    `s`, `g` and `scale` are as of `LearnedThreshold`; s of shape (1,).

    Args:
        units: the groups of the weight.
    """

    def __init__(self, s: nn.Parameter, g: Callable[[Tensor], Tensor], scale: float, units: Units) -> None:
        super().__init__(s, g, scale)
        self.units = units

    def forward(self, weight: Tensor) -> Tensor:
        return group_soft_threshold(weight, self.threshold(), self.units.view, self.units.dims)
