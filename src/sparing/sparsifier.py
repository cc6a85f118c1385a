"""The sparsifier: the clock of a sparse run, and what connects method, model and optimizers."""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparing.attachment import check_held, check_optimizers, check_penalty, check_state, doubts
from sparing.errors import InputError, SparsityWarning
from sparing.goal import (
    collapsed,
    describe_uncounted,
    goal_reached,
    make_clock,
    set_costs,
    start_ramp,
    warn_collapsed,
    warn_ended,
    warn_pruned_at_once,
)
from sparing.hooks import StepHooks
from sparing.layers import Layer, sparse_layers
from sparing.method import Method
from sparing.missed import warn_missed_target
from sparing.optimizers import chain, gradient_scale, holders, in_backward, parameters_of, parts
from sparing.parametrizations import Clock, Sparse
from sparing.schedules import check_steps

Kind = TypeVar("Kind", bound=Sparse)


class Sparsifier(StepHooks):
    """The sparsified layers of a model, the clock of the run, and the link to the optimizer; made by `sparsify_`.

    Thresholds, masks and the count of steps are in `model.state_dict()`; the sparsifier itself saves nothing.

    Attributes:
        model: the model.
        method: the method it is trained with.
        layers: the sparsified layers by name, found once.
        plan: what the method resolved for this model and length of run.
        optimizers: those it is attached to.

    Examples:
        >>> sparsifier = sparsify_(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), STR(init=-5.0))
        >>> list(sparsifier.layers), sparsifier.step
        (['0', '2'], 0)
    """

    WATCH_EVERY = 100
    """Optimizer steps between two checks for layers whose weights are all zero; one more follows the last step."""

    UNCOUNTED = 10
    """Steps of other optimizers in a row at which to warn."""

    SKIPPED = 100
    """Steps that `finish` may make up for without a warning: a gradient scaler skips some."""

    def __init__(self, model: nn.Module, method: Method, layers: dict[str, Layer], plan: Any, clock: Clock) -> None:
        self.model, self.method, self.layers, self.plan, self.clock = model, method, layers, plan, clock
        super().__init__()
        self._holders: tuple[Any, ...] = ()  # of optimizer state: the optimizers and those around or within them
        self._penalized = self._penalty_warned = self._checked = False
        self._warned, self._doubts = set[str](), set[str]()
        self._join_layers()

    @property
    def step(self) -> int:
        """Optimizer steps taken; steps that a gradient scaler skipped are not among them."""
        return self.clock.step

    @property
    def steps(self) -> int | None:
        """Length of the run in optimizer steps; None if it was not given."""
        return self.clock.steps

    @property
    def forgotten(self) -> str | None:
        """A sentence if the method could not act, because optimizer steps were not counted; None otherwise."""
        if self.clock.steps is None or not self.method.acts:
            return None
        if self.clock.step > 0 and (self.clock.step >= self.clock.last_update or not self.uncounted):
            return None
        return describe_uncounted(self.method, self.clock, bool(self.optimizers), self.uncounted)

    def each(self, kind: type[Kind]) -> Iterator[tuple[Layer, Kind]]:
        """Iterate over the layers whose parametrization is of the class `kind`, with that parametrization."""
        for layer in self.layers.values():
            if isinstance(part := layer.parametrization, kind):
                yield layer, part

    @property
    def due(self) -> bool:
        """Whether an update is due after this step; of a method with a schedule."""
        return bool(self.plan.updates.due(self.clock.step))

    @property
    def progress(self) -> float:
        """How far the sparsity ramp is at this step, in [0, 1]; of a method with a schedule."""
        return float(self.plan.updates.progress(self.clock.step, self.clock.start))

    @property
    def holds(self) -> bool:
        """Whether this step is on the ramp of a run that did not start dense; of a method with a schedule.

        A method whose gradients reach pruned weights then updates its thresholds at every step: zeros lie close
        together, and the next step could move all of them past a threshold.
        """
        return self.clock.start > 0 and self.clock.step <= self.plan.updates.end

    def sparsity(self) -> float:
        """Return the fraction of zeros in the effective weights of all layers together, in [0, 1]."""
        weights = sum(layer.weight.numel() for layer in self.layers.values())
        return 1 - sum(layer.nonzero() for layer in self.layers.values()) / max(weights, 1)

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Copy a mask into each layer, given by the layer's name; of a method with `Masked` parametrizations."""
        for name, mask in masks.items():
            self.layers[name].parametrization.mask.copy_(mask)  # type: ignore[operator]

    def attach(self, *optimizers: Any) -> None:
        """Let the method act around `optimizer.step()`, through torch's own optimizer hooks.

        A second call moves over to the new optimizers, for a second phase of training.

        Methods that regrow weights set the optimizer state of these weights to zero: every floating-point number that
        it holds for them, in tensors of the shape of the weight, of another shape, or quantized ones of torchao. State
        of fewer numbers than the weight has, such as the factors of Adafactor or the moments of GaLore, and
        preconditioners stay as they are.

        Args:
            optimizers: all that train the model. Wrappers such as those of accelerate, Lightning, opacus and
                sharpness-aware minimization, and those that hold a list of `optimizers`, are looked through. With
                several optimizers, the method acts before the first and after the last of them has stepped. A step ends
                without those that a GradScaler skips, once another one steps again. Call `scaler.unscale_` on all
                before the first steps.

        Raises:
            InputError: no optimizer is given; they do not hold a threshold or dense weight of a sparsified layer; the
                model is sharded by FSDP2, and the method has masks or a target; the method changes gradients or
                optimizer state, and the optimizer is LBFGS; the method sets weights of which the optimizer keeps a
                copy, as Lookahead does. The first step raises it if the state has such a copy, or cannot be reset, as
                the 8-bit codes of bitsandbytes, or if a gradient hook takes the step, within the backward pass.

        Warns:
            SparsityWarning: the optimizer gives no weight decay to thresholds that nothing else raises.
        """
        self.drop_lost_layers()
        optimizers = tuple(part for optimizer in optimizers for part in parts(optimizer))
        inner = tuple(dict.fromkeys(chain(optimizer)[-1] for optimizer in optimizers))
        resets = list(self.method.resets(self, inner))
        check_optimizers(self.method, self.layers, optimizers, inner, resets)
        self._complete_step()  # that only some of the optimizers before took
        self._checked = False
        self._holders = tuple(each for optimizer in optimizers for each in holders(optimizer))
        check_state(self.method, self.layers, self._holders, resets)
        self._hook(inner)
        self._doubts = set()
        self._warn_doubts()

    def penalty(self) -> Tensor:
        """Return the term to add to the loss: `loss = loss + sparsifier.penalty()`; zero for most methods.

        With gradient accumulation, add it to one of the losses, or to each divided by their number.
        """
        self._penalized |= torch.is_grad_enabled()  # without gradients it is for a log
        self._refresh_layers()
        if not self.method.regularizes or not self.layers:
            return torch.zeros((), device=next(self.model.parameters()).device)
        check_penalty(self.method, self.layers)
        return self.method.penalty(self)

    def unscale(self, gradient: Tensor) -> Tensor:
        """Return a gradient without the scale of a GradScaler, which leaves it to a fused optimizer to unscale."""
        scale = gradient_scale(self.optimizers)
        return gradient if scale is None else gradient / scale

    def finish(self) -> None:
        """End a run that took fewer steps than planned: count the others, and perform the updates due in them.

        Call it after the last step where a gradient scaler may have skipped some. It prunes as far as the target asks,
        but regrows no weights, which nothing would train. It does nothing in a run that took all of its steps.

        Warns:
            SparsityWarning: so many steps were not taken, or not counted, that the weights could not adapt to pruning.
        """
        self._complete_step()
        if self.forgotten is not None:
            warnings.warn(self.forgotten, SparsityWarning, stacklevel=2)
            if not self.optimizers:
                return
        self.drop_lost_layers()
        if not self.layers or self.clock.steps is None or self.clock.step >= self.clock.steps:
            return
        missing = self.clock.last_update - self.clock.step
        if self.forgotten is None and self.method.finishes and missing > max(self.SKIPPED, self.clock.steps // 10):
            warn_pruned_at_once(self.method, self.clock, missing)
        while self.clock.step < self.clock.steps:
            self.clock.step += 1
            if self.method.finishes:
                self.method.after_step(self, self._holders)
        warn_missed_target(self.model, self.clock)

    def retarget(self, method: Method, steps: int | None = None) -> None:
        """Continue with another target or length: the step count starts again at 0, the ramp at today's sparsity.

        Args:
            method: of the class of the present one, with another target, budget or schedule.
            steps: length of the new run.

        Raises:
            InputError: the method is of another class, differs in more than that, or makes its masks only once.
        """
        check_steps(steps)
        self.method.check_retarget(method)
        self.drop_lost_layers()
        plan = method.prepare(self.model, self.layers, steps)
        if getattr(getattr(plan, "updates", None), "end", 1) == 0:
            raise InputError("retarget(): begin=0 and end=0 prune in sparsify_() only; give a later end")
        self.method, self.plan = method, plan
        set_costs(self.layers, method, plan)
        clock = make_clock(method, plan, steps, len(self.layers))
        clock.start = goal_reached(self.layers, clock.goal)
        vars(self.clock).update(vars(clock))

    def start(self) -> None:
        """Give the values of the start to parametrizations that left the meta device without a checkpoint."""
        made = self.method.parametrizations(self.layers, self.plan)
        for name, layer in self.layers.items():
            layer.find_parametrization().take_values(made[name])  # type: ignore[union-attr]

    def restart(self) -> None:
        """Make masks and the start of the ramp anew, from weights that were loaded before the first step."""
        made = self.method.parametrizations(self.layers, self.plan)
        weights = {name: layer.weight for name, layer in self.layers.items()}
        self.clock.start = start_ramp(self.method, self.plan, weights, made)
        for name, layer in self.layers.items():
            layer.parametrization.take_state(made[name].state())

    def skip_step(self) -> None:
        """Skip the upcoming optimizer step of the model, by clearing its gradients but for layers of other sparsifiers.

        Other models that the optimizers train take their step.
        """
        others = {id(p) for layer in self._others() for p in (*layer.originals, *layer.parametrization.parameters())}
        own = {id(parameter) for parameter in self.model.parameters()} - others
        for parameter in parameters_of(self.optimizers):
            if id(parameter) in own:
                parameter.grad = None

    def collapsed(self) -> list[str]:
        """Return the names of the sparsified layers in which every effective weight is zero."""
        self._refresh_layers()
        return collapsed(self.layers)

    def warn_collapsed(self) -> None:
        """Warn about layers that have lost every weight, once for each of them."""
        new = [name for name in self.collapsed() if name not in self._warned]
        self._warned.update(new)
        if new:
            warn_collapsed(self.step, {name: self.layers[name] for name in new})

    def _warn_doubts(self, optimizer: Optimizer | None = None) -> None:
        """Warn of what keeps the method from reaching its aim, once in the same words, before an optimizer's step."""
        for text in doubts(self.method, self.plan, self.layers, self.optimizers, optimizer):
            if text not in self._doubts:
                warnings.warn(text, SparsityWarning, stacklevel=3)
            self._doubts.add(text)

    def _makes(self, layer: Layer) -> bool:
        """Return whether this run makes the effective weight of a layer; another may after `densify_` of a part."""
        part = layer.find_parametrization()
        return part is not None and part.clock is self.clock

    def _others(self) -> list[Layer]:
        """Return the layers of other sparsifiers."""
        return [layer for layer in sparse_layers(self.model).values() if not self._makes(layer)]

    def _refresh_layers(self) -> None:
        """Leave out layers that were densified; the target is that of the others."""
        if not self.clock.stale:
            return
        self.clock.stale = False
        self.layers = {name: layer for name, layer in self.layers.items() if self._makes(layer)}
        if self.layers:
            self.plan = self.method.limited_to(self.layers, self.plan, self.model, self.steps)
            rest = make_clock(self.method, self.plan, self.steps, len(self.layers))
            self.clock.goal, self.clock.layers, self.clock.reduced = rest.goal, rest.layers, True
            set_costs(self.layers, self.method, self.plan)

    def drop_lost_layers(self) -> None:
        """Drop the layers that are no longer in the model, with a warning; the target is that of the others."""
        self._refresh_layers()
        modules = {id(module) for module in self.model.modules()}
        left = {
            name: layer
            for name, layer in self.layers.items()
            if self._makes(layer) and any(id(place.module) in modules for place in layer.places)
        }
        lost = self.layers.keys() - left.keys()
        if not lost:
            return
        self.layers = left
        self.clock.stale = True
        self._refresh_layers()
        names = sorted(lost)
        warnings.warn(
            f"{self.method.name}: sparsified layers are no longer in the model, as their modules were replaced or "
            f"their parametrizations removed: {', '.join(names)}. The target is now that of the other "
            f"{len(self.layers)} layers. To sparsify what is in their place, call sparsify_(model, method, "
            f"select={names})",
            SparsityWarning,
            stacklevel=3,
        )

    def _join_layers(self) -> None:
        """Make this the sparsifier of the parametrizations, for checks that start from the model."""
        for layer in self.layers.values():
            layer.parametrization.sparsifier = (self,)

    def _hook(self, optimizers: tuple[Optimizer, ...]) -> None:
        for layer in self.layers.values():
            layer.parametrization.keep_state()
        super()._hook(optimizers)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._join_layers()

    def _accepts_step(self, optimizer: Optimizer, idle: bool) -> bool:
        if in_backward() and self.method.acts:
            raise InputError(
                f"{self.method.name} acts around a step of all parameters, and {type(optimizer).__name__}.step() was "
                "called by a gradient hook, within the backward pass: call it after backward()"
            )
        self._refresh_layers()
        # A parametrization may be removed between two steps. This check needs no walk through the model.
        if any(layer.places[0].parametrizations is None for layer in self.layers.values()):
            self.drop_lost_layers()
        if idle and self.layers:
            check_held(self.layers, self.optimizers)
        if not self._checked or self.step % self.WATCH_EVERY == 0 or self.step + 1 == self.steps:
            self._warn_doubts(optimizer)
        return bool(self.layers)

    def _is_trained_by(self, optimizer: Optimizer) -> bool:
        if self.clock.steps is None or not self.method.acts:
            return False  # no step is missed
        held = {id(parameter) for parameter in parameters_of([optimizer])}
        made_by = [layer.places[0].parametrizations for layer in self.layers.values()]
        return any(id(p) in held for each in made_by if each is not None for p in each.parameters(recurse=False))

    def _after_other_step(self) -> None:
        if self.uncounted == self.UNCOUNTED and self.forgotten is not None:
            warnings.warn(self.forgotten, SparsityWarning, stacklevel=4)

    def _begin_step(self) -> None:
        if self.method.edits_gradients:
            self.method.before_step(self, self._holders)

    def _end_step(self) -> None:
        clock = self.clock
        clock.step += 1
        watched = clock.step % self.WATCH_EVERY == 0 or clock.step == clock.steps
        if watched or not self._checked:
            self.drop_lost_layers()
            check_held(self.layers, self.optimizers)
        if not self._checked:  # the first step has created the state
            check_state(self.method, self.layers, self._holders, self.method.resets(self, self.optimizers))
            self._checked = True
        self.method.after_step(self, self._holders)
        if watched:
            self.warn_collapsed()
        if clock.step == clock.steps:
            warn_missed_target(self.model, clock)
        if clock.steps is not None and clock.step == clock.steps + 1 and self.method.acts and not self._others():
            warn_ended(self.method, clock)
        if self.method.regularizes and not self._penalized and not self._penalty_warned:
            self._penalty_warned = True
            warnings.warn(
                f"{self.method.name} adds a term to the loss, and step {clock.step} was taken without it: train with "
                "loss = loss + sparsifier.penalty()",
                SparsityWarning,
                stacklevel=2,
            )
        self._penalized = False
