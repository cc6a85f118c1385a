"""SNIP: single-shot network pruning. One mini-batch decides, before training, which weights are kept.

    c = |dL/dW ⊙ W|                                at the initial weights: the change of the loss without a weight
    M = the (1 − s) share of largest c             over all layers, once, before training
    S = W ⊙ M,   dW = dS ⊙ M

Source: Lee, Ajanthan & Torr, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019,
algorithm 1, and its code (model.py).
Deviations: the mini-batch is the first of training, and its optimizer step moves no weight. c is not divided by its
sum, which does not change the order. The network has its own initialization, and is trained from the weights that were
scored. Biases are not pruned.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.budget import Budget
from sparing.layers import Layer
from sparing.method import Optimizers, Ranking, check_gradients
from sparing.patterns import Units
from sparing.sparsifier import Sparsifier


@dataclass(frozen=True, kw_only=True)
class SNIP(Ranking):
    """Keep the weights whose removal would change the loss of the first mini-batch most.

    The network is dense until the first optimizer step, which makes the masks from its gradients and moves no weight.
    Accumulate gradients before that step to score more than one mini-batch. A layer without gradient is pruned first.

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

    def before_step(self, sparsifier: Sparsifier, optimizers: Optimizers) -> None:
        if sparsifier.step == 0:
            check_gradients(self, {name: layer.weight.grad for name, layer in sparsifier.layers.items()})
            sparsifier.set_masks(sparsifier.plan.allocation.masks(_sensitivity))
            sparsifier.skip_step()


def _sensitivity(layer: Layer, units: Units) -> Tensor:
    gradient = layer.weight.grad
    if gradient is None:
        return units.mean(torch.zeros_like(layer.weight, dtype=torch.float32))
    # In float32: in half precision the products of small numbers become 0, and ties are arbitrary.
    return units.mean((gradient.float() * layer.weight.float()).abs())
