"""AC/DC: when the phases change, and what they do to weights, gradients and momentum."""

import pytest
import torch
from harness import Run
from torch import nn

import sparing
from sparing import ACDC

METHOD = ACDC(sparsity=0.75, begin=2, end=15, phase=3)


def phases(steps, **settings):
    """One letter for each step: C for compressed, d for dense."""
    sparsifier = sparing.sparsify_(nn.Linear(4, 4), ACDC(sparsity=0.5, **settings), steps=steps)
    return "".join("C" if sparsifier.plan.compressed(step) else "d" for step in range(steps))


def masks(run):
    return [layer.parametrization.mask.clone() for layer in run.sparsifier.layers.values()]


def test_the_defaults_are_the_epochs_of_the_published_configuration():
    """Compressed from epochs 10, 20, ..., 70 and 85 of 100, dense from 15, 25, ..., 65 and 75."""
    expected = ["d"] * 100
    for start, end in [*((epoch, epoch + 5) for epoch in range(10, 71, 10)), (85, 100)]:
        expected[start:end] = "C" * (end - start)
    assert phases(100) == "".join(expected)
    assert phases(1000)[::10] == "".join(expected)


@pytest.mark.parametrize(
    ("steps", "settings", "expected"),
    [
        (12, {"begin": 1, "end": 9, "phase": 2}, "dCCddCCddCCC"),
        # A compressed phase whose dense phase does not fit before `end` is left out.
        (12, {"begin": 1, "end": 8, "phase": 2}, "dCCdddddCCCC"),
        (12, {"begin": 2, "end": 12, "phase": 5}, "ddCCCCCddddd"),
        # There is at least one dense step, and a phase has at least one.
        (6, {"begin": 0, "end": 5, "phase": 0.01}, "dCdCdC"),
    ],
)
def test_phases_alternate_while_both_fit_before_end(steps, settings, expected):
    assert phases(steps, **settings) == expected


def test_masks_are_all_true_or_the_largest_of_the_whole_network_fixed_within_a_phase():
    run = Run("linear", METHOD)
    previous, compressed = masks(run), False
    for letter in "dCCCdddCCCddddCCCCCC":  # of the steps 1 to 20
        run.train(1)
        current, was, compressed = masks(run), compressed, letter == "C"
        flat = torch.cat([mask.flatten() for mask in current])
        assert int(flat.sum()) == (120 if compressed else 480)
        if compressed and not was:
            sizes = torch.cat([layer.weight.detach().abs().flatten() for layer in run.sparsifier.layers.values()])
            assert sizes[flat].min() >= sizes[~flat].max()
        elif compressed:
            assert all(map(torch.equal, current, previous))
        previous = current


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_decompression_sets_pruned_weights_and_the_momentum_of_every_parameter_to_zero(optimizer):
    run = Run("conv2d", METHOD, optimizer).train(4)
    compressed = masks(run)
    layers = list(run.sparsifier.layers.values())
    assert any(layer.weight[~mask].any() for layer, mask in zip(layers, compressed, strict=True))
    assert all(momentum.any() for momentum in momenta(run))
    run.train(1)  # the fifth step ends the phase
    for layer, mask in zip(layers, compressed, strict=True):
        assert layer.weight[~mask].count_nonzero() == 0
        assert layer.weight[mask].all()
    buffers = momenta(run)
    # Weights, biases and those of the normalization; Adam has two buffers for each.
    assert len(buffers) == len(list(run.model.parameters())) * (1 if optimizer == "sgd" else 2)
    assert not any(buffer.any() for buffer in buffers)
    run.train(1)
    assert all(layer.effective_weight[~mask].any() for layer, mask in zip(layers, compressed, strict=True))


@pytest.mark.parametrize(("kind", "key"), [(torch.optim.Rprop, "step_size"), (torch.optim.ASGD, "ax")])
def test_decompression_leaves_what_is_no_momentum(kind, key):
    model = nn.Linear(8, 4)
    sparsifier = sparing.sparsify_(model, METHOD, steps=20)
    optimizer = kind(model.parameters(), lr=0.01, **({"t0": 0} if kind is torch.optim.ASGD else {}))
    sparsifier.attach(optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(2, 8)).square().sum().backward()
        optimizer.step()
    assert all(state[key].all() for state in optimizer.state.values())


def momenta(run):
    return [value for state in run.optimizer.state.values() for value in state.values() if value.dim() > 0]


def test_a_compressed_phase_masks_the_gradient_and_a_dense_one_does_not():
    model = nn.Linear(3, 2, bias=False)
    model.weight.data = torch.tensor([[3.0, -1.0, 2.0], [0.5, 0.1, -4.0]])
    sparsifier = sparing.sparsify_(model, ACDC(sparsity=0.5, begin=1, end=5, phase=2), steps=6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier.attach(optimizer)
    dense, largest = torch.ones(2, 3), torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    for expected in (dense, largest, largest, dense, dense, largest):
        optimizer.zero_grad()
        model.weight.sum().backward()
        assert torch.equal(model.parametrizations.weight.original.grad, expected)
        optimizer.step()


def test_phases_that_do_not_fit_before_end_are_refused():
    with pytest.raises(sparing.InputError, match="phase of 40 steps each .phase=40. do not fit between step 10 and"):
        sparing.sparsify_(nn.Linear(4, 4), ACDC(sparsity=0.9, phase=40), steps=100)
