"""RigL: what it drops and grows, when, and that nothing else is touched."""

import math

import pytest
import torch
from harness import Rows, Run

from sparing import InputError, RigL

# At its update at step 10 it moves int(0.488 · 3) = 1 of three live weights.
METHOD = RigL(steps=100, sparsity=0.5, end=100, every=10, fraction=0.5)
WEIGHT = [5.0, 1.0, -2.0, 9.0, 9.0, 9.0]
LIVE = [1, 1, 1, 0, 0, 0]
NOTHING = [0.0] * 6


def at_update(method=METHOD, **options):
    rows = Rows(method, [WEIGHT], [LIVE], **options)
    rows.sparsifier.step = 10
    return rows


def test_drops_the_smallest_live_and_grows_the_largest_dense_gradient_at_zero():
    rows = at_update().step([7.0, 0.0, 7.0, 0.1, -3.0, 2.0])
    assert rows.masks == [[1, 0, 1, 0, 1, 0]]
    assert rows.weights == [[5.0, 1.0, -2.0, 9.0, 0.0, 9.0]]


def test_a_step_that_rewires_moves_no_surviving_weight():
    rows = at_update()
    rows.sparsifier.step = 9
    rows.step([1.0] * 6)
    before = rows.weights[0]
    assert before[:3] != WEIGHT[:3]
    rows.step([1.0, 0.0, 1.0, 2.0, 0.0, 0.0])
    assert [rows.weights[0][i] for i in (0, 2)] == [before[i] for i in (0, 2)]


def test_a_weight_dropped_and_grown_at_once_keeps_its_value_and_momentum():
    rows = at_update()
    rows.sparsifier.step = 0
    rows.step(NOTHING)
    rows.fill_state(7.0)
    rows.sparsifier.step = 10
    rows.step([0.0, 9.0, 0.0, 1.0, 1.0, 1.0])
    assert rows.masks == [LIVE]
    assert rows.weights == [WEIGHT]
    assert rows.state() == [[7.0] * 6]


@pytest.mark.parametrize(("optimizer", "buffers"), [("sgd", 1), ("adamw", 2)])
def test_the_optimizer_forgets_what_stood_where_a_weight_is_grown(optimizer, buffers):
    rows = at_update(optimizer=optimizer)
    rows.sparsifier.step = 0
    rows.step(NOTHING)
    rows.fill_state(7.0)
    rows.sparsifier.step = 10
    rows.step([0.0, 0.0, 0.0, 1.0, 2.0, 1.0])
    assert rows.masks == [[1, 0, 1, 0, 1, 0]]
    assert rows.state() == [[7.0, 7.0, 7.0, 7.0, 0.0, 7.0]] * buffers


def test_a_dead_weight_is_moved_by_nothing_in_a_plain_step():
    rows = at_update()
    rows.sparsifier.step = 1
    for _ in range(3):
        rows.step([1.0] * 6)
    assert rows.weights[0][3:] == WEIGHT[3:]
    assert all(new < old for new, old in zip(rows.weights[0][:3], WEIGHT[:3], strict=True))


@pytest.mark.parametrize("step", [10, 40, 80])
def test_moves_the_share_of_the_cosine_by_an_independent_reading(step):
    method = RigL(steps=100, sparsity=0.5, budget="uniform", end=100, every=10, fraction=0.6)
    weight, gradient = torch.randn(2, 80).tolist()
    rows = Rows(method, [weight])
    mask = rows.masks[0]
    rows.sparsifier.step = step
    rows.step(gradient)
    live = sorted((i for i in range(80) if mask[i]), key=lambda i: abs(weight[i]))
    count = int(0.3 * (1 + math.cos(math.pi * step / 100)) * 40)
    kept = set(live[count:])
    others = sorted((i for i in range(80) if i not in kept), key=lambda i: -abs(gradient[i]))
    assert {i for i in range(80) if rows.masks[0][i]} == kept | set(others[:count])
    assert 0 < count < 40


@pytest.mark.parametrize("end", [16, 0.8])
def test_rewires_every_so_many_steps_and_for_the_last_time_before_the_end(end):
    run = Run("linear", RigL(steps=20, sparsity=0.75, end=end, every=4, fraction=0.9))
    changed, still = [], []
    weight = run.sparsifier.layers["0"].weight
    for step in range(20):
        before = [part.mask.clone() for part in parts(run)]
        old_weight = weight.detach().clone()
        run.train(1)
        kept = before[0] & parts(run)[0].mask
        if torch.equal(weight[kept], old_weight[kept]):
            still.append(step)
        if any(not torch.equal(old, part.mask) for old, part in zip(before, parts(run), strict=True)):
            changed.append(step)
    assert changed == still == [4, 8, 12]


def test_every_layer_keeps_its_count_at_every_step():
    run = Run("conv2d", RigL(steps=20, sparsity=0.75, end=16, every=2, fraction=0.9))
    counts = [int(part.keep) for part in parts(run)]
    for _ in range(20):
        assert [int(part.mask.sum()) for part in parts(run)] == counts
        run.train(1)


def test_the_first_mask_follows_from_the_seed_of_the_method_alone():
    first, same, other = (
        Run("linear", RigL(steps=20, sparsity=0.75, every=4, seed=seed), seed=torch_seed)
        for seed, torch_seed in ((0, 0), (0, 1), (1, 0))
    )
    for a, b, c in zip(parts(first), parts(same), parts(other), strict=True):
        assert torch.equal(a.mask, b.mask)
        assert not torch.equal(a.mask, c.mask)


@pytest.mark.parametrize("bad", [0, 1.0, -0.3, "half", True])
def test_a_fraction_out_of_range_is_refused(bad):
    with pytest.raises(InputError, match="RigL: fraction must be a fraction between 0 and 1"):
        RigL(steps=1000, sparsity=0.9, fraction=bad)


def parts(run):
    return [layer.parametrization for layer in run.sparsifier.layers.values()]
