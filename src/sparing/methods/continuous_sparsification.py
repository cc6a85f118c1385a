"""Continuous sparsification: a soft mask that hardens while it is learned.

    S = W ⊙ sigmoid(β m) / sigmoid(m0)                  training; m one number per weight, from m0
    S = W ⊙ 1{m > 0}     / sigmoid(m0)                  evaluation, and training once the run is over
    β(t) = β_final^(t / steps)                          from 1; the soft mask tends to the hard one
    loss + λ · Σ sigmoid(β m)                           lowers m

At the start the training weight is W itself. Which weights stay is learned by gradient descent alone; as β grows, the
sigmoid saturates and m stops moving.

Source: Savarese, Silva & Maire, "Winning the Lottery with Continuous Sparsification", NeurIPS 2020, and its code
(models/layers.py, main.py).
Deviations: β grows with every step instead of every epoch; the penalty sums the mask without the factor 1 /
sigmoid(m0), which the code leaves in; evaluation is by the hard mask during the run as well.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparing.method import Layers, Method, Optimizers, Parametrizations
from sparing.operators import Operator, apply_operator, save
from sparing.parametrizations import Sparse, in_training_step, learned_number, warn_evaluation_mode
from sparing.schedules import to_step
from sparing.sparsifier import Sparsifier


class SigmoidMask(Sparse):
    """S = W ⊙ sigmoid(β m) · scale where gradients are recorded in training mode, else S = W ⊙ 1{m > 0} · scale.

    Args:
        m: the mask's numbers, float32, of the shape of the weight.
        scale: a constant factor.
    """

    temperature: Tensor
    finished: Tensor

    def __init__(self, m: nn.Parameter, scale: float) -> None:
        super().__init__()
        self.m = m
        self.scale = scale
        self.register_state("temperature", torch.ones((), dtype=torch.float32, device=m.device))
        self.register_state("finished", torch.zeros((), dtype=torch.bool, device=m.device))

    def forward(self, weight: Tensor) -> Tensor:
        # Reading the weight without recording gradients (a count, densify_) gives the hard mask.
        if not in_training_step(self):
            return weight * (self.scale * (self.m > 0)).to(weight.dtype)
        return apply_operator(_SigmoidMask, weight, self.m, self.temperature, self.finished, self.scale)


def _mask(m: Tensor, temperature: Tensor, finished: Tensor | None) -> Tensor:
    soft = (temperature * m).sigmoid_()
    return soft if finished is None else torch.where(finished, (m > 0).to(m.dtype), soft)


class _SigmoidMask(Operator):
    """S = W ⊙ mask · scale; the mask alone without W. Saves only its inputs, not the mask."""

    @staticmethod
    def forward(weight: Tensor | None, m: Tensor, temperature: Tensor, finished: Tensor | None, scale: float) -> Tensor:
        mask = _mask(m, temperature, finished)
        return mask if weight is None else weight * (scale * mask).to(weight.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.scale = inputs
        save(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        weight, m, temperature, finished = ctx.saved_tensors
        mask = _mask(m, temperature, finished)
        grad_weight = None if weight is None else grad_output * (ctx.scale * mask).to(weight.dtype)
        grad_mask = grad_output if weight is None else (grad_output * weight).to(m.dtype)
        # The derivative, mask · (1 − mask), is zero where the mask is hard.
        grad_m = torch.ops.aten.sigmoid_backward(grad_mask, mask).mul_(ctx.scale * temperature)
        return grad_weight, grad_m, None, None, None


@dataclass(frozen=True, kw_only=True)
class ContinuousSparsification(Method):
    """Learn a soft mask whose temperature turns it into a hard one by the end of the run.

    S = W ⊙ sigmoid(β m) / sigmoid(m0),  β from 1 to `final_temperature`

    Add `sparsifier.penalty()` to the loss. There is no target: the sparsity follows from `init`, λ and the length of
    the run.

    Args:
        weight: λ, the weight of the penalty, the sum of the soft mask, ≥ 0. Higher is sparser.
        init: m0, the value m starts from. Lower is sparser; at 0 or below the hard mask starts empty.
        final_temperature: β at the end of the run, at least 1.

    Examples:
        >>> ContinuousSparsification(weight=1e-8)
        ContinuousSparsification(weight=1e-08, init=0.05, final_temperature=200.0)
    """

    name = "continuous_sparsification"
    ranges: ClassVar = {"weight": "[0, inf)", "init": "[-10, 10]", "final_temperature": "[1, inf)"}

    weight: float
    init: float = 0.05
    final_temperature: float = 200.0

    def prepare(self, model: nn.Module, layers: Layers, steps: int | None) -> int:
        return to_step(1.0, steps, "ContinuousSparsification")

    def parametrizations(self, layers: Layers, plan: int) -> Parametrizations:
        scale = 1 + math.exp(-self.init)
        weights = {name: layer.weight for name, layer in layers.items()}
        return {name: SigmoidMask(learned_number(w.shape, self.init, w), scale) for name, w in weights.items()}

    def penalty(self, sparsifier: Sparsifier) -> Tensor:
        parts = [part for _, part in sparsifier.each(SigmoidMask)]
        warn_evaluation_mode(self.name, parts)
        sums = [apply_operator(_SigmoidMask, None, part.m, part.temperature, None, 1.0).sum() for part in parts]
        return self.weight * torch.stack(sums).sum()

    @torch.no_grad()
    def before_step(self, sparsifier: Sparsifier, optimizers: Optimizers) -> None:
        if sparsifier.step >= sparsifier.plan:
            for _, part in sparsifier.each(SigmoidMask):
                part.m.grad = None  # so that neither momentum nor decay moves the mask any more

    @torch.no_grad()
    def after_step(self, sparsifier: Sparsifier, optimizers: Optimizers) -> None:
        progress = min(sparsifier.step / sparsifier.plan, 1.0)
        for _, part in sparsifier.each(SigmoidMask):
            part.temperature.fill_(self.final_temperature**progress)
            part.finished.fill_(progress == 1.0)
