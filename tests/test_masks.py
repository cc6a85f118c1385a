"""Masks: exact counts whatever the scores, ties included, and exact shares of a total."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing import InputError
from sparing.masks import apportion, count_kept, keep_top, keep_top_together, random_mask, random_scores, rewire

laws = settings(max_examples=60, deadline=None)
# Few different values, so that ties are the rule.
scores = st.lists(st.sampled_from([-1.5, 0.0, 0.25, 1.0, 3.0]), min_size=1, max_size=40)


@laws
@given(scores, st.data())
def test_keep_top_keeps_exactly_the_count_and_nothing_below_what_it_drops(values, data):
    count = data.draw(st.integers(0, len(values)))
    tensor = torch.tensor(values)
    mask = keep_top(tensor, count)
    assert mask.dtype == torch.bool
    assert int(mask.sum()) == count
    if 0 < count < len(values):
        assert tensor[mask].min() >= tensor[~mask].max()


@pytest.mark.parametrize("count", [0, 3, 11, 12])
def test_keep_top_keeps_the_shape_of_any_layout(count):
    tensor = torch.randn(2, 3, 2, 1).to(memory_format=torch.channels_last).transpose(1, 2)
    mask = keep_top(tensor, count)
    assert mask.shape == tensor.shape
    assert set(tensor[mask].tolist()) == set(sorted(tensor.flatten().tolist())[12 - count :])


@pytest.mark.parametrize("count", [-1, 4])
def test_keep_top_refuses_a_count_out_of_range(count):
    with pytest.raises(InputError, match=f"cannot keep {count} of 3 weights"):
        keep_top(torch.zeros(3), count)


@laws
@given(st.lists(scores, min_size=1, max_size=4), st.data())
def test_keep_top_together_is_keep_top_over_all_tensors(parts, data):
    tensors = [torch.tensor(part) for part in parts]
    count = data.draw(st.integers(0, sum(map(len, parts))))
    masks = keep_top_together(tensors, count)
    assert [mask.shape for mask in masks] == [tensor.shape for tensor in tensors]
    assert sum(int(mask.sum()) for mask in masks) == count
    kept = [float(v) for t, m in zip(tensors, masks, strict=True) for v in t[m]]
    dropped = [float(v) for t, m in zip(tensors, masks, strict=True) for v in t[~m]]
    assert not kept or not dropped or min(kept) >= max(dropped)


def test_keep_top_together_keeps_the_shapes():
    masks = keep_top_together([torch.zeros(2, 3), torch.ones(3, 1, 2)], 7)
    assert [mask.shape for mask in masks] == [(2, 3), (3, 1, 2)]
    assert [int(mask.sum()) for mask in masks] == [1, 6]


@laws
@given(st.data())
def test_rewire_drops_the_smallest_live_and_grows_the_largest_others(data):
    size = data.draw(st.integers(1, 30))
    # Distinct scores, so that which positions are right has one answer; zeros and negatives among them.
    keep = torch.tensor(data.draw(st.permutations(range(-2, size - 2)))).float()
    grow = torch.tensor(data.draw(st.permutations(range(-2, size - 2)))).float()
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    live = int(mask.sum())
    count = data.draw(st.integers(0, live))
    new = rewire(mask, keep, grow, count)

    survivors = sorted((i for i in range(size) if mask[i]), key=lambda i: -keep[i])[: live - count]
    born = sorted((i for i in range(size) if i not in survivors), key=lambda i: -grow[i])[:count]
    assert sorted(survivors + born) == new.nonzero().flatten().tolist()


@laws
@given(scores, st.data())
def test_rewire_conserves_the_count_when_scores_are_equal(values, data):
    tensor = torch.tensor(values)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
    count = data.draw(st.integers(0, int(mask.sum())))
    new = rewire(mask, tensor, tensor.flip(0), count)
    assert int(new.sum()) == int(mask.sum())
    assert int((mask & ~new).sum()) <= count


def test_rewire_leaves_the_mask_it_was_given():
    mask = torch.tensor([True, False])
    assert rewire(mask, torch.ones(2), torch.tensor([0.0, 1.0]), 1).tolist() == [False, True]
    assert mask.tolist() == [True, False]


parts = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 50)), min_size=1, max_size=8)


@laws
@given(parts, st.data())
def test_apportion_sums_exactly_within_the_rooms(parts, data):
    shares, rooms = zip(*parts, strict=True)
    total = data.draw(st.integers(0, sum(rooms)))
    split = apportion(total, shares, rooms)
    assert sum(split) == total
    assert all(0 <= part <= room for part, room in zip(split, rooms, strict=True))


@laws
@given(parts, st.data())
def test_apportion_is_proportional_up_to_one(parts, data):
    shares, rooms = zip(*parts, strict=True)
    total = data.draw(st.integers(0, sum(rooms)))
    split = apportion(total, shares, rooms)
    free = [i for i in range(len(parts)) if split[i] < rooms[i]]
    if len(free) == len(parts) and sum(shares) > 0:
        assert all(abs(split[i] - total * shares[i] / sum(shares)) < 1 for i in free)
    # A part that is full got no more for its share than one that is not, but for the rounding.
    for i in free:
        for j in set(range(len(parts))) - set(free):
            assert (split[j] - 1) * shares[i] <= (split[i] + 1) * shares[j]


@pytest.mark.parametrize(
    ("total", "shares", "rooms", "split"),
    [
        (10, [1, 1, 2], [10, 10, 10], [3, 2, 5]),  # 2.5, 2.5, 5: the remainder goes to the first of equals
        (10, [1, 1, 8], [10, 10, 4], [3, 3, 4]),  # what the third cannot take is split anew
        (6, [0, 0, 0], [2, 3, 4], [2, 2, 2]),  # no shares: equal ones
        (5, [1, 0], [3, 9], [3, 2]),  # the part with a share is full
        (7, [1, 2, 4], [7, 7, 7], [1, 2, 4]),
        (7, [1, 1], [3, 9], [3, 4]),  # 3.5 rounded up is more than the first has room for
        (0, [1.0], [0], [0]),
    ],
)
def test_apportion_by_hand(total, shares, rooms, split):
    assert apportion(total, shares, rooms) == split


def test_apportion_refuses_more_than_there_is_room_for():
    with pytest.raises(InputError, match="cannot share out 8 where there is room for 7"):
        apportion(8, [1, 1], [3, 4])


@laws
@given(st.integers(1, 5), st.integers(1, 7), st.data())
def test_random_masks_are_exact_and_follow_from_seed_and_index(rows, columns, data):
    weight = torch.empty(rows, columns)
    count = data.draw(st.integers(0, rows * columns))
    seed, index = data.draw(st.integers(0, 2**40)), data.draw(st.integers(0, 200))
    mask = random_mask(weight, count, seed, index)
    assert mask.shape == weight.shape
    assert int(mask.sum()) == count
    torch.rand(3)  # the global state has no part in it
    assert torch.equal(mask, random_mask(weight, count, seed, index))


def test_random_masks_differ_between_layers_and_seeds_and_scores_between_steps():
    weight = torch.empty(32, 32)
    masks = [random_mask(weight, 300, seed, index) for seed in range(3) for index in range(3)]
    scores = [random_scores(weight, 0, 0, step) for step in range(5)]
    for draws in (masks, scores):
        assert not any(torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


def test_random_numbers_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    random_mask(torch.empty(4, 4), 3, seed=1, index=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_scores_are_uniform():
    values = random_scores(torch.empty(200, 200), 0, 3)
    assert values.min() >= 0
    assert values.max() < 1
    assert float(values.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(values.var()) == pytest.approx(1 / 12, abs=0.003)


@pytest.mark.parametrize(
    ("weights", "sparsity", "kept"),
    [(1000, 0.9, 100), (10, 0.0, 10), (10, 1.0, 0), (7, 0.5, 3), (3, 0.5, 1), (25_502_912, 0.9, 2_550_291)],
)
def test_count_kept_by_hand(weights, sparsity, kept):
    assert count_kept(weights, sparsity) == kept


@laws
@given(st.integers(0, 10**7), st.floats(0, 1))
def test_count_kept_is_within_half_a_weight(weights, sparsity):
    assert abs(count_kept(weights, sparsity) - weights * (1 - sparsity)) <= 0.5 + 1e-6
