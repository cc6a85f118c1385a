"""DST: dynamic sparse training with a learned threshold for every filter or neuron.

    S = W ⊙ M,      M = step(|W| − t)                   t one number per output channel, starts at 0
    d step/dx := 2 − 4|x|   for |x| ≤ 0.4               a surrogate with a long tail: the derivative
                 0.4        for 0.4 < |x| ≤ 1           itself is zero
                 0          otherwise
    loss + α · Σ exp(−t)                                raises the thresholds

W gets dS ⊙ M and the gradient through |W| in the mask, so pruned weights are still trained. If a layer has 1 % of its
weights or fewer active, its t are reset to 0.

Source: Liu, Xu, Shi, Cheung & So, "Dynamic Sparse Training: Find Efficient Sparse Network From Scratch With Trainable
Masked Layers", ICLR 2020, and its code (binarization.py).
Deviations: t is reset after the optimizer step, in the code at the next forward pass, with the same effect. t stays
float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparing.layers import filter_shape
from sparing.method import Layers, Method, Optimizers, Parametrizations
from sparing.operators import Operator, apply_operator
from sparing.parametrizations import Sparse, learned_number
from sparing.sparsifier import Sparsifier
from sparing.threshold import sum_to

LEAST_DENSITY = 0.01


class StepMask(Sparse):
    """S = W ⊙ step(|W| − t), with the long-tailed derivative of the step.

    Args:
        t: the thresholds, float32, of a shape that broadcasts to the weight.

    Examples:
        >>> StepMask(nn.Parameter(torch.tensor([0.2])))(torch.tensor([-0.5, 0.1, 0.3])).detach().abs()
        tensor([0.5000, 0.0000, 0.3000])
    """

    decays: ClassVar[Mapping[str, str]] = {"t": "thresholds"}

    def __init__(self, t: nn.Parameter) -> None:
        super().__init__()
        self.t = t

    def threshold(self) -> Tensor:
        return self.t.clamp(min=0)

    def forward(self, weight: Tensor) -> Tensor:
        return apply_operator(_StepMask, weight, self.t)


class _StepMask(Operator):
    """The operator. It saves W and t only, and computes the mask again in the backward pass."""

    @staticmethod
    def forward(weight: Tensor, t: Tensor) -> Tensor:
        return weight * (weight.abs() - t > 0).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        weight, t = ctx.saved_tensors
        x = weight.abs() - t
        size = x.abs()
        tail = torch.where(size <= 0.4, 2 - 4 * size, 0.4).masked_fill_(size > 1, 0)
        through_mask = grad_output * weight * tail
        grad_weight = grad_output * (x > 0).to(weight.dtype) + through_mask.to(weight.dtype) * weight.sign()
        return grad_weight.to(weight.dtype), -sum_to(through_mask, t.shape, t.dtype)


@dataclass(frozen=True, kw_only=True)
class DST(Method):
    """Learn a threshold for each filter or neuron, with gradients through the step of the mask.

    S = W ⊙ step(|W| − t),  loss + α Σ exp(−t)

    Add `sparsifier.penalty()` to the loss. There is no target: the sparsity follows from α. Weight decay on t lowers
    the thresholds, against the penalty; it is `threshold_weight_decay` of `param_groups`.

    Args:
        alpha: α, the weight of the penalty that raises the thresholds, ≥ 0. Higher is sparser.

    Raises:
        InputError: alpha is negative or not a finite number; a grouped transposed convolution is selected, whose
            filters are not slices of the weight tensor.

    Examples:
        >>> DST(alpha=1e-4)
        DST(alpha=0.0001)
    """

    name = "dst"
    ranges: ClassVar = {"alpha": "[0, inf)"}

    alpha: float

    def parametrizations(self, layers: Layers, plan: Any) -> Parametrizations:
        thresholds = {name: learned_number(filter_shape(each), 0.0, each.weight) for name, each in layers.items()}
        return {name: StepMask(t) for name, t in thresholds.items()}

    def penalty(self, sparsifier: Sparsifier) -> Tensor:
        return self.alpha * torch.stack([torch.exp(-part.t).sum() for _, part in sparsifier.each(StepMask)]).sum()

    @torch.no_grad()
    def after_step(self, sparsifier: Sparsifier, optimizers: Optimizers) -> None:
        for layer, part in sparsifier.each(StepMask):
            active = torch.count_nonzero(layer.weight.abs() > part.t)
            # The comparison stays on the device: no synchronization.
            part.t.masked_fill_(active <= LEAST_DENSITY * layer.weight.numel(), 0)
