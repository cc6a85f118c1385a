"""ST-3 and ST-3σ: one threshold, rescaled filters, straight-through gradients, for weights and for groups."""

import pytest
import torch
from harness import Run
from torch import nn

import sparing
from sparing import ST3, ST3Sigma
from sparing.masks import count_kept
from sparing.patterns import Block, Filters, Unstructured
from sparing.schedules import cubic

WEIGHT = torch.tensor([[3.0, -1.0, 2.0], [0.5, 0.0, -4.0]])
both = pytest.mark.parametrize("kind", [ST3, ST3Sigma])


def sparsified(weights, kind=ST3, learning_rate=0.1, **settings):
    """Linear layers of these weights, sparsified, and a function that takes a step by given gradients."""
    model = nn.ModuleList(nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights)
    for layer, weight in zip(model, weights, strict=True):
        layer.weight.data = weight.clone()
    method = kind(**{"every": 1, "begin": 0, "end": 0, "sparsity": 0.5} | settings)
    sparsifier = sparing.sparsify_(model, method, steps=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    sparsifier.attach(optimizer)

    def step(gradients=None):
        optimizer.zero_grad()
        gradients = [torch.zeros_like(w) for w in weights] if gradients is None else gradients
        sum((layer.weight * g).sum() for layer, g in zip(model, gradients, strict=True)).backward()
        optimizer.step()

    return model, step


def by_the_formula(weights, sparsity, kind, group):
    """The effective weights, read off the equations one group after the other; no norms tie.

    `group` yields, for a weight, the index of each group: n rows of one column, or one row.
    """
    sigma = {id(w): sum(w.shape) ** -0.5 if kind is ST3Sigma else 1.0 for w in weights}
    norms = [(float(w[i].square().mean().sqrt()) / sigma[id(w)], w[i].numel(), w, i) for w in weights for i in group(w)]
    sizes = {size for _, size, _, _ in norms}
    weights_in_all = sum(w.numel() for w in weights)
    # Groups of one size are counted; of groups of several sizes, as many are kept as fit.
    size = sizes.pop() if len(sizes) == 1 else 1
    room = size * count_kept(weights_in_all // size, sparsity)
    masks, th = {id(w): torch.zeros_like(w) for w in weights}, 0.0
    for norm, size, w, i in sorted(norms, key=lambda entry: -entry[0]):
        room -= size
        if room < 0:
            th = th or norm
        else:
            masks[id(w)][i] = 1
    assert th > 0
    effective = []
    for w in weights:
        s, mask = torch.zeros_like(w), masks[id(w)]
        for i in group(w):
            s[i] = w[i] * (1 - th * sigma[id(w)] / w[i].square().mean().sqrt()) * mask[i]
        for row, weight, kept in zip(s, w, mask, strict=True):
            q = (weight.abs() * kept).mean() / weight.abs().mean()
            row *= 1.01 / (q + 0.01)
        effective.append(s)
    return effective


def rows(w):
    return [(slice(r, r + 1), slice(None)) for r in range(w.shape[0])]


def blocks(n):
    return lambda w: [(slice(r, r + n), slice(c, c + 1)) for r in range(0, w.shape[0], n) for c in range(w.shape[1])]


@pytest.mark.parametrize(
    ("pattern", "group"),
    [(Unstructured(), blocks(1)), (Block(2), blocks(2)), (Block(4), blocks(4)), (Filters(), rows)],
    ids=["unstructured", "block2", "block4", "filters"],
)
@both
def test_effective_weights_follow_the_formula_and_gradients_pass_straight_through(kind, pattern, group):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(8, 5, generator=generator), 1.2 * torch.randn(4, 7, generator=generator)]
    model, step = sparsified(weights, kind, sparsity=0.6, pattern=pattern)
    step()
    for layer, expected in zip(model, by_the_formula(weights, 0.6, kind, group), strict=True):
        assert expected.any()
        torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-3, atol=1e-5)
        gradient = torch.randn(layer.weight.shape)
        layer.weight.backward(gradient)
        assert torch.equal(layer.parametrizations.weight.original.grad, gradient)


def test_a_case_by_hand():
    # √(1 + 3) = 2 and √(1 + 8) = 3, so the scores are 2 |W| and 3 |W|.
    narrow, wide = torch.tensor([[3.0, -1.0, 2.0]]), torch.tensor([[1.5, -1.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
    model, step = sparsified([narrow, wide], ST3Sigma, sparsity=7 / 11)
    step()
    # Scores 6, 4.5, 4, 3 (the −1 of the wide layer) are kept; 2 (the −1 of the narrow one) and 1.8 are not.
    th = 2.0
    first, second = 1.01 / (5 / 6 + 0.01), 1.01 / (2.5 / 4.6 + 0.01)
    left, right = model[0].weight, model[1].weight
    assert torch.allclose(left, first * torch.tensor([[3 - th / 2, 0.0, 2 - th / 2]]), atol=1e-5)
    assert torch.allclose(right, second * torch.tensor([[1.5 - th / 3, th / 3 - 1.0, 0, 0, 0, 0, 0, 0]]), atol=1e-5)
    thresholds = [float(layer.parametrizations.weight[0].threshold()) for layer in model]
    assert thresholds == pytest.approx([1.0, 2 / 3])


def test_pruned_weights_are_trained_by_the_gradient_of_their_place_and_return():
    model, step = sparsified([WEIGHT], learning_rate=1.0)
    step()
    gradient = torch.tensor([[0.1, 4.0, -0.2], [0.3, 0.4, -0.5]])
    step([gradient])
    assert torch.allclose(model[0].parametrizations.weight.original, WEIGHT - gradient)
    assert model[0].weight[0, 1] < 0  # −1 − 4 is among the three largest now, and 2.2 is not
    assert model[0].weight[0, 2] == 0


@pytest.mark.parametrize("pattern", [Unstructured(), Block(4)])
@both
def test_the_total_follows_the_cubic_ramp_exactly_at_each_step(kind, pattern):
    run = Run("conv2d", kind(sparsity=0.75, begin=4, end=12, every=1, pattern=pattern))
    size = pattern.n if isinstance(pattern, Block) else 1
    for done in range(1, 21):
        run.train(1)
        effective = [layer.effective_weight for layer in run.sparsifier.layers.values()]
        total = sum(weight.numel() for weight in effective)
        wanted = count_kept(total, cubic(done, 4, 12, 0.75)) // size * size
        assert sum(int(weight.count_nonzero()) for weight in effective) == wanted


def test_the_sum_of_the_shape_is_over_every_dimension_of_a_convolution():
    run = Run("conv2d", ST3Sigma(sparsity=0.75, begin=2, end=10, every=1)).train(15)
    layers = list(run.sparsifier.layers.values())
    sums = [8 + 4 + 3 + 3, 4 + 72]
    common = [float(layer.threshold) * total**0.5 for layer, total in zip(layers, sums, strict=True)]
    assert common[0] == pytest.approx(common[1], rel=1e-5)
    assert common[0] > 0


def test_updates_go_on_to_the_end_of_the_run_and_are_made_at_each_of_the_last_steps():
    run = Run("linear", ST3(sparsity=0.75, begin=0, end=10, every=3))
    updates = []
    for done in range(1, 21):
        before = [layer.threshold.clone() for layer in run.sparsifier.layers.values()]
        run.train(1)
        if before != [layer.threshold for layer in run.sparsifier.layers.values()]:
            updates.append(done)
    assert updates == [3, 6, 9, 10, 12, 15, 18, 19, 20]


def test_between_updates_a_weight_is_active_while_it_is_above_the_threshold():
    model, step = sparsified([WEIGHT])
    step()
    scale = model[0].parametrizations.weight[0].scale
    model[0].parametrizations.weight.original.data[0] = torch.tensor([0.5, -1.5, 2.0])  # beside a threshold of 1
    assert torch.equal(model[0].weight, scale * torch.tensor([[0.0, -0.5, 1.0], [0.0, 0.0, -3.0]]))


@pytest.mark.filterwarnings("ignore::sparing.SparsityWarning")
@pytest.mark.parametrize("pattern", [Unstructured(), Block(2)])
@both
def test_equal_weights_are_pruned_together_and_filters_of_zeros_stay_finite(kind, pattern):
    model, step = sparsified([torch.ones(4, 4), torch.tensor([[1.0] * 4, [0.0] * 4])[:, :4]], kind, pattern=pattern)
    step()
    if kind is ST3:
        assert model[0].weight.count_nonzero() == 0
    assert all(torch.isfinite(layer.weight).all() for layer in model)
    zeros, step = sparsified([torch.zeros(4, 4)], kind, pattern=pattern)
    step()
    assert torch.equal(zeros[0].weight, torch.zeros(4, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@both
def test_other_dtypes_follow_the_formula_to_their_rounding(kind, dtype):
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(8, 8, generator=generator).to(dtype), torch.randn(8, 4, generator=generator).to(dtype)]
    model, step = sparsified(weights, kind)
    step()
    for layer, expected in zip(model, by_the_formula([w.double() for w in weights], 0.5, kind, blocks(1)), strict=True):
        assert layer.weight.dtype == dtype
        assert torch.allclose(layer.weight.double(), expected, rtol=0.02, atol=0.01)


@pytest.mark.slow
def test_the_count_is_exact_for_any_widths():
    # th · σ is rounded, for one in three of these seeds to below the weight that th came from.
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        weights = [torch.randn(shape, generator=generator) for shape in [(7, 5 + seed), (3, 11), (13, 2)]]
        model, step = sparsified(weights, ST3Sigma, sparsity=0.7)
        step()
        total = sum(weight.numel() for weight in weights)
        assert sum(int(layer.weight.count_nonzero()) for layer in model) == count_kept(total, 0.7)


def test_half_precision_comes_near_the_count():
    weights = [torch.randn(16, 16).bfloat16(), torch.randn(8, 40).bfloat16()]
    model, step = sparsified(weights, ST3Sigma, sparsity=0.9)
    step()
    # Equal weights, common in bf16, are zero together.
    assert 0 <= count_kept(576, 0.9) - sum(int(layer.weight.count_nonzero()) for layer in model) <= 4
