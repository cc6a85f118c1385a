"""The methods in examples/, which show the contract for methods of one's own."""

import dataclasses
import importlib
import sys
import typing
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparing
from sparing.masks import count_kept
from sparing.patterns import NM
from sparing.run.method_section import build_method
from tolerance import tolerance

EXAMPLES = Path(__file__).parent.parent / "examples" / "03_own_methods"
STEPS = 20
METHODS = {
    "top_kast:TopKAST": {"sparsity": 0.75},
    "movement_pruning:MovementPruning": {"sparsity": 0.75},
    "sr_ste:SRSTE": {},
}
every_method = pytest.mark.parametrize("path", METHODS)


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 16, generator=generator), torch.randint(0, 4, (16,), generator=generator)


class Run:
    def __init__(self, path, seed=0, **arguments):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))
        method = build_method({"name": path, **METHODS[path], **arguments})
        self.sparsifier = sparing.sparsify_(self.model, method, steps=STEPS)
        groups = sparing.param_groups(self.model, weight_decay=0.1)
        self.optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        self.sparsifier.attach(self.optimizer)

    def train(self, steps):
        losses = []
        for step in range(self.sparsifier.step, self.sparsifier.step + steps):
            x, y = batch(step)
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(x), y)
            (loss + self.sparsifier.penalty()).backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses


@every_method
def test_the_target_is_met_exactly(path):
    run = Run(path)
    run.train(STEPS)
    layers = run.sparsifier.layers.values()
    kept = sum(layer.nonzero() for layer in layers)
    assert kept == count_kept(sum(layer.weight.numel() for layer in layers), 0.5 if "sr_ste" in path else 0.75)
    assert sparing.report(run.model).missed == ()


@every_method
def test_a_run_resumes_from_model_and_optimizer_alone(path):
    straight, first = Run(path), Run(path)
    straight.train(STEPS)
    first.train(8)
    second = Run(path, seed=1)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.train(STEPS - 8)
    for one, other in zip(straight.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_two_of_four_inputs_are_kept():
    run = Run("sr_ste:SRSTE")
    run.train(STEPS)
    for layer in run.sparsifier.layers.values():
        assert (layer.effective_weight != 0).reshape(-1, 4).sum(1).unique().tolist() == [2]


def test_pruned_weights_are_pulled_toward_zero_by_the_formula():
    run = Run("sr_ste:SRSTE", weight=0.5)
    x, y = batch(0)
    layer = run.sparsifier.layers["0"]
    effective = layer.effective_weight.detach().requires_grad_()
    rest = run.model[1:]
    (by_effective,) = torch.autograd.grad(
        F.cross_entropy(rest(F.linear(x, effective, run.model[0].bias)), y), effective
    )
    (F.cross_entropy(run.model(x), y) + run.sparsifier.penalty()).backward()
    expected = by_effective + 0.5 * (~layer.parametrization.mask) * layer.weight.detach()
    atol = tolerance(torch.float32, terms=len(x), scale=expected.abs().max())
    torch.testing.assert_close(layer.weight.grad, expected, rtol=0, atol=atol)


def test_only_the_larger_set_of_weights_gets_gradients_from_the_loss():
    run = Run("top_kast:TopKAST", weight=0.0, backward=0.5)
    x, y = batch(0)
    F.cross_entropy(run.model(x), y).backward()
    for layer in run.sparsifier.layers.values():
        part = layer.parametrization
        assert part.mask.sum() == count_kept(part.mask.numel(), 0.75)
        assert part.backward.sum() == count_kept(part.mask.numel(), 0.375)
        assert (part.backward | ~part.mask).all()
        assert layer.weight.grad[~part.backward].count_nonzero() == 0
        assert layer.weight.grad[part.backward & ~part.mask].count_nonzero() > 0


def test_scores_are_trained_by_the_formula_and_do_not_decay():
    run = Run("movement_pruning:MovementPruning")
    groups = {group["name"]: group for group in run.optimizer.param_groups}
    layer = run.sparsifier.layers["0"]
    scores = layer.parametrization.scores
    assert any(scores is parameter for parameter in groups["no_decay"]["params"])
    assert groups["no_decay"]["weight_decay"] == 0
    x, y = batch(0)
    F.cross_entropy(run.model(x), y).backward()
    # While nothing is pruned, the gradient of the weight is that of the effective weight.
    torch.testing.assert_close(scores.grad, layer.weight.grad * layer.weight.detach())


@every_method
def test_a_method_of_ones_own_is_found_by_its_import_path(path):
    module, name = path.split(":")
    assert sparing.find_method(path) is getattr(importlib.import_module(module), name)
    assert dataclasses.is_dataclass(sparing.find_method(path))


@every_method
def test_each_is_under_forty_lines(path):
    source = (EXAMPLES / f"{path.split(':')[0]}.py").read_text()
    code = source.split('"""')[2].strip().splitlines()
    assert len([line for line in code if line.strip()]) < 40


def test_the_type_of_a_name_is_not_the_module_of_str():
    assert typing.get_type_hints(sparing.find_method)["name"] is str


def test_a_method_that_cannot_be_found_is_refused():
    with pytest.raises(sparing.InputError, match="unknown method 'rigil'; did you mean 'rigl'"):
        sparing.find_method("rigil")
    with pytest.raises(sparing.InputError, match="method 'no_such_module:X' cannot be imported"):
        sparing.find_method("no_such_module:X")
    with pytest.raises(sparing.InputError, match="not a subclass of sparing.Method"):
        sparing.find_method("top_kast:TwoMasks")
    assert "top_kast" in sys.modules


def test_an_entry_point_offers_a_method_under_a_name(tmp_path, monkeypatch):
    folder = tmp_path / "offers-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: offers\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[sparing.methods]\nsr_ste = sr_ste:SRSTE\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert build_method({"name": "sr_ste"}).pattern == NM(2, 4)
