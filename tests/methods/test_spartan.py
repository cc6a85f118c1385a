"""Spartan: the soft top-k, its gradient over all layers, and the three parts of a run."""

import pytest
import torch
from harness import Run
from torch import nn

import sparing
from sparing import InputError, Spartan
from sparing.masks import count_kept
from sparing.methods.spartan import soft_top_k
from sparing.patterns import Block, Filters, Unstructured


def solved(values, count, beta):
    """Return the μ of Σ σ(β v + μ) = count, found by bisection."""
    low, high = torch.tensor(-1e3).double(), torch.tensor(1e3).double()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if torch.sigmoid(beta * values + middle).sum() < count else (low, middle)
    return middle


def sparsified(weights, steps=10, **settings):
    """Linear layers of these weights, sparsified, and a function that takes a step by given gradients."""
    model = nn.ModuleList(nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype) for w in weights)
    for layer, weight in zip(model, weights, strict=True):
        layer.weight.data = weight.clone()
    sparsifier = sparing.sparsify_(model, Spartan(**{"every": 1, "sparsity": 0.5, "begin": 0} | settings), steps=steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier.attach(optimizer)

    def step(gradients):
        optimizer.zero_grad()
        sum((layer.weight * g).sum() for layer, g in zip(model, gradients, strict=True)).backward()
        optimizer.step()
        return [layer.parametrizations.weight.original.grad for layer in model]

    return model, step


@pytest.mark.parametrize(("count", "beta"), [(10, 1.0), (100, 1.0), (100, 20.0)])
def test_the_soft_mask_sums_to_k(count, beta):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).abs().double()
    soft = torch.sigmoid(beta * values + soft_top_k({"": lambda: values}, count, beta))
    assert float(soft.sum()) == pytest.approx(count, rel=0.03)
    assert torch.allclose(soft, torch.sigmoid(beta * values + solved(values, count, beta)), atol=0.06)


def test_the_shift_is_that_of_all_layers_together_and_infinite_where_all_or_none_is_kept():
    first, second = torch.tensor([[0.1, 0.9]]), torch.tensor([0.5, 0.7, 0.2])
    together = torch.cat([first.flatten(), second])
    torch.testing.assert_close(
        soft_top_k({"a": lambda: first, "b": lambda: second}, 2, 10.0), soft_top_k({"": lambda: together}, 2, 10.0)
    )
    assert soft_top_k({"": lambda: second}, 3, 10.0) == torch.inf
    assert soft_top_k({"": lambda: second}, 0, 10.0) == -torch.inf


@pytest.mark.parametrize("budget", ["global", "uniform"])
@pytest.mark.parametrize(
    ("pattern", "views"),
    [
        (Unstructured(), [(8, 1, 4), (4, 1, 4)]),
        (Block(2), [(4, 2, 4), (2, 2, 4)]),
        (Block(4), [(2, 4, 4), (1, 4, 4)]),
        (Filters(), [(8, 4, 1), (4, 4, 1)]),
    ],
    ids=["unstructured", "block2", "block4", "filters"],
)
def test_the_gradient_is_that_of_the_soft_mask_by_autograd(pattern, views, budget):
    """Of Σ dS ⊙ W ⊙ m(W), where μ follows W so that Σ m stays: of all layers, or of each where each has its own k.

    The middle dimension of a view is the group.
    """
    generator = torch.Generator().manual_seed(1)
    shapes = [(8, 4), (4, 4)]
    weights, gradients = ([torch.randn(s, generator=generator).double() for s in shapes] for _ in range(2))
    beta = 3.0
    settings = {"end": 10, "beta_first": beta, "beta_last": beta}
    model, step = sparsified(weights, pattern=pattern, budget=budget, **settings)
    step(gradients)
    made = step(gradients)
    copies = [weight.clone().requires_grad_() for weight in weights]
    norms = [w.reshape(view).square().mean(1, keepdim=True).sqrt() for w, view in zip(copies, views, strict=True)]
    soft = [layer.parametrizations.weight[0].soft.double() for layer in model]
    together = [[0, 1]] if budget == "global" else [[0], [1]]
    loss = 0.0
    for members in together:
        # The sum that Sinkhorn stopped at, so that both sides have one mask.
        reached = sum(soft[i].reshape(views[i])[:, :1].sum() for i in members)
        flat = torch.cat([norms[i].flatten() for i in members])
        mu = solved(flat.detach(), reached, beta)
        m = torch.sigmoid(beta * flat + mu)
        # One step of Newton's method changes no value, and gives μ its derivative.
        slope = (m * (1 - m)).sum().detach()
        mu = mu - (m.sum() - m.sum().detach()) / slope
        for i in members:
            mask = torch.sigmoid(beta * norms[i] + mu)
            assert torch.allclose(mask.expand(views[i]).reshape(shapes[i]), soft[i], atol=1e-5)
            loss = loss + (gradients[i].reshape(views[i]) * copies[i].reshape(views[i]) * mask).sum()
    loss.backward()
    for gradient, copy in zip(made, copies, strict=True):
        torch.testing.assert_close(gradient, copy.grad, rtol=1e-4, atol=1e-5)


def test_effective_weights_have_soft_values_on_the_hard_mask():
    weight = torch.tensor([[3.0, -1.0, 2.0], [0.5, 0.1, -4.0]])
    model, step = sparsified([weight], end=10)
    assert torch.equal(model[0].weight, weight)
    (before,) = step([torch.ones(2, 3)])
    assert torch.equal(before, torch.ones(2, 3))  # nothing was pruned yet
    part = model[0].parametrizations.weight[0]
    mask = torch.tensor([[True, False, True], [False, False, True]])
    assert torch.equal(part.mask, mask)
    assert torch.equal(model[0].weight, torch.where(mask, weight * part.soft, 0.0))
    assert ((part.soft > 0) & (part.soft < 1)).all()


def test_k_falls_until_begin_beta_rises_until_end_and_then_both_masks_are_fixed():
    run = Run("conv2d", Spartan(sparsity=0.75, begin=5, end=15, every=1))
    fixed = None
    for done in range(1, 21):
        run.train(1)
        parts = [layer.parametrization for layer in run.sparsifier.layers.values()]
        total = sum(part.mask.numel() for part in parts)
        assert sum(int(part.mask.sum()) for part in parts) == count_kept(total, 0.75 * min(done / 5, 1))
        state = [torch.where(part.mask, part.soft, -part.soft) for part in parts]
        if done > 15:
            assert all(map(torch.equal, state, fixed))
        elif fixed:
            assert not torch.equal(state[0], fixed[0])
        # The logits are β |W| + μ: their spread over that of |W| is β.
        if done <= 15:
            sizes = torch.cat([layer.weight.detach().abs().flatten() for layer in run.sparsifier.layers.values()])
            logits = torch.logit(torch.cat([part.soft.flatten() for part in parts]).double())
            beta = (logits.max() - logits.min()) / (sizes.max() - sizes.min())
            assert float(beta) == pytest.approx(1 + 19 * done / 15, rel=0.02)
        fixed = state


def test_in_the_last_part_the_gradient_is_that_of_the_fixed_masks():
    weight = torch.tensor([[3.0, -1.0, 2.0], [0.5, 0.1, -4.0]])
    model, step = sparsified([weight], steps=4, end=1)
    gradient = torch.arange(1.0, 7.0).reshape(2, 3)
    step([gradient])
    part = model[0].parametrizations.weight[0]
    (made,) = step([gradient])
    assert torch.equal(made, torch.where(part.mask, part.soft * gradient, 0.0))


def test_bad_arguments_are_refused():
    for bad in (0.0, "high", float("inf")):
        with pytest.raises(InputError, match=r"Spartan: beta_first must be a number in \(0, inf\), got"):
            Spartan(sparsity=0.9, beta_first=bad)
    with pytest.raises(InputError, match="Spartan: beta_last must be at least beta_first=5.0, got 2"):
        Spartan(sparsity=0.9, beta_first=5.0, beta_last=2)
