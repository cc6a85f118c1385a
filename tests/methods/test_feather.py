"""Feather: its thresholding, the factor θ on the gradients of pruned weights, one threshold for all layers."""

import pytest
import torch
from harness import Run
from torch import nn

import sparing
from sparing import Feather
from sparing.masks import count_kept
from sparing.patterns import Block, Filters, Unstructured
from sparing.schedules import cubic

WEIGHT = torch.tensor([[3.0, -1.0, 2.0], [0.5, 0.0, -4.0]])


def sparsified(weight, **settings):
    """A Linear layer of this weight, sparsified, after one step by gradients of zero."""
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    model.weight.data = weight.clone()
    sparsifier = sparing.sparsify_(model, Feather(**{"begin": 0, "end": 0, "every": 1} | settings), steps=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    assert torch.equal(model.weight, weight)
    (0 * model.weight.sum()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return model


def test_a_case_by_hand():
    model = sparsified(WEIGHT, sparsity=0.5)
    expected = torch.tensor([[26.0, 0.0, 7.0], [0.0, 0.0, -63.0]])  # |W|³ − 1³, with the sign
    assert torch.allclose(model.weight**3, expected, rtol=1e-5)
    assert model.parametrizations.weight[0].threshold() == 1.0


@pytest.mark.parametrize(
    ("pattern", "view", "theta"),
    [
        (Unstructured(), (8, 1, 6), 0.0),
        (Unstructured(), (8, 1, 6), 1),
        (Block(2), (4, 2, 6), 0.5),
        (Block(4), (2, 4, 6), 1.0),
        (Filters(), (8, 6, 1), 0.5),
    ],
    ids=str,
)
def test_effective_weights_and_gradients_follow_the_formula(pattern, view, theta):
    """S_G = W_G (1 − (th / ‖W_G‖)³)^(1/3),  dW = dS (M + θ (1 − M)); the middle one of `view` is the group."""
    generator = torch.Generator().manual_seed(0)
    weight, gradient = torch.randn(2, 8, 6, generator=generator)
    model = sparsified(weight, sparsity=0.5, pattern=pattern, theta=theta)
    norm = weight.reshape(view).square().mean(1, keepdim=True).sqrt()
    count = norm.numel()
    th = norm.flatten().sort().values[count - count_kept(count, 0.5) - 1]
    factor = (1 - (th / norm) ** 3).clamp_min(0) ** (1 / 3)
    torch.testing.assert_close(model.weight.detach(), (weight.reshape(view) * factor).reshape(8, 6))
    mask = (norm > th).expand(view).reshape(8, 6)
    assert int(mask.sum()) == 24
    assert torch.equal(model.weight != 0, mask)
    model.weight.backward(gradient)
    assert torch.equal(model.parametrizations.weight.original.grad, torch.where(mask, gradient, theta * gradient))


@pytest.mark.parametrize(("sparsity", "theta"), [(0.9, 1.0), (0.95, 1.0), (0.951, 0.5), (0.99, 0.5)])
def test_theta_is_a_half_above_95_percent(sparsity, theta):
    model = sparsified(torch.randn(20, 20), sparsity=sparsity)
    assert model.parametrizations.weight[0].theta == theta


def test_weights_whose_cubes_underflow_in_half_precision_are_kept():
    weight = torch.tensor([[1e-3, 2e-3, 3e-3, 4e-3]], dtype=torch.float16)
    model = sparsified(weight, sparsity=0.5)
    exact = torch.tensor([0, 0, 27.0 - 8, 64.0 - 8]) ** (1 / 3) * 1e-3
    assert model.weight.dtype == torch.float16
    assert torch.allclose(model.weight[0].float(), exact, rtol=0.01)


@pytest.mark.parametrize("pattern", [Unstructured(), Block(4)])
def test_the_total_follows_the_cubic_ramp_of_half_the_run_at_each_step_under_one_threshold(pattern):
    run = Run("conv2d", Feather(sparsity=0.75, every=1, pattern=pattern))
    size = pattern.n if isinstance(pattern, Block) else 1
    thresholds = []
    for done in range(1, 21):
        run.train(1)
        effective = [layer.effective_weight for layer in run.sparsifier.layers.values()]
        wanted = count_kept(sum(w.numel() for w in effective), cubic(done, 0, 10, 0.75)) // size * size
        assert sum(int(weight.count_nonzero()) for weight in effective) == wanted
        (threshold,) = {float(layer.threshold) for layer in run.sparsifier.layers.values()}
        thresholds.append(threshold)
    assert len(set(thresholds)) == 20


def test_between_updates_a_weight_is_active_while_it_is_above_the_threshold():
    model = sparsified(WEIGHT, sparsity=0.5)
    model.parametrizations.weight.original.data[0] = torch.tensor([0.5, -2.0, 2.0])
    assert torch.allclose(model.weight[0] ** 3, torch.tensor([0.0, -7.0, 7.0]), rtol=1e-5)


@pytest.mark.parametrize(("theta", "saved"), [(1.0, 0), (0.5, 1)])
def test_the_backward_saves_at_most_the_effective_weight(theta, saved):
    model = sparsified(WEIGHT, sparsity=0.5, theta=theta)
    tensors = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
        effective = model.weight
    assert [t.data_ptr() for t in tensors] == [effective.data_ptr()] * saved


@pytest.mark.filterwarnings("ignore::sparing.SparsityWarning")
@pytest.mark.parametrize("pattern", [Unstructured(), Block(2)])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_weights_are_pruned_together(value, pattern):
    model = sparsified(torch.full((4, 4), value), sparsity=0.5, pattern=pattern)
    assert model.parametrizations.weight[0].threshold() == value
    assert torch.equal(model.weight, torch.zeros(4, 4))


def test_a_theta_out_of_range_is_refused():
    for theta in (-0.1, 1.5, "half", True):
        with pytest.raises(sparing.InputError, match=r"theta must be a number in \[0, 1\], got"):
            Feather(sparsity=0.9, theta=theta)
