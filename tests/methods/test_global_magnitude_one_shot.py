"""GlobalMagnitudeOneShot: the masks are made once, by one threshold over all layers."""

import pytest
import torch
from harness import Run
from torch import nn

import sparing
from sparing import GlobalMagnitudeOneShot


def flat(run, what):
    return torch.cat([what(layer).detach().flatten() for layer in run.sparsifier.layers.values()])


def test_at_zero_the_smallest_of_all_layers_are_gone_before_training():
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 4, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -4.0, 3.0, -2.0]]))
        model[1].weight.copy_(torch.tensor([[-0.4], [0.3], [5.0], [0.1]]))
    sparsifier = sparing.sparsify_(model, GlobalMagnitudeOneShot(steps=10, sparsity=0.5))
    assert model[0].weight.tolist() == [[0.0, -4.0, 3.0, -2.0]]
    assert model[1].weight.flatten().tolist() == [0.0, 0.0, 5.0, 0.0]
    assert [int(layer.parametrization.keep) for layer in sparsifier.layers.values()] == [3, 1]


@pytest.mark.parametrize("at", [6, 0.3])
@pytest.mark.parametrize("model", ["linear", "lstm"])
def test_dense_until_the_step_then_the_largest_of_that_step_for_good(model, at):
    run = Run(model, GlobalMagnitudeOneShot(steps=20, sparsity=0.75, at=at)).train(5)
    assert flat(run, lambda layer: layer.parametrization.mask).all()
    run.train(1)
    made = flat(run, lambda layer: layer.parametrization.mask)
    sizes = flat(run, lambda layer: layer.weight.abs())
    assert int(made.sum()) == made.numel() - round(0.75 * made.numel())
    assert sizes[made].min() >= sizes[~made].max()
    for layer in run.sparsifier.layers.values():
        assert int(layer.parametrization.keep) == int(layer.parametrization.mask.sum())
    run.train(14)
    assert torch.equal(flat(run, lambda layer: layer.parametrization.mask), made)


def test_a_model_without_data_gets_masks_of_the_right_shape():
    model = nn.Linear(16, 16, device="meta")
    layer = sparing.sparsify_(model, GlobalMagnitudeOneShot(steps=10, sparsity=0.75)).layers["weight"]
    assert layer.parametrization.mask.is_meta


@pytest.mark.parametrize("at", [21, -1, 1.5, -0.1, True, "end", float("nan")])
def test_a_step_outside_the_run_is_refused(at):
    with pytest.raises(sparing.InputError, match="GlobalMagnitudeOneShot: at must be a step from 0 to 20 or a frac"):
        GlobalMagnitudeOneShot(steps=20, sparsity=0.5, at=at)
