"""StaticRandom: a random sparse network, fixed before training.

    M = a random choice of keep_l positions in layer l       once, from the seed
    S = W ⊙ M,   dW = dS ⊙ M

What every method that chooses its weights has to beat at the same budget.

Source: Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, section 4: the
baseline "Static".
Deviations: the positions are those with which RigL starts from the same seed and budget. Weights keep
the initial values of the dense network; they are not scaled up for the smaller fan-in.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from sparing.budget import Budget, check_target, kept_counts
from sparing.layers import Layer
from sparing.masks import random_mask
from sparing.parametrizations import Mask, Sparse
from sparing.sparsify import Method


@dataclass(frozen=True)
class StaticRandom(Method):
    """Train a random choice of weights, the same from start to end.

    Args:
        sparsity: of all layers together with budget="erk", of each with "uniform".
        budget: "erk", "uniform", a Budget, a budget file, or a published name.
        seed: of the random masks; equal on all ranks, whatever their own seeds.

    Raises:
        InputError: a value is out of range; see `check_target`.

    Examples:
        >>> model = nn.Linear(100, 10)
        >>> _ = sparsify_(model, StaticRandom(sparsity=0.9))
        >>> report(model).total.nonzero
        100
    """

    name: ClassVar[str] = "static_random"

    sparsity: float | None = None
    budget: Budget | str | None = "erk"
    seed: int = 0

    def __post_init__(self) -> None:
        check_target("StaticRandom", self.sparsity, self.budget)

    def parametrizations(self, layers: Mapping[str, Layer]) -> dict[str, Sparse]:
        counts = kept_counts(layers, self.sparsity, self.budget)
        return {
            name: Mask(random_mask(layer.weight, counts[name], self.seed, index), counts[name])
            for index, (name, layer) in enumerate(layers.items())
        }
