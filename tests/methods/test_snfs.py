"""SNFS: the momentum of all weights, how many are dropped, which layers they go to, and where in them."""

import math

import pytest
import torch
from harness import Rows, Run

from sparing import SNFS, InputError

# Half of the live weights are dropped at every update, whenever it comes.
HALF = SNFS(steps=100, sparsity=0.5, end=100, every=1, fraction=0.5, final_fraction=0.5)
FIRST = [5.0, -4.0, 1.0, 0.5, 9.0, 9.0, 9.0, 9.0]
SECOND = [-5.0, 0.5, 4.0, 1.0, 9.0, 9.0, 9.0, 9.0]
LIVE = [1, 1, 1, 1, 0, 0, 0, 0]
NOTHING = [0.0] * 8


def test_the_momentum_is_the_moving_average_of_the_dense_gradient():
    rows = Rows(SNFS(steps=100, sparsity=0.5, momentum=0.8), [FIRST], [LIVE])
    expected = [0.0] * 8
    for _ in range(4):
        gradient = torch.randn(8).tolist()
        expected = [0.8 * m + 0.2 * g for m, g in zip(expected, gradient, strict=True)]
        rows.step(gradient)
    assert rows.parts[0].momentum[0].tolist() == pytest.approx(expected)
    assert rows.parts[0].momentum.dtype == torch.float32
    # The weights themselves only see the gradient of the live ones.
    assert rows.weights[0][4:] == FIRST[4:]
    assert all(new != old for new, old in zip(rows.weights[0][:4], FIRST[:4], strict=True))


def test_moves_weights_to_the_layer_of_larger_mean_momentum_and_grows_where_it_is_largest():
    """Both layers drop 2 of 4. Live |m| is as 3 to 1 in the mean, so of these 4 the first gets 3 and the second 1."""
    rows = Rows(HALF, [FIRST, SECOND], [LIVE, LIVE], lr=0.0)
    rows.step([3.0, -3.0, 3.0, 3.0, 1.0, -4.0, 5.0, 0.0], [1.0, 1.0, -1.0, 1.0, 40.0, 30.0, -90.0, 50.0])
    # In the first layer 5 and 6 beat the two just dropped, of which one comes back.
    first, second = rows.masks
    assert first[:2] == [1, 1]
    assert first[5:7] == [1, 1]
    assert first[2] + first[3] == 1
    assert first[4] == first[7] == 0
    assert second == [1, 0, 1, 0, 0, 0, 1, 0]
    assert [int(part.keep) for part in rows.parts] == [5, 3]
    # Newborns are zero; the weight that came back is not.
    assert rows.weights[0] == [5.0, -4.0, 1.0, 0.5, 9.0, 0.0, 0.0, 9.0]
    assert rows.weights[1] == [-5.0, 0.5, 4.0, 1.0, 9.0, 9.0, 0.0, 9.0]


def test_a_layer_that_is_full_passes_the_rest_of_its_share_on():
    rows = Rows(HALF, [[5.0, -4.0], FIRST], [[1, 0], LIVE], lr=0.0)
    # The first layer drops int(0.5 · 1) = 0 and has room for 1 of the 2 that its momentum earns it.
    rows.step([99.0, 0.0], [0.01, 0.01, 0.01, 0.01, 1.0, 0.0, 0.0, 0.0])
    assert rows.masks == [[1, 1], [1, 1, 0, 0, 1, 0, 0, 0]]


def test_layers_without_any_momentum_share_equally():
    rows = Rows(HALF, [FIRST, SECOND], [LIVE, LIVE], lr=0.0).step(NOTHING, NOTHING)
    assert [sum(mask) for mask in rows.masks] == [4, 4]


@pytest.mark.parametrize(("own", "other", "expected"), [(3.0, 1.0, [10, 3]), (1.0, 1.1, [8, 5]), (1.0, 5.0, [6, 7])])
def test_a_layer_nearly_dense_that_learns_more_than_most_drops_no_more_than_its_sparsity(own, other, expected):
    """Of 10 weights 9 live: sparsity 0.1, so it drops int(0.1 · 9) = 0; without the rule int(0.5 · 9) = 4.

    The other layer drops 2 of 4. What is dropped, 2 or 4 + 2, is shared out as `own` to `other`.
    """
    rows = Rows(HALF, [[1.0] * 10, FIRST], lr=0.0)
    rows.parts[0].mask.copy_(torch.arange(10) < 9)
    rows.parts[0].keep.fill_(9)
    rows.step([own] * 10, [other] * 8)
    assert [sum(mask) for mask in rows.masks] == expected


def test_a_sparser_layer_drops_the_full_share_however_much_it_learns():
    """Both layers drop int(0.9 · 4) = 3; of these 6 the first gets 4, the second 2."""
    method = SNFS(steps=100, sparsity=0.5, end=100, every=1, fraction=0.9, final_fraction=0.9)
    rows = Rows(method, [FIRST, SECOND], [LIVE, LIVE], lr=0.0)
    rows.step([2.0] * 4 + [9.0] * 4, [1.0] * 8)
    assert rows.masks[0] == [1, 0, 0, 0, 1, 1, 1, 1]


def test_nothing_moves_from_the_end_on():
    rows = Rows(HALF, [FIRST], [LIVE], lr=0.0)
    rows.sparsifier.step = 99
    assert rows.step([0.0] * 4 + [1.0] * 4).masks == [LIVE]


def test_a_frozen_layer_is_left_alone():
    rows = Rows(HALF, [FIRST, SECOND], [LIVE, LIVE], lr=0.0)
    rows.layers[0].weight.requires_grad_(False)
    rows.step(NOTHING, [1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    assert rows.masks[0] == LIVE
    assert rows.weights[0] == FIRST
    assert rows.masks[1] != LIVE
    assert sum(rows.masks[1]) == 4


@pytest.mark.parametrize(("optimizer", "buffers"), [("sgd", 1), ("adamw", 2)])
def test_the_optimizer_forgets_what_stood_where_a_weight_is_grown(optimizer, buffers):
    rows = Rows(HALF, [FIRST], [LIVE], optimizer=optimizer, lr=0.0)
    rows.sparsifier.step = 100
    rows.step(NOTHING)
    rows.fill_state(7.0)
    rows.sparsifier.step = 10
    before = rows.state()
    rows.step([0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 2.0, 0.0])
    assert rows.masks == [[1, 1, 0, 0, 1, 0, 1, 0]]
    assert len(before) == buffers
    for old, new in zip(before, rows.state(), strict=True):
        assert [value == 0.0 for value in new] == [i in (4, 6) for i in range(8)]
        assert all(value == 7.0 for value in old)


@pytest.mark.parametrize("step", [10, 50, 90])
def test_drops_the_share_that_falls_from_a_half_to_a_two_hundredth(step):
    weight = torch.randn(1000).tolist()
    live = [1] * 500 + [0] * 500
    rows = Rows(SNFS(steps=100, sparsity=0.5, every=10), [weight], [live], lr=0.0)
    rows.sparsifier.step = step - 1
    rows.step([0.0] * 500 + [1.0] * 500)
    rate = 0.005 + (0.5 - 0.005) / 2 * (1 + math.cos(math.pi * step / 100))
    order = sorted(range(500), key=lambda i: abs(weight[i]))
    assert {i for i in range(500) if not rows.masks[0][i]} == set(order[: int(rate * 500)])
    assert sum(rows.masks[0]) == 500


@pytest.mark.parametrize("model", ["linear", "conv2d", "lstm"])
def test_the_total_is_conserved_at_every_step_and_layers_differ_in_the_end(model):
    run = Run(model, SNFS(steps=20, sparsity=0.75, end=20, every=2))
    parts = [layer.parametrization for layer in run.sparsifier.layers.values()]
    start = [int(part.mask.sum()) for part in parts]
    changed = []
    for step in range(1, 21):
        before = [part.mask.clone() for part in parts]
        run.train(1)
        assert sum(int(part.mask.sum()) for part in parts) == sum(start)
        assert [int(part.mask.sum()) for part in parts] == [int(part.keep) for part in parts]
        if any(not torch.equal(old, part.mask) for old, part in zip(before, parts, strict=True)):
            changed.append(step)
    assert [int(part.mask.sum()) for part in parts] != start
    assert set(changed) <= set(range(2, 20, 2))
    assert changed[:3] == [2, 4, 6]


@pytest.mark.parametrize("field", ["fraction", "final_fraction", "momentum"])
@pytest.mark.parametrize("bad", [0, 1.0, -0.3, "half", True])
def test_a_fraction_out_of_range_is_refused(field, bad):
    with pytest.raises(InputError, match=f"SNFS: {field} must be a fraction between 0 and 1"):
        SNFS(steps=1000, sparsity=0.9, **{field: bad})


def test_a_share_that_would_grow_is_refused():
    with pytest.raises(InputError, match="SNFS: final_fraction=0.6 is larger than fraction=0.5"):
        SNFS(steps=1000, sparsity=0.9, final_fraction=0.6)
