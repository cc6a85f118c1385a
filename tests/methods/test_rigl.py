"""RigL: what it prunes and regrows, how much, and when pruned weights get a gradient."""

import math

import pytest
import torch
from harness import Rows, Run, batch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import sparing
from sparing import RigL
from sparing.patterns import Block

# The update at step 10 moves int(0.488 · 3) = 1 of three active weights.
METHOD = RigL(sparsity=0.5, end=100, every=10, fraction=0.5)
WEIGHT = [5.0, 1.0, -2.0, 9.0, 9.0, 9.0]
ACTIVE = [1, 1, 1, 0, 0, 0]


def before_update(**options):
    """One step before the update at step 10, with optimizer state that shows what is kept of it."""
    rows = Rows(METHOD, [WEIGHT], [ACTIVE], **options)
    rows.sparsifier.clock.step = 9
    rows.step([0.0] * 6)
    rows.fill_state(7.0)
    return rows


def test_prunes_the_smallest_active_weight_and_regrows_the_largest_gradient_at_zero():
    rows = before_update().step([7.0, 0.0, 7.0, 0.1, -3.0, 2.0])
    assert rows.masks == [[1, 0, 1, 0, 1, 0]]
    assert rows.weights == [[5.0, 1.0, -2.0, 9.0, 0.0, 9.0]]
    assert rows.state() == [[7.0, 7.0, 7.0, 7.0, 0.0, 7.0]]


def test_a_weight_pruned_and_regrown_at_once_keeps_value_and_momentum():
    rows = before_update().step([0.0, 9.0, 0.0, 1.0, 1.0, 1.0])
    assert (rows.masks, rows.weights, rows.state()) == ([ACTIVE], [WEIGHT], [[7.0] * 6])


def test_blocks_are_pruned_by_their_norm_and_regrown_by_the_norm_of_their_gradient():
    """(−4, 2) has the smallest norm, (3.5, 3.5) the smallest maximum, (0.1, 5) the smallest mean; (0, 5) > (3, 3)."""
    model = nn.Linear(3, 4, bias=False)
    model.weight.data = torch.tensor([[0.1, -4.0, 9.0], [5.0, 2.0, 9.0], [3.5, 9.0, 9.0], [3.5, 9.0, 9.0]])
    method = RigL(sparsity=0.5, end=100, every=1, fraction=0.5, pattern=Block(2))
    sparsifier = sparing.sparsify_(model, method, steps=100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    part = sparsifier.layers["weight"].parametrization
    active = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0]], dtype=torch.bool)
    assert active.sum() == part.mask.sum()
    part.mask.copy_(active)
    for _ in range(2):
        optimizer.zero_grad()
        model.weight.backward(torch.tensor([[0.0, 0, 0], [0, 0, 5], [0, 3, 0], [0, 3, 0]]))
        optimizer.step()
    assert part.mask.int().tolist() == [[1, 0, 1], [1, 0, 1], [1, 0, 0], [1, 0, 0]]
    assert torch.equal(model.weight, torch.tensor([[0.1, 0, 0], [5, 0, 0], [3.5, 0, 0], [3.5, 0, 0]]))


@pytest.mark.parametrize("step", [10, 40, 80])
def test_moves_the_share_of_the_cosine_by_an_independent_reading(step):
    method = RigL(sparsity=0.5, budget="uniform", end=100, every=10, fraction=0.6)
    weight, gradient = torch.randn(2, 80).tolist()
    rows = Rows(method, [weight])
    mask = rows.masks[0]
    rows.sparsifier.clock.step = step - 1
    rows.step([0.0] * 80).step(gradient)
    active = sorted((i for i in range(80) if mask[i]), key=lambda i: abs(weight[i]))
    count = int(0.3 * (1 + math.cos(math.pi * step / 100)) * 40)
    kept = set(active[count:])
    others = sorted((i for i in range(80) if i not in kept), key=lambda i: -abs(gradient[i]))
    assert {i for i in range(80) if rows.masks[0][i]} == kept | set(others[:count])
    assert 0 < count < 40


@pytest.mark.parametrize("accumulated", [1, 2])
def test_pruned_weights_get_the_dense_gradient_in_the_step_of_an_update_and_exactly_zero_in_all_others(accumulated):
    run = Run("conv2d", RigL(sparsity=0.75, end=16, every=4))
    for step in range(20):
        run.optimizer.zero_grad()
        dense = dict.fromkeys(run.sparsifier.layers, 0.0)
        for part in range(accumulated):
            x, y = batch(run.shape, accumulated * step + part)
            with parametrize.cached():
                effective = {name: layer.effective_weight for name, layer in run.sparsifier.layers.items()}
                for weight in effective.values():
                    weight.retain_grad()
                F.cross_entropy(run.model(x), y).backward()
            dense = {name: total + effective[name].grad for name, total in dense.items()}
        for name, layer in run.sparsifier.layers.items():
            mask = layer.parametrization.mask | (step in (4, 8, 12))
            assert dense[name][~layer.parametrization.mask].any()
            assert torch.equal(layer.weight.grad, torch.where(mask, dense[name], 0.0))
        run.optimizer.step()
