"""DNW: discovering neural wirings. All weights are trained, the largest are used.

    M = the (1 − s) share of largest |W|                 after every step
    S = W ⊙ M,   dW = dS                                 straight through: pruned weights are trained, too

Source: Wortsman, Farhadi, Rastegari, "Discovering Neural Wirings", NeurIPS 2019, and its code (ChooseEdges).
Deviations: the code makes the mask in every forward pass. Here it is made after every optimizer step, and is the same,
because weights do not change between two steps. The code rounds the number of zeros down, here it is rounded to the
nearest.
"""

from dataclasses import dataclass

from sparing.allocation import magnitude
from sparing.method import Layers, Optimizers, Parametrizations, Plan, Ranking
from sparing.parametrizations import DenseGradientMask
from sparing.sparsifier import Sparsifier


@dataclass(frozen=True, kw_only=True)
class DNW(Ranking):
    """Use the largest weights of each layer, and train all of them straight through the mask.

    `sparsity`, `budget` and `pattern` are those of `sparing.method.Ranking`: the target from the first step on.

    Args:
        every: optimizer steps between two masks.

    Examples:
        >>> model = nn.Linear(100, 10)
        >>> _ = sparsify_(model, DNW(sparsity=0.9))
        >>> report(model).total.nonzero
        100
    """

    name = "dnw"
    retargets = True

    every: int = 1

    def parametrizations(self, layers: Layers, plan: Plan) -> Parametrizations:
        return {name: DenseGradientMask(mask) for name, mask in plan.allocation.masks(magnitude).items()}

    def after_step(self, sparsifier: Sparsifier, optimizers: Optimizers) -> None:
        if sparsifier.step % self.every == 0:
            sparsifier.set_masks(sparsifier.plan.allocation.masks(magnitude))
