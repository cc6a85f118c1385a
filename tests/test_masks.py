"""Masks: exact counts whatever the scores, ties included, and exact shares of a total."""

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparing
from sparing import InputError, masks
from sparing.masks import (
    affordable_threshold,
    apportion,
    count_kept,
    global_threshold,
    keep_top,
    keep_top_together,
    prune_and_regrow,
    random_scores,
)

laws = settings(max_examples=60)
# Few different values, so that most scores tie.
scores = st.lists(st.sampled_from([-1.5, 0.0, 0.25, 1.0, 3.0]), min_size=1, max_size=40)


def functions(tensors):
    return {f"layer{index}": lambda tensor=tensor: tensor for index, tensor in enumerate(tensors)}


@st.composite
def layers(draw):
    """Scores of a few layers, some of them empty: continuous, tied, equal, sorted or with outliers."""
    seed = draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    kinds = {
        "normal": lambda x: x,
        "tied": lambda x: (2 * x).round() / 2,
        "equal": lambda x: torch.full_like(x, 0.5),
        "sorted": lambda x: x.sort().values,
        "outliers": lambda x: torch.where(x > 1, 1e30 * x, 1e-30 * x),
        "magnitudes": lambda x: x.abs() + 1e3,
    }
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    sizes = draw(st.lists(st.integers(0, 300), min_size=1, max_size=4).filter(any))
    kind = st.sampled_from(sorted(kinds))
    return [kinds[draw(kind)](torch.randn(size, generator=generator)).to(dtype) for size in sizes]


@pytest.mark.slow
@settings(max_examples=200)
@given(layers(), st.integers(1, 500), st.integers(1, 64), st.data())
def test_the_global_threshold_is_that_of_a_sort_however_much_is_selected_at_once(tensors, few, sample, data):
    """`few` is far below the number of scores, so that a bracket is narrowed as it is for millions of them."""
    ranked = torch.cat(tensors).sort(descending=True).values
    count = data.draw(st.integers(0, len(ranked) - 1))
    with mock.patch.multiple(masks, FEW=few, SAMPLE=sample):
        threshold = global_threshold(functions(tensors), count)
        kept = keep_top_together(functions(tensors), count)
    assert threshold == ranked[count]
    assert threshold.dtype == tensors[0].dtype
    flat = torch.cat(list(kept.values()))
    assert int(flat.sum()) == count
    assert torch.equal(torch.cat(tensors)[flat].sort(descending=True).values, ranked[:count])
    # Among equal scores the first ones.
    tied = torch.cat(tensors) == threshold
    assert flat[tied].tolist() == sorted(flat[tied].tolist(), reverse=True)


@pytest.mark.slow
@settings(max_examples=200)
@given(layers(), st.data())
def test_the_affordable_threshold_is_the_smallest_that_the_budget_pays_for(tensors, data):
    scores = [tensor.abs() for tensor in tensors if len(tensor)]
    costs = [data.draw(st.integers(1, 50)) for _ in scores]
    budget = data.draw(st.integers(0, sum(cost * len(each) for cost, each in zip(costs, scores, strict=True))))

    def cost_above(threshold):
        return sum(cost * int((each > threshold).sum()) for cost, each in zip(costs, scores, strict=True))

    named = {str(index): each for index, each in enumerate(scores)}
    threshold = affordable_threshold(named, dict(zip(named, costs, strict=True)), budget)
    assert cost_above(threshold) <= budget
    lower = torch.cat([each[each <= threshold] for each in scores])
    if threshold > 0:  # with the largest of the scores below, and those equal to it, it would cost more
        assert cost_above(torch.nextafter(lower.amax(), lower.new_zeros(()))) > budget


@pytest.mark.parametrize("few", [masks.FEW, 100])
@pytest.mark.parametrize("nan", [1, 501, 1000])
def test_scores_that_are_nan_are_refused(nan, few):
    tensor = torch.randn(1000)
    tensor[:nan] = torch.nan
    message = rf"^{nan} of 1000 scores are NaN, the first at index \(0,\): .*; lower the learning rate"
    with mock.patch.object(masks, "FEW", few), pytest.raises(InputError, match=message):
        keep_top(tensor, 500)


def test_scores_that_are_nan_are_refused_with_their_layers_and_the_first_position():
    wrong, right = torch.zeros(2, 3), torch.ones(2)
    wrong[1, 1:] = torch.nan
    message = r"^layer 'layer1': 2 of 6 scores are NaN, the first at index \(1, 1\), and some in 'layer3': "
    for select in (keep_top_together, global_threshold):
        with pytest.raises(InputError, match=message):
            select(functions([right, wrong, right, wrong]), 3)
    with pytest.raises(InputError, match=r"^layer 'b': 1 of 2 scores are NaN or infinite, the first at index \(1,\): "):
        affordable_threshold({"a": right, "b": torch.tensor([1.0, torch.inf])}, {"a": 1, "b": 2}, 3)


@pytest.mark.parametrize(
    "method",
    [
        sparing.GMP(sparsity=0.5, begin=0, budget="uniform", every=1),
        sparing.GMP(sparsity=0.5, begin=0, budget="global", every=1),
        sparing.GMP(sparsity=0.5, begin=0, budget="global", every=1, pattern=sparing.Filters()),  # of two sizes
        sparing.GMP(begin=0, every=1, pattern=sparing.NM(2, 4)),
        sparing.SET(sparsity=0.5, every=1),
        sparing.SNFS(sparsity=0.5, every=1),
        sparing.Spartan(sparsity=0.5, budget="uniform", every=1),
        sparing.Feather(macs=0.5, input_size=(1, 8), every=1),
    ],
    ids=lambda method: f"{method.name}-{method.pattern}",
)
def test_weights_that_are_nan_are_refused_with_the_layer(method):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = sparing.sparsify_(model, method, steps=8)
    sparsifier.attach(optimizer)
    with torch.no_grad():
        sparsifier.layers["2"].weight.fill_(torch.nan)
    model(torch.ones(1, 8)).sum().backward()
    for parameter in model.parameters():
        parameter.grad.zero_()
    with pytest.raises(InputError, match=r"layer '2': \d+ of \d+ scores are NaN"):
        optimizer.step()


def test_momentum_that_is_infinite_is_refused_with_the_layer():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    sparsifier = sparing.sparsify_(model, sparing.SNFS(sparsity=0.5, every=1), steps=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier.attach(optimizer)
    model(torch.full((1, 8), 1e38)).sum().backward()
    sparsifier.layers["2"].weight.grad[0, 0] = torch.inf
    with pytest.raises(
        InputError, match=r"layer '2': 1 of 128 scores are NaN or infinite, the first at index \(0, 0\)"
    ):
        optimizer.step()


def test_a_weight_that_is_nan_stays_under_dsr():
    """Pruned, it would hide that the model has diverged."""
    layer = nn.Linear(8, 16)
    sparsifier = sparing.sparsify_(layer, sparing.DSR(sparsity=0.5, every=1), steps=8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    row, column = sparsifier.layers["weight"].parametrization.mask.nonzero()[0].tolist()
    with torch.no_grad():
        sparsifier.layers["weight"].weight[row, column] = torch.nan
    layer(torch.ones(1, 8)).sum().backward()
    layer.zero_grad()
    layer.parametrizations.weight.original.grad = torch.zeros(16, 8)
    optimizer.step()
    assert layer.weight.isnan()[row, column]


def test_all_scores_are_the_zero_threshold():
    assert global_threshold(functions([torch.ones(2), torch.ones(3)]), 5) == 0


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


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (8, 4, 1, 1)])
def test_ties_in_a_channels_last_tensor_are_broken_by_position(shape):
    tensor = torch.zeros(shape).to(memory_format=torch.channels_last)
    assert keep_top(tensor, 7).flatten().nonzero().flatten().tolist() == list(range(7))


@pytest.mark.parametrize("count", [-1, 4])
def test_keep_top_refuses_a_count_out_of_range(count):
    with pytest.raises(InputError, match=f"cannot keep {count} of 3 weights"):
        keep_top(torch.zeros(3), count)


def test_meta_scores_give_masks_of_their_shapes():
    kept = keep_top_together(functions([torch.empty(2, 3, device="meta")]), 2)
    kept = kept["layer0"]
    assert (kept.shape, kept.dtype, kept.is_meta) == ((2, 3), torch.bool, True)


@laws
@given(st.data())
def test_prune_and_regrow_prunes_the_smallest_active_and_regrows_the_largest_others(data):
    size = data.draw(st.integers(1, 30))
    # Distinct scores, so that which positions are right has one answer; zeros and negatives among them.
    keep = torch.tensor(data.draw(st.permutations(range(-2, size - 2)))).float()
    grow = torch.tensor(data.draw(st.permutations(range(-2, size - 2)))).float()
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    before, active = mask.clone(), int(mask.sum())
    count = data.draw(st.integers(0, active))
    new = prune_and_regrow(mask, keep, grow, count)

    survivors = sorted((i for i in range(size) if mask[i]), key=lambda i: -keep[i])[: active - count]
    regrown = sorted((i for i in range(size) if i not in survivors), key=lambda i: -grow[i])[:count]
    assert sorted(survivors + regrown) == new.nonzero().flatten().tolist()
    assert torch.equal(mask, before)


@laws
@given(scores, st.data())
def test_prune_and_regrow_conserves_the_count_when_scores_are_equal(values, data):
    tensor = torch.tensor(values)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
    count = data.draw(st.integers(0, int(mask.sum())))
    new = prune_and_regrow(mask, tensor, tensor.flip(0), count)
    assert int(new.sum()) == int(mask.sum())
    assert int((mask & ~new).sum()) <= count


parts = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 50)), min_size=1, max_size=8)


@laws
@given(parts, st.data())
def test_apportion_sums_exactly_within_the_rooms_and_is_proportional_up_to_one(parts, data):
    shares, rooms = zip(*parts, strict=True)
    total = data.draw(st.integers(0, sum(rooms)))
    split = apportion(total, shares, rooms)
    assert sum(split) == total
    assert all(0 <= part <= room for part, room in zip(split, rooms, strict=True))
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


def test_random_scores_follow_from_seed_and_position_alone():
    before = torch.get_rng_state()
    position = [(seed, index, step) for seed in range(2) for index in range(3) for step in range(3)]
    position += [(0,), (0, 1), (2**40, 200)]
    draws = [random_scores((32, 32), torch.device("cpu"), *where) for where in position]
    assert not any(torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again = [random_scores((32, 32), torch.device("cpu"), *where) for where in position]
    assert all(map(torch.equal, draws, again))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_random_scores_do_not_depend_on_the_default_dtype(dtype):
    expected, before = random_scores((8, 8), torch.device("cpu"), 0), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(random_scores((8, 8), torch.device("cpu"), 0), expected)
    finally:
        torch.set_default_dtype(before)


def test_random_scores_are_uniform():
    values = random_scores((200, 200), torch.device("cpu"), 0, 3)
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


@pytest.mark.parametrize(
    "method",
    [sparing.GMP(sparsity=0.9, budget="global"), sparing.ST3(sparsity=0.9), sparing.SNIP(sparsity=0.9)],
    ids=lambda method: method.name,
)
def test_a_threshold_for_all_layers_needs_no_copy_of_all_weights(method):
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(32)))
    weights = sum(4 * parameter.numel() for parameter in model.parameters())
    sparsifier = sparing.sparsify_(model, method, steps=2)
    optimizer = torch.optim.SGD(sparing.param_groups(model, weight_decay=0.0), lr=0.01, foreach=False)
    sparsifier.attach(optimizer)
    largest = 0
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 256)).square().mean().backward()
        with torch.profiler.profile(profile_memory=True) as profile:
            optimizer.step()
        events = profile.profiler.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        largest = max(largest, *itertools.accumulate(change for _, change in changes))
    assert sparing.report(model).total.sparsity == pytest.approx(0.9, abs=1e-3)
    assert 0 < largest < 0.5 * weights
