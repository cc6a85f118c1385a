"""DNW: the mask is the top of the weights, all of which are trained straight through it."""

import pytest
import torch
from harness import Rows, Run

from sparing import DNW, InputError


def top(weight, count):
    """The positions of the `count` largest sizes, by sorting."""
    order = sorted(range(weight.numel()), key=lambda i: -abs(float(weight.flatten()[i])))
    return set(order[:count])


def test_the_largest_weights_are_used_from_the_start():
    rows = Rows(DNW(sparsity=0.5), [[4.0, -1.0, 2.0, -3.0]])
    assert rows.masks == [[1, 0, 0, 1]]
    assert rows.layers[0].effective_weight[0].tolist() == [4.0, 0.0, 0.0, -3.0]


def test_an_unused_weight_is_moved_by_the_gradient_until_it_comes_in():
    rows = Rows(DNW(sparsity=0.5), [[4.0, -1.0, 2.0, -3.0]], lr=1.0)
    rows.step([0.0, 0.5, -2.0, -0.5])
    assert rows.weights == [[4.0, -1.5, 4.0, -2.5]]
    assert rows.masks == [[1, 0, 1, 0]]


def test_the_gradient_of_every_weight_is_that_of_the_effective_weight():
    run = Run("linear", DNW(sparsity=0.75))
    layer = run.sparsifier.layers["0"]
    x = torch.randn(5, 16)
    effective = layer.effective_weight.detach().requires_grad_()
    upper = run.sparsifier.layers["2"].effective_weight.detach()
    hidden = torch.relu(x @ effective.T + layer.module.bias.detach())
    (hidden @ upper.T).square().sum().backward()
    out = torch.relu(run.model[0](x)) @ upper.T
    out.square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, effective.grad)
    assert layer.weight.grad[~layer.parametrization.mask].count_nonzero() > 0


@pytest.mark.parametrize("model", ["linear", "conv2d", "lstm"])
def test_after_every_step_the_mask_is_the_top_of_the_weights_exactly(model):
    run = Run(model, DNW(sparsity=0.75))
    for _ in range(5):
        for layer in run.sparsifier.layers.values():
            live = layer.parametrization.mask.flatten().nonzero().flatten().tolist()
            assert set(live) == top(layer.weight.detach(), layer.weight.numel() // 4)
        run.train(1)


def test_the_mask_stands_still_between_updates():
    rows = Rows(DNW(sparsity=0.5, every=3), [[4.0, -1.0, 2.0, -3.0]], lr=1.0)
    masks = [rows.step([0.0, 0.0, -2.0, 0.0]).masks[0] for _ in range(3)]
    assert masks == [[1, 0, 0, 1], [1, 0, 0, 1], [1, 0, 1, 0]]


@pytest.mark.parametrize("bad", [0, -1, 1.5, "one", True])
def test_every_must_be_a_positive_integer(bad):
    with pytest.raises(InputError, match="DNW: every must be a whole number of optimizer steps, at least 1, got"):
        DNW(sparsity=0.9, every=bad)
