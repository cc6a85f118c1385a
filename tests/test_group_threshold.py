"""Thresholds for groups of weights against their formulas, finite differences, and the soft threshold of one weight."""

import pytest
import torch
from harness import Run
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing import STR, Block
from sparing.group_threshold import feather_threshold, group_norm, group_soft_threshold
from sparing.threshold import soft_threshold

# Shape, view and dims of groups: single weights, rows, blocks of outputs, filters, filters of a grouped transposed one.
GROUPS = {
    "weights": ((6, 5), (6, 5), ()),
    "rows": ((6, 5), (6, 5), (1,)),
    "blocks": ((6, 5), (3, 2, 5), (1,)),
    "filters": ((4, 3, 2, 2), (4, 3, 2, 2), (1, 2, 3)),
    "slices": ((4, 3, 2), (2, 2, 3, 2), (1, 3)),
    "all": ((4, 3), (4, 3), (0, 1)),
}
every_grouping = pytest.mark.parametrize("groups", GROUPS)


def members(shape, view, dims):
    """Return the number of the group of each weight, by index."""
    index = torch.arange(torch.Size(view).numel()).reshape(view)
    coordinates = [torch.arange(n).reshape([-1 if d == e else 1 for e in range(len(view))]) for d, n in enumerate(view)]
    key = torch.zeros_like(index)
    for dim, coordinate in enumerate(coordinates):
        if dim not in dims:
            key = key * view[dim] + coordinate
    return key.reshape(shape)


def naive(weight, threshold, shape, view, dims, power=1):
    """Return the formula, group by group in a loop."""
    group, effective = members(shape, view, dims), torch.zeros_like(weight)
    for number in range(int(group.max()) + 1):
        inside = group == number
        norm = weight[inside].square().mean().sqrt()
        factor = (1 - (threshold / norm) ** power).clamp(min=0) ** (1 / power)
        effective[inside] = torch.where(norm > threshold, weight[inside] * factor, 0.0)
    return effective


def pair(groups, dtype=torch.float64):
    torch.manual_seed(3)
    shape, view, dims = GROUPS[groups]
    weight = torch.randn(shape, dtype=dtype)
    norms = group_norm(weight, view, dims)
    threshold = (norms.median() + norms.max()).reshape(1) / 2 if norms.numel() > 1 else norms.reshape(1) / 2
    return weight.requires_grad_(), threshold.to(torch.promote_types(dtype, torch.float32)).requires_grad_()


@every_grouping
def test_the_norm_is_the_root_mean_square_of_each_group(groups):
    shape, view, dims = GROUPS[groups]
    weight = torch.randn(shape, dtype=torch.float64)
    group = members(shape, view, dims)
    expected = [weight[group == number].square().mean().sqrt() for number in range(int(group.max()) + 1)]
    torch.testing.assert_close(group_norm(weight, view, dims).flatten(), torch.stack(expected))
    low = group_norm(weight.bfloat16(), view, dims)
    assert low.dtype == (torch.float32 if dims else torch.bfloat16)


@every_grouping
def test_the_group_soft_threshold_has_its_formula_and_the_gradients_of_finite_differences(groups):
    shape, view, dims = GROUPS[groups]
    weight, threshold = pair(groups)
    effective = group_soft_threshold(weight, threshold, view, dims)
    torch.testing.assert_close(effective, naive(weight, threshold, shape, view, dims))
    assert effective.count_nonzero() > 0
    assert torch.autograd.gradcheck(lambda w, t: group_soft_threshold(w, t, view, dims), (weight, threshold))
    assert torch.autograd.gradgradcheck(lambda w, t: group_soft_threshold(w, t, view, dims), (weight, threshold))


def test_a_threshold_per_group_gets_a_gradient_per_group():
    weight, _ = pair("rows")
    threshold = torch.linspace(0.1, 1.5, 6, dtype=torch.float64).reshape(6, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda w, t: group_soft_threshold(w, t, (6, 5), (1,)), (weight, threshold))


def test_groups_of_one_weight_are_thresholded_and_trained_as_by_the_soft_threshold():
    weight, threshold = pair("weights")
    upstream = torch.randn_like(weight)
    ours, theirs = group_soft_threshold(weight, threshold, (6, 5), ()), soft_threshold(weight, threshold)
    torch.testing.assert_close(ours, theirs)
    for first, second in zip(
        torch.autograd.grad(ours, (weight, threshold), upstream),
        torch.autograd.grad(theirs, (weight, threshold), upstream),
        strict=True,
    ):
        torch.testing.assert_close(first, second)


def test_blocks_of_one_weight_train_as_plain_str_to_the_last_bit():
    plain, blocks = (Run("conv2d", STR(init=-3.0, pattern=p)).train(20) for p in (STR().pattern, Block(1)))
    for (key, ours), theirs in zip(blocks.model.state_dict().items(), plain.model.state_dict().values(), strict=True):
        if "_extra_state" not in key:  # it names the pattern
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "function", [group_soft_threshold, lambda w, t, *groups: feather_threshold(w, t, 0.5, *groups)]
)
def test_groups_at_the_threshold_and_of_zeros_are_pruned_with_finite_gradients(function):
    weight = torch.tensor([[3.0, 4.0], [-1.0, 1.0], [0.0, 0.0], [1e-10, 0.0]], requires_grad=True)
    for value in (1.0, 0.0):
        threshold = torch.tensor([value], requires_grad=True)
        effective = function(weight, threshold, (4, 2), (1,))
        # The second group is exactly at a threshold of 1, the third at a threshold of 0.
        assert (effective.detach() != 0).any(dim=1).tolist() == [True, value == 0, False, value == 0]
        gradients = torch.autograd.grad(effective.square().sum() + effective.sum(), (weight, threshold))
        assert all(gradient.isfinite().all() for gradient in gradients)
        if function is group_soft_threshold:
            assert not gradients[0][2].any()


@pytest.mark.parametrize("threshold", [0.0, 1.6e-28])
def test_a_group_of_tiny_weights_above_a_tiny_threshold_has_finite_gradients(threshold):
    """These are the thresholds of s = -3200, where the paper starts, and of s = -64."""
    weight = torch.full((1, 4), 1e-18, requires_grad=True)
    effective = group_soft_threshold(weight, torch.tensor([threshold]), (1, 4), (1,))
    effective.backward(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    torch.testing.assert_close(weight.grad, torch.tensor([[1.0, 2.0, 3.0, 4.0]]))


def test_a_frozen_weight_or_threshold_gets_no_gradient():
    weight, threshold = pair("rows")
    group_soft_threshold(weight, threshold.detach(), (6, 5), (1,)).sum().backward()
    assert threshold.grad is None
    weight.grad = None
    group_soft_threshold(weight.detach(), threshold, (6, 5), (1,)).sum().backward()
    assert (weight.grad, threshold.grad is None) == (None, False)


@every_grouping
def test_bfloat16_weights_are_thresholded_and_summed_in_float32(groups):
    shape, view, dims = GROUPS[groups]
    weight, threshold = pair(groups, torch.bfloat16)
    effective = group_soft_threshold(weight, threshold, view, dims)
    assert effective.dtype == torch.bfloat16
    wide = weight.detach().float().requires_grad_()
    # A weight of its own is rounded as it is everywhere: its norm is |W| in its own dtype.
    cut = threshold.detach() if dims else threshold.detach().bfloat16().float()
    expected = group_soft_threshold(wide, cut, view, dims)
    torch.testing.assert_close(effective.float(), expected, rtol=2e-2, atol=2e-2)
    upstream = torch.randn(shape).bfloat16()
    ours = torch.autograd.grad(effective, (weight, threshold), upstream)
    theirs = torch.autograd.grad(expected, wide, upstream.float())
    assert [gradient.dtype for gradient in ours] == [torch.bfloat16, torch.float32]
    torch.testing.assert_close(ours[0].float(), theirs[0], rtol=5e-2, atol=5e-2)


def test_the_threshold_gradient_of_bfloat16_weights_is_summed_in_float32():
    weight = torch.ones(1000, 7, dtype=torch.bfloat16, requires_grad=True)
    threshold = torch.tensor([0.5], requires_grad=True)
    effective = group_soft_threshold(weight, threshold, (1000, 7), (1,))
    effective.backward(torch.full_like(effective, 1 / 3))
    third = float(torch.tensor(1 / 3, dtype=torch.bfloat16))
    # A bfloat16 sum would be off by up to 1 part in 256.
    assert float(threshold.grad) == pytest.approx(-7000 * third, rel=1e-5)


# torch.compile uses functions that torch itself deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["soft", "feather"])
def test_compiles_in_one_graph_with_the_same_outputs_and_gradients(kind, dtype):
    _, view, dims = GROUPS["blocks"]
    weight, threshold = pair("blocks", dtype)

    def function(weight, threshold):
        if kind == "soft":
            return group_soft_threshold(weight, threshold, view, dims)
        return feather_threshold(weight, threshold, 0.5, view, dims)

    torch._dynamo.reset()
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        effective = run(weight, threshold)
        results.append((effective, *torch.autograd.grad(effective.square().sum(), (weight, threshold))))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.parametrize(
    "function", [group_soft_threshold, lambda w, t, *groups: feather_threshold(w, t, 0.5, *groups)]
)
def test_per_sample_gradients_by_vmap(function):
    _, view, dims = GROUPS["blocks"]
    weight, threshold = (tensor.detach() for tensor in pair("blocks"))
    x = torch.randn(7, 5, dtype=torch.float64)

    def loss(weight, threshold, x):
        return (function(weight, threshold, view, dims) @ x).square().sum()

    together = torch.vmap(torch.func.grad(loss, (0, 1)), (None, None, 0))(weight, threshold, x)
    for index in range(7):
        alone = torch.func.grad(loss, (0, 1))(weight, threshold, x[index])
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[index], theirs)


# Feather


@every_grouping
@pytest.mark.parametrize("theta", [0.0, 0.5, 1.0])
def test_the_feather_threshold_has_its_formula_and_its_gradients(groups, theta):
    shape, view, dims = GROUPS[groups]
    weight, threshold = pair(groups)
    effective = feather_threshold(weight, threshold, theta, view, dims)
    torch.testing.assert_close(effective, naive(weight, threshold, shape, view, dims, power=3))
    upstream = torch.randn_like(weight)
    ours = torch.autograd.grad(effective, (weight, threshold), upstream)
    kept = effective.detach() != 0
    assert torch.equal(ours[0], torch.where(kept, upstream, theta * upstream))
    torch.testing.assert_close(ours[1], -(upstream * effective.detach().sign()).sum().reshape(1))


@settings(max_examples=50)
@given(st.floats(2**-60, 4, width=32), st.floats(0, 2, width=32))
def test_feather_lies_between_the_soft_threshold_and_the_weight(weight, threshold):
    w, t = torch.tensor([weight, -weight]), torch.tensor(threshold)
    effective, soft = feather_threshold(w, t, 1.0), soft_threshold(w, t)
    assert torch.equal(effective != 0, w.abs() > t)
    assert effective[1] == -effective[0]
    assert (effective.abs() <= w.abs()).all()
    assert (effective.abs() >= soft.abs() * (1 - 1e-6)).all()
    assert torch.equal(feather_threshold(w, torch.tensor(0.0), 1.0), w)
