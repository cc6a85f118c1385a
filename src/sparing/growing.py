"""Base of methods that are sparse from start to end: they prune weights and regrow as many elsewhere."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.budget import Budget, random_score
from sparing.layers import Layer
from sparing.method import Layers, Optimizers, Plan, Ranking
from sparing.optimizers import reset_state
from sparing.parametrizations import Masked
from sparing.schedules import check_seed


@dataclass(frozen=True, kw_only=True)
class Growing(Ranking):
    """Abstract: keep a constant number of weights, and move some of them at every update.

    Args:
        end: the last update comes before it, a step (int) or a fraction of the run (float).
        every: ΔT, optimizer steps between two updates; shortened if `end` comes earlier.
        seed: of the random first mask and of random growth; equal on all ranks, whatever their own seeds.
    """

    finishes = False
    takes_global = False
    takes_nm = False

    budget: Budget | str = "erk"
    end: int | float = 0.75
    every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self)

    def first_masks(self, layers: Layers, plan: Plan) -> dict[str, Tensor]:
        """Return the random masks of the start."""
        return plan.allocation.masks(random_score(layers, self.seed))

    def due(self, plan: Plan, step: int) -> bool:
        """Return whether the masks are updated after that many steps."""
        assert plan.updates is not None
        return plan.updates.due(step) and step < plan.updates.end


@torch.no_grad()
def replace_mask(layer: Layer, part: Masked, mask: Tensor, optimizers: Optimizers) -> None:
    """Replace the mask of a layer. Regrown weights start at zero, without momentum."""
    regrown = mask & ~part.mask
    layer.weight.masked_fill_(regrown, 0)
    reset_state(optimizers, layer.weight, regrown)
    part.mask.copy_(mask)
