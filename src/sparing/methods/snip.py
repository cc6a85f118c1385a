"""SNIP: single-shot network pruning. One mini-batch decides, before training, which weights there are.

    c = |dL/dW ⊙ W|                                          at the initial weights: how much the loss
                                                             changes if a weight is removed
    M = the (1 − s) share of largest c, all layers           once, and fixed from then on
    S = W ⊙ M,   dW = dS ⊙ M

Source: Lee, Ajanthan & Torr, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019,
algorithm 1, and its code (model.py).
Deviations: the mini-batch is the first of training, and its optimizer step moves nothing. c is not divided by its
sum, which changes no choice. The network is initialized by its own rules, and the initialization that is scored is
the one that is trained. Biases are not pruned.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.budget import Budget
from sparing.layers import Layer
from sparing.method import Layers, Optimizers, Parametrizations, Plan, Ranking
from sparing.parametrizations import Mask
from sparing.patterns import Units
from sparing.sparsifier import Sparsifier


@dataclass(frozen=True, kw_only=True)
class SNIP(Ranking):
    """Keep the weights whose removal would change the loss of the first mini-batch most.

    The network is dense until the first optimizer step. That step makes the masks from the gradient it finds and
    moves no weight, so training starts from the initial ones. Accumulate gradients before that step to decide by more
    than one mini-batch. A layer that gets no gradient is pruned first.

    `sparsity`, `budget` and `pattern` are those of `sparing.method.Ranking`.

    Examples:
        >>> model = nn.Linear(100, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparsify_(model, SNIP(sparsity=0.9)).attach(optimizer)
        >>> model(torch.randn(8, 100)).square().mean().backward()
        >>> optimizer.step()
        >>> report(model).total.nonzero
        100
    """

    name = "snip"

    budget: Budget | str = "global"

    def parametrizations(self, layers: Layers, plan: Plan) -> Parametrizations:
        return {name: Mask(torch.ones_like(layer.weight, dtype=torch.bool)) for name, layer in layers.items()}

    def before_step(self, sparsifier: Sparsifier, optimizers: Optimizers) -> None:
        if sparsifier.step == 0:
            sparsifier.set_masks(sparsifier.plan.allocation.masks(_sensitivity))
            sparsifier.skip_step()


def _sensitivity(layer: Layer, units: Units) -> Tensor:
    gradient = layer.weight.grad
    if gradient is None:
        return units.mean(torch.zeros_like(layer.weight, dtype=torch.float32))
    # In float32: in half precision the products of small numbers become 0, and ties are arbitrary.
    return units.mean((gradient.float() * layer.weight.float()).abs())
