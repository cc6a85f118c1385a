"""The contract of a method, and the base class of methods that rank weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparing.allocation import Allocation
from sparing.budget import Budget, check_target
from sparing.errors import InputError, SparsityWarning, listed
from sparing.layers import Layer
from sparing.parametrizations import Mask, Sparse
from sparing.patterns import NM, Pattern, Unstructured
from sparing.schedules import Updates, check_number, check_positions

if TYPE_CHECKING:
    from sparing.sparsifier import Sparsifier


Layers = Mapping[str, Layer]
"""The layers to sparsify, by name."""

Parametrizations = dict[str, Sparse]
"""A parametrization for each layer, by the layer's name."""

Optimizers = tuple[Optimizer, ...]
"""All optimizers that train the model, in the order in which they step, and wrappers that have state of their own."""

_MAY_CHANGE = {"sparsity", "macs", "input_size", "budget", "begin", "end", "every", "phase"}
"""Arguments of a method that `Sparsifier.retarget` may change: targets and schedules."""


@dataclass(frozen=True)
class Method(ABC):
    """Abstract: a way to train a sparse network. A subclass is a frozen dataclass and its own configuration.

    `sparsify_` calls `prepare` and `parametrizations` once. After `Sparsifier.attach`, the hooks run around every
    optimizer step, except those that a gradient scaler skips. The method has no state: everything that a checkpoint
    needs is a parameter or registered state of the parametrizations (`RunState.register_state`). The length of the run
    is an argument of `sparsify_`, not of the method.

    Attributes:
        name: the name of the method in recipes and messages.
        retargets: whether the target may change in a run, see `Sparsifier.retarget`.
        finishes: whether `Sparsifier.finish` performs the updates due in steps that were not taken; False if updates
            only move weights.
        sets_weights: whether updates set weights that go on training, so that the optimizer must not keep a copy.
        ramps: whether the sparsity rises to the target, of a method whose plan has units. In a model that is sparse
            already, the ramp then starts at the zeros that are there.
        ranges: intervals such as "(0, 1)" or "[0, inf)" of the arguments that are numbers, by name. They are checked
            here.

    Examples:
        A method that prunes the smaller half of each layer after the first step:

        >>> from sparing.parametrizations import Mask
        >>> class Halve(Method):
        ...     name = "halve"
        ...     def parametrizations(self, layers, plan):
        ...         return {name: Mask(layer.weight.detach().isfinite()) for name, layer in layers.items()}
        ...     def after_step(self, sparsifier, optimizers):
        ...         if sparsifier.step == 1:
        ...             for layer, part in sparsifier.each(Mask):
        ...                 size = layer.weight.detach().abs()
        ...                 part.mask.copy_(size > size.median())
        >>> Halve() == Halve()
        True
    """

    name: ClassVar[str]
    retargets: ClassVar[bool] = False
    finishes: ClassVar[bool] = True
    sets_weights: ClassVar[bool] = False
    ramps: ClassVar[bool] = False
    ranges: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        for field, interval in self.ranges.items():
            check_number(self, field, interval)

    @property
    def edits_gradients(self) -> bool:
        """Whether it acts before optimizer steps."""
        return type(self).before_step is not Method.before_step

    @property
    def regularizes(self) -> bool:
        """Whether it adds a term to the loss."""
        return type(self).penalty is not Method.penalty

    @property
    def rescales(self) -> bool:
        """Whether it sets learned thresholds."""
        return False

    @property
    def acts(self) -> bool:
        """Whether it acts around optimizer steps."""
        return self.edits_gradients or type(self).after_step is not Method.after_step

    @classmethod
    def for_schedule(
        cls, sparsity: float, learning_rates: Sequence[float], momentum: float, **arguments: Any
    ) -> tuple[Method, float]:
        """Return the method, and the weight decay of its thresholds that takes a run to about this sparsity.

        For methods whose sparsity follows from the schedule. The key `for_sparsity` of a recipe calls it.

        Args:
            sparsity: of all layers together, in (0, 1).
            learning_rates: learning rate of every step of the run.
            momentum: momentum of SGD; 0 for AdamW.
            arguments: other arguments of the method.

        Raises:
            InputError: the method has no such rule; an argument is out of range.
        """
        raise InputError(f"method {cls.name!r} has no rule for for_sparsity; give sparsity")

    def check_schedule(self, learning_rates: Sequence[float], weight_decay: float, momentum: float) -> None:
        """Warn if the method cannot work with this schedule. `sparing train` calls it before the first step.

        Args:
            learning_rates: learning rate of every step of the run.
            weight_decay: weight decay of learned thresholds.
            momentum: momentum of SGD; 0 for AdamW.
        """

    def prepare(self, model: nn.Module, layers: Layers, steps: int | None) -> Any:
        """Resolve the method for this model and length of the run; the result is `Sparsifier.plan`.

        `sparsify_` calls it before it changes the model, and it may raise `InputError`. Checkpoints do not contain it.
        """
        return None

    def check_retarget(self, new: Method) -> None:
        """Check that `Sparsifier.retarget` may replace the method by another one.

        Raises:
            InputError: it is of another class, cannot change its sparsity, or differs in more than target and schedule.
        """
        if type(new) is not type(self):
            raise InputError(
                f"retarget() changes the arguments of {self.name!r}, not the method, to "
                f"{getattr(new, 'name', new)!r:.200}: call densify_() and sparsify_() for that"
            )
        if not self.retargets:
            raise InputError(
                f"retarget(): {self.name!r} cannot change its sparsity during training: call densify_(), then "
                "sparsify_() with a method that can, such as GMP"
            )
        ours, theirs = self.describe(), new.describe()
        changed = [key for key in ours if ours[key] != theirs[key] and key not in _MAY_CHANGE]
        if changed:
            raise InputError(f"retarget() changes targets and schedules, not {', '.join(changed)}")

    @abstractmethod
    def parametrizations(self, layers: Layers, plan: Any) -> Parametrizations:
        """Return a parametrization for every layer, by the layer's name, on the device of its weight."""

    def before_step(self, sparsifier: Sparsifier, optimizers: Optimizers) -> None:
        """Act just before the optimizer step, when the gradients are computed (see `Sparsifier.unscale`)."""

    def after_step(self, sparsifier: Sparsifier, optimizers: Optimizers) -> None:
        """Act just after the optimizer step; `sparsifier.step` counts this step."""

    def resets(self, sparsifier: Sparsifier, optimizers: Optimizers) -> Iterable[Tensor]:
        """Return the parameters whose optimizer state updates set to zero; it is checked after the first step."""
        return ()

    def penalty(self, sparsifier: Sparsifier) -> Tensor:
        """Return the term that the method adds to the loss, differentiable; see `Sparsifier.penalty`."""
        raise NotImplementedError

    def goal(self, plan: Any) -> tuple[int, Mapping[str, int] | None] | None:
        """Return the cost of all layers at the target, and the cost of one weight by layer (None: 1 each).

        Return None if there is no target.
        """
        return None

    def limited_to(self, layers: Layers, plan: Any, model: nn.Module, steps: int | None) -> Any:
        """Return the plan for the layers that are left of those it was made for."""
        return self.prepare(model, layers, steps)

    def describe(self) -> dict[str, Any]:
        """Return name and arguments in plain values, for checkpoints. Equal methods have equal descriptions."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"method": self.name, **{key: json.loads(json.dumps(v, default=_plain)) for key, v in fields.items()}}


@dataclass(frozen=True)
class Plan:
    """A `Ranking` method resolved for a model and a length of run: how many weights to keep, and when to update."""

    allocation: Allocation
    updates: Updates | None = None


@dataclass(frozen=True, kw_only=True)
class Ranking(Method):
    """Abstract: a method that ranks weights and keeps the best. A subclass defines the score and the schedule.

    A run starts dense, unless the subclass makes other masks in `parametrizations`.

    Args:
        sparsity: target sparsity, a fraction in [0, 1): of each layer with budget="uniform", of all layers together
            otherwise. Leave it out with a Budget or an N:M pattern.
        budget: "uniform", "erk", "global" (the best of all layers together), a `Budget`, a budget file, or the name
            of a published budget.
        pattern: which weights are pruned together: `Unstructured()`, `Block(n)`, `NM(n, m)` or `Filters()`.

    A subclass with a schedule has the field `end` and, optionally, `begin` and `every`. They are checked and resolved
    here.

    Attributes:
        takes_global: whether budget="global" is supported.
        takes_nm: whether the pattern `NM` is supported.
        equal_units: whether units must have the same size in all layers, because they move between layers or compete.
        after_ramp: whether updates continue after the ramp, to the end of the run.

    Raises:
        InputError: the target is missing or contradictory; a value is out of range; the method does not support the
            budget or the pattern.
    """

    takes_global: ClassVar[bool] = True
    takes_nm: ClassVar[bool] = True
    equal_units: ClassVar[bool] = False
    after_ramp: ClassVar[bool] = False

    sparsity: float | None = None
    budget: Budget | str = "uniform"
    pattern: Pattern = Unstructured()

    def __post_init__(self) -> None:
        super().__post_init__()
        who = type(self).__name__
        check_positions(self, *(field for field in ("begin", "end", "phase") if hasattr(self, field)))
        if not isinstance(self.pattern, Pattern):
            raise InputError(
                f"{who}: pattern must be Unstructured(), Block(n), NM(n, m) or Filters(), got {self.pattern!r}"
            )
        if isinstance(self.pattern, NM):
            if not self.takes_nm:
                raise InputError(
                    f"{who}: {self.pattern} is not supported: the method chooses how many weights a group keeps"
                )
            if self.sparsity not in (None, self.pattern.sparsity):
                raise InputError(
                    f"{who}: {self.pattern} has sparsity {self.pattern.sparsity:g}, got sparsity={self.sparsity!r}"
                )
            return
        self.check_target()
        if self.budget == "global" and not self.takes_global:
            raise InputError(
                f"{who}: budget='global' is not supported: it starts from random masks, which need a sparsity for each "
                "layer; choose 'uniform', 'erk' or a Budget"
            )

    def check_target(self) -> None:
        """Check what the network is pruned to."""
        check_target(type(self).__name__, self.sparsity, self.budget)

    def allocate(self, model: nn.Module, layers: Layers) -> Allocation:
        """Return how many units the layers keep."""
        return Allocation.resolve(layers, self.pattern, self.sparsity, self.budget)

    def prepare(self, model: nn.Module, layers: Layers, steps: int | None) -> Plan:
        allocation = self.allocate(model, layers)
        sizes = {units.weights for units in allocation.units.values()}
        if self.equal_units and len(sizes) > 1:
            raise InputError(
                f"{type(self).__name__}: {self.pattern} makes groups of {min(sizes)} to {max(sizes)} weights, and they "
                "must have one size in all layers: use Block(n), or leave layers out with select="
            )
        return Plan(allocation, self.updates(steps))

    def parametrizations(self, layers: Layers, plan: Any) -> Parametrizations:
        """Return masks that keep all weights, until the method sets others."""
        return {name: Mask(torch.ones_like(layer.weight, dtype=torch.bool)) for name, layer in layers.items()}

    def limited_to(self, layers: Layers, plan: Any, model: nn.Module, steps: int | None) -> Any:
        if isinstance(plan.allocation.kept, int):  # of all layers together
            return self.prepare(model, layers, steps)
        return dataclasses.replace(plan, allocation=plan.allocation.limited_to(layers))

    def updates(self, steps: int | None) -> Updates | None:
        """Return when masks or thresholds are updated; None for a method without the field `end`."""
        if not hasattr(self, "end"):
            return None
        begin, every = getattr(self, "begin", 0), getattr(self, "every", 1)
        return Updates.resolve(self, begin, self.end, every, steps, self.after_ramp)

    def goal(self, plan: Any) -> tuple[int, Mapping[str, int] | None] | None:
        allocation: Allocation = plan.allocation
        if allocation.costs is None:
            return allocation.goal, None
        return allocation.goal, {n: cost // allocation.units[n].weights for n, cost in allocation.costs.items()}


def check_gradients(method: Method, gradients: Mapping[str, Tensor | None]) -> None:
    """Check that a method which ranks weights by their gradients has some, and warn of layers that have none.

    Args:
        method: that ranks weights.
        gradients: of the weights, by layer.

    Raises:
        InputError: all gradients are zero or missing.
    """
    without = [name for name, gradient in gradients.items() if gradient is None or not bool(gradient.any())]
    if len(without) == len(gradients):
        raise InputError(
            f"{method.name} ranks weights by their gradients, and those of all sparsified layers are zero or missing "
            "in this step: call backward() before optimizer.step()"
        )
    if without:
        warnings.warn(
            f"{method.name} ranks weights by their gradients, and no gradient reached {len(without)} of "
            f"{len(gradients)} layers in this step: {listed(without, 4)}, whose weights rank last. "
            "Leave out with select= what the loss does not use",
            SparsityWarning,
            stacklevel=3,
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping) and len(value) <= 16:
        return dict(value)
    if isinstance(value, Mapping):  # a Budget of many layers: the description is saved with each of them
        digest = hashlib.sha256(json.dumps(dict(value), sort_keys=True).encode()).hexdigest()
        return f"{len(value)} layers, {digest[:12]}"
    if isinstance(value, Tensor):
        return list(value.shape)
    return getattr(value, "__qualname__", None) or repr(value)
