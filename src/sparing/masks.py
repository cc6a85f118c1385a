"""Masks with exact counts: which weights are kept, and how a total is shared between layers.

A mask keeps exactly the count that is asked for, ties included. Selection over all layers together needs the
scores of one layer in memory at a time, not of all of them.
"""

from collections.abc import Callable, Mapping, Sequence
from math import floor

import torch
from torch import Tensor

from sparing.errors import InputError, listed

Scores = Callable[[], Tensor]
"""Computes the scores of one layer, of any shape; it is called several times."""

FEW = 2**18
"""So many scores are selected from at once; above, a bracket around the answer is narrowed first."""

SAMPLE = 2**15
"""Scores in the sample that the bracket is read from."""


def count_kept(weights: int, sparsity: float) -> int:
    """Return how many of `weights` stay at a sparsity in [0, 1]: all but the rounded share of zeros.

    Examples:
        >>> count_kept(1000, 0.9)
        100
    """
    return weights - round(weights * sparsity)


def check_scores(scores: Mapping[str, Scores], finite: bool = False) -> None:
    """Check that scores can be ranked.

    Args:
        scores: by name of the layer, "" if it is not known.
        finite: refuse infinite scores, too.

    Raises:
        InputError: scores are NaN; the message has the names of their layers, and the index of the first.
    """

    def wrong(name: str) -> Tensor:
        return ~scores[name]().isfinite() if finite else scores[name]().isnan()

    counts = [wrong(name).count_nonzero() for name in scores]
    counts = torch.stack([each.to(counts[0].device) for each in counts]).tolist()  # waits for a GPU once
    bad = {name: count for name, count in zip(scores, counts, strict=True) if count}
    if not bad:
        return
    first, *others = bad
    found = wrong(first)
    more = f", and some in {listed(map(repr, others), 3)}" if others else ""
    raise InputError(
        f"{f'layer {first!r}: ' if first else ''}{bad[first]} of {found.numel()} scores are "
        f"{'NaN or infinite' if finite else 'NaN'}, the first at index {tuple(found.nonzero()[0].tolist())}{more}: the "
        "weights or their gradients have diverged; lower the learning rate"
    )


def keep_top(scores: Tensor, count: int, layer: str = "") -> Tensor:
    """Return a mask of the `count` largest scores, exactly; among equal scores the first ones.

    Args:
        scores: any shape.
        count: 0 to the number of scores.
        layer: its name, for messages.

    Returns:
        A boolean tensor of the shape of `scores` with `count` True.

    Raises:
        InputError: the count is out of range; scores are NaN.

    Examples:
        >>> keep_top(torch.tensor([0.1, 0.5, 0.5, 0.3]), 2)
        tensor([False,  True,  True, False])
    """
    return keep_top_together({layer: lambda: scores}, count)[layer]


def keep_top_together(scores: Mapping[str, Scores], count: int) -> dict[str, Tensor]:
    """Return masks of the `count` largest scores over all layers, exactly; among equal scores the first ones.

    Raises:
        InputError: the count is out of range; scores are NaN.

    Examples:
        >>> keep_top_together({"a": lambda: torch.tensor([3.0, 1.0]), "b": lambda: torch.tensor([2.0])}, 2)
        {'a': tensor([ True, False]), 'b': tensor([True])}
    """
    if scores and next(iter(scores.values()))().is_meta:  # shapes without values: nothing to rank
        return {name: torch.ones_like(each(), dtype=torch.bool) for name, each in scores.items()}
    total = sum(each().numel() for each in scores.values())
    if not 0 <= count <= total:
        raise InputError(f"cannot keep {count} of {total} weights")
    if count in (0, total):
        return {name: torch.full_like(each(), count > 0, dtype=torch.bool) for name, each in scores.items()}
    threshold = global_threshold(scores, count)
    masks = {name: each() > threshold for name, each in scores.items()}
    missing = count - int(sum(mask.count_nonzero() for mask in masks.values()))
    for name, mask in masks.items():
        if missing > 0:
            first = (scores[name]() == threshold).reshape(-1).nonzero()[:missing, 0]
            mask[torch.unravel_index(first, mask.shape)] = True
            missing -= len(first)
    return masks


def global_threshold(layers: Mapping[str, Scores], count: int) -> Tensor:
    """Return the threshold above which `count` of all scores lie: the largest of the others.

    Fewer lie above it where scores are equal to it. If `count` is all of them it is zero.

    Args:
        layers: scores of the layers, by name.
        count: 0 to the number of scores.

    Raises:
        InputError: scores are NaN.

    Examples:
        >>> global_threshold({"a": lambda: torch.tensor([3.0, 1.0]), "b": lambda: torch.tensor([2.0])}, 2)
        tensor(1.)
    """
    scores = list(layers.values())
    total = sum(each().numel() for each in scores)
    rank = total - count  # of the threshold, from the smallest, counted from 1
    if rank == 0:
        return scores[0]().new_zeros(())
    check_scores(layers)
    low, high, below, inside, margin = -torch.inf, torch.inf, 0, total, 0.01
    while inside > FEW and low < high:
        stride = max(inside // SAMPLE, 1)
        # Cloned: a slice would keep all scores of its layer in memory.
        sample = torch.cat([_between(each(), low, high)[::stride].clone() for each in scores])
        if not sample.numel():
            break
        sample = sample.double().sort().values
        guess = (rank - below) / inside * len(sample)
        reach = margin * len(sample)
        first, last = floor(guess - reach), floor(guess + reach)
        lower = low if first < 0 else float(sample[first])
        upper = high if last >= len(sample) else float(sample[last])
        under = int(sum((each() < lower).count_nonzero() for each in scores))
        up_to = int(sum((each() <= upper).count_nonzero() for each in scores))
        if not under < rank <= up_to:
            margin *= 4  # the sample was not typical: look further
            if margin > 1:
                break
            continue
        if up_to - under == inside:
            break  # nothing was left out
        low, high, below, inside = lower, upper, under, up_to - under
    if low == high:
        return scores[0]().new_tensor(low)
    left = torch.cat([_between(each(), low, high) for each in scores])
    return left.kthvalue(rank - below).values


def affordable_threshold(scores: Mapping[str, Tensor], costs: Mapping[str, int], budget: int) -> Tensor:
    """Return the smallest threshold above which all scores together cost at most a budget, by bisection.

    Args:
        scores: of the layers, ≥ 0, by name.
        costs: of each score of a layer, > 0.
        budget: ≥ 0.

    Raises:
        InputError: scores are NaN or infinite.

    Examples:
        >>> affordable_threshold({"a": torch.tensor([4.0, 1.0]), "b": torch.tensor([3.0])}, {"a": 10, "b": 1}, 12)
        tensor(1.)
    """
    check_scores({name: each.detach for name, each in scores.items()}, finite=True)
    left, price = [each.reshape(-1) for each in scores.values()], [costs[name] for name in scores]
    low, high, spent = left[0].new_zeros(()), torch.stack([each.amax() for each in left]).amax(), 0
    if sum(cost * int((each > low).count_nonzero()) for cost, each in zip(price, left, strict=True)) <= budget:
        return low
    # The threshold is above `low` and at most `high`; what lies above `high` costs `spent`, and `left` lies between.
    while any(len(each) for each in left):
        middle = low + (high - low) / 2
        if not low < middle < high:
            break  # no number lies between them
        above = [each > middle for each in left]
        cost = sum(cost * int(each.count_nonzero()) for cost, each in zip(price, above, strict=True))
        if spent + cost <= budget:
            high, spent = middle, spent + cost
            left = [each[~mask] for each, mask in zip(left, above, strict=True)]
        else:
            low = middle
            left = [each[mask] for each, mask in zip(left, above, strict=True)]
    return high


def _between(scores: Tensor, low: float, high: float) -> Tensor:
    if (low, high) == (-torch.inf, torch.inf):
        return scores.reshape(-1)
    return scores[(scores >= low) & (scores <= high)]


def prune_and_regrow(mask: Tensor, keep_scores: Tensor, grow_scores: Tensor, count: int, layer: str = "") -> Tensor:
    """Prune `count` active positions and regrow as many, so that the number of active ones stays.

    The active positions of the smallest `keep_scores` are pruned, then the positions of the largest `grow_scores`
    are regrown among all that are not active, those just pruned included.

    Args:
        mask: the active positions, boolean.
        keep_scores: of every position; only those of active ones matter.
        grow_scores: of every position; only those of positions not active matter.
        count: at most the number of active positions.
        layer: its name, for messages.

    Returns:
        The new mask, with exactly as many True as `mask`.

    Examples:
        >>> active = torch.tensor([True, True, False, False])
        >>> prune_and_regrow(active, torch.tensor([1.0, 2.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 5.0, 6.0]), 1)
        tensor([False,  True, False,  True])
    """
    active = int(mask.sum())
    kept = keep_top(keep_scores.masked_fill(~mask, torch.finfo(keep_scores.dtype).min), active - count, layer)
    regrown = keep_top(grow_scores.masked_fill(kept, torch.finfo(grow_scores.dtype).min), count, layer)
    return kept | regrown


def apportion(total: int, shares: Sequence[float], rooms: Sequence[int]) -> list[int]:
    """Split an integer in proportion to shares, no part larger than its room; the parts sum exactly.

    What a full part cannot take goes to the others, again in proportion. Remainders go to the
    largest fractions first (Hamilton's method).

    Args:
        total: what to split, at most the sum of `rooms`.
        shares: ≥ 0, one for each part; if all that have room are 0 they count as equal.
        rooms: the most each part can take.

    Raises:
        InputError: there is less room than `total`.

    Examples:
        >>> apportion(10, [1, 1, 2], [10, 10, 3])
        [4, 3, 3]
    """
    if total > sum(rooms):
        raise InputError(f"cannot share out {total} where there is room for {sum(rooms)}")
    parts = [0] * len(shares)
    left = total
    while left > 0:
        open_ = [i for i in range(len(parts)) if parts[i] < rooms[i]]
        weight = sum(shares[i] for i in open_)
        ideal = {i: left * shares[i] / weight if weight > 0 else left / len(open_) for i in open_}
        full = [i for i in open_ if ideal[i] >= rooms[i] - parts[i]]
        if full:
            for i in full:
                left -= rooms[i] - parts[i]
                parts[i] = rooms[i]
            continue
        for i in open_:
            parts[i] += int(ideal[i])
        left -= sum(int(ideal[i]) for i in open_)
        for i in sorted(open_, key=lambda i: int(ideal[i]) - ideal[i])[:left]:
            parts[i] += 1
        left = 0
    return parts


def random_scores(shape: Sequence[int], device: torch.device, seed: int, *position: int) -> Tensor:
    """Return uniform numbers in [0, 1) that follow from the seed and the position alone.

    They are the same on every rank, on every device, and after a resume: there is no state to save.

    Args:
        shape: of the result.
        device: of the result; the numbers are drawn on the CPU.
        seed: of the method.
        position: what tells draws apart, such as the index of the layer and the step.
    """
    mixed = seed
    for part in position:
        mixed = (mixed * 1_000_003 + part + 1) % 2**63
    generator = torch.Generator("cpu").manual_seed(mixed)
    return torch.rand(tuple(shape), generator=generator, dtype=torch.float32, device="cpu").to(device)
