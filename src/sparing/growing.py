"""Base of methods that are sparse from start to end: they prune weights and regrow as many elsewhere."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from sparing.allocation import Score, random_score
from sparing.budget import Budget
from sparing.goal import nonzero_masks
from sparing.layers import Layer
from sparing.masks import keep_top, prune_and_regrow
from sparing.method import Layers, Optimizers, Parametrizations, Plan, Ranking
from sparing.optimizers import reset_state
from sparing.parametrizations import Mask, Masked
from sparing.patterns import Units
from sparing.schedules import check_seed
from sparing.sparsifier import Sparsifier

Kind = TypeVar("Kind", bound=Masked)


@dataclass(frozen=True, kw_only=True)
class Growing(Ranking):
    """Abstract: keep a constant number of weights, and move some of them at every update.

    Args:
        fraction: the share of active weights that the first update moves, in (0, 1).
        end: end of the updates, a step (int) or a fraction of the run (float); there is no update at that step itself.
        every: ΔT, optimizer steps between two updates; shortened if fewer than two intervals fit before `end`.
        seed: of the random first mask and of random growth; equal on all ranks, whatever their own seeds.
    """

    finishes = False
    takes_global = False
    takes_nm = False
    ranges: ClassVar[Mapping[str, str]] = {"fraction": "(0, 1)"}

    budget: Budget | str = "erk"
    fraction: float = 0.3
    end: int | float = 0.75
    every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self)

    def parametrizations(self, layers: Layers, plan: Plan) -> Parametrizations:
        masks = plan.allocation.masks(first_score(layers, self.seed))
        return {name: self.masked(mask) for name, mask in masks.items()}

    def masked(self, mask: Tensor) -> Masked:
        """Return the parametrization of a layer, with its random first mask."""
        return Mask(mask)

    def resets(self, sparsifier: Sparsifier, optimizers: Optimizers) -> list[Tensor]:
        return [layer.weight for layer in sparsifier.layers.values()]

    def due(self, sparsifier: Sparsifier, step: int) -> bool:
        """Return whether the masks are updated after that many steps."""
        updates = sparsifier.plan.updates
        return bool(updates.due(step) and step < updates.end)


def first_score(layers: Layers, seed: int) -> Score:
    """Return a random score of each unit, higher for the nonzero units of layers that are sparse already."""
    weights = {name: layer.weight for name, layer in layers.items() if not layer.weight.is_meta}
    sparse, random = nonzero_masks(weights), random_score(layers, seed)

    def score(layer: Layer, units: Units) -> Tensor:
        drawn = random(layer, units)
        return drawn + units.active(sparse[layer.name]) if layer.name in sparse else drawn

    return score


@dataclass(frozen=True)
class MaskUpdate(Generic[Kind]):
    """One update of the mask of one layer.

    Attributes:
        layer: the layer.
        part: its parametrization.
        units: the units of its weight.
        active: the active units, a boolean tensor.
    """

    layer: Layer
    part: Kind
    units: Units
    active: Tensor

    @classmethod
    def each(cls, sparsifier: Sparsifier, kind: type[Kind]) -> "Iterator[MaskUpdate[Kind]]":
        """Iterate over the layers to update. Frozen layers are left out: they could not train a regrown weight."""
        for layer, part in sparsifier.each(kind):
            if layer.weight.requires_grad:
                units = sparsifier.plan.allocation.units[layer.name]
                yield MaskUpdate(layer, part, units, units.active(part.mask))

    @cached_property
    def count(self) -> int:
        """Number of active units."""
        return int(self.active.sum())

    def norm(self) -> Tensor:
        """Return the root mean square of each unit of the weight."""
        return self.units.norm(self.layer.weight)

    def largest(self, count: int) -> Tensor:
        """Return a mask of the `count` active units of largest norm."""
        return keep_top(self.norm().masked_fill(~self.active, -1), count, self.layer.name)

    def prune_and_regrow(self, share: float, scores: Tensor, optimizers: Optimizers) -> None:
        """Prune a share of the active units, those of smallest norm, and regrow as many of the largest score."""
        count = int(share * self.count)
        self.replace(prune_and_regrow(self.active, self.norm(), scores, count, self.layer.name), optimizers)

    @torch.no_grad()
    def replace(self, chosen: Tensor, optimizers: Optimizers) -> None:
        """Make the chosen units the active ones. Regrown weights start at zero, without momentum."""
        mask = self.units.expand(chosen)
        regrown = mask & ~self.part.mask
        self.layer.weight.masked_fill_(regrown, 0)
        reset_state(optimizers, self.layer.weight, regrown)
        self.part.mask.copy_(mask)
