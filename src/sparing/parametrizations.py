"""Base classes of the parametrizations: modules that make the effective weight from the dense weight.

Everything a checkpoint needs is in the state_dict of these modules: parameters, registered state such as masks (see
`sparing.run_state`), and the clock of the run as extra state. So it is saved, moved and copied with the model.
"""

import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from sparing.errors import InputError, SparsityWarning
from sparing.operators import Operator, apply_operator, masked
from sparing.run_state import RunState
from sparing.threshold import soft_threshold


@dataclass
class Clock:
    """The time and the identity of one sparse training run, shared by all of its parametrizations.

    Attributes:
        method: name and arguments of the method, in plain values.
        steps: length of the run in optimizer steps; None if the method needs none.
        step: optimizer steps taken.
        start: the share of the final sparsity that the run started with; above 0 after `retarget`, and in a model that
            was sparse already.
        layers: how many layers the run has.
        goal: the most that the layers may cost at the end of the run; None without a target. It follows
            from model and method, so it is not saved.
        unit: of the goal, "weights" or "MACs".
        stale: set when layers were densified, so that the sparsifier looks for its layers again.
        last_update: the step of the last update; the end of the run if the plan has no updates, 0 if the method does
            not act.
        reduced: whether the target has become that of fewer layers.
    """

    method: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    step: int = 0
    start: float = 0.0
    layers: int = 0
    goal: int | None = None
    unit: str = "weights"
    stale: bool = False
    last_update: int = 0
    reduced: bool = False

    def save(self) -> Tensor:
        """Return the clock as bytes of JSON, in a uint8 tensor."""
        rest = json.dumps({"steps": self.steps, "method": self.method})[1:]
        # Numbers that change are padded: torch.distributed.checkpoint loads into tensors of the same size.
        text = f'{{"step": {self.step:>20}, "start": {json.dumps(self.start):>30}, {rest}'.encode()
        return torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def load(self, state: Tensor) -> None:
        """Set step and start from what `save` returned.

        Raises:
            InputError: the state is that of another method, target or length of run, or cannot be read.
        """
        if not state.numel() or state.is_meta:
            return  # a parametrization that was saved without a sparsifier
        try:  # a checkpoint that was cast to another dtype has whole numbers
            if bool((state != state.round()).any()):
                raise ValueError("an average of state_dicts")
            saved = json.loads(bytes(state.cpu().int().tolist()))
            theirs = {"steps": saved["steps"], **saved["method"]}
            step, start = +saved["step"], +saved["start"]
        except (ValueError, TypeError, KeyError) as error:
            if state.is_floating_point():
                return self._take_average()
            raise InputError(
                "the step count of a checkpoint cannot be read: it is damaged, or an average of state_dicts that was "
                "cast back to integers. Average parameters, or leave the average in floating point"
            ) from error
        ours = {"steps": self.steps, **self.method}
        different = [key for key in (theirs | ours) if theirs.get(key) != ours.get(key)]
        change = "change them with sparsifier.retarget()"
        if "method" in different:  # the arguments of two methods say nothing
            different, change = ["method"], "call densify_(), and sparsify_() with the other method"
        if different:
            described = (", ".join(f"{key}={values.get(key)!r}" for key in different) for values in (theirs, ours))
            raise InputError(
                f"the checkpoint is of a run with {next(described)}, this run has {next(described)}. Call sparsify_() "
                f"with the method and steps of the checkpoint, load it, then {change}"
            )
        self.step, self.start = step, start

    def _take_average(self) -> None:
        """Take the step of an average of checkpoints: that of the model if it has been trained, or the end."""
        if self.step == 0:
            self.step = self.steps or 1
            warnings.warn(
                "the checkpoint is an average of several, so its step count is not known: it counts as the end of the "
                "run. To go on with the run, load one of those it was made of",
                SparsityWarning,
                stacklevel=2,
            )


class Sparse(RunState):
    """Abstract: make the effective weight, most of it exactly zero, from the dense weight.

    Every subclass is final and defines `forward(weight) -> effective weight`, of the same shape and dtype.
    `sparsify_`, `densify_` and `report` recognize a sparsified layer by this class.

    Parameters and state keep their dtype when the model is moved to a narrower one. In bf16 or fp16 a step of
    weight decay, s ← (1 − 5e-5) s, is lost to rounding, and the s of STR would never move.

    Attributes:
        decays: for each parameter that gets weight decay, the group of `param_groups` whose decay it gets:
            "thresholds", "weights" or "norms". A parameter that is not named gets none.
        clock: of the run; set by `sparsify_`.
        cost: of one weight, in the unit of the goal of the run.
        sparsifier: the sparsifier of the run, alone in a tuple; a copy of the model has none.
    """

    decays: ClassVar[Mapping[str, str]] = {}
    clock: Clock | None = None
    cost: int = 1
    sparsifier: tuple[Any, ...] = ()

    @property
    def rate(self) -> float | None:
        """Learning rate of the thresholds in `param_groups`; None is that of the optimizer."""
        return None

    def threshold(self) -> Tensor | None:
        """Return the threshold in force, ≥ 0, in units of the weight; None where there is none."""
        return None

    def follow(self, source: Any) -> None:
        super().follow(source)
        model = source.module()
        if self.clock is not None and isinstance(model, Sparse) and model.clock is not None:
            self.clock.step, self.clock.start = model.clock.step, model.clock.start

    def is_trained(self) -> bool:
        return self.clock is None or self.clock.step > 0

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8) if self.clock is None else self.clock.save()

    def set_extra_state(self, state: Tensor) -> None:
        if self.clock is not None:
            self.clock.load(state)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != "sparsifier"}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if not tensor.is_floating_point():
                return moved
            narrower = torch.finfo(moved.dtype).bits < torch.finfo(tensor.dtype).bits
            # From the tensor itself, not from its rounded copy.
            return tensor.to(moved.device) if narrower else moved

        if self._source is not None:
            self._source.move(fn)
        return super()._apply(keep_dtype, recurse)


class LearnedThreshold(Sparse):
    """Abstract: a threshold that is learned through s.

    t = scale · g(s)                   in units of a weight
    t = scale · √‖W‖ · g(s)            in units of the layer, if `weight` is given

    Args:
        s: the learned number, of a shape that broadcasts to the weight. The same Parameter in
            several modules makes them share one threshold.
        g: the map from s to numbers ≥ 0.
        scale: a constant factor, the k of k · sigmoid.
        weight: the dense weight W, whose norm ‖W‖, the root of the sum of squares, `measure` takes.
    """

    decays: ClassVar[Mapping[str, str]] = {"s": "thresholds"}
    unit: Tensor | None = None
    """√‖W‖, saved with the model; None where thresholds are in units of a weight."""

    def __init__(
        self, s: nn.Parameter, g: Callable[[Tensor], Tensor], scale: float = 1.0, weight: Tensor | None = None
    ) -> None:
        super().__init__()
        self.s = s
        self.g = g
        self.scale = scale
        if weight is not None:
            # Measured at the first update: before it, the weights of ranks may differ. Until then nothing is pruned.
            self.register_state("unit", torch.zeros((), dtype=torch.float32, device=weight.device))

    def threshold(self) -> Tensor:
        return self.threshold_at(self.s)

    def threshold_at(self, s: Tensor) -> Tensor:
        """Return the threshold for another s."""
        t = self.g(s)
        t = t if self.scale == 1.0 else self.scale * t
        return t if self.unit is None else self.unit * t

    @torch.no_grad()
    def measure(self, weight: Tensor) -> None:
        """Take the norm of the dense weight, if thresholds are in units of it."""
        if self.unit is not None:
            norm = torch.linalg.vector_norm(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
            self.unit.copy_(norm.sqrt())

    def extra_repr(self) -> str:
        return f"g={getattr(self.g, '__name__', repr(self.g))}, scale={self.scale}, s={tuple(self.s.shape)}"


class SoftThreshold(LearnedThreshold):
    """S(W, t) = sign(W) · relu(|W| − t), with the threshold t = scale · g(s) learned through s.

    Examples:
        >>> soft = SoftThreshold(nn.Parameter(torch.tensor([-2.0])), torch.sigmoid)
        >>> soft(torch.tensor([-0.5, 0.1, 0.3])).detach()
        tensor([-0.3808,  0.0000,  0.1808])
    """

    def forward(self, weight: Tensor) -> Tensor:
        return soft_threshold(weight, self.threshold())


def learned_number(shape: Sequence[int], start: float, weight: Tensor) -> nn.Parameter:
    """Return a learned parameter of a parametrization: on the device of the weight, float32 whatever its dtype.

    In bf16 a training step of an s near −10 would be lost to rounding; see `Sparse`.
    """
    return nn.Parameter(torch.full(tuple(shape), float(start), dtype=torch.float32, device=weight.device))


class Masked(Sparse):
    """Abstract: the effective weight is the weight where a mask is True, and zero elsewhere.

    S = W ⊙ M,   dW = dS ⊙ M                  unless a subclass has a `forward` of its own

    Args:
        mask: boolean, of the shape of the weight.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_state("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return masked(weight, self.mask)

    def extra_repr(self) -> str:
        return f"mask={tuple(self.mask.shape)}"


class Mask(Masked):
    """S = W ⊙ M, and so dW = dS ⊙ M: a pruned weight gets no gradient.

    Examples:
        >>> Mask(torch.tensor([True, False]))(torch.tensor([3.0, 4.0]))
        tensor([3., 0.])
    """


class DenseGradientMask(Masked):
    """S = W ⊙ M forward, but dW = dS: the straight-through estimator.

    A pruned weight gets the gradient that the effective weight has in its place.

    Examples:
        >>> weight = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> DenseGradientMask(torch.tensor([True, False]))(weight).sum().backward()
        >>> weight.grad
        tensor([1., 1.])
    """

    def forward(self, weight: Tensor) -> Tensor:
        return straight_through(weight, masked(weight.detach(), self.mask))


def in_training_step(module: nn.Module) -> bool:
    """Return whether this call of a module belongs to a training step: gradients are recorded in training mode.

    The first pass of reentrant checkpointing belongs to one, too. It records no gradients, and is repeated in the
    backward pass, where the weights must be the same.
    """
    if not module.training or torch.is_grad_enabled():
        return module.training
    frame = None if torch.compiler.is_compiling() else sys._getframe()
    while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
        frame = frame.f_back
    return frame is not None


def warn_evaluation_mode(method: str, parts: Sequence[nn.Module]) -> None:
    """Warn if the penalty of a method is computed for a training step of modules that are in evaluation mode."""
    still = sum(not part.training for part in parts)
    if still and torch.is_grad_enabled():
        warnings.warn(
            f"{method}: {still} of {len(parts)} layers are in evaluation mode, where the penalty decides what is "
            "pruned, and the loss has no part in it: call model.train() before training",
            SparsityWarning,
            stacklevel=4,
        )


def straight_through(weight: Tensor, effective: Tensor) -> Tensor:
    """Return `effective`, with the gradient passed on to `weight` unchanged.

    Args:
        weight: W, which gets the gradient of the result.
        effective: S, made from W without recording gradients; of its shape.

    Source: Bengio, Léonard & Courville, "Estimating or Propagating Gradients Through Stochastic Neurons", 2013.

    Examples:
        >>> weight = torch.tensor([0.2, 1.2], requires_grad=True)
        >>> straight_through(weight, weight.detach().round()).sum().backward()
        >>> weight.grad
        tensor([1., 1.])
    """
    return apply_operator(_StraightThrough, weight, effective)


class _StraightThrough(Operator):
    @staticmethod
    def forward(weight: Tensor, effective: Tensor) -> Tensor:
        return effective.view_as(effective)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output, None
