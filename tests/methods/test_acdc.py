"""AC/DC: when phases change, and what a compressed and a dense phase do to weights and momentum."""

import pytest
import torch
from harness import Run
from torch import nn

import sparing


def phases(**settings):
    method = sparing.ACDC(sparsity=0.9, **settings)
    return "".join("C" if method.is_compressed(step) else "d" for step in range(method.steps))


def masks(run):
    return [part.mask.clone() for _, part in run.sparsifier.parts(sparing.Sparse)]


def test_the_defaults_are_the_epochs_of_the_published_configuration():
    """Pruned at epochs 10, 20, ..., 70 and 85 of 100, restored at 15, 25, ..., 65 and 75."""
    expected = ["d"] * 100
    for start, end in [*((epoch, epoch + 5) for epoch in range(10, 71, 10)), (85, 100)]:
        expected[start:end] = "C" * (end - start)
    assert phases(steps=100) == "".join(expected)
    assert phases(steps=1000)[::10] == "".join(expected)


def test_the_last_dense_phase_ends_at_end_and_no_compressed_phase_is_cut():
    assert phases(steps=12, begin=1, end=9, phase=2) == "dCCddCCddCCC"
    assert phases(steps=12, begin=1, end=8, phase=2) == "dCCdddddCCCC"
    assert phases(steps=12, begin=2, end=12, phase=5) == "ddCCCCCddddd"


def test_masks_are_the_largest_of_the_whole_network_and_fixed_within_a_phase():
    run = Run("linear", sparing.ACDC(steps=20, sparsity=0.75, begin=2, end=15, phase=3))
    previous = None
    for done in range(1, 21):
        run.train(1)
        current = masks(run)
        live = sum(int(mask.sum()) for mask in current)
        if not run.sparsifier.method.is_compressed(done):
            assert live == 480
        elif not run.sparsifier.method.is_compressed(done - 1):
            sizes = torch.cat([layer.weight.detach().abs().reshape(-1) for layer in run.sparsifier.layers.values()])
            flat = torch.cat([mask.reshape(-1) for mask in current])
            assert live == 120
            assert sizes[flat].min() >= sizes[~flat].max()
        else:
            assert all(map(torch.equal, current, previous))
        assert [int(part.keep) for _, part in run.sparsifier.parts(sparing.Sparse)] == [int(m.sum()) for m in current]
        previous = current


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_dead_weights_return_from_zero_with_nothing_remembered_and_live_ones_keep_theirs(optimizer):
    run = Run("linear", sparing.ACDC(steps=20, sparsity=0.75, begin=2, end=15, phase=3), optimizer).train(4)
    compressed = masks(run)
    assert any(layer.weight[~m].any() for layer, m in zip(run.sparsifier.layers.values(), compressed, strict=True))
    run.train(1)  # the fifth step ends the phase
    for layer, mask in zip(run.sparsifier.layers.values(), compressed, strict=True):
        assert layer.weight[~mask].count_nonzero() == 0
        assert layer.weight[mask].count_nonzero() == mask.sum()
        remembered = [v for v in run.optimizer.state[layer.weight].values() if v is not None and v.dim() > 0]
        assert remembered
        for value in remembered:
            assert value[~mask].count_nonzero() == 0
            assert value[mask].count_nonzero() > 0
    run.train(1)
    for layer, mask in zip(run.sparsifier.layers.values(), compressed, strict=True):
        assert layer.effective_weight[~mask].count_nonzero() > 0


def test_a_compressed_phase_masks_the_gradient_and_a_dense_one_does_not():
    model = nn.Linear(3, 2, bias=False)
    model.weight.data = torch.tensor([[3.0, -1.0, 2.0], [0.5, 0.1, -4.0]])
    sparsifier = sparing.sparsify_(model, sparing.ACDC(steps=6, sparsity=0.5, begin=1, end=5, phase=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier.attach(optimizer)
    largest = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    for expected in (torch.ones(2, 3), largest, largest, torch.ones(2, 3), torch.ones(2, 3), largest):
        optimizer.zero_grad()
        model.weight.sum().backward()
        assert torch.equal(model.parametrizations.weight.original.grad, expected)
        optimizer.step()


def test_bad_input():
    with pytest.raises(sparing.InputError, match="begin=0 leaves no dense step of 100"):
        sparing.ACDC(steps=100, sparsity=0.9, begin=0)
    for phase in (0, 0.001, -3, "long", True):
        with pytest.raises(sparing.InputError, match="phase must be a step .* of at least 1 step of 100, got"):
            sparing.ACDC(steps=100, sparsity=0.9, phase=phase)
    with pytest.raises(sparing.InputError, match="phase=40 is too long: .* 40 steps do not fit between step 10 and"):
        sparing.ACDC(steps=100, sparsity=0.9, phase=40)
