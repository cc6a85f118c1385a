"""SNFS: the momentum of all weights, how many are pruned, and where they are regrown."""

import math

import pytest
import torch
from harness import Rows, Run, batch
from torch import nn
from torch.nn import functional as F

import sparing
from sparing import SNFS, InputError
from sparing.patterns import Block, Filters

# Half of the active weights are pruned at every update, whenever it comes.
HALF = SNFS(sparsity=0.5, end=100, every=1, fraction=0.5, final_fraction=0.5)
FIRST = [5.0, -4.0, 1.0, 0.5, 9.0, 9.0, 9.0, 9.0]
SECOND = [-5.0, 0.5, 4.0, 1.0, 9.0, 9.0, 9.0, 9.0]
ACTIVE = [1, 1, 1, 1, 0, 0, 0, 0]


def test_the_momentum_averages_the_dense_gradient_and_the_optimizer_gets_the_masked_one():
    rows = Rows(SNFS(sparsity=0.5, momentum=0.8), [FIRST], [ACTIVE])
    expected = [0.0] * 8
    for _ in range(4):
        gradient = torch.randn(8).tolist()
        expected = [0.8 * m + 0.2 * g for m, g in zip(expected, gradient, strict=True)]
        rows.step(gradient)
    assert rows.parts[0].momentum[0].tolist() == pytest.approx(expected)
    assert rows.weights[0][4:] == FIRST[4:]
    assert all(new != old for new, old in zip(rows.weights[0][:4], FIRST[:4], strict=True))
    assert not any(rows.state()[0][4:])


@pytest.mark.parametrize("fused", [False, True])
def test_the_momentum_is_free_of_the_scale_of_a_gradient_scaler(fused):
    momenta = []
    for scale in (None, 2.0**10):
        run = Run("linear", SNFS(sparsity=0.75), "adamw", fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for step in range(3):
            x, y = batch(run.shape, step)
            run.optimizer.zero_grad()
            scaler.scale(F.cross_entropy(run.model(x), y)).backward()
            scaler.step(run.optimizer)
            scaler.update()
        momenta.append([layer.parametrization.momentum for layer in run.sparsifier.layers.values()])
    for plain, scaled in zip(*momenta, strict=True):
        assert plain.any()
        torch.testing.assert_close(scaled, plain)


def test_weights_move_to_the_layer_of_larger_mean_momentum_and_to_its_largest_momentum():
    """Both layers prune 2 of 4. Their active |m| are as 3 to 1 in the mean, so of these 4 they regrow 3 and 1."""
    rows = Rows(HALF, [FIRST, SECOND], [ACTIVE, ACTIVE])
    rows.optimizer.param_groups[0]["lr"] = 0.0
    rows.step([3.0, -3.0, 3.0, 3.0, 1.0, -4.0, 5.0, 0.0], [1.0, 1.0, -1.0, 1.0, 40.0, 30.0, -90.0, 50.0])
    first, second = rows.masks
    # In the first layer 5 and 6 beat the two just pruned, of which one is regrown at once and keeps its value.
    assert [first[i] for i in (0, 1, 4, 5, 6, 7)] == [1, 1, 0, 1, 1, 0]
    assert first[2] + first[3] == 1
    assert second == [1, 0, 1, 0, 0, 0, 1, 0]
    assert rows.weights[0] == [5.0, -4.0, 1.0, 0.5, 9.0, 0.0, 0.0, 9.0]
    assert rows.weights[1] == [-5.0, 0.5, 4.0, 1.0, 9.0, 9.0, 0.0, 9.0]


def test_blocks_are_pruned_by_their_norm_and_regrown_by_the_norm_of_their_momentum():
    """(1, 1) and (4, 2) have the smallest norms; of the other blocks (0, 5) and (4, 4) have the largest momentum."""
    model = nn.Linear(4, 4, bias=False)
    model.weight.data = torch.tensor([[0.1, 4.0, 9, 9], [-5.0, 2.0, 9, 9], [3.5, 1.0, 9, 9], [3.5, 1.0, 9, 9]])
    method = SNFS(sparsity=0.5, end=100, every=1, fraction=0.5, final_fraction=0.5, pattern=Block(2))
    sparsifier = sparing.sparsify_(model, method, steps=100)
    sparsifier.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    mask = sparsifier.layers["weight"].parametrization.mask
    mask.copy_(torch.tensor([[1, 1, 0, 0]] * 4))
    model.weight.backward(torch.tensor([[0.0, 0, 0, 3], [0, 0, 5, 3], [0, 0, 4, 1], [0, 0, 4, 1]]))
    sparsifier.optimizers[0].step()
    assert mask.int().tolist() == [[1, 0, 1, 0], [1, 0, 1, 0], [1, 0, 1, 0], [1, 0, 1, 0]]


def test_a_full_layer_passes_the_rest_of_its_share_on():
    rows = Rows(HALF, [[5.0, -4.0], FIRST], [[1, 0], ACTIVE])
    # The first layer prunes int(0.5 · 1) = 0 and has room for 1 of the 2 that its momentum earns it.
    rows.step([99.0, 0.0], [0.01, 0.01, 0.01, 0.01, 1.0, 0.0, 0.0, 0.0])
    assert rows.masks == [[1, 1], [1, 1, 0, 0, 1, 0, 0, 0]]


def test_layers_without_momentum_share_equally():
    rows = Rows(HALF, [FIRST, SECOND], [ACTIVE, ACTIVE]).step([0.0] * 8, [0.0] * 8)
    assert [sum(mask) for mask in rows.masks] == [4, 4]


@pytest.mark.parametrize(("own", "other", "expected"), [(3.0, 1.0, [10, 3]), (1.0, 1.1, [8, 5]), (1.0, 5.0, [6, 7])])
def test_a_nearly_dense_layer_that_learns_more_than_most_prunes_no_larger_share_than_its_sparsity(own, other, expected):
    """Of 10 weights 9 are active: it prunes int(0.1 · 9) = 0, or int(0.5 · 9) = 4 if it learns less than most.

    The other layer prunes 2 of 4. The sum, 2 or 4 + 2, is shared out as `own` to `other`.
    """
    rows = Rows(HALF, [[1.0] * 10, FIRST])
    rows.optimizer.param_groups[0]["lr"] = 0.0
    rows.parts[0].mask.copy_(torch.arange(10) < 9)
    rows.step([own] * 10, [other] * 8)
    assert [sum(mask) for mask in rows.masks] == expected


def test_a_sparser_layer_prunes_the_full_share_however_much_it_learns():
    """Both layers prune int(0.9 · 4) = 3; of these 6 the first regrows 4, the second 2."""
    method = SNFS(sparsity=0.5, end=100, every=1, fraction=0.9, final_fraction=0.9)
    rows = Rows(method, [FIRST, SECOND], [ACTIVE, ACTIVE])
    rows.optimizer.param_groups[0]["lr"] = 0.0
    rows.step([2.0] * 4 + [9.0] * 4, [1.0] * 8)
    assert rows.masks[0] == [1, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("step", [10, 50, 90])
def test_prunes_a_share_that_falls_from_a_half_to_a_two_hundredth(step):
    weight = torch.randn(1000).tolist()
    rows = Rows(SNFS(sparsity=0.5, every=10), [weight], [[1] * 500 + [0] * 500])
    rows.sparsifier.clock.step = step - 1
    rows.step([0.0] * 500 + [1.0] * 500)
    rate = 0.005 + (0.5 - 0.005) / 2 * (1 + math.cos(math.pi * step / 100))
    order = sorted(range(500), key=lambda i: abs(weight[i]))
    assert {i for i in range(500) if not rows.masks[0][i]} == set(order[: int(rate * 500)])
    assert sum(rows.masks[0]) == 500


def test_bad_arguments_are_refused():
    with pytest.raises(InputError, match="SNFS: final_fraction=0.6 is larger than fraction=0.5"):
        SNFS(sparsity=0.9, final_fraction=0.6)
    # Filters of 16 and of 24 weights, which cannot take each other's place.
    with pytest.raises(
        InputError, match="SNFS: Filters.. makes groups of 16 to 24 weights, and they must have one size"
    ):
        Run("linear", SNFS(sparsity=0.5, pattern=Filters()))
