"""Variational dropout: every weight learns a noise of its own, and the noisiest are pruned.

    S = W + σ ⊙ ε,   ε ~ N(0, 1)                        training
    S = W ⊙ 1{log α < cut}                              evaluation
    log α = log σ² − log(W² + 1e-8)                     noise over signal, in [−8, 8] in training

    loss + w(t) · Σ KL,      −KL(α) ≈ k1 · sigmoid(k2 + k3 log α) − ½ log(1 + 1/α) − k1

KL falls as α grows: a weight takes on as much noise as the loss allows.

Source: Molchanov, Ashukha & Vetrov, "Variational Dropout Sparsifies Deep Neural Networks", ICML 2017;
clipping, ramp and cut as in the code of Gale, Elsen & Hooker, "The State of Sparsity in
Deep Neural Networks", 2019.
Deviations: the papers sample activations (the local reparameterization); here each weight is sampled,
once a forward and for the whole batch. The mean is the same, the gradients are noisier.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparing.errors import InputError
from sparing.layers import Layer
from sparing.parametrizations import Sparse
from sparing.schedules import check_schedule, to_step
from sparing.sparsify import Method, Sparsifier

CLIP = 8.0
K1, K2, K3 = 0.63576, 1.87320, 1.48695


class GaussianNoise(Sparse):
    """S = W + σ ⊙ ε where gradients are recorded in training mode, else S = W ⊙ 1{log α < cut}.

    Args:
        log_sigma2: log σ², float32, of the shape of the weight.
        cut: the log α from which on a weight is pruned.
    """

    def __init__(self, log_sigma2: nn.Parameter, cut: float) -> None:
        super().__init__()
        self.log_sigma2 = log_sigma2
        self.cut = cut

    def log_alpha(self, weight: Tensor) -> Tensor:
        return self.log_sigma2 - torch.log(weight.float().square() + 1e-8)

    def divergence(self, weight: Tensor) -> Tensor:
        """Σ KL over the layer."""
        log_alpha = self.log_alpha(weight).clamp(-CLIP, CLIP)
        return (K1 - K1 * torch.sigmoid(K2 + K3 * log_alpha) + 0.5 * F.softplus(-log_alpha)).sum()

    def forward(self, weight: Tensor) -> Tensor:
        # Whoever reads the weight without recording gradients (a count, densify_) wants no noise.
        if not (self.training and torch.is_grad_enabled()):
            return torch.where(self.log_alpha(weight) < self.cut, weight, 0.0)
        deviation = torch.exp(0.5 * self.log_alpha(weight).clamp(-CLIP, CLIP)) * (weight.float().square() + 1e-8).sqrt()
        return weight + (deviation * torch.randn_like(deviation)).to(weight.dtype)

    def extra_repr(self) -> str:
        return f"cut={self.cut}, log_sigma2={tuple(self.log_sigma2.shape)}"


@dataclass(frozen=True)
class VariationalDropout(Method):
    """Learn the noise that each weight can bear, and prune those that are mostly noise.

    log α = log σ² − log(W² + 1e-8);  a weight with log α ≥ cut is zero in evaluation.

    Args:
        steps: optimizer steps of the whole run.
        kl_weight: the weight of the KL term once the ramp is done; 1 / (number of training examples)
            for a loss that is a mean over examples. Higher is sparser.
        begin: where the linear ramp of the KL weight begins: a step (int) or a fraction of `steps` (float).
        end: where it ends, likewise.
        init: the value log σ² starts from.
        cut: log α from which on a weight is zero.

    There is no target: how sparse the network becomes follows from `kl_weight` and the length of the
    run. Set `threshold_weight_decay=0` in `param_groups`: decay would move log σ² toward 0, which is noise.

    Raises:
        InputError: a value is out of range; see `check_schedule`.

    Examples:
        >>> VariationalDropout(steps=1000, kl_weight=1 / 60000)
        VariationalDropout(steps=1000, kl_weight=1.6666666666666667e-05, begin=0.0, end=0.5, init=-10.0, cut=3.0)
    """

    name: ClassVar[str] = "variational_dropout"

    steps: int
    kl_weight: float
    begin: int | float = 0.0
    end: int | float = 0.5
    init: float = -10.0
    cut: float = 3.0

    def __post_init__(self) -> None:
        check_schedule("VariationalDropout", self.steps, self.begin, self.end, every=1)
        for field in ("kl_weight", "init", "cut"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise InputError(f"VariationalDropout: {field} must be a finite number, got {value!r}")
        if self.kl_weight <= 0:
            raise InputError(f"VariationalDropout: kl_weight must be above 0, got {self.kl_weight!r}")

    def parametrizations(self, layers: Mapping[str, Layer]) -> dict[str, Sparse]:
        return {name: GaussianNoise(self._start(layer.weight), self.cut) for name, layer in layers.items()}

    def before_step(self, sparsifier: Sparsifier) -> None:
        begin, end = to_step(self.begin, self.steps), to_step(self.end, self.steps)
        ramp = min(max((sparsifier.step - begin) / max(end - begin, 1), 0.0), 1.0)
        for layer, part in sparsifier.parts(GaussianNoise):
            if ramp == 0 or layer.weight.grad is None or part.log_sigma2.grad is None:
                continue  # not trained in this step
            with torch.enable_grad():
                divergence = part.divergence(layer.weight)
            by_weight, by_noise = torch.autograd.grad(divergence, (layer.weight, part.log_sigma2))
            layer.weight.grad.add_(by_weight, alpha=self.kl_weight * ramp)
            part.log_sigma2.grad.add_(by_noise, alpha=self.kl_weight * ramp)

    def _start(self, weight: Tensor) -> nn.Parameter:
        # float32 whatever the weight's dtype: near −10 a step of training is nothing to bf16.
        return nn.Parameter(torch.full_like(weight, self.init, dtype=torch.float32))
