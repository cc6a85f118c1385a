"""GraSP: gradient signal preservation. Before training, keep the weights that carry the gradient.

    Hg    = d(gᵀ g_const)/dW,   g = dL/dW          the Hessian times the gradient
    score = −W ⊙ Hg                                half of the change of ‖g‖² without the weight
    M     = the (1 − s) share of smallest score    over all layers, once, before training
    S     = W ⊙ M,   dW = dS ⊙ M

Source: Wang, Zhang & Grosse, "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR 2020,
algorithm 1, and its code (pruner/GraSP.py).
Deviations: only `prune` is the paper's. Without that call, the first two optimizer steps estimate Hg ≈ (g₂(W + p·g₁) −
g₁(W)) / p. The gradients are those of two mini-batches; their difference is noise in this estimate, and so are the
jumps that ReLU makes in the gradient. The logits are not divided by the paper's temperature; the closure may do that.
Linear layers are not initialized again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from sparing.budget import Budget
from sparing.errors import InputError
from sparing.group_threshold import wide
from sparing.method import Layers, Optimizers, Parametrizations, Plan, Ranking, check_gradients
from sparing.parametrizations import Masked
from sparing.sparsifier import Sparsifier


class ProbedMask(Masked):
    """S = (W + D) ⊙ M. The displacement D is one zero, but between the first optimizer step and the second."""

    displacement: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask)
        self.register_state("displacement", torch.zeros(1, device=mask.device))

    def forward(self, weight: Tensor) -> Tensor:
        return super().forward(weight + self.displacement.to(weight) if self.displaced else weight)

    @property
    def displaced(self) -> bool:
        """Whether this is between the two steps."""
        return self.displacement.shape == self.mask.shape

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}displacement", self.displacement)
        self.displacement = torch.empty_like(saved, device=self.mask.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


@dataclass(frozen=True, kw_only=True)
class GraSP(Ranking):
    """Keep the weights whose removal would weaken the gradient most.

    Call `prune` once, before training. Without the call the network is dense for two optimizer steps, which estimate
    the same scores and move no weight; between the two the effective weights are displaced along the gradient. A good
    estimate needs the accumulated gradients of many mini-batches in both steps.

    `sparsity`, `budget` and `pattern` are those of `sparing.method.Ranking`.

    Args:
        probe: p, the displacement of the weights in the estimate, in gradients; `prune` does not use it.

    Examples:
        >>> model, method = nn.Sequential(nn.Linear(100, 10), nn.Tanh()), GraSP(sparsity=0.9)
        >>> inputs = torch.randn(8, 100)
        >>> method.prune(sparsify_(model, method), lambda: model(inputs).square().mean())
        >>> report(model).total.nonzero
        100
    """

    name = "grasp"
    ranges: ClassVar = {"probe": "(0, inf)"}

    budget: Budget | str = "global"
    probe: float = 0.1

    def parametrizations(self, layers: Layers, plan: Plan) -> Parametrizations:
        return {name: ProbedMask(torch.ones_like(layer.weight, dtype=torch.bool)) for name, layer in layers.items()}

    def prune(self, sparsifier: Sparsifier, closure: Callable[[], Tensor]) -> None:
        """Make the masks from the exact product of Hessian and gradient; ranks of torch.distributed add up theirs.

        Args:
            sparsifier: what `sparsify_` returned for this method.
            closure: runs the model and returns the loss, once, on as much data as fits in memory.

        Raises:
            InputError: the sparsifier is that of another method; steps were already taken, or the masks are made.
        """
        if sparsifier.method != self:
            raise InputError(f"GraSP: the sparsifier is that of {sparsifier.method}, not of {self}")
        if sparsifier.step > 0 or _pruned(sparsifier):
            raise InputError(f"GraSP: call prune() once, before training; {sparsifier.step} optimizer steps were taken")
        weights = {layer.name: layer.weight for layer, _ in sparsifier.each(ProbedMask)}
        gradients = torch.autograd.grad(closure(), list(weights.values()), create_graph=True, materialize_grads=True)
        check_gradients(self, dict(zip(weights, gradients, strict=True)))
        flow = torch.stack([(g * g.detach()).sum() for g in gradients]).sum()
        products = torch.autograd.grad(flow, list(weights.values()), materialize_grads=True)
        if dist.is_available() and dist.is_initialized():
            for product in products:
                dist.all_reduce(product)
        _keep_best(sparsifier, dict(zip(weights, products, strict=True)))

    @torch.no_grad()
    def before_step(self, sparsifier: Sparsifier, optimizers: Optimizers) -> None:
        if sparsifier.step > 1 or _pruned(sparsifier):
            return
        if sparsifier.step > 0:
            check_gradients(self, {name: layer.weight.grad for name, layer in sparsifier.layers.items()})
        products = {}
        for layer, part in sparsifier.each(ProbedMask):
            gradient = layer.weight.grad
            gradient = torch.zeros_like(layer.weight) if gradient is None else sparsifier.unscale(gradient)
            if sparsifier.step == 0:
                part.displacement = self.probe * gradient
                continue
            # p² Hg: the positive factor changes no choice.
            products[layer.name] = self.probe * wide(gradient) - wide(part.displacement.to(gradient.device))
            part.displacement = torch.zeros(1, device=gradient.device)
        if products:
            _keep_best(sparsifier, products)
        sparsifier.skip_step()


def _keep_best(sparsifier: Sparsifier, products: Mapping[str, Tensor]) -> None:
    score = lambda layer, units: units.mean(wide(layer.weight.detach()) * wide(products[layer.name]))  # noqa: E731
    sparsifier.set_masks(sparsifier.plan.allocation.masks(score))


def _pruned(sparsifier: Sparsifier) -> bool:
    return any(not bool(part.mask.all()) for _, part in sparsifier.each(ProbedMask))
