"""GMP: exact counts along the cubic ramp, the largest weights kept, and what happens to dead ones."""

import pytest
import torch
from harness import Rows, Run

from sparing import GMP, Budget, InputError


def kept(run):
    return [int(layer.parametrization.mask.sum()) for layer in run.sparsifier.layers.values()]


@pytest.mark.parametrize(("begin", "end", "every"), [(2, 16, 2), (3, 14, 4), (0, 17, 5), (6, 6, 1), (0.1, 0.85, 3)])
def test_counts_follow_the_cubic_ramp_at_every_update_and_end_on_target(begin, end, every):
    """Also where the end is no multiple of `every` steps after the beginning: there is an update at it."""
    run = Run("linear", GMP(steps=20, sparsity=0.75, begin=begin, end=end, every=every))
    sizes = [layer.weight.numel() for layer in run.sparsifier.layers.values()]
    first, last = (int(at * 20) if isinstance(at, float) else at for at in (begin, end))
    expected = list(sizes)
    for step in range(1, 21):
        run.train(1)
        if step == last or (first <= step < last and (step - first) % every == 0):
            ramp = 1.0 if step == last else 1 - (1 - (step - first) / (last - first)) ** 3
            expected = [size - round(size * 0.75 * ramp) for size in sizes]
        assert kept(run) == expected
        if step >= last:
            assert expected == [size // 4 for size in sizes]


def test_the_target_is_met_exactly_where_the_sparsity_is_no_round_number():
    budget = Budget({"0": 1 / 3, "2": 0.987})
    run = Run("linear", GMP(steps=20, budget=budget, begin=1, end=10, every=4)).train(10)
    assert kept(run) == [384 - round(384 / 3), 96 - round(96 * 0.987)]


def test_keeps_the_largest_weights_of_each_layer():
    rows = Rows(GMP(steps=10, sparsity=0.5, begin=1, end=1, every=1), [[4.0, -1.0, 2.0, -3.0], [0.1, 0.4, -0.3, 0.2]])
    rows.step([0.0] * 4, [0.0] * 4)
    assert rows.masks == [[1, 0, 0, 1], [0, 1, 1, 0]]
    assert [layer.effective_weight[0].tolist() for layer in rows.layers] == [
        pytest.approx([4.0, 0.0, 0.0, -3.0]),
        pytest.approx([0.0, 0.4, -0.3, 0.0]),
    ]


def test_a_dead_weight_keeps_its_value_gets_no_gradient_and_comes_back_if_it_is_large_again():
    rows = Rows(GMP(steps=10, sparsity=0.5, begin=0, end=4, every=2), [[4.0, 3.0, 2.0, 1.0]], lr=1.0)
    nothing = [0.0] * 4
    rows.step(nothing).step(nothing)
    assert rows.masks == [[1, 1, 0, 0]]  # 0.5 · (1 − 1/8) of 4, rounded
    rows.step([3.5, 0.0, 9.0, 9.0])
    assert rows.weights == [[0.5, 3.0, 2.0, 1.0]]
    assert rows.masks == [[1, 1, 0, 0]]
    rows.optimizer.state.clear()
    rows.step(nothing)
    assert rows.masks == [[0, 1, 1, 0]]


def test_masks_stand_still_between_updates_and_after_the_end():
    run = Run("conv2d", GMP(steps=20, sparsity=0.75, begin=4, end=12, every=4))
    changed = []
    for step in range(1, 21):
        before = [layer.parametrization.mask.clone() for layer in run.sparsifier.layers.values()]
        run.train(1)
        after = [layer.parametrization.mask for layer in run.sparsifier.layers.values()]
        if any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)):
            changed.append(step)
    assert changed == [8, 12]


def test_a_ramp_that_ends_before_it_begins_is_refused():
    with pytest.raises(InputError, match=r"GMP: begin=0.9 \(step 90\) comes after end=0.5 \(step 50\)"):
        GMP(steps=100, sparsity=0.9, begin=0.9, end=0.5, every=1)
