"""GraSP: gradient signal preservation. Before training, keep the weights that the gradient flows by.

    Hg    = d(gᵀ g_const)/dW,   g = dL/dW                    the Hessian times the gradient
    score = −W ⊙ Hg                                          half of what ‖g‖² gains without the weight
    M     = all but the s share of largest score, all layers once, and fixed from then on
    S     = W ⊙ M,   dW = dS ⊙ M

Source: Wang, Zhang & Grosse, "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR
2020, algorithm 1, and its code (pruner/GraSP.py).
Deviations: only `prune` is the paper's. Without that call, the first two optimizer steps stand in for it:
Hg ≈ (g₂(W + p·g₁) − g₁(W)) / p with the gradients of two different mini-batches, whose difference is
noise in this estimate, as are the jumps that ReLU makes in the gradient. The logits are not divided by
the paper's temperature; the closure may do that. Linear layers are not initialized anew.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparing.budget import check_target
from sparing.errors import InputError
from sparing.layers import Layer
from sparing.masks import count_kept, keep_top_together
from sparing.param_groups import skip_step
from sparing.parametrizations import Masked, Sparse
from sparing.sparsify import Method, Sparsifier


class ProbedMask(Masked):
    """S = (W + D) ⊙ M, with a displacement D between the first optimizer step and the second only.

    D is not a buffer, as it has the shape of the weight for one step and no elements for all others;
    it is in the state_dict all the same.
    """

    def __init__(self, mask: Tensor, keep: int) -> None:
        super().__init__(mask, keep)
        self.displacement = torch.empty(0)

    def forward(self, weight: Tensor) -> Tensor:
        if self.displacement.numel() > 0:
            weight = weight + self.displacement.to(weight)
        return torch.where(self.mask, weight, 0.0)

    def get_extra_state(self) -> Tensor:
        return self.displacement

    def set_extra_state(self, state: Tensor) -> None:
        self.displacement = state.clone()


@dataclass(frozen=True)
class GraSP(Method):
    """Keep the weights whose removal would weaken the gradient most.

    Call `prune` once, before training. Without the call the network is dense for two optimizer
    steps, which estimate the same scores and move no weight; between the two the effective weights
    are displaced along the gradient. The estimate is a poor one unless both steps accumulate the
    gradients of many mini-batches. How sparse each layer becomes follows from its scores; the total
    is met exactly.

    Args:
        sparsity: of all layers together.
        probe: p, how far the estimate displaces the weights, in gradients; `prune` does not use it.

    Raises:
        InputError: `probe` is not a positive number; the sparsity is refused by `check_target`.

    Examples:
        >>> model, method = nn.Sequential(nn.Linear(100, 10), nn.Tanh()), GraSP(sparsity=0.9)
        >>> inputs = torch.randn(8, 100)
        >>> method.prune(sparsify_(model, method), lambda: model(inputs).square().mean())
        >>> report(model).total.nonzero
        100
    """

    name: ClassVar[str] = "grasp"

    sparsity: float
    probe: float = 0.1

    def __post_init__(self) -> None:
        check_target("GraSP", self.sparsity, None)
        number = isinstance(self.probe, (int, float)) and not isinstance(self.probe, bool)
        if not number or not 0 < self.probe < math.inf:
            raise InputError(f"GraSP: probe must be a positive number, got {self.probe!r}")

    def parametrizations(self, layers: Mapping[str, Layer]) -> dict[str, Sparse]:
        return {
            name: ProbedMask(torch.ones_like(layer.weight, dtype=torch.bool), layer.weight.numel())
            for name, layer in layers.items()
        }

    def prune(self, sparsifier: Sparsifier, closure: Callable[[], Tensor]) -> None:
        """Make the masks from the exact Hessian-gradient product.

        Args:
            sparsifier: what `sparsify_` returned for this method.
            closure: runs the model and returns the loss, once, on as much data as fits in memory.

        Raises:
            InputError: the sparsifier is another method's; steps are done or masks made already.
        """
        if sparsifier.method != self:
            raise InputError(f"GraSP: the sparsifier is that of {sparsifier.method}, not of {self}")
        if sparsifier.step > 0 or _pruned(sparsifier):
            raise InputError(f"GraSP: prune() comes once and first; {sparsifier.step} optimizer steps are done")
        weights = [layer.weight for layer, _ in sparsifier.parts(ProbedMask)]
        gradients = torch.autograd.grad(closure(), weights, create_graph=True, materialize_grads=True)
        flow = torch.stack([(g * g.detach()).sum() for g in gradients]).sum()
        self._keep_best(sparsifier, torch.autograd.grad(flow, weights, materialize_grads=True))

    @torch.no_grad()
    def before_step(self, sparsifier: Sparsifier) -> None:
        if sparsifier.step > 1 or _pruned(sparsifier):
            return
        layers, parts = zip(*sparsifier.parts(ProbedMask), strict=True)
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in (layer.weight for layer in layers)]
        if sparsifier.step == 0:
            for part, gradient in zip(parts, gradients, strict=True):
                part.displacement = self.probe * gradient
        else:
            # p² Hg: the positive factor changes no choice.
            products = [
                self.probe * _wide(g) - _wide(part.displacement.to(g.device))
                for part, g in zip(parts, gradients, strict=True)
            ]
            self._keep_best(sparsifier, products)
            for part in parts:
                part.displacement = torch.empty(0)
        skip_step(sparsifier.optimizers)

    @torch.no_grad()
    def _keep_best(self, sparsifier: Sparsifier, products: Sequence[Tensor]) -> None:
        layers, parts = zip(*sparsifier.parts(ProbedMask), strict=True)
        kept = [_wide(layer.weight) * _wide(product) for layer, product in zip(layers, products, strict=True)]
        count = count_kept(sum(score.numel() for score in kept), self.sparsity)
        for part, mask in zip(parts, keep_top_together(kept, count), strict=True):
            part.mask.copy_(mask)
            part.keep.copy_(mask.sum())


def _pruned(sparsifier: Sparsifier) -> bool:
    return any(int(part.keep) < part.mask.numel() for _, part in sparsifier.parts(ProbedMask))


def _wide(tensor: Tensor) -> Tensor:
    # In half precision the difference of two gradients would be rounding alone.
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
