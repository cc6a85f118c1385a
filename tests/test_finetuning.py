"""Fine-tuning: which layers are pruned, units and learning rate of learned thresholds, and what is warned of."""

import re

import pytest
import torch
from torch import nn

import sparing
from sparing import STR, InputError, SparsityWarning, STRFeather


class Base(nn.Module):
    """As transformers has it: a backbone without a head, with a pooler."""

    base_model_prefix = "base"

    def __init__(self):
        super().__init__()
        self.embeddings, self.layer, self.pooler = nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    @property
    def base_model(self):
        return getattr(self, self.base_model_prefix, self)

    def forward(self, ids):
        return self.pooler(self.layer(self.embeddings(ids)).mean(1))


class Classifier(nn.Module):
    base_model_prefix = "base"

    def __init__(self):
        super().__init__()
        self.base, self.classifier = Base(), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))

    @property
    def base_model(self):
        return getattr(self, self.base_model_prefix, self)

    def forward(self, ids):
        return self.classifier(self.base(ids))


def selected(model, select=None):
    return list(sparing.sparsify_(model, STR(), select=select).layers)


def test_heads_and_poolers_of_transformers_models_are_left_out_by_default():
    # The head is small in most models; a large one is named.
    with pytest.warns(SparsityWarning, match="not selected by default: 'base.pooler' .*, 'classifier.0'"):
        assert selected(Classifier()) == ["base.layer"]
    with pytest.warns(SparsityWarning, match="'pooler'"):
        assert selected(Base()) == ["layer"]
    assert selected(Classifier(), sparing.select.excluding("*.nothing")) == ["base.layer"]
    assert selected(nn.ModuleDict({"model": Classifier()}), sparing.select.excluding()) == ["model.base.layer"]


def test_heads_are_chosen_by_name_or_predicate():
    assert selected(Classifier(), ["classifier.*", "base.pooler"]) == ["base.pooler", "classifier.0", "classifier.1"]
    everything = ["base.layer", "base.pooler", "classifier.0", "classifier.1"]
    assert selected(Classifier(), lambda name, module: isinstance(module, nn.Linear)) == everything
    assert selected(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))) == ["0", "1"]


def three_layers(method, **groups):
    """Layers whose weights differ in size, with AdamW, in a run of 120 steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 2))
    sparsifier = sparing.sparsify_(model, method, steps=120)
    optimizer = torch.optim.AdamW(sparing.param_groups(model, weight_decay=0.01, **groups), lr=1e-3)
    sparsifier.attach(optimizer)
    return model, sparsifier, optimizer


def train(model, optimizer, steps=120):
    x = torch.randn(512, 30)
    y = (x[:, :3].sum(1) > 0).long()
    for step in range(steps):
        optimizer.zero_grad()
        part = slice(32 * (step % 16), 32 * (step % 16) + 32)
        nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()


def test_thresholds_part_under_adamw_and_the_total_is_met():
    model, sparsifier, optimizer = three_layers(STRFeather(sparsity=0.8, begin=0.1, every=4))
    train(model, optimizer)
    shares = [layer.sparsity() for layer in sparsifier.layers.values()]
    assert max(shares) - min(shares) > 0.05
    total = sparing.report(model).total
    assert total.nonzero == round(0.2 * total.weights)


@pytest.mark.parametrize("size", [1.0, 2.0**16])
def test_the_gradient_of_thresholds_keeps_the_cost_whatever_the_scale_of_the_loss(size):
    """(G − μ C) / rms(G), μ = ⟨G, C⟩ / ⟨C, C⟩, and C counts the weights near the threshold."""
    _, sparsifier, _ = three_layers(STRFeather(sparsity=0.8, begin=0))
    sparsifier.clock.step = 112
    sparsifier.method.after_step(sparsifier, ())
    parts = [layer.parametrization for layer in sparsifier.layers.values()]
    c = torch.stack([part.saving for part in parts])
    for layer, part in zip(list(sparsifier.layers.values())[:2], parts, strict=False):  # the third has 80 weights
        s, few = part.s.detach(), 0.02
        active = [int((layer.weight.abs() > part.threshold_at(s + d)).sum()) for d in (-few, few)]
        assert float(part.saving) == pytest.approx((active[0] - active[1]) / (2 * few), rel=0.5)
    g = torch.tensor([1.0, 3.0, 0.5])
    for part, each in zip(parts, g, strict=True):
        part.s.grad = size * each.reshape(1)
    sparsifier.method.before_step(sparsifier, ())
    found = torch.cat([part.s.grad for part in parts])
    torch.testing.assert_close(found, (g - c * (g @ c) / (c @ c)) / g.square().mean().sqrt())
    assert abs(float(found @ c)) < 1e-4 * float(c.norm())


def test_thresholds_have_a_learning_rate_of_their_own():
    def rates(method, **groups):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
        sparing.sparsify_(model, method, steps=10)
        return {group["name"]: group.get("lr") for group in sparing.param_groups(model, weight_decay=0.1, **groups)}

    assert rates(STR(sparsity=0.5)) == {"weights": None, "thresholds": None}
    assert rates(STR(), threshold_lr=0.5) == {"weights": None, "thresholds": 0.5}
    assert rates(STRFeather(sparsity=0.5)) == {"weights": None, "thresholds": 0.1}
    assert rates(STRFeather(sparsity=0.5), threshold_lr=0.0) == {"weights": None, "thresholds": 0.0}
    for wrong in (-1, float("inf"), [0.1]):
        with pytest.raises(InputError, match=rf"threshold_lr must be in \[0, inf\), got {re.escape(repr(wrong))}"):
            rates(STR(), threshold_lr=wrong)


def test_units_of_the_layers_are_loaded_with_the_model():
    model, _, optimizer = three_layers(STRFeather(sparsity=0.8, every=4))
    train(model, optimizer, 60)
    twin, _, _ = three_layers(STRFeather(sparsity=0.8, every=4))
    with torch.no_grad():
        twin[0].parametrizations.weight.original.mul_(10.0)
    twin.load_state_dict(model.state_dict())
    x = torch.randn(4, 30)
    assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (1.0, r"str: the thresholds of 3 layers are nearly equal after the run: the largest is \d\.\d+% above"),
        (1e-3, r"str: 1 of 3 layers keep the least that is allowed, a tenth of the density of all: '2' \(2.00%\)"),
    ],
)
def test_thresholds_that_do_not_part_and_layers_on_their_floor_are_warned_of(size, message):
    model, sparsifier, optimizer = three_layers(STR(sparsity=0.8, every=4), threshold_lr=1e-6)
    with torch.no_grad():
        model[2].parametrizations.weight.original.mul_(size)
    sparsifier.clock.step = 119
    with pytest.warns(SparsityWarning, match=message) as caught:
        train(model, optimizer, 1)
    assert len(caught) == 1


def test_short_runs_are_not_judged():
    model, sparsifier, optimizer = three_layers(STR(sparsity=0.8), threshold_lr=1e-6)
    sparsifier.retarget(STR(sparsity=0.8), steps=10)
    train(model, optimizer, 10)


@pytest.mark.parametrize(("momentum", "dampening", "factor"), [(0.9, 0.0, 0.1), (0.9, 0.9, 1.0), (0.0, 0.0, 1.0)])
def test_momentum_does_not_multiply_the_steps_of_thresholds(momentum, dampening, factor):
    model, sparsifier, _ = three_layers(STRFeather(sparsity=0.8, begin=0))
    groups = sparing.param_groups(model, weight_decay=0.01)
    sparsifier.attach(torch.optim.SGD(groups, lr=0.1, momentum=momentum, dampening=dampening))
    sparsifier.clock.step = 112
    parts = [layer.parametrization for layer in sparsifier.layers.values()]
    for number, part in enumerate(parts):
        part.saving.fill_(10.0)
        part.s.grad = torch.tensor([float(number)])
    sparsifier.method.before_step(sparsifier, ())
    found = torch.cat([part.s.grad for part in parts])
    torch.testing.assert_close(found, factor * torch.tensor([-1.0, 0.0, 1.0]) / (5 / 3) ** 0.5)
