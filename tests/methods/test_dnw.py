"""DNW: the mask keeps the largest weights, and all weights are trained straight through it."""

import pytest
from harness import Rows, Run

from sparing import DNW


def test_a_weight_outside_the_mask_is_trained_until_it_is_among_the_largest():
    rows = Rows(DNW(sparsity=0.5), [[4.0, -1.0, 2.0, -3.0]], lr=1.0)
    assert rows.layers[0].effective_weight[0].tolist() == [4.0, 0.0, 0.0, -3.0]
    rows.step([0.0, 0.5, -2.0, -0.5])
    assert rows.weights == [[4.0, -1.5, 4.0, -2.5]]
    assert rows.layers[0].effective_weight[0].tolist() == [4.0, 0.0, 4.0, 0.0]


@pytest.mark.parametrize("model", ["conv2d", "lstm"])
def test_after_each_step_the_mask_keeps_exactly_the_largest(model):
    run = Run(model, DNW(sparsity=0.75))
    for _ in range(5):
        for layer in run.sparsifier.layers.values():
            order = sorted(range(layer.weight.numel()), key=lambda i: -abs(float(layer.weight.flatten()[i].detach())))
            kept = layer.parametrization.mask.flatten().nonzero().flatten().tolist()
            assert set(kept) == set(order[: layer.weight.numel() // 4])
        run.train(1)


def test_masks_stay_between_updates():
    rows = Rows(DNW(sparsity=0.5, every=3), [[4.0, -1.0, 2.0, -3.0]], lr=1.0)
    masks = [rows.step([0.0, 0.0, -2.0, 0.0]).masks[0] for _ in range(3)]
    assert masks == [[1, 0, 0, 1], [1, 0, 0, 1], [1, 0, 1, 0]]
