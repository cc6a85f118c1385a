"""RigL, SET, SNFS and DSR: what all methods share that prune weights and regrow as many elsewhere."""

import pytest
import torch
from harness import Rows, Run, batch
from torch import nn
from torch.nn import functional as F

import sparing
from sparing import DSR, SET, SNFS, RigL
from sparing.patterns import Block, Unstructured

# With the steps after which the masks differ, of 20. RigL updates them in the next step, from its gradient.
METHODS = {
    "rigl": (RigL, {"end": 16, "every": 4, "fraction": 0.9}, [5, 9, 13]),
    "set": (SET, {"end": 16, "every": 4, "fraction": 0.9}, [4, 8, 12]),
    "snfs": (SNFS, {"end": 16, "every": 4}, [4, 8, 12]),
    "dsr": (DSR, {"end": 16, "every": 4, "threshold": 0.15, "fraction": 0.2}, [4, 8]),
}
BETWEEN_LAYERS = ("snfs", "dsr")
every_method = pytest.mark.parametrize("name", METHODS)


def make(name, **settings):
    kind, own, _ = METHODS[name]
    return kind(**{"sparsity": 0.75} | own | settings)


def groups(mask, n):
    """Return which weights of each block are active: n neighbouring rows of one column."""
    return mask.reshape(mask.shape[0] // n, n, mask.shape[1])


@pytest.mark.parametrize(("n", "optimizer"), [(1, "adamw"), (2, "sgd"), (4, "adamw")])
@every_method
def test_updates_move_whole_blocks_keep_the_count_and_regrow_from_zero_without_momentum(name, n, optimizer):
    run = Run("linear", make(name, pattern=Block(n)), optimizer)
    layers = list(run.sparsifier.layers.values())
    masks = [layer.parametrization.mask.clone() for layer in layers]
    counts = [int(groups(mask, n).any(1).sum()) for mask in masks]
    assert sum(counts) * n * 4 == pytest.approx(480, abs=2 * 4 * n)  # layers are rounded one by one
    changed = []
    for step in range(1, 21):
        before = [parameter.detach().clone() for parameter in run.model.parameters()]
        run.train(1)
        new = [layer.parametrization.mask.clone() for layer in layers]
        for mask in new:
            assert torch.equal(groups(mask, n).any(1), groups(mask, n).all(1))
        now = [int(groups(mask, n).any(1).sum()) for mask in new]
        assert sum(now) == sum(counts)
        assert now == counts or name in BETWEEN_LAYERS
        regrown = [after & ~old for after, old in zip(new, masks, strict=True)]
        if any(map(torch.any, regrown)):
            changed.append(step)
            for layer, where, after, old in zip(layers, regrown, new, masks, strict=True):
                assert not layer.weight[where].any()
                buffers = [b for b in run.optimizer.state[layer.weight].values() if b.dim() > 0]
                assert len(buffers) == (1 if optimizer == "sgd" else 2)
                for buffer in buffers:
                    assert not buffer[where].any()
                    assert buffer[after & old].any()
        weights = {id(layer.weight): where for layer, where in zip(layers, regrown, strict=True)}
        for parameter, start in zip(run.model.parameters(), before, strict=True):
            expected = start.masked_fill(weights.get(id(parameter), torch.tensor(False)), 0)
            # The step of an update of RigL moves nothing; all other steps are taken.
            assert torch.equal(parameter, expected) == (name == "rigl" and changed[-1:] == [step])
        masks = new
    assert changed == METHODS[name][2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@every_method
def test_masks_are_updated_in_other_dtypes(name, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4)).to(dtype)
    sparsifier = sparing.sparsify_(model, make(name), steps=20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer)
    layer = sparsifier.layers["0"]
    start = layer.parametrization.mask.clone()
    for step in range(6):
        x, y = batch((16,), step)
        optimizer.zero_grad()
        F.cross_entropy(model(x.to(dtype)), y).backward()
        optimizer.step()
    assert not torch.equal(layer.parametrization.mask, start)
    assert sum(int(layer.parametrization.mask.sum()) for layer in sparsifier.layers.values()) == 120
    assert layer.effective_weight.dtype == dtype


@pytest.mark.filterwarnings("ignore:.* layers .0. are frozen:sparing.SparsityWarning")
@every_method
def test_a_frozen_layer_takes_no_part(name):
    weights, active = [[9.0, 9.0, 9.0, 9.0, 5.0, -4.0, 0.01, 0.02]] * 2, [[0, 0, 0, 0, 1, 1, 1, 1]] * 2
    method = make(name, sparsity=0.5, end=100, every=2, fraction=0.9, budget="uniform")
    rows = Rows(method, weights, active)
    rows.layers[0].weight.requires_grad_(False)
    for _ in range(3):
        rows.step([0.0] * 8, [2.0, 3.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    assert rows.masks[0] == active[0]
    assert rows.weights[0] == pytest.approx(weights[0])
    assert rows.masks[1] != active[1]
    assert sum(rows.masks[1]) == 4


@pytest.mark.parametrize("pattern", [Unstructured(), Block(2)])
@every_method
def test_the_first_mask_follows_from_the_seed_of_the_method_alone(name, pattern):
    first, same, other = (
        [layer.parametrization.mask for layer in Run("linear", method, seed=seed).sparsifier.layers.values()]
        for method, seed in (
            (make(name, pattern=pattern, seed=1), 0),
            (make(name, pattern=pattern, seed=1), 1),
            (make(name, pattern=pattern, seed=2), 0),
        )
    )
    assert all(map(torch.equal, first, same))
    assert not any(map(torch.equal, first, other))
