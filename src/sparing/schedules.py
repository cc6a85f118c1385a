"""Schedules: learning rates, sparsity ramps, and the steps at which updates are due."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparing.errors import InputError


def warmup_cosine(position: float, total: float, warmup: float = 0.0) -> float:
    """Return the factor on the learning rate: linear warm-up, then half a cosine down to zero.

        f(t) = (t + 1) / w                            for t < w
        f(t) = ½ (1 + cos(π (t − w) / (T − w)))       from then on

    Args:
        position: t, epochs or steps taken so far, in the unit of the others.
        total: T > w, the length of the run.
        warmup: w, the length of the warm-up.

    Returns:
        A factor in [0, 1], exactly 1 when the warm-up ends and 0 at T.

    Source: the paper's code (schedulers.py), which counts in epochs.

    Examples:
        >>> [warmup_cosine(epoch, 3, 1) for epoch in range(4)]
        [1.0, 1.0, 0.5, 0.0]
    """
    if position < warmup:
        return (position + 1) / warmup
    if position >= total:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * (position - warmup) / (total - warmup)))


def warmup_drops(position: float, drops: Sequence[float], warmup: float = 0.0, factor: float = 0.1) -> float:
    """Return the factor on the learning rate: linear warm-up, then multiplied by `factor` at every drop.

        f(t) = (t + 1) / w                     for t < w
        f(t) = factor^(number of drops ≤ t)    from then on

    Args:
        position: t, epochs or steps taken so far, in the unit of the others.
        drops: where the learning rate drops.
        warmup: w, the length of the warm-up.
        factor: what a drop multiplies the learning rate by.

    Source: Kusupati et al., "FastGRNN", NeurIPS 2018, section 4: one drop after two thirds of the epochs.

    Examples:
        >>> [warmup_drops(epoch, [2]) for epoch in range(4)]
        [1.0, 1.0, 0.1, 0.1]
    """
    if position < warmup:
        return (position + 1) / warmup
    return factor ** sum(drop <= position for drop in drops)


def cubic(step: int, begin: int, end: int, final: float) -> float:
    """Return the sparsity of gradual magnitude pruning: it rises fast at first, then more slowly.

        s(t) = 0                                      for t ≤ begin
        s(t) = final · (1 − (1 − (t − begin) / (end − begin))³)
        s(t) = final, exactly                         for t ≥ end

    Args:
        step: t, optimizer steps taken.
        begin: step at which pruning begins.
        end: step at which the final sparsity is reached; equal to `begin` it is one-shot pruning.
        final: the target sparsity, in [0, 1].

    Source: Zhu & Gupta, "To prune, or not to prune", 2017, equation 1 with s_i = 0.

    Examples:
        >>> [round(cubic(step, 0, 10, 0.8), 3) for step in (0, 5, 10)]
        [0.0, 0.7, 0.8]
    """
    if step >= end:
        return final
    if step <= begin:
        return 0.0
    return final * (1 - (1 - (step - begin) / (end - begin)) ** 3)


def cosine(step: int, end: int, initial: float) -> float:
    """Return a fraction that falls along half a cosine: f(t) = initial/2 · (1 + cos(π t / end)), 0 from `end` on.

    Source: Evci et al., "Rigging the Lottery", ICML 2020, section 3.

    Examples:
        >>> [round(cosine(step, 10, 0.3), 3) for step in (0, 5, 10)]
        [0.3, 0.15, 0.0]
    """
    return 0.0 if step >= end else initial / 2 * (1 + math.cos(math.pi * step / end))


def to_step(position: int | float, steps: int | None, what: str = "a fraction of the run") -> int:
    """Return an optimizer step from a step (int) or from a fraction of the run (float in [0, 1]).

    Args:
        position: the step or fraction.
        steps: length of the run; None if it is not known, which only a step can do without.
        what: names the position in the error.

    Raises:
        InputError: a fraction of an unknown length; a step beyond the run.

    Examples:
        >>> to_step(0.25, 1000), to_step(40, None)
        (250, 40)
    """
    if isinstance(position, int):
        if steps is not None and position > steps:
            raise InputError(f"{what} is step {position}, beyond the {steps} steps of the run")
        return position
    if steps is None:
        raise InputError(f"{what} needs the length of the run: sparsify_(model, method, steps=...)")
    return round(position * steps)


@dataclass(frozen=True)
class Updates:
    """When masks or thresholds are updated, in optimizer steps, and how far the sparsity ramp is.

    Attributes:
        begin: first step at which an update is due, and the start of the ramp.
        end: end of the ramp.
        every: steps between two updates.
        steps: length of the run, for updates that go on after the ramp; None stops them at its end. They are
            then due at each of the last `every` steps too, so that a run that a gradient scaler cuts short by a
            few steps ends on its target.

    Examples:
        >>> [step for step in range(12) if Updates(2, 9, 3).due(step)]
        [2, 5, 8, 9]
    """

    begin: int
    end: int
    every: int = 1
    steps: int | None = None

    @classmethod
    def resolve(
        cls, method: Any, begin: int | float, end: int | float, every: int, steps: int | None, after_ramp: bool = False
    ) -> "Updates":
        """Resolve positions of a run of `steps`; an interval that fits less than twice is shortened to a tenth.

        Args:
            method: names itself in errors.
            begin: start of the ramp, a step (int) or a fraction of the run (float).
            end: end of the ramp, likewise.
            every: steps between two updates.
            steps: length of the run.
            after_ramp: whether updates go on to the end of the run.

        Raises:
            InputError: a position needs the length of the run or lies beyond it; `begin` is after `end`.
        """
        who = type(method).__name__
        first, last = (to_step(at, steps, f"{who}: {key}={at!r}") for key, at in (("begin", begin), ("end", end)))
        if first > last:
            raise InputError(f"{who}: begin={begin!r} (step {first}) comes after end={end!r} (step {last})")
        if after_ramp and steps is None:
            raise InputError(f"{who} needs the length of the run: sparsify_(model, method, steps=...)")
        span = (steps if after_ramp and steps is not None else last) - first
        if 2 * every > span:
            every = max(span // 10, 1)
        return cls(first, last, every, steps if after_ramp else None)

    def due(self, step: int) -> bool:
        """Return whether an update is due once `step` steps have been taken."""
        if step < max(self.begin, 1):
            return False
        if self.steps is None:
            last = max(self.end, 1)  # nothing happens before the first step is taken
            return step <= last and ((step - self.begin) % self.every == 0 or step == last)
        return (step - self.begin) % self.every == 0 or step == self.end or self.steps - self.every < step <= self.steps

    def progress(self, step: int, start: float = 0.0) -> float:
        """Return the share of the final sparsity to have after `step` steps: the cubic ramp from `start` to 1."""
        return 1.0 if step >= self.end else start + (1 - start) * cubic(step, self.begin, self.end, 1.0)


def check_steps(steps: int | None) -> None:
    """Check the length of a run.

    Raises:
        InputError: it is neither None nor a whole number of optimizer steps.
    """
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise InputError(f"steps must be a whole number of optimizer steps, at least 1, got {steps!r}")


def check_positions(method: Any, *fields: str) -> None:
    """Check fields of a method that hold a step (int) or a fraction of the run (float), and `every` if it is there.

    Raises:
        InputError: a value is neither.
    """
    who = type(method).__name__
    for name in fields:
        at = getattr(method, name)
        if (
            isinstance(at, bool)
            or not isinstance(at, (int, float))
            or not (at >= 0 if isinstance(at, int) else 0 <= at <= 1)
        ):
            raise InputError(f"{who}: {name} must be a step (int) ≥ 0 or a fraction (float) in [0, 1], got {at!r}")
    every = getattr(method, "every", 1)
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise InputError(f"{who}: every must be a whole number of optimizer steps, at least 1, got {every!r}")


def check_seed(method: Any) -> None:
    """Check the field `seed` of a method.

    Raises:
        InputError: it is not a whole number ≥ 0.
    """
    if isinstance(method.seed, bool) or not isinstance(method.seed, int) or method.seed < 0:
        raise InputError(f"{type(method).__name__}: seed must be a whole number ≥ 0, got {method.seed!r}")


def check_number(method: Any, field: str, interval: str) -> None:
    """Check that a field of a method is a number in an interval such as "(0, 1)", "[0, 1]" or "[0, inf)".

    A tensor must be able to hold it: an integer in int64, another number in float32.

    Raises:
        InputError: it is not.
    """
    value = getattr(method, field)
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    largest = 2**63 - 1 if isinstance(value, int) else 3.4e38
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= largest
    above = number and (value > low if interval[0] == "(" else value >= low)
    below = number and (value < high if interval[-1] == ")" else value <= high)
    if not (above and below):
        raise InputError(f"{type(method).__name__}: {field} must be a number in {interval}, got {value!r}")
