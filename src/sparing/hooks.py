"""Count the steps that optimizers take together, and act around them, through torch's own hooks."""

from abc import ABC, abstractmethod
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch._compile import _disable_dynamo
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparing.optimizers import is_idle, is_nested, is_skipped, with_hook


@cache
def _watching() -> WeakSet["StepHooks"]:
    """Return the objects that are told of the steps of all optimizers.

    One hook serves them all: torch allows none to be removed during a step, when garbage may be collected.
    """
    watching: WeakSet[StepHooks] = WeakSet()

    def tell(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for each in list(watching):
            each._notice(optimizer)

    # Imports the compiler at the first step, where torch.compiler.disable() would now, which takes seconds.
    register_optimizer_step_post_hook(_disable_dynamo(tell))
    return watching


class StepHooks(ABC):
    """Abstract: acts before the first of several optimizers takes its part of a step, and after the last has.

    A step that a gradient scaler skips, or that moves nothing, is none. If only some optimizers take a step, it ends
    when one of them begins the next. Copies are hooked to the copied optimizers.

    Attributes:
        optimizers: those that are hooked.
        uncounted: steps of other optimizers that train the same weights, after the last step.
    """

    def __init__(self) -> None:
        self.optimizers: tuple[Optimizer, ...] = ()
        self.uncounted = 0
        _watching().add(self)
        self._handles: list[Any] = []
        self._stepped: set[int] = set()  # optimizers that have taken their part of the step
        self._taken = self._acted = False

    @abstractmethod
    def _accepts_step(self, optimizer: Optimizer, idle: bool) -> bool:
        """Return whether there is anything to act on; raise an error if the step cannot be taken.

        Args:
            optimizer: that is about to step.
            idle: whether the step moves nothing.
        """

    @abstractmethod
    def _begin_step(self) -> None:
        """Act on the gradients of a step."""

    @abstractmethod
    def _end_step(self) -> None:
        """Act after a step that was taken."""

    @abstractmethod
    def _is_trained_by(self, optimizer: Optimizer) -> bool:
        """Return whether an optimizer trains the weights that the steps are about."""

    @abstractmethod
    def _after_other_step(self) -> None:
        """Act after a step of an optimizer that is not hooked, but trains the same weights."""

    def _notice(self, optimizer: Optimizer) -> None:
        if optimizer not in self.optimizers and self._is_trained_by(optimizer):
            self.uncounted += 1
            self._after_other_step()

    def _hook(self, optimizers: tuple[Optimizer, ...]) -> None:
        while self._handles:
            self._handles.pop().remove()
        self.optimizers = optimizers
        # A compiled step() would trace the methods, which read numbers from tensors, and compile anew at each step.
        before, after = torch.compiler.disable(self._before_step), torch.compiler.disable(self._after_step)
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(before))
            self._handles.append(optimizer.register_step_post_hook(after))

    def __copy__(self) -> Any:
        """Return the object itself: another one with the same optimizers would count each of their steps again."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handles": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copied optimizer has lost its hooks, and has another identity.
        vars(self).update({**state, "_stepped": set(), "_acted": False})
        _watching().add(self)
        self._hook(self.optimizers)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        if is_nested(optimizer):
            return None
        # The optimizer itself is the first positional argument.
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 and callable(args[1]) else None)
        if id(optimizer) in self._stepped:  # the others skipped the step before
            self._complete_step()
        # With a closure the gradients are not there yet; a method that has acted may have cleared them.
        idle = closure is None and not self._acted and all(map(is_idle, self.optimizers))
        self._taken = self._accepts_step(optimizer, idle) and not idle and not is_skipped(optimizer)
        if not self._taken or self._acted:
            return None
        self._acted = True
        if closure is None:
            self._begin_step()
            return None
        # The closure computes the gradients within the step.
        closure = with_hook(closure, self._begin_step)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure}
        return (args[0], closure, *args[2:]), kwargs

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if is_nested(optimizer) or not self._taken:
            return
        self._stepped.add(id(optimizer))
        if len(self._stepped) == len(self.optimizers):
            self._complete_step()

    def _complete_step(self) -> None:
        """End a step that has begun; does nothing if none has."""
        if self._stepped:
            self._stepped, self._acted, self.uncounted = set(), False, 0
            parametrize._cache.clear()  # within parametrize.cached() it has the weights of before the step
            self._end_step()
