"""ST-3σ: a threshold a layer, th / √(Σ shape)."""

import pytest
import torch
from harness import Run
from torch import nn

import sparing
from sparing.masks import count_kept
from sparing.methods.st3_sigma import _between
from sparing.schedules import cubic


def sparsified(weights, **settings):
    """Linear layers of these weights after one step by gradients of one that moves nothing."""
    model = nn.ModuleList(nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights)
    for layer, weight in zip(model, weights, strict=True):
        layer.weight.data = weight.clone()
    sparsifier = sparing.sparsify_(model, sparing.ST3Sigma(**{"every": 1, **settings}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier.attach(optimizer)
    sum(layer.weight.sum() for layer in model).backward()
    optimizer.step()
    return model


def test_a_case_by_hand():
    # √(1 + 3) = 2 and √(1 + 8) = 3, so the scores are 2 |W| and 3 |W|.
    narrow, wide = torch.tensor([[3.0, -1.0, 2.0]]), torch.tensor([[1.5, -1.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
    model = sparsified([narrow, wide], steps=10, sparsity=7 / 11, begin=0, end=0)
    # Scores 6, 4.5, 4, 3 (the −1 of the wide) live; 2 (the −1 of the narrow) and 1.8 do not.
    th = 2.0
    first, second = 1.01 / (5 / 6 + 0.01), 1.01 / (2.5 / 4.6 + 0.01)
    left, right = model[0].weight, model[1].weight
    assert torch.allclose(left, first * torch.tensor([[3 - th / 2, 0.0, 2 - th / 2]]), atol=1e-5)
    assert torch.allclose(right, second * torch.tensor([[1.5 - th / 3, th / 3 - 1.0, 0, 0, 0, 0, 0, 0]]), atol=1e-5)
    thresholds = [float(layer.parametrizations.weight[0].threshold()) for layer in model]
    assert thresholds == pytest.approx([1.0, 2 / 3])


def test_layers_drawn_at_their_own_scale_end_equally_sparse():
    generator = torch.Generator().manual_seed(0)
    shapes = [(200, 25), (100, 125), (16, 20)]
    weights = [torch.randn(shape, generator=generator) / sum(shape) ** 0.5 for shape in shapes]
    model = sparsified(weights, steps=10, sparsity=0.8, begin=0, end=0)
    densities = [(layer.weight != 0).float().mean() for layer in model]
    assert all(abs(density - 0.2) < 0.04 for density in densities)


def test_the_sum_is_over_every_dimension_of_a_convolution():
    run = Run("conv2d", sparing.ST3Sigma(steps=20, sparsity=0.75, begin=2, end=10, every=1)).train(15)
    layers = list(run.sparsifier.layers.values())
    sums = [sum(layer.weight.shape) for layer in layers]
    assert sums == [8 + 4 + 3 + 3, 4 + 72]
    common = [float(layer.threshold) * total**0.5 for layer, total in zip(layers, sums, strict=True)]
    assert common[0] == pytest.approx(common[1], rel=1e-5)
    assert common[0] > 0
    assert all(torch.equal(layer.effective_weight != 0, layer.weight.abs() > layer.threshold) for layer in layers)


def test_gradients_pass_straight_through():
    model = sparsified([torch.randn(4, 4), torch.randn(4, 4)], steps=10, sparsity=0.5, begin=0, end=0)
    gradient = torch.randn(4, 4)
    (model[0].weight * gradient).sum().backward()
    # On top of the ones of the step taken.
    assert torch.equal(model[0].parametrizations.weight.original.grad, gradient + 1)


def test_the_total_follows_the_cubic_ramp_exactly():
    run = Run("linear", sparing.ST3Sigma(steps=20, sparsity=0.75, begin=4, end=12, every=1))
    for done in range(1, 21):
        run.train(1)
        effective = [layer.effective_weight for layer in run.sparsifier.layers.values()]
        total = sum(weight.numel() for weight in effective)
        assert sum(int(weight.count_nonzero()) for weight in effective) == count_kept(total, cubic(done, 4, 12, 0.75))


def test_the_count_is_exact_for_any_widths():
    # th · σ is rounded, in one of three of these to below the weight that th came from, in few past the next one.
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        weights = [torch.randn(shape, generator=generator) for shape in [(7, 5 + seed), (3, 11), (13, 2)]]
        model = sparsified(weights, steps=10, sparsity=0.7, begin=0, end=0)
        total = sum(weight.numel() for weight in weights)
        assert sum(int(layer.weight.count_nonzero()) for layer in model) == count_kept(total, 0.7)


def test_half_precision_comes_near_the_count():
    weights = [torch.randn(16, 16).bfloat16(), torch.randn(8, 40).bfloat16()]
    model = sparsified(weights, steps=10, sparsity=0.9, begin=0, end=0)
    assert all(layer.weight.dtype == torch.bfloat16 for layer in model)
    # Equal weights, common in bf16, are zero together.
    assert 0 <= count_kept(576, 0.9) - sum(int(layer.weight.count_nonzero()) for layer in model) <= 4


def test_bad_input():
    with pytest.raises(sparing.InputError, match=r"ST3Sigma: sparsity must be a fraction in \[0, 1\), got 90"):
        sparing.ST3Sigma(steps=10, sparsity=90)
    with pytest.raises(sparing.InputError, match=r"ST3Sigma: begin=0.6 \(step 6\) comes after end=0.5 \(step 5\)"):
        sparing.ST3Sigma(steps=10, sparsity=0.9, begin=0.6)


def test_rounding_moves_no_threshold_past_a_weight():
    size, live = torch.tensor([0.1, 0.3]), torch.tensor([False, True])
    for th, expected in [(0.2, 0.2), (0.09999999, 0.1), (0.3, 0.1), (0.30000004, 0.1)]:
        assert _between(torch.tensor(th), size, live, torch.float32) == torch.tensor(expected)
    # In bf16 0.3003 is 0.3008.
    halves = torch.tensor([0.1001, 0.3008]).bfloat16().float()
    assert _between(torch.tensor(0.3003), halves, live, torch.bfloat16) == halves[0]
