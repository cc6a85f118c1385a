"""RigL: rigging the lottery. Sparse from start to end; weights are pruned by size and regrown by gradient.

    every ΔT steps until T_end, per layer:
        f = α/2 · (1 + cos(π t / T_end))                the share of active weights to move
        prune the f · active smallest |W| of the active weights
        regrow as many of the largest |dL/dS| among the others, at zero
    S = W ⊙ M;  dW = dS ⊙ M, and dW = dS in the step of an update

Source: Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, section 3 and algorithm 1, and its
code (sparse_optimizers_base.py).
Deviations: ties are broken by position, not by noise. As in the code, a step that updates the masks moves no weight,
and a weight pruned and regrown at once keeps its value. The code also updates at step 0, and does not count an update
as a step.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparing.growing import Growing, MaskUpdate
from sparing.method import Optimizers
from sparing.operators import Operator, apply_operator, masked, plain_on_cpu, save
from sparing.parametrizations import Masked
from sparing.schedules import cosine
from sparing.sparsifier import Sparsifier


@dataclass(frozen=True, kw_only=True)
class RigL(Growing):
    """Keep a constant number of weights, and move some of them to where the gradient is largest.

    `sparsity`, `budget` and `pattern` are those of `sparing.method.Ranking`; `fraction`, the α of the formula, `end`,
    `every` and `seed` those of `sparing.growing.Growing`.

    Examples:
        >>> RigL(sparsity=0.9).fraction
        0.3
    """

    name = "rigl"

    def masked(self, mask: Tensor) -> Masked:
        return ProbingMask(mask)

    @torch.no_grad()
    def before_step(self, sparsifier: Sparsifier, optimizers: Optimizers) -> None:
        step = sparsifier.step
        if not self.due(sparsifier, step):
            return
        share = cosine(step, sparsifier.plan.updates.end, self.fraction)
        for each in MaskUpdate.each(sparsifier, ProbingMask):
            gradient = each.layer.weight.grad
            if gradient is not None:
                each.prune_and_regrow(share, each.units.norm(gradient), optimizers)
        sparsifier.skip_step()

    def after_step(self, sparsifier: Sparsifier, optimizers: Optimizers) -> None:
        due = self.due(sparsifier, sparsifier.step)
        if due or self.due(sparsifier, sparsifier.step - 1):
            for _, part in sparsifier.each(ProbingMask):
                part.probing.fill_(due)


class ProbingMask(Masked):
    """S = W ⊙ M, with the dense gradient dW = dS while probing and dW = dS ⊙ M otherwise."""

    probing: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask)
        self.register_state("probing", torch.zeros((), dtype=torch.bool, device=mask.device))

    def forward(self, weight: Tensor) -> Tensor:
        return apply_operator(_Probe, weight, self.mask, self.probing)


class _Probe(Operator):
    @staticmethod
    def forward(weight: Tensor, mask: Tensor, probing: Tensor) -> Tensor:
        return masked(weight, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        save(ctx, *inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        mask, probing = ctx.saved_tensors
        if plain_on_cpu(probing):  # the host knows the value, and need not combine it with the mask
            return grad_output if probing.item() else masked(grad_output, mask), None, None
        return torch.where(mask | probing, grad_output, 0.0), None, None
