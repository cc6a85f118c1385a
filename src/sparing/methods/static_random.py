"""StaticRandom: a random sparse network, fixed before training.

    M = a random choice of the positions to keep          once, from the seed
    S = W ⊙ M,   dW = dS ⊙ M

It is the baseline, at the same budget, of methods that choose their weights.

Source: Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, section 4: the baseline "Static".
Deviations: the positions are those of RigL's first mask with the same seed and budget. Weights keep the initial values
of the dense network, and are not scaled up for the smaller fan-in.
"""

from dataclasses import dataclass

from sparing.budget import Budget
from sparing.growing import first_score
from sparing.method import Layers, Parametrizations, Plan, Ranking
from sparing.parametrizations import Mask
from sparing.schedules import check_seed


@dataclass(frozen=True, kw_only=True)
class StaticRandom(Ranking):
    """Train a random choice of weights, the same from start to end; nonzero ones first, if layers are sparse already.

    `sparsity`, `budget` and `pattern` are those of `sparing.method.Ranking`.

    Args:
        seed: of the random masks; equal on all ranks, whatever their own seeds.

    Examples:
        >>> model = nn.Linear(100, 10)
        >>> _ = sparsify_(model, StaticRandom(sparsity=0.9))
        >>> report(model).total.nonzero
        100
    """

    name = "static_random"
    takes_global = False

    budget: Budget | str = "erk"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self)

    def parametrizations(self, layers: Layers, plan: Plan) -> Parametrizations:
        return {name: Mask(mask) for name, mask in plan.allocation.masks(first_score(layers, self.seed)).items()}
