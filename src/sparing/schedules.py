"""Schedules: pure functions of how far the run is."""

import math
from collections.abc import Sequence

from sparing.errors import InputError


def warmup_cosine(position: float, total: float, warmup: float = 0.0) -> float:
    """The factor on the learning rate: linear warm-up, then half a cosine down to zero.

        f(t) = (t + 1) / w                            for t < w
        f(t) = ½ (1 + cos(π (t − w) / (T − w)))       from then on

    Args:
        position: t, epochs or steps done so far, in the unit of the others.
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


def warmup_drops(position: float, drops: Sequence[float], warmup: float = 0.0) -> float:
    """The factor on the learning rate: linear warm-up, then a tenth of what it was at every drop.

        f(t) = (t + 1) / w                     for t < w
        f(t) = 10^−(number of drops ≤ t)       from then on

    Args:
        position: t, epochs or steps done so far, in the unit of the others.
        drops: where the learning rate is divided by ten.
        warmup: w, the length of the warm-up.

    Source: Kusupati et al., "FastGRNN", NeurIPS 2018, section 4: one drop after two thirds of the epochs.

    Examples:
        >>> [warmup_drops(epoch, [2]) for epoch in range(4)]
        [1.0, 1.0, 0.1, 0.1]
    """
    if position < warmup:
        return (position + 1) / warmup
    return 10.0 ** -sum(drop <= position for drop in drops)


def cubic(step: int, begin: int, end: int, final: float) -> float:
    """The sparsity of gradual magnitude pruning: fast at first, slower as less is left.

        s(t) = 0                                      for t ≤ begin
        s(t) = final · (1 − (1 − (t − begin) / (end − begin))³)
        s(t) = final, exactly                         for t ≥ end

    Args:
        step: t, optimizer steps done.
        begin: step at which pruning begins.
        end: step at which the final sparsity is reached; `begin` makes it one shot.
        final: the sparsity aimed for, in [0, 1].

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
    """A fraction that falls along half a cosine: f(t) = initial/2 · (1 + cos(π t / end)), 0 from `end` on.

    Source: Evci et al., "Rigging the Lottery", ICML 2020, section 3.

    Examples:
        >>> [round(cosine(step, 10, 0.3), 3) for step in (0, 5, 10)]
        [0.3, 0.15, 0.0]
    """
    return 0.0 if step >= end else initial / 2 * (1 + math.cos(math.pi * step / end))


def to_step(position: int | float, steps: int) -> int:
    """An optimizer step from a step (int) or from a fraction of the run (float in [0, 1]).

    Examples:
        >>> to_step(0.25, 1000), to_step(40, 1000)
        (250, 40)
    """
    return position if isinstance(position, int) else round(position * steps)


def is_update(step: int, begin: int, end: int, every: int) -> bool:
    """Whether masks or thresholds are renewed at this step: every so many steps from `begin`, and at `end` in any case.

    Examples:
        >>> [step for step in range(12) if is_update(step, 2, 9, 3)]
        [2, 5, 8, 9]
    """
    last = max(end, 1)  # nothing happens before the first step is done
    return begin <= step <= last and ((step - begin) % every == 0 or step == last)


def check_schedule(method: str, steps: int, begin: int | float, end: int | float, every: int) -> None:
    """Refuse a schedule that cannot be followed.

    Raises:
        InputError: `steps` or `every` is not a positive integer; `begin` or `end` is neither a step
            nor a fraction, or lies beyond the run; `begin` is after `end`; nothing is updated in
            between because `every` is too long.
    """
    for name, value in (("steps", steps), ("every", every)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{method}: {name} must be a whole number of optimizer steps, at least 1, got {value!r}")
    for name, at in (("begin", begin), ("end", end)):
        most = steps if isinstance(at, int) else 1
        if isinstance(at, bool) or not isinstance(at, (int, float)) or not 0 <= at <= most:
            allowed = f"a step from 0 to {steps} or a fraction (float) from 0.0 to 1.0"
            raise InputError(f"{method}: {name} must be {allowed}, got {at!r}")
    first, last = to_step(begin, steps), to_step(end, steps)
    if first > last:
        raise InputError(f"{method}: begin={begin!r} (step {first}) comes after end={end!r} (step {last})")
    if every > max(last - first, 1):
        raise InputError(f"{method}: every={every} is longer than the {last - first} steps from begin to end")


def check_fraction(method: str, name: str, value: float) -> None:
    """Refuse what is not a number strictly between 0 and 1.

    Raises:
        InputError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise InputError(f"{method}: {name} must be a fraction between 0 and 1, got {value!r}")
