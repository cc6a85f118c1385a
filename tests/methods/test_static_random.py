"""StaticRandom: masks that follow from seed and budget alone, and never change."""

import torch
from harness import Run, build

import sparing
from sparing import RigL, StaticRandom


def masks(model):
    return [layer.parametrization.mask.clone() for layer in sparing.sparse_layers(model).values()]


def sparsified(method, seed=0):
    model, _ = build("linear", seed)
    sparing.sparsify_(model, method, steps=20)
    return model


def test_masks_never_change():
    run = Run("linear", StaticRandom(sparsity=0.75))
    before = masks(run.model)
    assert all(map(torch.equal, before, masks(run.train(20).model)))


def test_masks_follow_from_the_seed_and_are_those_that_rigl_starts_with():
    first = masks(sparsified(StaticRandom(sparsity=0.75, seed=3), seed=0))
    again = masks(sparsified(StaticRandom(sparsity=0.75, seed=3), seed=1))
    other = masks(sparsified(StaticRandom(sparsity=0.75, seed=4), seed=0))
    rigl = masks(sparsified(RigL(sparsity=0.75, seed=3)))
    assert all(map(torch.equal, first, again))
    assert all(map(torch.equal, first, rigl))
    assert not any(map(torch.equal, first, other))


def test_the_budget_is_erk_unless_another_is_given():
    # 384 and 96 weights, of densities in the ratio (40 / 384) : (28 / 96), 120 together.
    assert [int(mask.sum()) for mask in masks(sparsified(StaticRandom(sparsity=0.75)))] == [71, 49]
    uniform = StaticRandom(sparsity=0.75, budget="uniform")
    assert [int(mask.sum()) for mask in masks(sparsified(uniform))] == [96, 24]


def test_active_weights_keep_their_initial_values():
    plain, _ = build("linear")
    model = sparsified(StaticRandom(sparsity=0.75))
    for index, mask in zip((0, 2), masks(model), strict=True):
        assert torch.equal(model[index].weight, plain[index].weight * mask)
