"""SNIP: single-shot network pruning. One mini-batch decides, before training, which weights there are.

    c = |dL/dW ⊙ W|                                          at the initial weights: how much the loss
                                                             changes if a weight is taken away
    M = the (1 − s) share of largest c, all layers           once, and fixed from then on
    S = W ⊙ M,   dW = dS ⊙ M

Source: Lee, Ajanthan & Torr, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR
2019, algorithm 1, and its code (model.py).
Deviations: the mini-batch is the first of training, and its optimizer step moves nothing. c is not
divided by its sum, which changes no choice. The network is initialized by its own rules.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from sparing.budget import check_target
from sparing.layers import Layer
from sparing.masks import count_kept, keep_top_together
from sparing.param_groups import skip_step
from sparing.parametrizations import Mask, Sparse
from sparing.sparsify import Method, Sparsifier


@dataclass(frozen=True)
class SNIP(Method):
    """Keep the weights whose removal would change the loss of the first mini-batch most.

    The network is dense until the first optimizer step. That step makes the masks from the gradient
    it finds and moves no weight, so training starts from the initial ones. Accumulate gradients
    before that step to decide by more than one mini-batch. How sparse each layer becomes follows
    from its scores; the total is met exactly. A layer that gets no gradient is pruned first.

    Args:
        sparsity: of all layers together.

    Raises:
        InputError: a value is out of range; see `check_target`.

    Examples:
        >>> model = nn.Linear(100, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparsify_(model, SNIP(sparsity=0.9)).attach(optimizer)
        >>> model(torch.randn(8, 100)).square().mean().backward()
        >>> optimizer.step()
        >>> report(model).total.nonzero
        100
    """

    name: ClassVar[str] = "snip"

    sparsity: float

    def __post_init__(self) -> None:
        check_target("SNIP", self.sparsity, None)

    def parametrizations(self, layers: Mapping[str, Layer]) -> dict[str, Sparse]:
        return {
            name: Mask(torch.ones_like(layer.weight, dtype=torch.bool), layer.weight.numel())
            for name, layer in layers.items()
        }

    @torch.no_grad()
    def before_step(self, sparsifier: Sparsifier) -> None:
        if sparsifier.step > 0:
            return
        layers, parts = zip(*sparsifier.parts(Mask), strict=True)
        scores = [_sensitivity(layer.weight) for layer in layers]
        count = count_kept(sum(score.numel() for score in scores), self.sparsity)
        for part, mask in zip(parts, keep_top_together(scores, count), strict=True):
            part.mask.copy_(mask)
            part.keep.copy_(mask.sum())
        skip_step(sparsifier.optimizers)


def _sensitivity(weight: torch.Tensor) -> torch.Tensor:
    if weight.grad is None:
        return torch.zeros_like(weight, dtype=torch.float32)
    # In float32: in half precision the products of small numbers become 0, and ties are arbitrary.
    return (weight.grad.float() * weight.float()).abs()
