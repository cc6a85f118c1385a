"""Spartan: the soft top-k, its gradient over all layers, and the run's three parts."""

import pytest
import torch
from harness import Run
from torch import nn

import sparing
from sparing.masks import count_kept
from sparing.methods.spartan import soft_top_k


def solved(values, count, beta):
    """σ(β v + μ) with Σ = count, μ found by bisection in float64."""
    low, high = torch.tensor(-1e3).double(), torch.tensor(1e3).double()
    for _ in range(200):
        middle = (low + high) / 2
        if torch.sigmoid(beta * values + middle).sum() < count:
            low = middle
        else:
            high = middle
    return torch.sigmoid(beta * values + middle)


def sparsified(weights, **settings):
    """Linear layers of these weights, sparsified, and a function that takes a step by given gradients."""
    model = nn.ModuleList(nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype) for w in weights)
    for layer, weight in zip(model, weights, strict=True):
        layer.weight.data = weight.clone()
    sparsifier = sparing.sparsify_(model, sparing.Spartan(**{"every": 1, **settings}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier.attach(optimizer)

    def step(gradients):
        optimizer.zero_grad()
        sum((layer.weight * g).sum() for layer, g in zip(model, gradients, strict=True)).backward()
        optimizer.step()
        return [layer.parametrizations.weight.original.grad for layer in model]

    return model, step


@pytest.mark.parametrize(("count", "beta"), [(10, 1.0), (100, 1.0), (100, 20.0)])
def test_the_soft_mask_is_a_logistic_curve_of_sum_k(count, beta):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).abs().double()
    (soft,) = soft_top_k([values], count, beta)
    assert torch.allclose(soft.sum(), torch.tensor(count).double(), rtol=0.03)
    # Whatever μ was stopped at, it is one number: the logit is affine in v.
    inside = (soft > 1e-9) & (soft < 1 - 1e-9)
    shift = torch.logit(soft[inside]) - beta * values[inside]
    assert shift.max() - shift.min() < 1e-5
    assert torch.allclose(soft, solved(values, count, beta), atol=0.06)


def test_the_soft_mask_is_shared_by_the_layers_and_whole_at_the_ends():
    first, second = torch.tensor([[0.1, 0.9]]), torch.tensor([0.5, 0.7, 0.2])
    (together,) = soft_top_k([torch.cat([first.reshape(-1), second])], 2, 10.0)
    apart = soft_top_k([first, second], 2, 10.0)
    assert apart[0].shape == (1, 2)
    assert torch.equal(torch.cat([part.reshape(-1) for part in apart]), together)
    assert [m.tolist() for m in soft_top_k([second], 3, 10.0)] == [[1.0, 1.0, 1.0]]
    assert [m.tolist() for m in soft_top_k([second], 0, 10.0)] == [[0.0, 0.0, 0.0]]


def test_the_gradient_is_that_of_the_soft_mask_over_all_layers():
    """Against finite differences of Σ dS ⊙ W ⊙ m(W), with m solved anew at every point."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(3, 4, generator=generator).double(), torch.randn(2, 3, generator=generator).double()]
    gradients = [torch.randn(3, 4, generator=generator).double(), torch.randn(2, 3, generator=generator).double()]
    settings = {"steps": 10, "sparsity": 0.5, "begin": 0, "end": 10, "beta_first": 3.0, "beta_last": 3.0}
    model, step = sparsified(weights, **settings)
    step(gradients)
    parts = [layer.parametrizations.weight[0] for layer in model]
    flat, upstream = (torch.cat([t.reshape(-1) for t in tensors]) for tensors in (weights, gradients))
    soft = torch.cat([part.soft.reshape(-1) for part in parts]).double()
    # The sum that Sinkhorn stopped at, so that the two sides share one mask.
    reached = soft.sum()
    assert torch.allclose(soft, solved(flat.abs(), reached, 3.0), atol=1e-5)

    def loss(w):
        return (upstream * w * solved(w.abs(), reached, 3.0)).sum()

    steps = 1e-6 * torch.eye(len(flat), dtype=torch.double)
    expected = torch.stack([(loss(flat + h) - loss(flat - h)) / 2e-6 for h in steps])
    made = torch.cat([g.reshape(-1) for g in step(gradients)])
    assert torch.allclose(made, expected, atol=1e-4)


def test_the_forward_weights_are_soft_values_on_the_hard_mask():
    weight = torch.tensor([[3.0, -1.0, 2.0], [0.5, 0.1, -4.0]])
    model, step = sparsified([weight], steps=10, sparsity=0.5, begin=0, end=10)
    assert torch.equal(model[0].weight, weight)
    (before,) = step([torch.ones(2, 3)])
    assert torch.equal(before, torch.ones(2, 3))  # nothing was pruned when it was made
    part = model[0].parametrizations.weight[0]
    live = torch.tensor([[True, False, True], [False, False, True]])
    assert torch.equal(part.mask, live)
    assert torch.equal(model[0].weight, torch.where(live, weight * part.soft, 0.0))
    assert ((part.soft > 0) & (part.soft < 1)).all()


def test_k_falls_until_begin_and_everything_but_the_weights_is_fixed_from_end_on():
    run = Run("conv2d", sparing.Spartan(steps=20, sparsity=0.75, begin=5, end=15, every=1))
    frozen = None
    for done in range(1, 21):
        run.train(1)
        parts = [layer.parametrization for layer in run.sparsifier.layers.values()]
        total = sum(part.mask.numel() for part in parts)
        assert sum(int(part.mask.sum()) for part in parts) == count_kept(total, 0.75 * min(done / 5, 1))
        assert all(int(part.keep) == int(part.mask.sum()) for part in parts)
        state = [torch.where(part.mask, part.soft, -part.soft) for part in parts]
        if done > 15:
            assert all(map(torch.equal, state, frozen))
        elif frozen:
            assert not torch.equal(state[0], frozen[0])
        frozen = state


def test_in_the_final_part_the_gradient_is_that_of_the_fixed_mask():
    weight = torch.tensor([[3.0, -1.0, 2.0], [0.5, 0.1, -4.0]])
    model, step = sparsified([weight], steps=4, sparsity=0.5, begin=0, end=1)
    gradient = torch.arange(1.0, 7.0).reshape(2, 3)
    step([gradient])
    part = model[0].parametrizations.weight[0]
    (made,) = step([gradient])
    assert torch.equal(made, torch.where(part.mask, part.soft * gradient, 0.0))


def test_beta_rises_linearly_to_end():
    method = sparing.Spartan(steps=100, sparsity=0.9)
    assert [method.beta(step) for step in (0, 40, 80, 99)] == [1.0, 10.5, 20.0, 20.0]


def test_bad_input():
    for bad in (0.0, -1, "high", True, float("inf")):
        with pytest.raises(sparing.InputError, match="Spartan: beta_first must be a finite number, > 0, got"):
            sparing.Spartan(steps=100, sparsity=0.9, beta_first=bad)
    with pytest.raises(sparing.InputError, match="beta_last must be a finite number, at least beta_first=5.0, got 2"):
        sparing.Spartan(steps=100, sparsity=0.9, beta_first=5.0, beta_last=2)
    with pytest.raises(sparing.InputError, match=r"Spartan: begin=0.9 \(step 90\) comes after end=0.8"):
        sparing.Spartan(steps=100, sparsity=0.9, begin=0.9)
