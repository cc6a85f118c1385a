"""The sparsifier: its link to the optimizer, and its state."""

import pytest
import torch
from torch import nn

import sparing
from sparing import STR, InputError, SparsityWarning


def sparse_model(init=-3.0):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    return model, sparing.sparsify_(model, STR(init=init))


def sgd(model, **options):
    return torch.optim.SGD(sparing.param_groups(model, weight_decay=1e-3), lr=0.1, **options)


def test_counts_optimizer_steps_and_not_those_the_scaler_skips():
    model, sparsifier = sparse_model()
    optimizer = sgd(model)
    sparsifier.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, 6)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert sparsifier.step == 2


def test_hooks_run_around_the_step():
    seen = []

    class Spy(sparing.Method):
        name = "spy"

        def parametrizations(self, layers):
            return STR().parametrizations(layers)

        def before_step(self, sparsifier):
            seen.append(("before", sparsifier.step, float(model.bias.detach().sum())))

        def after_step(self, sparsifier):
            seen.append(("after", sparsifier.step, float(model.bias.detach().sum())))

    model = nn.Linear(4, 2)
    sparsifier = sparing.sparsify_(model, Spy())
    optimizer = sgd(model)
    sparsifier.attach(optimizer)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert [entry[:2] for entry in seen] == [("before", 0), ("after", 1)]
    assert seen[0][2] != seen[1][2]


def test_an_optimizer_built_before_sparsify_is_refused():
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = sparing.sparsify_(model, STR())
    with pytest.raises(InputError, match="does not hold the s of layer 'weight': build it after sparsify_"):
        sparsifier.attach(optimizer)


def test_attach_needs_an_optimizer_and_only_once():
    model, sparsifier = sparse_model()
    with pytest.raises(InputError, match="needs the optimizer"):
        sparsifier.attach()
    optimizer = sgd(model)
    sparsifier.attach(optimizer)
    with pytest.raises(InputError, match="attached already"):
        sparsifier.attach(optimizer)


def test_two_optimizers_share_the_parameters_and_steps_are_counted_once():
    model, sparsifier = sparse_model()
    groups = {g["name"]: g["params"] for g in sparing.param_groups(model, weight_decay=0.0)}
    first = torch.optim.SGD(groups["weights"], lr=0.1)
    second = torch.optim.AdamW(groups["thresholds"], lr=0.1)
    sparsifier.attach(first, second)
    model(torch.randn(4, 6)).sum().backward()
    first.step()
    second.step()
    assert sparsifier.step == 1


def test_state_dict_round_trip_and_a_foreign_state_is_refused():
    _, sparsifier = sparse_model()
    sparsifier.step = 17
    _, other = sparse_model()
    other.load_state_dict(sparsifier.state_dict())
    assert other.step == 17
    with pytest.raises(InputError, match="saved by method 'rigl' and cannot continue 'str'"):
        other.load_state_dict({"step": 1, "method": {"name": "rigl"}})


def test_a_layer_that_loses_every_weight_is_named_once():
    model, sparsifier = sparse_model()
    optimizer = sgd(model)
    sparsifier.attach(optimizer)
    sparsifier.layers["2"].parametrization.s.data.fill_(5.0)

    def steps(count):
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.randn(4, 6)).sum().backward()
            optimizer.step()

    with pytest.warns(SparsityWarning, match="step 100: every weight of '2' is zero"):
        steps(100)
    assert sparsifier.collapsed() == ["2"]
    steps(100)  # warnings are errors here: a second one would fail


def test_a_fused_optimizer_that_skips_its_step_is_not_counted():
    model, sparsifier = sparse_model()
    optimizer = torch.optim.AdamW(sparing.param_groups(model, weight_decay=1e-3), lr=0.01, fused=True)
    sparsifier.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, 6)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert sparsifier.step == 2


def test_a_closure_is_refused_by_methods_that_work_on_gradients_and_taken_by_str():
    for method, refused in ((sparing.RigL(steps=100, sparsity=0.5, every=10), True), (STR(), False)):
        model = nn.Linear(6, 4)
        sparsifier = sparing.sparsify_(model, method)
        optimizer = sgd(model)
        sparsifier.attach(optimizer)

        def closure(model=model):
            loss = model(torch.ones(2, 6)).sum()
            loss.backward()
            return loss

        if refused:
            with pytest.raises(InputError, match="call backward.. before optimizer.step"):
                optimizer.step(closure)
        else:
            optimizer.step(closure)
            assert sparsifier.step == 1


def test_after_densify_the_hooks_do_nothing():
    model = nn.Linear(6, 4)
    sparsifier = sparing.sparsify_(model, sparing.RigL(steps=100, sparsity=0.5, every=2, end=0.9))
    optimizer = sgd(model)
    sparsifier.attach(optimizer)
    sparing.densify_(model)
    for _ in range(5):
        before = model.weight.detach().clone()
        optimizer.zero_grad()
        model(torch.ones(2, 6)).sum().backward()
        optimizer.step()
        assert not torch.equal(model.weight, before)
