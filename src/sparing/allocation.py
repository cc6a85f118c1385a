"""Allocation: how many weights or groups each layer keeps under a budget, and the masks with exactly so many."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sparing.budget import RULES, Budget
from sparing.errors import InputError, SparsityWarning, nearest
from sparing.group_threshold import wide
from sparing.layers import Layer
from sparing.macs_target import COST_POWER, dense_cost
from sparing.masks import (
    Scores,
    affordable_threshold,
    check_scores,
    count_kept,
    global_threshold,
    keep_top_together,
    random_scores,
)
from sparing.patterns import NM, Pattern, Units

Score = Callable[[Layer, Units], Tensor]
"""Returns the score of every unit of a layer; the largest are kept."""


@dataclass(frozen=True)
class Allocation:
    """How many units (weights, or groups of weights) each layer keeps at the end, or all layers together.

    Attributes:
        layers: the layers to sparsify, by name.
        units: the units of each layer.
        kept: units kept in each layer; or an int, what those kept in all layers together may cost.
        costs: of a unit of each layer; None for its number of weights. Units of layers whose costs differ compete by
            score / (cost of a weight)^¼.
    """

    layers: Mapping[str, Layer]
    units: Mapping[str, Units]
    kept: Mapping[str, int] | int
    costs: Mapping[str, int] | None = None

    @classmethod
    def resolve(
        cls, layers: Mapping[str, Layer], pattern: Pattern, sparsity: float | None, budget: Budget | str
    ) -> "Allocation":
        """Resolve a target for these layers.

        Args:
            layers: the layers to sparsify.
            pattern: which weights are pruned together.
            sparsity: for a budget that is a rule.
            budget: a rule, a Budget, a .json or .csv file, or the name of a published budget.

        Raises:
            InputError: the budget misses a layer or names one that is not sparsified; the file or name is unknown;
                the pattern is not defined for a layer, or fixes the sparsity that the budget is to choose.

        Warns:
            SparsityWarning: a layer keeps no weight, or all together keep more than twice as many as asked for.
        """
        units = {name: pattern.units(layer) for name, layer in layers.items()}
        if isinstance(pattern, NM):
            if budget not in RULES:
                raise InputError(
                    f"{pattern} fixes the sparsity of every layer at {pattern.sparsity:g}: leave budget out"
                )
            return cls(layers, units, {name: each.kept(pattern.sparsity) for name, each in units.items()})
        if budget == "global":
            assert sparsity is not None  # check_target has seen to it
            sizes = {each.weights for each in units.values()}
            # Where units differ in size, the sparsity is that of the weights.
            size = sizes.pop() if len(sizes) == 1 else 1
            return cls(
                layers,
                units,
                size * count_kept(sum(each.count * each.weights for each in units.values()) // size, sparsity),
            )
        resolved = _resolve_budget(layers, sparsity, budget)
        kept = {name: each.kept(resolved[name]) for name, each in units.items()}
        empty = [name for name, count in kept.items() if count == 0]
        if empty:
            warnings.warn(
                f"the budget leaves no weight in {len(empty)} of {len(layers)} layers ({empty[0]!r}: sparsity "
                f"{resolved[empty[0]]:g} of {units[empty[0]].count} weights or groups): they output only their bias",
                SparsityWarning,
                stacklevel=2,
            )
        found = cls(layers, units, kept)
        total = dense_cost(units, found.unit_costs)
        if budget in RULES and sparsity is not None and found.goal > 2 * count_kept(total, sparsity):
            warnings.warn(
                f"the budget {budget!r} at sparsity {sparsity:g} keeps {found.goal:,} of {total:,} weights, which is a "
                f"sparsity of {found.pruned:.4f}: each layer keeps at least one weight or group",
                SparsityWarning,
                stacklevel=2,
            )
        return found

    @property
    def goal(self) -> int:
        """What all layers cost together at the end: weights, or MACs."""
        if isinstance(self.kept, int):
            return self.kept
        return sum(kept * self.units[name].weights for name, kept in self.kept.items())

    @property
    def pruned(self) -> float:
        """The share of the cost that is pruned at the end, in [0, 1]."""
        return 1 - self.goal / dense_cost(self.units, self.unit_costs)

    @property
    def unit_costs(self) -> Mapping[str, int]:
        """What a unit of each layer costs."""
        return {name: each.weights for name, each in self.units.items()} if self.costs is None else self.costs

    def limited_to(self, layers: Mapping[str, Layer]) -> "Allocation":
        """Return the allocation of some of its layers, where each has a number of its own."""
        assert not isinstance(self.kept, int)
        return Allocation(
            layers, {name: self.units[name] for name in layers}, {name: self.kept[name] for name in layers}
        )

    def at(self, progress: float) -> Mapping[str, int] | int:
        """Return `kept` after a share of the way from dense to the target; exactly `kept` at 1."""
        if progress == 1.0:
            return self.kept
        if isinstance(self.kept, int):
            total = dense_cost(self.units, self.unit_costs)
            return count_kept(total, progress * (1 - self.kept / total))
        return {
            name: self.units[name].kept(progress * (1 - kept / self.units[name].count))
            for name, kept in self.kept.items()
        }

    @torch.no_grad()
    def masks(self, score: Score, progress: float = 1.0) -> dict[str, Tensor]:
        """Return a mask of each layer, of the shape of its weight: the units of largest score.

        Args:
            score: of the units of one layer.
            progress: the share of the way from dense to the target.
        """
        kept, scores = self.at(progress), self._scores(score)
        if isinstance(kept, int):
            chosen = self._together(scores, kept)
        else:
            chosen = {name: self.units[name].keep_top(each(), kept[name], name) for name, each in scores.items()}
        return {name: _like(self.layers[name].weight, self.units[name].expand(mask)) for name, mask in chosen.items()}

    @torch.no_grad()
    def thresholds(self, score: Score, progress: float = 1.0) -> dict[str, Tensor]:
        """Return a threshold for each layer above which the units to keep lie; fewer where scores tie.

        Args:
            score: of the units of one layer, ≥ 0.
            progress: the share of the way from dense to the target.
        """
        kept, scores = self.at(progress), self._scores(score)
        if not isinstance(kept, int):
            return {name: global_threshold({name: each}, kept[name]) for name, each in scores.items()}
        costs = set(self.unit_costs.values())
        if len(costs) == 1:
            return dict.fromkeys(scores, global_threshold(scores, kept // costs.pop()))
        masks = self._together(scores, kept)
        left_out = {name: each().masked_fill(masks[name], 0).amax() for name, each in scores.items()}
        if self.costs is not None:  # each layer has its own
            return left_out
        return dict.fromkeys(scores, torch.stack(list(left_out.values())).amax())

    def _scores(self, score: Score) -> dict[str, Scores]:
        return {name: partial(score, layer, self.units[name]) for name, layer in self.layers.items()}

    def _together(self, scores: Mapping[str, Scores], kept: int) -> dict[str, Tensor]:
        costs = self.unit_costs
        if len(set(costs.values())) == 1:
            return keep_top_together(scores, kept // next(iter(costs.values())))
        # In the order of their scores, as many as fit.
        values = {name: each() for name, each in scores.items()}
        if any(value.is_meta for value in values.values()):
            return {name: torch.ones_like(value, dtype=torch.bool) for name, value in values.items()}
        if self.costs is not None:  # the smallest threshold above which the units cost no more than that
            worth = {name: (costs[name] / self.units[name].weights) ** -COST_POWER for name in scores}
            values = {name: wide(value) * worth[name] for name, value in values.items()}
            threshold = affordable_threshold(values, costs, kept)
            return {name: value > threshold for name, value in values.items()}
        check_scores({name: value.detach for name, value in values.items()})
        weights = torch.cat([torch.full_like(v, costs[n], dtype=torch.int64).flatten() for n, v in values.items()])
        order = torch.cat([value.flatten() for value in values.values()]).argsort(descending=True, stable=True)
        fits = torch.empty_like(order, dtype=torch.bool)
        fits[order] = weights[order].cumsum(0) <= kept
        split = fits.split([value.numel() for value in values.values()])
        return {name: part.reshape(values[name].shape) for name, part in zip(values, split, strict=True)}


def _like(weight: Tensor, mask: Tensor) -> Tensor:
    """Return a mask in the memory format of the weight, so that the effective weight keeps it."""
    if mask.stride() == weight.stride():
        return mask
    return torch.empty_like(weight, dtype=torch.bool).copy_(mask)


def magnitude(layer: Layer, units: Units) -> Tensor:
    """Return the score |W|; for groups their root mean square."""
    return units.norm(layer.weight)


def random_score(layers: Iterable[str], seed: int, *position: int) -> Score:
    """Return a score that is random for each unit: from the seed, the index of the layer, and a position."""
    index = {name: number for number, name in enumerate(layers)}
    return lambda layer, units: random_scores(units.unit_shape, layer.weight.device, seed, index[layer.name], *position)


def _resolve_budget(layers: Mapping[str, Layer], sparsity: float | None, budget: Budget | str) -> Budget:
    if isinstance(budget, str) and budget in RULES:
        assert sparsity is not None  # check_target has seen to it
        shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
        return Budget.from_sizes(shapes, budget, sparsity)
    if isinstance(budget, str):
        budget = Budget.find(budget)
    unknown = [name for name in budget if name not in layers]
    if unknown:
        raise InputError(
            f"the budget names layer {unknown[0]!r}, which is not sparsified; {nearest(unknown[0], layers)}"
        )
    missing = [name for name in layers if name not in budget]
    if missing:
        raise InputError(
            f"the budget misses {len(missing)} of {len(layers)} layers, {missing[0]!r} first; "
            "add them, or leave them out with select="
        )
    return budget
