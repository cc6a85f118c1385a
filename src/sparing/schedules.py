"""Schedules: pure functions of how far the run is."""

import math


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

    Example:
        >>> [warmup_cosine(epoch, 3, 1) for epoch in range(4)]
        [1.0, 1.0, 0.5, 0.0]
    """
    if position < warmup:
        return (position + 1) / warmup
    if position >= total:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * (position - warmup) / (total - warmup)))
