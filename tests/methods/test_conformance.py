"""What every method guarantees, for each kind of layer, pattern and budget."""

import copy
import dataclasses
import io
import sys
from math import floor

import pytest
import torch
from harness import MODELS, SETTINGS, STEPS, VARIANTS, Run, batch, build, groups_of, make, method_class, ready_for
from safetensors.torch import load_file, save_file
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import sparing
from sparing import METHODS, NM, Block, Budget, Filters, InputError, Ranking, Unstructured
from sparing.parametrizations import Masked

pytestmark = pytest.mark.filterwarnings("ignore::sparing.SparsityWarning")
every_method = pytest.mark.parametrize("name", SETTINGS)
every_model = pytest.mark.parametrize("model", [model for model in MODELS if model != "mixed"])

PATTERNS = {"unstructured": Unstructured(), "block": Block(4), "nm": NM(2, 4), "filters": Filters()}
BUDGETS = ("uniform", "erk", "global", "custom")
TARGET = 0.7  # no layer has a number of weights of which it is a round share

# The table of what is supported: the patterns and budgets of each method. N:M fixes the sparsity of every layer, so
# it takes no budget that chooses one. A method that starts from a random mask takes no global budget.
ALL_PATTERNS, ALL_BUDGETS = "unstructured block nm filters", "uniform erk global custom"
SUPPORTED = {
    "gmp": (ALL_PATTERNS, ALL_BUDGETS),
    "dnw": (ALL_PATTERNS, ALL_BUDGETS),
    "acdc": (ALL_PATTERNS, ALL_BUDGETS),
    "snip": (ALL_PATTERNS, ALL_BUDGETS),
    "grasp": (ALL_PATTERNS, ALL_BUDGETS),
    "static_random": (ALL_PATTERNS, "uniform erk custom"),
    "rigl": ("unstructured block filters", "uniform erk custom"),
    "set": ("unstructured block filters", "uniform erk custom"),
    "snfs": ("unstructured block", "uniform erk custom"),
    "dsr": ("unstructured block", "uniform erk custom"),
    "st3": ("unstructured block filters", ALL_BUDGETS),
    "st3_sigma": ("unstructured block filters", ALL_BUDGETS),
    "feather": ("unstructured block filters", ALL_BUDGETS),
    "spartan": ("unstructured block", ALL_BUDGETS),
    "str_sparsity": ("unstructured block filters", "global"),
    "str_feather": ("unstructured block filters", "global"),
}
# Their layers exchange weights, so that only the total is fixed.
MOVE_BETWEEN_LAYERS = {"snfs", "dsr"}
# Their sparsity is learned: nothing fixes it.
NO_TARGET = {"str", "variational_dropout", "dst", "continuous_sparsification", "fixed_mask"}

# Layers for which a pattern or method is not defined, by model.
NO_PATTERN = {
    ("depthwise", "block"): "has 1 neighbouring output channels, which 4 does not divide",
    ("depthwise", "nm"): "has 1 inputs per output channel, which 4 does not divide",
    ("grouped", "nm"): "has 2 inputs per output channel, which 4 does not divide",
    ("grouped_transposed", "nm"): "has 2 inputs per output channel, which 4 does not divide",
}
NO_METHOD = dict.fromkeys(
    (("grouped_transposed", "dst"), ("mixed", "dst")), "one threshold per filter is not supported"
)


def refusal(name, pattern, budget):
    """Return the reason for which a combination is refused; None if it is supported."""
    patterns, budgets = SUPPORTED[name]
    if pattern == "nm" and "nm" not in patterns:
        return "leaves no threshold to learn" if name.startswith("str") else "chooses how many weights a group keeps"
    if pattern == "nm":
        return "fixes the sparsity of every layer at 0.5" if budget == "custom" else None
    if budget not in budgets:
        return "budget='global' is not supported: it starts from random masks"
    return None if pattern in patterns else "must have one size in all layers"


def with_pattern():
    """Yield the methods that take a pattern, with each that they take but the trivial one."""
    for name, (patterns, _) in SUPPORTED.items():
        yield from ((name, pattern) for pattern in patterns.split() if pattern != "unstructured")


WITH_PATTERN = list(with_pattern())


def arguments(name, pattern, budget, layers):
    """Return the arguments that ask a method for a pattern, a budget and the target."""
    if not issubclass(method_class(name), Ranking):
        return {"pattern": PATTERNS[pattern], "sparsity": TARGET}
    budget = Budget({layer: 0.5 + 0.05 * i for i, layer in enumerate(layers)}) if budget == "custom" else budget
    sparsity = None if isinstance(budget, Budget) or pattern == "nm" else TARGET
    return {"pattern": PATTERNS[pattern], "budget": budget, "sparsity": sparsity}


def every_combination():
    """Yield method, pattern and budget; a method without budgets has the one it follows."""
    for name in SUPPORTED:
        ranked = issubclass(method_class(name), Ranking)
        for pattern in PATTERNS:
            yield from ((name, pattern, budget) for budget in (BUDGETS if ranked else ("global",)))


def sparsities(layers, budget, sparsity):
    """Return the sparsity of each layer under a budget, by its definition."""
    if isinstance(budget, Budget):
        return budget
    if budget == "uniform":
        return dict.fromkeys(layers, sparsity)
    # ERK: the one ε at which the densities min(1, ε Σ shape / Π shape) leave the total, by bisection.
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    sums = {name: sum(layer.weight.shape) for name, layer in layers.items()}
    total = sum(size - floor(sparsity * size) for size in sizes.values())
    low, high = 0.0, float(max(sizes.values()))
    for _ in range(200):
        middle = (low + high) / 2
        kept = sum(min(sizes[name], middle * sums[name]) for name in layers)
        low, high = (middle, high) if kept < total else (low, middle)
    return {name: 1 - min(1.0, high * sums[name] / sizes[name]) for name in layers}


@torch.no_grad()  # without gradients, methods that train with noise give the weight of evaluation
def active(layer):
    """Return the positions that a layer may use: its mask, or where the effective weight is not zero."""
    part = layer.parametrization
    return part.mask if isinstance(part, Masked) else layer.effective_weight != 0


def active_units(layer, pattern):
    """Return how many units of a layer are active; assert that each is kept or pruned as a whole."""
    groups, mask = groups_of(layer, pattern).flatten(), active(layer).flatten()
    sizes, kept = torch.bincount(groups), torch.bincount(groups, weights=mask.double()).long()
    assert not layer.effective_weight.detach().flatten()[~mask].any()
    if isinstance(pattern, NM):
        assert (kept == pattern.n).all()
        return int(kept.sum())
    assert ((kept == 0) | (kept == sizes)).all()
    return int((kept > 0).sum())


def assert_exact(run, pattern, budget, sparsity):
    """Assert the numbers of active units, per layer or of all layers together, without any slack."""
    layers, method = run.sparsifier.layers, run.sparsifier.method
    weights = {name: layer.weight.numel() for name, layer in layers.items()}
    groups = {name: int(groups_of(layer, pattern).max()) + 1 for name, layer in layers.items()}
    found = {name: active_units(layer, pattern) for name, layer in layers.items()}
    total = sum(found.values())
    if isinstance(pattern, NM):
        assert found == {name: count * pattern.n for name, count in groups.items()}
        return
    if budget != "global":
        each = sparsities(layers, budget, sparsity)
        expected = {name: count - round(count * each[name]) for name, count in groups.items()}
        assert total == sum(expected.values()) if method.name in MOVE_BETWEEN_LAYERS else found == expected
        return
    sizes = {name: weights[name] // count for name, count in groups.items()}
    largest, dense = max(sizes.values()), sum(weights.values())
    if isinstance(method, Ranking) and len(set(sizes.values())) == 1:
        assert total == sum(groups.values()) - round(sum(groups.values()) * sparsity)
        return
    # As many units as fit into the weights to keep: fewer weights are left over than the largest of them has.
    left = dense - round(dense * sparsity) - sum(count * sizes[name] for name, count in found.items())
    assert 0 <= left < largest


def test_the_tables_name_every_method():
    assert set(SETTINGS) == set(METHODS) | set(VARIANTS)
    assert {method_class(name).name for name in SUPPORTED} | NO_TARGET == set(METHODS)
    assert all(issubclass(method_class(name), Ranking) or name.startswith("str") for name in SUPPORTED)


@pytest.mark.parametrize(("name", "pattern", "budget"), list(every_combination()))
def test_every_supported_combination_ends_exact_and_every_other_one_is_refused(name, pattern, budget):
    model, _ = build("mixed")
    chosen = arguments(name, pattern, budget, sparing.layers.find_layers(model))
    reason = refusal(name, pattern, budget)
    if reason is not None:
        with pytest.raises(InputError, match=reason):
            sparing.sparsify_(model, make(name, **chosen), steps=STEPS)
        assert not sparing.sparse_layers(model)
        return
    run = Run("mixed", make(name, **chosen)).train(STEPS)
    assert_exact(run, PATTERNS[pattern], chosen.get("budget", "global"), TARGET)
    assert sparing.report(run.model).missed == ()


@pytest.mark.parametrize("name", [name for name, (patterns, _) in SUPPORTED.items() if "nm" in patterns])
def test_a_pattern_of_n_in_m_needs_no_other_target(name):
    model, _ = build("linear")
    sparing.sparsify_(model, method_class(name)(pattern=NM(2, 4)), steps=1000)


@every_model
@pytest.mark.parametrize(("name", "pattern"), [pair for pair in WITH_PATTERN if pair[0] in ("gmp", "str_sparsity")])
def test_every_kind_of_layer_takes_the_patterns_that_fit_it(name, pattern, model):
    chosen = arguments(name, pattern, "uniform", ())
    if (model, pattern) in NO_PATTERN:
        with pytest.raises(InputError, match=NO_PATTERN[model, pattern]):
            sparing.sparsify_(build(model)[0], make(name, **chosen), steps=STEPS)
        return
    run = Run(model, make(name, **chosen)).train(STEPS)
    assert_exact(run, PATTERNS[pattern], chosen.get("budget", "global"), TARGET)


@every_model
@every_method
def test_pruned_weights_are_exactly_zero_at_every_step_and_the_count_is_exact_at_the_end(name, model):
    method = make(name)
    if (model, name) in NO_METHOD:
        with pytest.raises(InputError, match=NO_METHOD[model, name]):
            sparing.sparsify_(build(model)[0], method, steps=STEPS)
        return
    run = Run(model, method)
    for _ in range(STEPS):
        run.train(1)
        for layer in run.sparsifier.layers.values():
            part, mask, used = layer.parametrization, active(layer), layer.effective_weight.detach()
            if name not in ("variational_dropout", "continuous_sparsification"):  # they are soft while training
                assert not used[~mask].any()
            if part.threshold() is not None:
                assert torch.equal(mask, layer.weight.detach().abs() > part.threshold())
    if name not in NO_TARGET:
        assert_exact(run, Unstructured(), getattr(method, "budget", "global"), method.sparsity)
    total = sparing.report(run.model).total
    assert 0 < total.nonzero < total.weights


def resumed(run, method, optimizer="sgd"):
    """Return a fresh run that continues from the files of another: those of its model and optimizer alone."""
    files = io.BytesIO(), io.BytesIO()
    torch.save(run.model.state_dict(), files[0])
    torch.save(run.optimizer.state_dict(), files[1])
    states = []
    for file in files:
        file.seek(0)
        states.append(torch.load(file, weights_only=True))
    fresh = Run("conv2d", method, optimizer, seed=7)
    fresh.model.load_state_dict(states[0])
    fresh.optimizer.load_state_dict(states[1])
    fresh.step = fresh.sparsifier.step
    return fresh


def same(first, second):
    """Return whether two values are equal to the last bit, through nested dictionaries and lists."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def assert_resumes(method, optimizer, cuts):
    """Assert that a run which is cut at any of these steps ends as one that is not."""
    straight = Run("conv2d", method, optimizer)
    begun = {}
    for step in range(STEPS):
        if step in cuts:
            begun[step] = resumed(straight, method, optimizer)
        torch.manual_seed(step)  # of the noise of variational dropout
        straight.train(1)
    for cut, run in begun.items():
        for step in range(cut, STEPS):
            torch.manual_seed(step)
            run.train(1)
        assert same(run.state(), straight.state()), f"differs after a resume at step {cut}"


@every_method
def test_a_resume_at_any_step_from_model_and_optimizer_alone_changes_no_bit(name):
    assert_resumes(make(name), "sgd", [1, 4, 5, 10, 15])
    assert_resumes(make(name), "adamw", [STEPS // 2])


@pytest.mark.parametrize(("name", "pattern"), WITH_PATTERN)
def test_a_resume_with_a_pattern_changes_no_bit(name, pattern):
    assert_resumes(make(name, **arguments(name, pattern, "uniform", ())), "sgd", [STEPS // 2])


@pytest.mark.parametrize("model", ["conv2d", "transposed", "channels_last", "lstm"])
@every_method
def test_copies_checkpoints_and_dense_models_have_equal_outputs(name, model, tmp_path):
    run = Run(model, make(name)).train(STEPS)
    x, _ = batch(run.shape, 0)
    expected = run.model.eval()(x)
    before = sparing.report(run.model).total
    state = {key: value.contiguous() for key, value in run.model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    fresh = Run(model, make(name), seed=7).model.eval()
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(fresh(x), expected)
    replica = copy.deepcopy(run.model)
    plain = sparing.dense_state_dict(run.model)
    sparing.densify_(replica)
    assert torch.equal(replica(x), expected)
    assert same(dict(replica.state_dict()), {key: plain[key] for key in replica.state_dict()})
    assert sparing.report(replica).total == before
    assert torch.equal(run.model(x), expected)
    assert sparing.sparse_layers(run.model)


@every_method
def test_learns_a_fixed_batch(name):
    run = Run("linear", make(name))
    x, y = batch(run.shape, 0)
    losses = []
    for _ in range(2 * STEPS):
        run.optimizer.zero_grad()
        loss = F.cross_entropy(run.model(x), y)
        (loss + run.sparsifier.penalty()).backward()
        run.optimizer.step()
        losses.append(float(loss.detach()))
    assert min(losses) < 0.5 * losses[0]


@every_method
def test_a_bfloat16_model_trains_to_its_target(name):
    run = Run("linear", make(name))
    run.model.to(torch.bfloat16)
    for step in range(STEPS):
        x, y = batch(run.shape, step)
        run.optimizer.zero_grad()
        (F.cross_entropy(run.model(x.bfloat16()).float(), y) + run.sparsifier.penalty()).backward()
        run.optimizer.step()
    for layer in run.sparsifier.layers.values():
        assert layer.effective_weight.dtype == torch.bfloat16
        assert layer.weight.isfinite().all()
        # What a parametrization learns or remembers would lose its small steps in bfloat16.
        kept = [tensor for tensor in layer.parametrization.state_dict().values() if isinstance(tensor, torch.Tensor)]
        assert all(tensor.dtype == torch.float32 for tensor in kept if tensor.is_floating_point())
    if name not in NO_TARGET:
        kept = sum(int(active(layer).sum()) for layer in run.sparsifier.layers.values())
        masked = isinstance(run.sparsifier.layers["0"].parametrization, Masked)
        # A threshold cannot tell equal weights apart: in bfloat16 a few tie with it, and all of them are pruned.
        assert kept == run.sparsifier.clock.goal if masked else 0.9 <= kept / run.sparsifier.clock.goal <= 1


@every_method
def test_another_default_device_changes_nothing(name):
    # As after torch.set_default_device("cuda") with a model on the CPU; "meta" stands for the other device.
    expected = Run("linear", make(name)).train(STEPS)
    model, shape = build("linear")
    ready_for(make(name), model)
    batches = [batch(shape, step) for step in range(STEPS)]
    with torch.device("meta"):
        sparsifier = sparing.sparsify_(model, make(name), steps=STEPS)
        optimizer = torch.optim.SGD(sparing.param_groups(model, weight_decay=1e-2), lr=0.1, momentum=0.9)
        sparsifier.attach(optimizer)
        for x, y in batches:
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + sparsifier.penalty()).backward()
            optimizer.step()
        counted = sparing.report(model, (1, *shape)).as_dict()
    assert same(model.state_dict(), expected.model.state_dict())
    assert counted == sparing.report(expected.model, (1, *shape)).as_dict()


@every_method
def test_a_meta_model_takes_everything_from_a_checkpoint(name):
    trained = Run("conv2d", make(name)).train(STEPS // 2)
    with torch.device("meta"):
        model, shape = build("conv2d")
        sparsifier = sparing.sparsify_(model, make(name), steps=STEPS)
    assert sparsifier.layers["0"].effective_weight.shape == (8, 4, 3, 3)
    model.to_empty(device="cpu").load_state_dict(trained.model.state_dict())
    assert sparsifier.step == STEPS // 2
    x, _ = batch(shape, 0)
    assert torch.equal(model.eval()(x), trained.model.eval()(x))


# torch.compile uses functions that torch itself deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", METHODS)
def test_compiles_in_one_graph_with_the_same_gradients(name):
    run = Run("linear", make(name)).train(STEPS)
    x, y = batch(run.shape, 0)

    def gradients(forward):
        run.optimizer.zero_grad()
        torch.manual_seed(0)
        F.cross_entropy(forward(x), y).backward()
        return {key: parameter.grad for key, parameter in run.model.named_parameters() if parameter.grad is not None}

    eager = gradients(run.model)
    torch._dynamo.reset()
    compiled = gradients(torch.compile(run.model, fullgraph=True, backend="aot_eager"))
    assert compiled.keys() == eager.keys()
    for key, gradient in eager.items():
        torch.testing.assert_close(compiled[key], gradient)


@pytest.mark.parametrize(
    ("name", "pattern"), [*((name, None) for name in METHODS), *(pair for pair in WITH_PATTERN if pair[1] == "block")]
)
def test_per_sample_gradients_by_vmap_equal_those_of_one_sample_at_a_time(name, pattern):
    changes = arguments(name, pattern, "uniform", ()) if pattern else {}
    run = Run("linear", make(name, **changes)).train(STEPS)
    x, y = batch(run.shape, 0)
    parameters = {key: value.detach() for key, value in run.model.named_parameters()}

    def loss(parameters, x, y):
        return F.cross_entropy(functional_call(run.model, parameters, (x[None],)), y[None])

    torch.manual_seed(0)
    together = vmap(grad(loss), (None, 0, 0), randomness="same")(parameters, x, y)
    for index in range(3):
        torch.manual_seed(0)
        run.optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(run.model(x[index : index + 1]), y[index : index + 1]).backward()
        for key, parameter in run.model.named_parameters():
            torch.testing.assert_close(together[key][index], parameter.grad)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("name", ["gmp", "rigl", "acdc", "spartan"])
def test_the_average_of_a_masked_model_has_the_masks_of_the_model(name, use_buffers):
    run = Run("conv2d", make(name))
    average = torch.optim.swa_utils.AveragedModel(run.model, use_buffers=use_buffers)
    for _ in range(STEPS):
        run.train(1)
        average.update_parameters(run.model)
    ours = sparing.sparse_layers(average.module)
    for key, layer in run.sparsifier.layers.items():
        assert torch.equal(ours[key].parametrization.mask, layer.parametrization.mask)


@every_method
def test_a_method_is_a_frozen_dataclass_that_prints_itself(name):
    method = make(name)
    assert method == make(name)
    assert hash(method) == hash(make(name))
    assert type(method).__name__ in repr(method)
    field = next(iter(method.__dataclass_fields__), "name")
    with pytest.raises(AttributeError):
        setattr(method, field, 3)
    assert METHODS[method_class(name).name] is method_class(name)
    assert "Source:" in (sys.modules[type(method).__module__].__doc__ or "")


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("bad", [1.0, -0.1, "half", True, float("nan")])
def test_a_target_sparsity_out_of_range_is_refused(name, bad):
    with pytest.raises(InputError, match=r"sparsity must be a fraction in \[0, 1\)"):
        make(name, sparsity=bad)


JUNK = [object(), [], {}, b"", 1j, float("nan"), "", -(10**400), torch.ones(2)]


@pytest.mark.parametrize("bad", JUNK, ids=[type(value).__name__ for value in JUNK])
@every_method
def test_every_argument_refuses_a_value_of_another_type(name, bad):
    method = method_class(name)
    fields = {field.name: field for field in dataclasses.fields(method)}
    needed = {field: 0.5 for field, its in fields.items() if its.default is dataclasses.MISSING}
    for field in set(fields) - {"input_size"}:  # used with macs only, where the model is run
        others = {"sparsity": 0.5} if "sparsity" in fields and field not in ("sparsity", "macs", "budget") else needed
        with pytest.raises(InputError, match=field):
            sparing.sparsify_(torch.nn.Linear(4, 4), method(**{**others, field: bad}), steps=STEPS)


@pytest.mark.parametrize("name", [name for name in SUPPORTED if issubclass(method_class(name), Ranking)])
def test_a_budget_that_does_not_fit_the_model_is_refused(name):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    for budget, message in [
        ("uniform", "give sparsity="),
        (None, "budget must be"),
        (Budget({"0": 0.5, "9": 0.5}), "the budget names layer '9', which is not sparsified"),
        (Budget({"0": 0.5}), "the budget misses 1 of 2 layers, '1' first"),
    ]:
        with pytest.raises(InputError, match=message):
            sparing.sparsify_(model, make(name, sparsity=None, budget=budget), steps=STEPS)
    with pytest.raises(InputError, match="not both"):
        make(name, sparsity=0.5, budget=Budget({"0": 0.5}))
    with pytest.raises(InputError, match="pattern must be"):
        make(name, pattern="block")
    assert not sparing.sparse_layers(model)


SCHEDULED = [name for name in SETTINGS if "end" in method_class(name).__dataclass_fields__ and name != "str"]


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_schedule_that_cannot_be_followed_is_refused(name):
    model, _ = build("linear")
    with pytest.raises(InputError, match=r"end must be a step \(int\) ≥ 0 or a fraction"):
        make(name, end=1.5)
    with pytest.raises(InputError, match="beyond the 20 steps of the run"):
        sparing.sparsify_(model, make(name, end=21), steps=STEPS)
    with pytest.raises(InputError, match="needs the length of the run"):
        sparing.sparsify_(model, make(name, end=0.5))
    assert not sparing.sparse_layers(model)


@pytest.mark.filterwarnings("default::sparing.SparsityWarning")
def test_a_budget_that_leaves_a_layer_empty_warns():
    method = METHODS["gmp"](budget=Budget({"weight": 0.99}))
    with pytest.warns(sparing.SparsityWarning, match=r"no weight in 1 of 1 layers \('weight': sparsity 0.99 of 16"):
        sparing.sparsify_(torch.nn.Linear(4, 4), method, steps=100)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in SETTINGS),
        *((name, {"pattern": Block(4)}) for name in ("str_sparsity", "str_feather", "st3")),
    ],
)
def test_a_weight_that_is_nan_is_not_pruned(name, options):
    """As in a dense model the loss is NaN too, so that nobody trains on a layer of zeros."""
    run = Run("linear", make(name, **options)).train(3)
    for layer in run.sparsifier.layers.values():
        layer.weight.data.fill_(float("nan"))
    x, _ = batch(run.shape, 3)
    assert run.model(x).isnan().all()
    with torch.no_grad():
        assert run.model.eval()(x).isnan().all()
