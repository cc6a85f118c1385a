"""GMP: exact counts along the cubic ramp, the largest weights kept, and one-shot pruning."""

import pytest
import torch
from harness import Rows, Run
from torch import nn

import sparing
from sparing import GMP, Budget
from sparing.masks import count_kept
from sparing.patterns import NM, Block, Filters
from sparing.schedules import cubic


def masks(run):
    return [layer.parametrization.mask.clone() for layer in run.sparsifier.layers.values()]


def flat(run, read):
    return torch.cat([read(layer).detach().flatten() for layer in run.sparsifier.layers.values()])


def keeps_the_largest(run):
    sizes = flat(run, lambda layer: layer.weight.abs())
    mask = flat(run, lambda layer: layer.parametrization.mask)
    return bool(mask.all()) or bool(sizes[mask].min() >= sizes[~mask].max())


def two_layers():
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 4, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -4.0, 3.0, -2.0]]))
        model[1].weight.copy_(torch.tensor([[-0.4], [0.3], [5.0], [0.1]]))
    return model


@pytest.mark.parametrize("budget", ["uniform", "global"])
@pytest.mark.parametrize(("begin", "end", "every"), [(2, 16, 2), (3, 14, 4), (0, 17, 5), (0.1, 0.85, 3)])
def test_counts_follow_the_cubic_ramp_at_each_update_and_masks_stay_in_between(begin, end, every, budget):
    """There is an update at `end`, also where it is no multiple of `every` after `begin`."""
    run = Run("linear", GMP(sparsity=0.75, budget=budget, begin=begin, end=end, every=every))
    sizes = [layer.weight.numel() for layer in run.sparsifier.layers.values()]
    first, last = (int(at * 20) if isinstance(at, float) else at for at in (begin, end))
    before, sparsity = masks(run), 0.0
    for step in range(1, 21):
        run.train(1)
        if step == last or (first <= step < last and (step - first) % every == 0):
            sparsity = 0.75 if step == last else 0.75 * (1 - (1 - (step - first) / (last - first)) ** 3)
            assert budget == "uniform" or keeps_the_largest(run)
        else:
            assert all(map(torch.equal, masks(run), before))
        before = masks(run)
        expected = [size - round(size * sparsity) for size in ([sum(sizes)] if budget == "global" else sizes)]
        counts = [int(mask.sum()) for mask in before]
        assert ([sum(counts)] if budget == "global" else counts) == expected
    assert sparsity == 0.75


@pytest.mark.parametrize("pattern", [Block(2), Block(4), Filters()], ids=str)
def test_whole_groups_of_largest_norm_are_kept_with_an_exact_count_at_each_step(pattern):
    run = Run("linear", GMP(sparsity=0.75, begin=0, end=10, every=1, pattern=pattern))
    for done in range(1, 11):
        run.train(1)
        for layer in run.sparsifier.layers.values():
            # The middle dimension is the group.
            inputs = layer.weight.shape[1]
            view = (-1, inputs, 1) if pattern == Filters() else (-1, pattern.n, inputs)
            norms = layer.weight.detach().reshape(view).square().mean(1).flatten()
            groups = layer.parametrization.mask.reshape(view)
            kept = groups.any(1).flatten()
            assert torch.equal(groups.any(1), groups.all(1))
            # The ramp goes from all groups to the exact number of the end.
            final = count_kept(len(kept), 0.75)
            assert int(kept.sum()) == count_kept(len(kept), cubic(done, 0, 10, 1 - final / len(kept)))
            assert kept.all() or norms[kept].min() >= norms[~kept].max()


def test_n_of_m_keeps_the_largest_of_each_group_and_prunes_them_one_at_a_time():
    run = Run("linear", GMP(begin=0, end=4, every=1, pattern=NM(1, 4)))
    counts = []
    for _ in range(4):
        run.train(1)
        for layer in run.sparsifier.layers.values():
            sizes = layer.weight.detach().abs().reshape(-1, 4)
            groups = layer.parametrization.mask.reshape(-1, 4)
            (count,) = groups.sum(1).unique().tolist()
            order = sizes.argsort(1, descending=True)
            assert groups.gather(1, order).tolist() == [[position < count for position in range(4)]] * len(groups)
        counts.append(count)
    # 0.75 · (1 − (3/4)³, 1 − (2/4)³, 1 − (1/4)³, 1) of 4 weights, rounded.
    assert counts == [4 - 2, 4 - 3, 4 - 3, 4 - 3]


def test_a_budget_that_is_no_round_number_is_met_exactly():
    run = Run("linear", GMP(budget=Budget({"0": 1 / 3, "2": 0.987}), begin=1, end=10, every=4)).train(10)
    assert [int(mask.sum()) for mask in masks(run)] == [384 - round(384 / 3), 96 - round(96 * 0.987)]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ("uniform", [[0.0, -4.0, 3.0, 0.0], [-0.4, 0.0, 5.0, 0.0]]),
        ("global", [[0.0, -4.0, 3.0, -2.0], [0.0, 0.0, 5.0, 0.0]]),
    ],
)
def test_begin_and_end_0_prune_in_sparsify_without_a_length_and_for_good(budget, expected):
    model = two_layers()
    sparsifier = sparing.sparsify_(model, GMP(sparsity=0.5, budget=budget, begin=0, end=0))
    assert [layer.weight.flatten().tolist() for layer in model] == [pytest.approx(row) for row in expected]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    before = [layer.effective_weight != 0 for layer in sparsifier.layers.values()]
    with torch.no_grad():
        for layer in sparsifier.layers.values():
            layer.weight.add_(7.0)
    (0 * model(torch.ones(1, 4)).sum()).backward()
    optimizer.step()
    assert all(map(torch.equal, before, [layer.effective_weight != 0 for layer in sparsifier.layers.values()]))


@pytest.mark.parametrize("budget", ["uniform", "global"])
@pytest.mark.parametrize("at", [6, 0.3])
def test_one_shot_is_dense_until_the_step_and_keeps_the_largest_of_that_step(at, budget):
    run = Run("lstm", GMP(sparsity=0.75, budget=budget, begin=at, end=at)).train(5)
    assert all(mask.all() for mask in masks(run))
    made = masks(run.train(1))
    if budget == "global":
        weights = sum(mask.numel() for mask in made)
        assert sum(int(mask.sum()) for mask in made) == weights - round(0.75 * weights)
        assert keeps_the_largest(run)
    for layer, mask in zip(run.sparsifier.layers.values(), made, strict=True):
        if budget == "uniform":
            assert int(mask.sum()) == mask.numel() - round(0.75 * mask.numel())
            assert layer.weight[mask].abs().min() >= layer.weight[~mask].abs().max()
    assert all(map(torch.equal, masks(run.train(14)), made))


def test_a_pruned_weight_decays_without_gradient_and_returns_if_it_is_among_the_largest_again():
    rows = Rows(GMP(sparsity=0.5, begin=0, end=4, every=2), [[4.0, 3.0, 2.0, 1.0]], lr=1.0, steps=10)
    rows.optimizer.param_groups[0]["weight_decay"] = 0.5
    rows.optimizer.param_groups[0]["momentum"] = 0.0
    nothing = [0.0] * 4
    rows.step(nothing).step(nothing)
    assert rows.masks == [[1, 1, 0, 0]]  # 0.5 · (1 − 1/8) of 4, rounded
    assert rows.weights == [[1.0, 0.75, 0.5, 0.25]]
    rows.step([0.4, 0.0, 9.0, 9.0])
    assert rows.weights == [pytest.approx([0.1, 0.375, 0.25, 0.125])]
    assert rows.masks == [[1, 1, 0, 0]]
    rows.step(nothing)
    assert rows.masks == [[0, 1, 1, 0]]
