"""STR: soft threshold weight reparameterization for learnable sparsity.

    S(W, s) = sign(W) · relu(|W| − k · g(s))           g = sigmoid, k = 1 in the paper

    W ← (1 − ηλ) W − η · dL/dS ⊙ 1{S ≠ 0}
    s ← (1 − ηλ) s + η · k g'(s) · Σ dL/dS ⊙ sign(S)   η learning rate, λ weight decay

s starts far below zero, where the threshold is nearly nothing. Weight decay pulls s up toward
zero; the loss holds it back where weights matter. Each layer settles on a sparsity of its own.
How sparse all of them are together follows from λ and the start of s. Or it is asked for, which
is not of the paper: then s ← ρ s as well, with the one ρ that the total needs (`sparing.target`).

Source: Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity",
ICML 2020, section 3 and Algorithm 1.
Deviations: s has shape (1,) where the paper's code has (1, 1); it is kept in float32.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from sparing.decay import weight_decay_for
from sparing.errors import InputError, nearest
from sparing.layers import TRANSPOSED_CONVOLUTIONS, Layer
from sparing.macs import Example
from sparing.parametrizations import SoftThreshold, Sparse, learned_number
from sparing.sparsify import Method, Sparsifier
from sparing.target import Goal, Target
from sparing.threshold import MAPS

GRANULARITIES = ("layer", "filter", "weight", "global")


@dataclass(frozen=True)
class STR(Method):
    """Learn a threshold for each layer, together with the weights.

    S(W, s) = sign(W) · relu(|W| − scale · g(s))

    Args:
        init: the value s starts from. Lower starts pruning later and ends less sparse.
        g: "sigmoid", "exp", or a callable from a tensor s to a tensor of the same shape, ≥ 0.
        scale: a constant factor of the threshold, the k of k · sigmoid.
        granularity: "layer", one s a layer; "filter", one an output channel or row; "weight", one
            a weight; "global", one for all layers.
        sparsity: end with this share of zeros, in all layers together; see `sparing.target.Target`.
        macs: end with this share (float) or number (int) of the model's MACs.
        steps: optimizer steps of the run, for either of them.
        input_size: of one input, for MACs.
        begin: where the way there begins: a step (int) or a fraction of `steps` (float).
        end: where it ends, likewise.
        every: optimizer steps between two pulls.

    Without a total, how sparse the network becomes is decided by `init` and by the weight decay on s
    (see `param_groups`): with weight decay 0 on s nothing pulls the thresholds up.

    Raises:
        InputError: a value is of the wrong type or out of range; "filter" on a grouped transposed
            convolution, whose filters are no slices of its weight; a total that cannot be reached.

    Examples:
        >>> STR(sparsity=0.9, steps=1000).g
        'sigmoid'
    """

    name: ClassVar[str] = "str"

    init: float = -5.0
    g: str | Callable[[Tensor], Tensor] = "sigmoid"
    scale: float = 1.0
    granularity: str = "layer"
    sparsity: float | None = None
    macs: float | int | None = None
    steps: int | None = None
    input_size: Example | None = None
    begin: int | float = 0.2
    end: int | float = 0.8
    every: int = 16

    def __post_init__(self) -> None:
        for field in ("init", "scale"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise InputError(f"STR: {field} must be a finite number, got {value!r}")
        if self.scale <= 0:
            raise InputError(f"STR: scale must be above 0, got {self.scale!r}")
        if self.granularity not in GRANULARITIES:
            raise InputError(
                f"STR: unknown granularity {self.granularity!r}; {nearest(str(self.granularity), GRANULARITIES)}"
            )
        if not callable(self.g) and (not isinstance(self.g, str) or self.g not in MAPS):
            raise InputError(f"STR: unknown g {self.g!r}; {nearest(str(self.g), MAPS)} (or give a callable)")
        at_start = self._map()(torch.full((1,), float(self.init), device="cpu"))
        if not isinstance(at_start, Tensor) or at_start.shape != (1,):
            raise InputError(f"STR: g must return a tensor of the shape of s; for shape (1,) it returned {at_start!r}")
        if not float(at_start) >= 0 or not math.isfinite(float(at_start)):
            raise InputError(f"STR: g(init) must be a finite threshold ≥ 0; g({self.init}) is {float(at_start)}")
        self._target()

    @classmethod
    def for_schedule(
        cls, sparsity: float, learning_rates: Iterable[float], momentum: float, init: float = -20.0
    ) -> tuple["STR", float]:
        """The method, and the weight decay on s that takes a run to about the sparsity wished for.

        λ = (ln(|init| / 7) + 0.75 · (1 − sparsity)^−0.85) · (1 − μ) / Σ η

        A rule of thumb; arguments, errors and where it comes from are those of
        `sparing.decay.weight_decay_for`.

        Examples:
            >>> method, decay = STR.for_schedule(0.9, [0.1] * 1000, momentum=0.9)
            >>> method.init, round(decay, 4)
            (-20.0, 0.0064)
        """
        return cls(init=init), weight_decay_for(sparsity, learning_rates, momentum, init)

    def parametrizations(self, layers: Mapping[str, Layer]) -> dict[str, Sparse]:
        g = self._map()
        if self.granularity == "global":
            # One module, not only one parameter: moving or loading a model may replace parameters.
            first = next(iter(layers.values()))
            shared = SoftThreshold(learned_number((1,), self.init, first.weight), g, self.scale)
            return dict.fromkeys(layers, shared)
        return {
            name: SoftThreshold(learned_number(self._shape(layer), self.init, layer.weight), g, self.scale)
            for name, layer in layers.items()
        }

    def plan(self, model: nn.Module, layers: Mapping[str, Layer]) -> Goal | None:
        target = self._target()
        return None if target is None else target.goal(model, layers)

    def after_step(self, sparsifier: Sparsifier) -> None:
        target = self._target()
        if target is not None:
            target.after_step(sparsifier)

    def _target(self) -> Target | None:
        if self.sparsity is None and self.macs is None:
            return None
        if self.granularity == "global" or callable(self.g):
            raise InputError("STR: a total needs a granularity other than 'global', and a g known by name")
        return Target("STR", self.sparsity, self.macs, self.steps, self.input_size, self.begin, self.end, self.every)

    def _map(self) -> Callable[[Tensor], Tensor]:
        return MAPS[self.g] if isinstance(self.g, str) else self.g

    def _shape(self, layer: Layer) -> tuple[int, ...]:
        shape = tuple(layer.weight.shape)
        if self.granularity == "layer":
            return (1,)
        if self.granularity == "weight":
            return shape
        ones = (1,) * len(shape)
        if not isinstance(layer.module, TRANSPOSED_CONVOLUTIONS):
            return shape[:1] + ones[1:]
        if layer.module.groups != 1:
            raise InputError(
                f"STR: granularity='filter' on layer {layer.name!r}, a transposed convolution of "
                f"{layer.module.groups} groups: its filters are no slices of its weight; use 'layer' or 'weight'"
            )
        return (1, shape[1], *ones[2:])
