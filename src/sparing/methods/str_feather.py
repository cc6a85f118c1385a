"""STR-Feather: the learned thresholds of STR under the curve and the gradients of Feather, with a target.

    t_l = √‖W_l‖ · exp(s_l)                                         one s per layer
    S_l = sign(W) ⊙ (|W|³ − t_l³)^(1/3) ⊙ M,   M = 1{|W| > t_l}

    dW  = dS ⊙ (M + θ (1 − M))                                      pruned weights are trained, too
    G_l = −dt_l/ds_l · Σ dS ⊙ sign(S)                               dL/ds of STR
    s_l ← (1 − ηλ) s_l − η · (G_l − μ C_l) / rms(G)                 μ = ⟨G, C⟩ / ⟨C, C⟩,  η = 1 / steps
    s_l − o_l ← ρ · (s_l − o_l)      at every update, with the one ρ that the target needs (`sparing.target`)

C_l is the cost that layer l saves per unit of s_l, and G − μ C is the gradient along the directions that keep the
total. It is zero if a saved weight costs all layers the same loss, G_l / C_l. Each G_l alone says that its threshold
should be lower, and AdamW, whose steps hardly depend on the size of a gradient, would lower all of them alike. G is
divided by its root mean square over the layers, and multiplied by 1 − β where SGD has the momentum β, so that one
learning rate η suits SGD and AdamW.

Made for pretrained networks: weights above the threshold hardly shrink, weights below it can come back, and t_l is in
units of the layer. With one threshold for all layers, the sizes of their weights decide how sparse each becomes. With
thresholds in multiples of ‖W_l‖, large layers would lose nearly all of their weights. The square root is between them.
‖W_l‖ is measured at every update; nothing is pruned before the first one. o_l is 0 for a target sparsity, and
¼ ln(cost_l / mean cost) for one in MACs, where a weight of layer l is applied cost_l times per forward pass.

Source: ours. STR is Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity", ICML 2020;
Feather is Glentis Georgoulakis, Retsinas & Maragos, "Feather: An Elegant Solution to Effective DNN Sparsification",
BMVC 2023.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparing.errors import InputError
from sparing.group_threshold import feather_threshold
from sparing.method import Layers, Optimizers, Parametrizations
from sparing.parametrizations import LearnedThreshold, Sparse, learned_number
from sparing.patterns import Units
from sparing.schedules import check_number
from sparing.sparsifier import Sparsifier
from sparing.target import Rescaling, rescale

TRAVEL = 1.0
"""How far s can move in a run by its gradient."""

NEAR = 0.05
"""Half the width, relative to the threshold, of the interval in which units are counted for `saving`."""


@dataclass(frozen=True, kw_only=True)
class STRFeather(Rescaling):
    """Learn a threshold for each layer, hardly shrink the weights above it, and train those below it as well.

    Clip the gradients at norm 3, as Feather's authors do: a run to 99 % sparsity diverged without it.

    `sparsity`, `macs`, `input_size`, `begin`, `end`, `every` and `pattern` are those of `sparing.target.Rescaling`.

    Args:
        theta: θ in [0, 1], the factor on the gradient of pruned weights; with None it is ½ if more than 0.95 of the
            weights, or of the MACs, are pruned, and 1 otherwise, as in Feather.
        init: the value s starts from, in [-64, 0].

    Raises:
        InputError: there is no target, or a value is out of range.

    Examples:
        >>> STRFeather(sparsity=0.9).end
        0.5
    """

    name = "str_feather"
    ranges: ClassVar = {"init": "[-64, 0]"}

    begin: int | float = 0.0
    end: int | float = 0.5
    theta: float | None = None
    init: float = -5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rescales:
            raise InputError("STRFeather: give sparsity=, a fraction in [0, 1), or macs=")
        if self.theta is not None:
            check_number(self, "theta", "[0, 1]")

    def parametrizations(self, layers: Layers, plan: Any) -> Parametrizations:
        pruned = 1 - plan.final / plan.dense if self.sparsity is None else self.sparsity
        theta = self.theta if self.theta is not None else 0.5 if pruned > 0.95 else 1.0
        made: dict[str, Sparse] = {}
        for name, layer in layers.items():
            s = learned_number((1,), self.start(name, plan), layer.weight)
            made[name] = FeatherLearnedThreshold(s, layer.weight, theta, plan.units[name])
        return made

    @torch.no_grad()
    def before_step(self, sparsifier: Sparsifier, optimizers: Optimizers) -> None:
        if sparsifier.step < max(sparsifier.plan.updates.begin, 1):
            return  # C is not measured yet
        parts = [part for _, part in sparsifier.each(FeatherLearnedThreshold) if part.s.grad is not None]
        if not parts:
            return
        gradients = [part.s.grad for part in parts]
        device = parts[0].s.device
        g = torch.cat([gradient.to(device) for gradient in gradients])  # type: ignore[union-attr]
        c = torch.stack([part.saving.to(device) for part in parts])
        along = g - c * (g @ c / (c @ c).clamp_min(1.0))
        # A fused optimizer divides by the scale of a GradScaler later, so the result keeps it.
        along /= sparsifier.unscale(g).square().mean().sqrt().clamp_min(torch.finfo(g.dtype).tiny)
        along *= _rest(sparsifier.optimizers, parts[0].s)
        for gradient, value in zip(gradients, along.split(1), strict=True):
            gradient.copy_(value)  # type: ignore[union-attr]

    @torch.no_grad()
    def after_step(self, sparsifier: Sparsifier, optimizers: Optimizers) -> None:
        target = sparsifier.plan
        if sparsifier.holds and not sparsifier.due:
            rescale(sparsifier.layers, target, target.wanted(sparsifier.step, sparsifier.clock.start))
        super().after_step(sparsifier, optimizers)
        if sparsifier.due:
            for layer, part in sparsifier.each(FeatherLearnedThreshold):
                part.saving.copy_(target.costs[layer.name] * part.pruned_per_s(layer.weight))


class FeatherLearnedThreshold(LearnedThreshold):
    """S = sign(W) ⊙ (|W|³ − t³)^(1/3) ⊙ M with the gradients of Feather, and t = √‖W‖ · exp(s).

    Args:
        s: shape (1,).
        weight: W.
        theta: θ.
        units: what is pruned together.

    Attributes:
        saving: cost that is saved per unit of s, C of the formula, measured at the last update.
    """

    saving: Tensor

    def __init__(self, s: nn.Parameter, weight: Tensor, theta: float, units: Units) -> None:
        super().__init__(s, torch.exp, weight=weight)
        self.theta, self.units = theta, units
        self.register_state("saving", torch.zeros((), dtype=torch.float32, device=weight.device))

    @property
    def rate(self) -> float | None:
        """Learning rate of s: a step of the optimizer is about as large, so s moves by at most `TRAVEL` in a run."""
        return None if self.clock is None or not self.clock.steps else TRAVEL / self.clock.steps

    def pruned_per_s(self, weight: Tensor) -> Tensor:
        """Return how many units are pruned per unit of s: those within 5 % of the threshold, over the s between.

        d ln t / ds = 1, so an interval of 10 % of the threshold is one of 0.1 of s.
        """
        norm, t = self.units.norm(weight), self.threshold()
        near = ((norm > (1 - NEAR) * t) & (norm < (1 + NEAR) * t)).sum()
        return near / (2 * NEAR)

    def forward(self, weight: Tensor) -> Tensor:
        return feather_threshold(weight, self.threshold(), self.theta, self.units.view, self.units.dims)


def _rest(optimizers: Optimizers, s: Tensor) -> float:
    """Return 1 − β of the group of s: the momentum of SGD adds up to 1 / (1 − β) gradients, that of Adam to one."""
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    own = next((group for group in groups if any(parameter is s for parameter in group["params"])), {})
    rest = 1 - float(own.get("momentum", 0.0))
    return rest / max(1 - float(own.get("dampening", 0.0)), rest)
