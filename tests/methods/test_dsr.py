"""DSR: what one threshold drops, how it adapts, which layers the dropped go to, and that the total stays."""

import pytest
import torch
from harness import Rows, Run

from sparing import DSR, InputError
from sparing.masks import random_scores

FIRST = [5.0, -4.0, 0.5, 3.0, 9.0, 9.0, 9.0, 9.0]
SECOND = [-0.25, 0.5, 4.0, 0.125, 9.0, 9.0, 9.0, 9.0]
LIVE = [1, 1, 1, 1, 0, 0, 0, 0]
NOTHING = [0.0] * 8


def method(**options):
    return DSR(**{"steps": 100, "sparsity": 0.5, "every": 1, "threshold": 1.0, "fraction": 0.5} | options)


def largest(scores, without, count):
    """The positions of the `count` largest scores but for some, by sorting."""
    order = sorted((i for i in range(len(scores)) if i not in without), key=lambda i: -scores[i])
    return set(order[:count])


@pytest.mark.parametrize("seed", range(4))
def test_one_threshold_drops_in_all_layers_and_the_rest_of_them_share_it_out(seed):
    """3 and 1 of 4 survive |w| ≥ 1; the 4 dropped are shared out as 3 to 1."""
    rows = Rows(method(seed=seed), [FIRST, SECOND], [LIVE, LIVE], lr=0.0).step(NOTHING, NOTHING)
    for index, (weight, stay, grow) in enumerate([(FIRST, {0, 1, 3}, 3), (SECOND, {2}, 1)]):
        scores = random_scores(torch.empty(1, 8), seed, index, 1)[0].tolist()
        born = largest(scores, stay, grow)
        assert {i for i in range(8) if rows.masks[index][i]} == stay | born
        # All that are grown start at zero, also those just dropped.
        assert rows.weights[index] == [0.0 if i in born else value for i, value in enumerate(weight)]
    assert [int(part.keep) for part in rows.parts] == [6, 2]


def test_a_weight_at_the_threshold_stays():
    rows = Rows(method(), [[1.0, -1.0, 0.9, 2.0]], [[1, 1, 0, 0]], lr=0.0).step([0.0] * 4)
    assert rows.masks == [[1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("small", "expected"), [(0, 2.0), (7, 2.0), (8, 1.0), (10, 1.0), (12, 1.0), (13, 0.5), (20, 0.5)]
)
def test_the_threshold_doubles_below_the_aim_and_halves_above_it(small, expected):
    """The aim is 0.5 of 20, and a fifth of that is tolerated: 8 to 12."""
    weight = [0.1] * small + [5.0] * (40 - small)
    rows = Rows(method(tolerance=0.2), [weight], [[1] * 20 + [0] * 20], lr=0.0).step([0.0] * 40)
    assert rows.parts[0].cut.tolist() == [expected]


def test_the_new_threshold_is_used_by_the_next_update_and_all_layers_hold_the_same():
    weight = [1.5, 1.5, 1.5, 5.0, 9.0, 9.0, 9.0, 9.0]
    rows = Rows(method(fraction=0.9), [weight, weight], [LIVE, LIVE], lr=0.0)
    assert rows.step(NOTHING, NOTHING).masks == [LIVE, LIVE]
    assert [float(part.cut) for part in rows.parts] == [2.0, 2.0]
    rows.step(NOTHING, NOTHING)
    assert all(mask[3] for mask in rows.masks)
    assert [weights[3] for weights in rows.weights] == [5.0, 5.0]
    assert sum(weights.count(0.0) for weights in rows.weights) == 6


def test_the_threshold_never_becomes_zero():
    rows = Rows(method(threshold=1.5e-45, fraction=0.1), [[5.0] + [0.0] * 19], [[1] * 10 + [0] * 10], lr=0.0)
    rows.step([0.0] * 20)
    assert float(rows.parts[0].cut) > 0


def test_a_layer_that_is_full_passes_the_rest_of_its_share_on():
    """6 and 1 survive, and of the 2 + 5 dropped the first layer should get 6; but it has room for 4."""
    rows = Rows(method(), [[5.0] * 6 + [0.1] * 4, [5.0] + [0.1] * 11], lr=0.0)
    for part, live in zip(rows.parts, (8, 6), strict=True):
        part.mask.copy_(torch.arange(part.mask.numel()) < live)
        part.keep.fill_(live)
    rows.step([0.0] * 10, [0.0] * 12)
    assert [sum(mask) for mask in rows.masks] == [10, 4]


def test_a_frozen_layer_is_left_alone():
    rows = Rows(method(), [FIRST, SECOND], [LIVE, LIVE], lr=0.0)
    rows.layers[0].weight.requires_grad_(False)
    rows.step(NOTHING, [1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    assert rows.masks[0] == LIVE
    assert rows.weights[0] == FIRST
    assert rows.masks[1] != LIVE
    assert sum(rows.masks[1]) == 4


@pytest.mark.parametrize(("optimizer", "buffers"), [("sgd", 1), ("adamw", 2)])
def test_the_optimizer_forgets_what_stood_where_a_weight_is_grown(optimizer, buffers):
    rows = Rows(method(every=10), [FIRST], [LIVE], optimizer=optimizer, lr=0.0).step(NOTHING)
    rows.fill_state(7.0)
    rows.sparsifier.step = 9
    rows.step(NOTHING)
    (born,) = (i for i in range(8) if rows.weights[0][i] == 0.0)
    states = rows.state()
    assert len(states) == buffers
    assert [[value == 0.0 for value in state] for state in states] == [[i == born for i in range(8)]] * buffers


def test_a_dead_weight_gets_no_gradient():
    rows = Rows(method(every=10), [FIRST], [LIVE]).step([1.0] * 8)
    assert rows.weights[0][4:] == FIRST[4:]
    assert rows.weights[0][:4] == pytest.approx([4.9, -4.1, 0.4, 2.9])


@pytest.mark.parametrize("model", ["linear", "conv2d", "lstm"])
def test_the_total_is_conserved_at_every_step_and_layers_differ_in_the_end(model):
    run = Run(model, DSR(steps=20, sparsity=0.75, every=2, threshold=0.05, fraction=0.2))
    parts = [layer.parametrization for layer in run.sparsifier.layers.values()]
    start = [int(part.mask.sum()) for part in parts]
    for step in range(1, 21):
        before = [part.mask.clone() for part in parts]
        run.train(1)
        assert sum(int(part.mask.sum()) for part in parts) == sum(start)
        assert [int(part.mask.sum()) for part in parts] == [int(part.keep) for part in parts]
        changed = any(not torch.equal(old, part.mask) for old, part in zip(before, parts, strict=True))
        assert changed == (step % 2 == 0 and step < 20)
    assert [int(part.mask.sum()) for part in parts] != start


@pytest.mark.parametrize("field", ["fraction", "tolerance"])
@pytest.mark.parametrize("bad", [0, 1.0, -0.3, "half", True])
def test_a_fraction_out_of_range_is_refused(field, bad):
    with pytest.raises(InputError, match=f"DSR: {field} must be a fraction between 0 and 1"):
        DSR(steps=1000, sparsity=0.9, **{field: bad})


@pytest.mark.parametrize("bad", [0, -1.0, float("inf"), float("nan"), "small", True])
def test_a_threshold_that_is_no_positive_number_is_refused(bad):
    with pytest.raises(InputError, match="DSR: threshold must be a finite number above 0, got"):
        DSR(steps=1000, sparsity=0.9, threshold=bad)
