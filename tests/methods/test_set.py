"""SET: what it prunes, how much, and that regrowth is uniform."""

import math

import pytest
import torch
from harness import Rows
from torch import nn

import sparing
from sparing import SET
from sparing.patterns import Block

# The update after step 10 moves int(0.488 · 3) = 1 of three active weights.
SETTINGS = {"sparsity": 0.5, "end": 100, "every": 10, "fraction": 0.5}
WEIGHT = [5.0, 1.0, -2.0, 9.0, 9.0, 9.0]
ACTIVE = [1, 1, 1, 0, 0, 0]
NOTHING = [0.0] * 6


def updated(seed, **options):
    """After the update at step 10, with optimizer state that shows what is kept of it."""
    rows = Rows(SET(**SETTINGS, seed=seed), [WEIGHT], [ACTIVE], **options)
    rows.optimizer.param_groups[0]["momentum"] = 1.0
    rows.step(NOTHING)
    rows.fill_state(0.5)
    rows.sparsifier.clock.step = 9
    return rows.step(NOTHING)


def test_the_smallest_weight_is_pruned_and_any_other_regrown_with_equal_chance():
    """A weight pruned and regrown at once keeps its value and momentum, any other starts from zero."""
    regrown = []
    for seed in range(200):
        rows = updated(seed, lr=1.0)
        # Position 1 is pruned; 0 and 2 never are.
        (position,) = (i for i in (1, 3, 4, 5) if rows.masks[0][i])
        assert rows.masks[0][0] == rows.masks[0][2] == 1
        taken = [value - 0.5 for value in WEIGHT]  # the step of the update is taken, by the momentum
        zero = None if position == 1 else position
        assert rows.weights == [[0.0 if i == zero else value for i, value in enumerate(taken)]]
        assert rows.state() == [[0.0 if i == zero else 0.5 for i in range(6)]]
        regrown.append(position)
    assert all(25 < regrown.count(position) < 75 for position in (1, 3, 4, 5))


def test_regrowth_is_drawn_anew_at_each_update():
    masks = set()
    for step in range(10, 60, 10):
        rows = Rows(SET(**SETTINGS | {"fraction": 0.9}), [[1.0] * 40], [[1] * 20 + [0] * 20])
        rows.sparsifier.clock.step = step - 1
        masks.add(tuple(rows.step([0.0] * 40).masks[0][20:]))
    assert len(masks) == 5


@pytest.mark.parametrize("step", [10, 40, 80])
def test_prunes_the_share_of_the_cosine_by_an_independent_reading(step):
    weight = torch.randn(400).tolist()
    rows = Rows(SET(**SETTINGS | {"fraction": 0.6}), [weight])
    mask = rows.masks[0]
    rows.sparsifier.clock.step = step - 1
    rows.step([0.0] * 400)
    active = sorted((i for i in range(400) if mask[i]), key=lambda i: abs(weight[i]))
    count = int(0.3 * (1 + math.cos(math.pi * step / 100)) * 200)
    assert 0 < count < 200
    assert all(rows.masks[0][i] for i in active[count:])
    # As many of the pruned return at once as their share of all free positions, roughly.
    back = sum(rows.masks[0][i] for i in active[:count])
    assert abs(back - count**2 / (200 + count)) < 4 * count**0.5 / 2


def test_blocks_are_pruned_by_their_norm():
    """(−4, 2) has the smallest norm, (3.5, 3.5) the smallest maximum, (0.1, 5) the smallest mean."""
    weight = torch.tensor([[0.1, -4.0, 9.0], [5.0, 2.0, 9.0], [3.5, 9.0, 9.0], [3.5, 9.0, 9.0]])
    active = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0]], dtype=torch.bool)
    regrown = set()
    for seed in range(30):
        model = nn.Linear(3, 4, bias=False)
        model.weight.data = weight.clone()
        method = SET(sparsity=0.5, end=100, every=1, fraction=0.5, pattern=Block(2), seed=seed)
        sparsifier = sparing.sparsify_(model, method, steps=100)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsifier.attach(optimizer)
        mask = sparsifier.layers["weight"].parametrization.mask
        assert active.sum() == mask.sum()
        mask.copy_(active)
        (0 * model.weight.sum()).backward()
        optimizer.step()
        assert mask[:, 0].all()
        blocks = mask.reshape(2, 2, 3)
        assert torch.equal(blocks.any(1), blocks.all(1))
        (position,) = (p for p in ((0, 1), (0, 2), (1, 1), (1, 2)) if blocks[p[0], 0, p[1]])
        regrown.add(position)
        assert bool(model.weight.any(0)[1:].any()) == (position == (0, 1))
    assert len(regrown) == 4
