"""Variational dropout: every weight learns a noise of its own, and the noisiest are pruned.

    S = W + σ ⊙ ε,   ε ~ N(0, 1)                        training
    S = W ⊙ 1{log α < cut}                              evaluation
    log α = log σ² − log(W² + 1e-8)                     noise over signal, in [−8, 8] in training

    loss + w(t) · Σ KL,      −KL(α) ≈ k1 · sigmoid(k2 + k3 log α) − ½ log(1 + 1/α) − k1

KL falls as α grows: a weight takes on as much noise as the loss allows.

Source: Molchanov, Ashukha & Vetrov, "Variational Dropout Sparsifies Deep Neural Networks", ICML 2017; clipping, ramp
and cut as in the code of Gale, Elsen & Hooker, "The State of Sparsity in Deep Neural Networks", 2019.
Deviations: the papers sample activations (the local reparameterization); here each weight is sampled, once in a
forward pass and for the whole batch. The mean is the same, the gradients are noisier.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparing.method import Layers, Method, Parametrizations
from sparing.operators import Operator, apply_operator, save
from sparing.parametrizations import Sparse, in_training_step, learned_number, warn_evaluation_mode
from sparing.schedules import Updates, check_positions
from sparing.sparsifier import Sparsifier

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

    def forward(self, weight: Tensor) -> Tensor:
        # Reading the weight without recording gradients (a count, densify_) gives it without noise.
        if not in_training_step(self):
            return torch.where(_log_alpha(weight, self.log_sigma2) >= self.cut, 0.0, weight)  # NaN stays NaN
        return apply_operator(_Noise, weight, self.log_sigma2, torch.randn_like(self.log_sigma2))


def _signal(weight: Tensor, log_sigma2: Tensor) -> Tensor:
    return weight.to(log_sigma2.dtype).square().add_(1e-8)


def _log_alpha(weight: Tensor, log_sigma2: Tensor) -> Tensor:
    return log_sigma2 - _signal(weight, log_sigma2).log_()


class _Noise(Operator):
    """S = W + σ ⊙ ε. Saves W, log σ² and S, which the layer saves in any case, and gets σ ⊙ ε back as S − W."""

    @staticmethod
    def forward(weight: Tensor, log_sigma2: Tensor, epsilon: Tensor) -> Tensor:
        log_alpha = _log_alpha(weight, log_sigma2)
        deviation = torch.exp(0.5 * (log_sigma2 + (log_alpha.clamp(-CLIP, CLIP) - log_alpha)))
        return weight + (deviation * epsilon).to(weight.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        save(ctx, *inputs[:2], output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, log_sigma2, effective = ctx.saved_tensors
        # Within the bounds of log α, σ depends on log σ² alone. Beyond them it depends on W alone.
        clipped = _log_alpha(weight, log_sigma2).abs_() > CLIP
        through_noise = grad_output * (effective - weight).to(log_sigma2.dtype)
        grad_log_sigma2 = (0.5 * through_noise).masked_fill_(clipped, 0)
        through_noise.masked_fill_(~clipped, 0).mul_(weight).div_(_signal(weight, log_sigma2))
        return through_noise.add_(grad_output).to(weight.dtype), grad_log_sigma2, None


class _Divergence(Operator):
    """KL of each weight. Saves only W and log σ², and computes log α again in the backward pass."""

    @staticmethod
    def forward(weight: Tensor, log_sigma2: Tensor) -> Tensor:
        log_alpha = _log_alpha(weight, log_sigma2).clamp(-CLIP, CLIP)
        return K1 - K1 * torch.sigmoid(K2 + K3 * log_alpha) + 0.5 * F.softplus(-log_alpha)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        weight, log_sigma2 = ctx.saved_tensors
        log_alpha = _log_alpha(weight, log_sigma2)
        slope = torch.sigmoid(K2 + K3 * log_alpha)
        slope = (1 - slope).mul_(slope).mul_(K1 * K3)
        slope.add_(torch.sigmoid(-log_alpha), alpha=0.5)
        slope = (slope.neg_() * grad_output).masked_fill_(log_alpha.abs_() > CLIP, 0)
        grad_weight = (-2 * slope).mul_(weight).div_(_signal(weight, log_sigma2))
        return grad_weight.to(weight.dtype), slope


@dataclass(frozen=True, kw_only=True)
class VariationalDropout(Method):
    """Learn the noise that each weight can bear, and prune those that are mostly noise.

    log α = log σ² − log(W² + 1e-8);  a weight with log α ≥ cut is zero in evaluation.

    Add `sparsifier.penalty()` to the loss. There is no target: the sparsity follows from `kl_weight` and the length
    of the run.

    Args:
        kl_weight: the weight of the KL term once the ramp is done; 1 / (number of training examples) for a loss that
            is a mean over examples. Higher is sparser.
        begin: start of the linear ramp of the KL weight, a step (int) or a fraction of the run (float).
        end: end of the ramp, likewise.
        init: the value log σ² starts from.
        cut: log α from which on a weight is zero.

    Examples:
        >>> VariationalDropout(kl_weight=1 / 60000).cut
        3.0
    """

    name = "variational_dropout"
    ranges: ClassVar = {"kl_weight": "(0, inf)", "init": "(-inf, inf)", "cut": "(-inf, inf)"}

    kl_weight: float
    begin: int | float = 0.0
    end: int | float = 0.5
    init: float = -10.0
    cut: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positions(self, "begin", "end")

    def prepare(self, model: nn.Module, layers: Layers, steps: int | None) -> Updates:
        return Updates.resolve(self, self.begin, self.end, 1, steps)

    def parametrizations(self, layers: Layers, plan: Updates) -> Parametrizations:
        weights = {name: layer.weight for name, layer in layers.items()}
        return {name: GaussianNoise(learned_number(w.shape, self.init, w), self.cut) for name, w in weights.items()}

    def penalty(self, sparsifier: Sparsifier) -> Tensor:
        begin, end = sparsifier.plan.begin, sparsifier.plan.end
        ramp = min(max((sparsifier.step - begin) / max(end - begin, 1), 0.0), 1.0)
        pairs = list(sparsifier.each(GaussianNoise))
        warn_evaluation_mode(self.name, [part for _, part in pairs])
        divergences = [apply_operator(_Divergence, layer.weight, part.log_sigma2).sum() for layer, part in pairs]
        total: Tensor = self.kl_weight * ramp * torch.stack(divergences).sum()
        return total
