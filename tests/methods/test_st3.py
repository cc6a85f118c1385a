"""ST-3: one threshold, rescaled filters, straight-through gradients."""

import pytest
import torch
from harness import Run
from torch import nn

import sparing
from sparing.masks import count_kept
from sparing.schedules import cubic

WEIGHT = torch.tensor([[3.0, -1.0, 2.0], [0.5, 0.0, -4.0]])


def sparsified(weights, learning_rate=0.0, **settings):
    """Linear layers of these weights, sparsified, and a function that takes a step by given gradients."""
    model = nn.ModuleList(nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights)
    for layer, weight in zip(model, weights, strict=True):
        layer.weight.data = weight.clone()
    sparsifier = sparing.sparsify_(model, sparing.ST3(**{"every": 1, **settings}))
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    sparsifier.attach(optimizer)

    def step(gradients=None):
        optimizer.zero_grad()
        gradients = [torch.zeros_like(w) for w in weights] if gradients is None else gradients
        sum((layer.weight * g).sum() for layer, g in zip(model, gradients, strict=True)).backward()
        optimizer.step()

    return model, step


def by_the_formula(weights, sparsity):
    """The effective weights, read off the equations one by one; no weights tie."""
    sizes = torch.cat([w.abs().reshape(-1) for w in weights]).sort().values
    pruned = len(sizes) - count_kept(len(sizes), sparsity)
    th = sizes[pruned - 1] if pruned else 0.0
    effective = []
    for w in weights:
        s = torch.zeros_like(w)
        for i, filter_ in enumerate(w):
            live = filter_.abs() > th
            q = (filter_.abs() * live).mean() / filter_.abs().mean()
            s[i] = 1.01 / (q + 0.01) * filter_.sign() * (filter_.abs() - th) * live
        effective.append(s)
    return effective


def test_a_case_by_hand():
    model, step = sparsified([WEIGHT], steps=10, sparsity=0.5, begin=0, end=0)
    assert torch.equal(model[0].weight, WEIGHT)
    step()
    first, second = 1.01 / (5 / 6 + 0.01), 1.01 / (4 / 4.5 + 0.01)
    expected = torch.tensor([[2 * first, 0.0, first], [0.0, 0.0, -3 * second]])
    assert torch.allclose(model[0].weight, expected, atol=1e-5)
    assert model[0].parametrizations.weight[0].threshold() == 1.0


def test_random_layers_follow_the_formula():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(6, 5, generator=generator), 3 * torch.randn(4, 7, generator=generator)]
    model, step = sparsified(weights, steps=10, sparsity=0.7, begin=0, end=0)
    step()
    for layer, expected in zip(model, by_the_formula(weights, 0.7), strict=True):
        assert torch.allclose(layer.weight, expected, atol=1e-4)


def test_dead_weights_are_moved_by_the_gradient_of_their_place_and_come_back():
    model, step = sparsified([WEIGHT], learning_rate=1.0, steps=10, sparsity=0.5, begin=0, end=0)
    step()
    gradient = torch.tensor([[0.1, 4.0, -0.2], [0.3, 0.4, -0.5]])
    step([gradient])
    dense = model[0].parametrizations.weight.original
    assert torch.allclose(dense, WEIGHT - gradient)
    assert model[0].weight[0, 1] < 0  # −1 − 4 is among the three largest now, and 2.2 is not
    assert model[0].weight[0, 2] == 0


def test_the_total_follows_the_cubic_ramp_exactly_and_the_threshold_is_one():
    run = Run("conv2d", sparing.ST3(steps=20, sparsity=0.75, begin=4, end=12, every=1))
    for done in range(1, 21):
        run.train(1)
        parts = [layer.parametrization for layer in run.sparsifier.layers.values()]
        effective = [layer.effective_weight for layer in run.sparsifier.layers.values()]
        total = sum(weight.numel() for weight in effective)
        assert sum(int(weight.count_nonzero()) for weight in effective) == count_kept(total, cubic(done, 4, 12, 0.75))
        assert len({float(part.threshold()) for part in parts}) == 1
    assert float(parts[0].threshold()) > 0


def test_between_two_updates_nothing_is_renewed_and_the_last_step_is_an_update():
    run = Run("linear", sparing.ST3(steps=20, sparsity=0.75, begin=0, end=10, every=3))
    renewed = []
    for done in range(1, 21):
        before = [part.th.clone() for _, part in run.sparsifier.parts(sparing.Sparse)]
        run.train(1)
        if before != [part.th for _, part in run.sparsifier.parts(sparing.Sparse)]:
            renewed.append(done)
    assert renewed == [3, 6, 9, 12, 15, 18, 20]


def test_between_two_updates_a_weight_lives_while_it_is_above_the_threshold():
    model, step = sparsified([WEIGHT], steps=10, sparsity=0.5, begin=0, end=0)
    step()
    scale = model[0].parametrizations.weight[0].scale
    model[0].parametrizations.weight.original.data[0] = torch.tensor([0.5, -1.5, 2.0])  # beside a threshold of 1
    assert torch.equal(model[0].weight, scale * torch.tensor([[0.0, -0.5, 1.0], [0.0, 0.0, -3.0]]))


@pytest.mark.filterwarnings("ignore::sparing.SparsityWarning")
def test_equal_weights_are_zero_together_and_filters_of_zeros_stay_finite():
    model, step = sparsified(
        [torch.ones(4, 4), torch.tensor([[1.0] * 4, [0.0] * 4])], steps=10, sparsity=0.5, begin=0, end=0
    )
    step()
    assert all(layer.parametrizations.weight[0].threshold() == 1 for layer in model)
    assert all(layer.weight.count_nonzero() == 0 for layer in model)
    assert all(torch.isfinite(layer.parametrizations.weight[0].scale).all() for layer in model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_follow_the_formula_to_their_rounding(dtype):
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    model, step = sparsified([weight], steps=10, sparsity=0.5, begin=0, end=0)
    step()
    (expected,) = by_the_formula([weight.double()], 0.5)
    assert model[0].weight.dtype == dtype
    assert torch.allclose(model[0].weight.double(), expected, rtol=0.02, atol=0.01)


def test_bad_input():
    with pytest.raises(sparing.InputError, match=r"ST3: sparsity must be a fraction in \[0, 1\), got 90"):
        sparing.ST3(steps=10, sparsity=90)
    with pytest.raises(sparing.InputError, match=r"ST3: begin=0.6 \(step 6\) comes after end=0.5 \(step 5\)"):
        sparing.ST3(steps=10, sparsity=0.9, begin=0.6)
