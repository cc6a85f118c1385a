"""SET: what it drops, that growth is chance, and that nothing else is touched."""

import math

import pytest
import torch
from harness import Rows, Run

from sparing import SET, InputError

# At its update at step 10 it moves int(0.488 · 3) = 1 of three live weights.
SETTINGS = {"steps": 100, "sparsity": 0.5, "end": 100, "every": 10, "fraction": 0.5}
WEIGHT = [5.0, 1.0, -2.0, 9.0, 9.0, 9.0]
LIVE = [1, 1, 1, 0, 0, 0]
NOTHING = [0.0] * 6


def updated(seed=0, gradient=NOTHING, **options):
    rows = Rows(SET(**SETTINGS, seed=seed), [WEIGHT], [LIVE], **options)
    rows.step(NOTHING)
    rows.fill_state(7.0)
    rows.sparsifier.step = 10
    return rows.step(gradient)


def grown(rows):
    """The one position that lives beside 0 and 2, the two that are never dropped."""
    assert rows.masks[0][0] == rows.masks[0][2] == 1
    (position,) = (i for i in (1, 3, 4, 5) if rows.masks[0][i])
    return position


def test_drops_the_smallest_live_and_grows_any_other_with_equal_chance():
    positions = [grown(updated(seed)) for seed in range(200)]
    assert all(25 < positions.count(position) < 75 for position in (1, 3, 4, 5))


@pytest.mark.parametrize(("optimizer", "buffers"), [("sgd", 1), ("adamw", 2)])
def test_newborns_are_zero_and_forgotten_by_the_optimizer_and_a_regrown_weight_keeps_its_own(optimizer, buffers):
    seen = set()
    for seed in range(12):
        rows = updated(seed, optimizer=optimizer)
        position = grown(rows)
        seen.add(position)
        born = None if position == 1 else position
        assert rows.weights == [[0.0 if i == born else value for i, value in enumerate(WEIGHT)]]
        assert rows.state() == [[0.0 if i == born else 7.0 for i in range(6)]] * buffers
    assert {1} < seen


def test_growth_does_not_look_at_the_gradient_and_a_step_that_rewires_moves_no_weight():
    still, pushed = updated(), updated(gradient=[3.0, -1.0, 2.0, 9.0, -9.0, 5.0])
    assert pushed.masks == still.masks
    assert pushed.weights == still.weights


def test_growth_is_drawn_anew_at_every_update():
    masks = set()
    for step in range(10, 60, 10):
        rows = Rows(SET(**SETTINGS | {"fraction": 0.9}), [[1.0] * 40], [[1] * 20 + [0] * 20])
        rows.sparsifier.step = step
        masks.add(tuple(rows.step([0.0] * 40).masks[0][20:]))
    assert len(masks) == 5


def test_a_dead_weight_gets_no_gradient():
    rows = Rows(SET(**SETTINGS), [WEIGHT], [LIVE])
    rows.step([1.0] * 6)
    assert rows.weights[0][3:] == WEIGHT[3:]
    assert rows.weights[0][:3] == pytest.approx([4.9, 0.9, -2.1])


@pytest.mark.parametrize("step", [10, 40, 80])
def test_drops_the_share_of_the_cosine_by_an_independent_reading(step):
    weight = torch.randn(400).tolist()
    rows = Rows(SET(**SETTINGS | {"fraction": 0.6}), [weight])
    mask = rows.masks[0]
    rows.sparsifier.step = step
    rows.step([0.0] * 400)
    live = sorted((i for i in range(400) if mask[i]), key=lambda i: abs(weight[i]))
    count = int(0.3 * (1 + math.cos(math.pi * step / 100)) * 200)
    assert 0 < count < 200
    assert all(rows.masks[0][i] for i in live[count:])
    assert sum(rows.masks[0]) == 200
    # Of those dropped, as many come back at once as their share of all that may be grown, roughly.
    back = sum(rows.masks[0][i] for i in live[:count])
    assert back < 0.8 * count


def test_rewires_every_so_many_steps_before_the_end_and_every_layer_keeps_its_count():
    run = Run("conv2d", SET(steps=20, sparsity=0.75, end=16, every=4, fraction=0.9))
    parts = [layer.parametrization for layer in run.sparsifier.layers.values()]
    changed, still = [], []
    weight = run.sparsifier.layers["0"].weight
    for step in range(20):
        before = [part.mask.clone() for part in parts]
        old_weight = weight.detach().clone()
        run.train(1)
        kept = before[0] & parts[0].mask
        if torch.equal(weight[kept], old_weight[kept]):
            still.append(step)
        assert [int(part.mask.sum()) for part in parts] == [int(part.keep) for part in parts]
        if any(not torch.equal(old, part.mask) for old, part in zip(before, parts, strict=True)):
            changed.append(step)
    assert changed == still == [4, 8, 12]


@pytest.mark.parametrize("bad", [0, 1.0, -0.3, "half", True])
def test_a_fraction_out_of_range_is_refused(bad):
    with pytest.raises(InputError, match="SET: fraction must be a fraction between 0 and 1"):
        SET(steps=1000, sparsity=0.9, fraction=bad)
