"""What every method owes its user, on every kind of layer: one suite over METHODS."""

import copy
import sys

import pytest
import torch
from harness import (
    EXACT_LAYERS,
    EXACT_TOTAL,
    MODELS,
    SETTINGS,
    SPARSITY,
    STEPS,
    VARIANTS,
    Run,
    batch,
    make,
    method_class,
)

import sparing
from sparing import METHODS
from sparing.masks import count_kept
from sparing.methods.feather import FeatherThreshold
from sparing.methods.st3 import RescaledSoftThreshold
from sparing.parametrizations import LearnedThreshold, Masked

pytestmark = pytest.mark.filterwarnings("ignore::sparing.SparsityWarning")
every_method = pytest.mark.parametrize("name", SETTINGS)
every_model = pytest.mark.parametrize("model", MODELS)


def same(first, second):
    """Equal to the last bit, through nested dictionaries and lists."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@torch.no_grad()  # what counts is the weight of evaluation, of methods that train with noise as well
def live(layer):
    """The positions a layer may use: its mask, or where it is not zero."""
    part = layer.parametrization
    return part.mask if isinstance(part, Masked) else layer.effective_weight.detach() != 0


def test_the_suite_knows_every_method():
    assert set(SETTINGS) == set(METHODS) | set(VARIANTS)
    assert EXACT_LAYERS <= EXACT_TOTAL <= set(SETTINGS)


@every_model
@every_method
def test_ends_with_exactly_the_count_asked_for(name, model):
    run = Run(model, make(name)).train(STEPS)
    layers = run.sparsifier.layers.values()
    total = sum(layer.weight.numel() for layer in layers)
    kept = [int(live(layer).sum()) for layer in layers]
    assert 0 < sum(kept) < total
    if name in EXACT_TOTAL:
        uniform = sum(count_kept(layer.weight.numel(), SPARSITY) for layer in layers)
        # A rule that balances layers rounds each of them.
        by_layer = name in EXACT_LAYERS and getattr(make(name), "budget", None) != "erk"
        assert abs(sum(kept) - uniform) <= (0 if by_layer else len(kept))


@every_model
@every_method
def test_what_is_pruned_is_exactly_zero_under_momentum_and_decay(name, model):
    run = Run(model, make(name))
    for _ in range(STEPS):
        run.train(1)
        for layer in run.sparsifier.layers.values():
            part = layer.parametrization
            if isinstance(part, Masked):
                assert layer.effective_weight[~part.mask].count_nonzero() == 0
            if isinstance(part, (LearnedThreshold, RescaledSoftThreshold, FeatherThreshold)):
                assert torch.equal(layer.effective_weight != 0, layer.weight.abs() > part.threshold())


@every_method
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_twenty_steps_equal_ten_and_ten_more_to_the_last_bit(name, optimizer):
    straight = Run("conv2d", make(name), optimizer).train(STEPS)
    first = Run("conv2d", make(name), optimizer).train(STEPS // 2)
    state = first.state()
    second = Run("conv2d", make(name), optimizer, seed=7).load(state).train(STEPS // 2)
    assert same(second.state(), straight.state())


@every_model
@every_method
def test_a_checkpoint_loads_strictly_into_a_fresh_model_with_equal_outputs(name, model, tmp_path):
    run = Run(model, make(name)).train(STEPS // 2)
    torch.save(run.model.state_dict(), tmp_path / "model.pt")
    fresh = Run(model, make(name), seed=7).model
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    x, _ = batch(run.shape, 0)
    assert torch.equal(fresh.eval()(x), run.model.eval()(x))


@every_model
@every_method
def test_densify_and_deepcopy_keep_outputs_to_the_last_bit(name, model):
    run = Run(model, make(name)).train(STEPS)
    x, _ = batch(run.shape, 0)
    expected = run.model.eval()(x)
    replica = copy.deepcopy(run.model)
    assert torch.equal(replica(x), expected)
    plain = sparing.dense_state_dict(run.model)
    sparing.densify_(replica)
    assert torch.equal(replica(x), expected)
    assert same(dict(replica.state_dict()), {key: plain[key] for key in replica.state_dict()})
    before, after = sparing.report(run.model).total, sparing.report(replica).total
    assert (before.nonzero, before.weights) == (after.nonzero, after.weights)
    assert torch.equal(run.model(x), expected)


@every_method
def test_steps_that_a_gradient_scaler_skips_do_not_advance_the_schedule(name):
    run = Run("linear", make(name)).train(3)
    before = run.state()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    x, y = batch(run.shape, 99)
    run.optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(run.model(x), y) * float("inf")
    scaler.scale(loss).backward()
    scaler.step(run.optimizer)
    after = run.state()
    assert run.sparsifier.step == 3
    assert same(after["model"], before["model"])


@every_method
def test_the_same_seeds_give_the_same_weights(name):
    first, second = (Run("conv2d", make(name)).train(STEPS) for _ in range(2))
    assert same(first.state(), second.state())


@every_method
def test_learns(name):
    """A fixed batch is learned through the sparse weights: the loss is halved by twice the schedule's steps."""
    run = Run("linear", make(name))
    x, y = batch(run.shape, 0)
    losses = []
    for _ in range(2 * STEPS):
        run.optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(run.model(x), y)
        loss.backward()
        run.optimizer.step()
        losses.append(float(loss.detach()))
    assert min(losses) < 0.5 * losses[0]


@every_method
def test_half_precision_and_meta_models_can_be_sparsified(name):
    for model in (torch.nn.Linear(16, 16).to(torch.bfloat16), torch.nn.Linear(16, 16, device="meta")):
        sparsifier = sparing.sparsify_(model, make(name), steps=STEPS)
        assert sparsifier.layers["weight"].effective_weight.dtype == model.bias.dtype


# torch.compile trips over what torch itself deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@every_method
def test_compiles_in_one_graph_with_the_same_gradients(name):
    run = Run("linear", make(name)).train(STEPS)
    x, y = batch(run.shape, 0)

    def gradients(forward):
        run.optimizer.zero_grad()
        torch.manual_seed(0)
        torch.nn.functional.cross_entropy(forward(x), y).backward()
        return {key: parameter.grad for key, parameter in run.model.named_parameters() if parameter.grad is not None}

    eager = gradients(run.model)
    torch._dynamo.reset()
    compiled = gradients(torch.compile(run.model, fullgraph=True, backend="aot_eager"))
    assert compiled.keys() == eager.keys()
    for key, gradient in eager.items():
        torch.testing.assert_close(compiled[key], gradient)


@every_method
def test_a_method_is_a_frozen_dataclass_that_prints_itself(name):
    method = make(name)
    assert method == make(name)
    assert hash(method) == hash(make(name))
    assert type(method).__name__ in repr(method)
    with pytest.raises(AttributeError):
        method.steps = 3
    assert METHODS[method_class(name).name] is method_class(name)
    assert "Source:" in (sys.modules[type(method).__module__].__doc__ or "")


@every_method
def test_bad_targets_and_schedules_are_refused(name):
    fields = method_class(name).__dataclass_fields__
    good = SETTINGS[name]
    if "sparsity" in fields and "sparsity" in good:
        for bad in (1.0, -0.1, "half", True):
            with pytest.raises(sparing.InputError, match=r"sparsity must be a fraction in \[0, 1\)"):
                method_class(name)(**{**good, "sparsity": bad})
    if "budget" in fields:
        with pytest.raises(sparing.InputError, match="give sparsity="):
            method_class(name)(**{**good, "sparsity": None, "budget": None})
        budget = sparing.Budget({"0": 0.5, "9": 0.5})
        method = method_class(name)(**{**good, "sparsity": None, "budget": budget})
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        with pytest.raises(sparing.InputError, match="the budget names layer '9', which is not sparsified"):
            sparing.sparsify_(model, method)
        short = method_class(name)(**{**good, "sparsity": None, "budget": sparing.Budget({"0": 0.5})})
        with pytest.raises(sparing.InputError, match="the budget misses 1 of 2 layers, '1' first"):
            sparing.sparsify_(model, short)
    if "every" in good:
        with pytest.raises(sparing.InputError, match="every"):
            method_class(name)(**{**good, "every": 0})
        if "steps" in good:
            with pytest.raises(sparing.InputError, match="every=1000 is longer than"):
                method_class(name)(**{**good, "every": 1000})
    if "steps" in good:
        with pytest.raises(sparing.InputError, match="steps must be a whole number"):
            method_class(name)(**{**good, "steps": 0})


@every_method
def test_every_method_takes_a_budget_and_meets_it(name):
    if "budget" not in method_class(name).__dataclass_fields__:
        return
    budget = sparing.Budget({"0": 0.5, "2": 0.9})
    run = Run("linear", method_class(name)(**{**SETTINGS[name], "sparsity": None, "budget": budget})).train(STEPS)
    kept = {key: int(live(layer).sum()) for key, layer in run.sparsifier.layers.items()}
    if name in EXACT_LAYERS:
        assert kept == {"0": 192, "2": 10}


@pytest.mark.filterwarnings("default::sparing.SparsityWarning")
def test_a_budget_that_leaves_a_layer_empty_warns():
    method = METHODS["gmp"](steps=100, every=10, budget=sparing.Budget({"weight": 0.99}))
    with pytest.warns(sparing.SparsityWarning, match=r"no weight in 1 of 1 layers \('weight': sparsity 0.99 of 16"):
        sparing.sparsify_(torch.nn.Linear(4, 4), method)
