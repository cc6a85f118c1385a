"""Masks with exact counts: which weights live, and how a total is shared out.

A mask keeps the count it is asked for, ties included: one made by comparing with a threshold would not
where weights are equal.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparing.errors import InputError


def count_kept(weights: int, sparsity: float) -> int:
    """How many of `weights` stay at a sparsity in [0, 1]: all but the rounded share of zeros.

    Examples:
        >>> count_kept(1000, 0.9)
        100
    """
    return weights - round(weights * sparsity)


def keep_top(scores: Tensor, count: int) -> Tensor:
    """A mask of the `count` largest scores, exactly; among equals an arbitrary choice.

    Args:
        scores: any shape; no NaN.
        count: 0 to the number of scores.

    Returns:
        A boolean tensor of the shape of `scores` with `count` True.

    Raises:
        InputError: the count is out of range.

    Examples:
        >>> keep_top(torch.tensor([0.1, 0.5, 0.5, 0.3]), 2)
        tensor([False,  True,  True, False])
    """
    flat = scores.reshape(-1)
    total = flat.numel()
    if not 0 <= count <= total:
        raise InputError(f"cannot keep {count} of {total} weights")
    # Selecting the smaller side is the cheaper one.
    if count <= total // 2:
        mask = torch.zeros(total, dtype=torch.bool, device=scores.device)
        mask[flat.topk(count, sorted=False).indices] = True
    else:
        mask = torch.ones(total, dtype=torch.bool, device=scores.device)
        mask[flat.topk(total - count, largest=False, sorted=False).indices] = False
    return mask.reshape(scores.shape)


def keep_top_together(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Masks of the `count` largest scores over all tensors at once, exactly.

    Examples:
        >>> keep_top_together([torch.tensor([3.0, 1.0]), torch.tensor([2.0])], 2)
        [tensor([ True, False]), tensor([True])]
    """
    together = keep_top(torch.cat([s.reshape(-1) for s in scores]), count)
    parts = together.split([s.numel() for s in scores])
    return [part.reshape(s.shape) for part, s in zip(parts, scores, strict=True)]


def largest_left_out(sizes: Sequence[Tensor], count: int) -> Tensor:
    """The threshold above which `count` of all values lie: the largest of the others; 0 if there are none.

    Fewer lie above it where values are equal to it.

    Args:
        sizes: |W| of the layers, say; ≥ 0.
        count: 0 to the number of values.

    Examples:
        >>> largest_left_out([torch.tensor([3.0, 1.0]), torch.tensor([2.0])], 2)
        tensor(1.)
    """
    together = torch.cat([size.reshape(-1) for size in sizes])
    left_out = together.numel() - count
    return together.kthvalue(left_out).values if left_out else together.new_zeros(())


def rewire(mask: Tensor, keep_scores: Tensor, grow_scores: Tensor, count: int) -> Tensor:
    """Drop `count` live positions and grow as many, so that the number of live ones stays.

    The live positions of the smallest `keep_scores` are dropped, then the positions of the largest
    `grow_scores` among all that are not live, those just dropped included, are grown.

    Args:
        mask: the live positions, boolean.
        keep_scores: of every position; only those of live ones matter.
        grow_scores: of every position; only those of positions not live matter.
        count: at most the number of live positions.

    Returns:
        The new mask, with exactly as many True as `mask`.

    Examples:
        >>> live = torch.tensor([True, True, False, False])
        >>> rewire(live, torch.tensor([1.0, 2.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 5.0, 6.0]), 1)
        tensor([False,  True, False,  True])
    """
    live = int(mask.sum())
    lowest = torch.finfo(keep_scores.dtype).min
    kept = keep_top(keep_scores.masked_fill(~mask, lowest), live - count)
    # Scores are moved up so that a score of 0 still beats a position that may not be grown.
    grown = keep_top(grow_scores.masked_fill(kept, lowest), count)
    return kept | grown


def apportion(total: int, shares: Sequence[float], rooms: Sequence[int]) -> list[int]:
    """Split an integer in proportion to shares, no part larger than its room; the parts sum exactly.

    What a full part cannot take goes to the others, again in proportion. Remainders go to the
    largest fractions first (Hamilton's method).

    Args:
        total: what to split, at most the sum of `rooms`.
        shares: ≥ 0, a number a part; if all that have room are 0 they count as equal.
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


def random_scores(weight: Tensor, seed: int, *position: int) -> Tensor:
    """Uniform numbers in [0, 1) of the shape of a weight that follow from the seed and position alone.

    The same on every rank, on every device, and after a resume: there is no state to save.

    Args:
        weight: gives shape and device.
        seed: the method's.
        position: whatever tells draws apart, such as the layer's index and the step.
    """
    mixed = seed
    for part in position:
        mixed = (mixed * 1_000_003 + part + 1) % 2**63
    generator = torch.Generator().manual_seed(mixed)
    return torch.rand(weight.shape, generator=generator).to(weight.device)


def random_mask(weight: Tensor, count: int, seed: int, index: int) -> Tensor:
    """A mask of `count` random positions of the weight of layer number `index`, exactly.

    Examples:
        >>> int(random_mask(torch.empty(10, 10), 7, seed=0, index=0).sum())
        7
    """
    return keep_top(random_scores(weight, seed, index), count)
