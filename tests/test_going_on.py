"""Going on: from a sparse model, from a checkpoint of another target, from dense weights, and with other layers."""

import copy
import gc
import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from harness import SETTINGS, build, make, method_class
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import sparing
from sparing import (
    ACDC,
    DNW,
    GMP,
    NM,
    SNIP,
    ST3,
    STR,
    Block,
    Budget,
    Feather,
    FixedMask,
    InputError,
    RigL,
    SparsityWarning,
    Spartan,
    ST3Sigma,
    STRFeather,
)
from sparing.goal import nonzero_masks
from sparing.hooks import _watching
from sparing.masks import count_kept

STEPS = 40


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 48), nn.Tanh(), nn.Linear(48, 24), nn.Tanh(), nn.Linear(24, 8))


def pruned(sparsity=0.8, budget="global", model=None):
    """Return a plain model with zeros in its weights."""
    model = mlp() if model is None else model
    sparing.sparsify_(model, GMP(sparsity=sparsity, budget=budget, begin=0, end=0))
    return sparing.densify_(model)


def train(model, steps, *sparsifiers, each=lambda: None, optimizer=None):
    if optimizer is None:
        optimizer = torch.optim.SGD(sparing.param_groups(model, weight_decay=1e-4), lr=0.05, momentum=0.9)
        for sparsifier in sparsifiers:
            sparsifier.attach(optimizer)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 16, generator=generator), torch.randint(0, 6, (16,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        each()
    return optimizer


def zeros(model):
    total = sparing.report(model).total
    return total.weights - total.nonzero


def weights_of(model):
    return {name: layer.weight for name, layer in sparing.layers.find_layers(model).items()}


# A sparse model is pruned further

RAMPS = {
    "gmp": GMP(sparsity=0.95, every=3),
    "gmp_erk": GMP(sparsity=0.95, budget="erk", every=3),
    "gmp_global": GMP(sparsity=0.95, budget="global", begin=0, every=1),
    "gmp_one_shot": GMP(sparsity=0.95, begin=20, end=20),
    "gmp_at_once": GMP(sparsity=0.95, begin=0, end=0),
    "gmp_block": GMP(sparsity=0.95, pattern=Block(4), every=3),
    "st3": ST3(sparsity=0.95),
    "st3_sigma": ST3Sigma(sparsity=0.95, begin=0.3),
    "feather": Feather(sparsity=0.95),
    "spartan": Spartan(sparsity=0.95, every=3),
    "spartan_begin": Spartan(sparsity=0.95, begin=0, every=3),
    "str": STR(sparsity=0.95, every=3),
    "str_macs": STR(macs=0.06, input_size=(1, 16), every=3),
    "str_feather": STRFeather(sparsity=0.95, every=3),
}


@pytest.mark.filterwarnings("ignore:.*every weight of")
@pytest.mark.parametrize("budget", ["global", "uniform"])
@pytest.mark.parametrize("name", RAMPS)
def test_a_sparse_model_is_never_less_sparse_on_its_way_to_a_higher_target(name, budget):
    model = pruned(0.8, budget)
    before = zeros(model)
    sparsifier = sparing.sparsify_(model, RAMPS[name], steps=STEPS)
    seen = [zeros(model)]
    train(model, STEPS, sparsifier, each=lambda: seen.append(zeros(model)))
    assert min(seen) >= before
    assert sparing.report(model).missed == ()
    if name != "gmp_at_once":
        assert seen[0] < seen[STEPS // 2 + 1] <= seen[-1] or name == "gmp_one_shot"
        assert 0.7 < sparsifier.clock.start < 0.9 or name == "gmp_block"


@pytest.mark.filterwarnings("ignore:.*every weight of")
def test_the_ramp_starts_at_the_share_of_the_way_that_the_zeros_are_and_ends_exact():
    model = pruned(0.8)
    total = sparing.report(model).total.weights
    sparsifier = sparing.sparsify_(model, GMP(sparsity=0.95, budget="global", begin=10, end=30, every=10), steps=STEPS)
    kept = count_kept(total, 0.8), count_kept(total, 0.95)
    assert sparsifier.clock.start == pytest.approx((total - kept[0]) / (total - kept[1]))
    seen = []
    train(model, STEPS, sparsifier, each=lambda: seen.append(total - zeros(model)))
    halfway = kept[1] + (kept[0] - kept[1]) / 8
    assert [seen[0], seen[9], seen[-1]] == [kept[0], kept[0], kept[1]]
    assert seen[19] == pytest.approx(halfway, abs=1)


@pytest.mark.filterwarnings("ignore:.*every weight of")
@pytest.mark.parametrize("name", ["gmp", "spartan", "feather", "str_feather"])
def test_a_run_that_went_on_from_zeros_resumes_to_the_last_bit(name):
    straight, resumed = pruned(), mlp()
    first = sparing.sparsify_(straight, RAMPS[name], steps=STEPS)
    optimizer = train(straight, STEPS // 2, first)
    second = sparing.sparsify_(resumed, RAMPS[name], steps=STEPS)
    resumed.load_state_dict(straight.state_dict())
    other = torch.optim.SGD(sparing.param_groups(resumed, weight_decay=1e-4), lr=0.05, momentum=0.9)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    second.attach(other)
    assert second.clock.start == first.clock.start > 0
    for model, its in ((straight, optimizer), (resumed, other)):
        train(model, STEPS // 2, optimizer=its)
    assert all(torch.equal(value, straight.state_dict()[key]) for key, value in resumed.state_dict().items())


INITIALIZATIONS = {
    "zero": nn.init.zeros_,
    "identity": nn.init.eye_,
    "bfloat16": lambda w: w.copy_(torch.empty_like(w).uniform_(-0.1, 0.1).bfloat16()).masked_fill_(
        torch.rand_like(w) < 1 / 256, 0
    ),
    "few": lambda w: w[0, :20].zero_(),
}


@pytest.mark.filterwarnings("ignore:step 0. every weight of '2'")
@pytest.mark.parametrize("name", ["gmp", "spartan", "feather", "str_feather", "str"])
@pytest.mark.parametrize("kind", INITIALIZATIONS)
def test_zeros_of_an_initialization_are_trained(kind, name):
    model = mlp()
    with torch.no_grad():
        INITIALIZATIONS[kind](model[2].weight)
    sparsifier = sparing.sparsify_(model, RAMPS[name], steps=STEPS)
    assert sparsifier.clock.start == 0
    part = sparsifier.layers["2"].parametrization
    assert not hasattr(part, "mask") or part.mask.all()
    train(model, 8, sparsifier)
    if kind != "few" and name != "str":  # which gives a weight of zero no gradient
        assert (sparsifier.layers["2"].weight != 0).float().mean() > 0.7


def test_a_new_zero_head_of_a_sparse_model_is_trained_and_one_weight_that_is_left_counts_as_pruned():
    model = pruned()
    model[4] = nn.Linear(24, 8)
    nn.init.zeros_(model[4].weight)
    with torch.no_grad():
        model[2].weight.zero_()[3, 5] = 0.7
    masks = nonzero_masks(weights_of(model))
    assert list(masks) == ["0", "2"]
    assert masks["2"].sum() == 1
    with pytest.warns(SparsityWarning, match="every weight of '4'"):
        sparsifier = sparing.sparsify_(model, GMP(sparsity=0.95, every=5), steps=STEPS)
    head = sparsifier.layers["4"]
    assert head.parametrization.mask.all()
    train(model, STEPS, sparsifier)
    assert head.nonzero() == count_kept(8 * 24, 0.95)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_dense_model_starts_its_ramp_at_zero(name):
    model, _ = build("conv2d")
    if name == "fixed_mask":
        return
    sparsifier = sparing.sparsify_(model, make(name), steps=20)
    assert sparsifier.clock.start == 0


@pytest.mark.parametrize("name", sorted(RAMPS.keys() - {"gmp_block"}))
def test_a_model_that_is_sparser_than_the_target_is_refused_with_both_numbers(name):
    model = pruned(0.97, "uniform")
    keys = model.state_dict().keys()
    target = "93.99%" if name == "str_macs" else "94.9[0-9]%: give a higher target, or keep these zeros with"
    with pytest.raises(InputError, match=f"sparsity of 96.97% already, above the target of {target}"):
        sparing.sparsify_(model, RAMPS[name], steps=STEPS)
    assert model.state_dict().keys() == keys


@pytest.mark.parametrize("method", [RigL(sparsity=0.5), DNW(sparsity=0.5), SNIP(sparsity=0.5), ACDC(sparsity=0.5)])
def test_a_method_without_a_ramp_takes_a_sparser_model(method):
    sparsifier = sparing.sparsify_(pruned(), method, steps=STEPS)
    assert sparsifier.clock.start == 0


def test_a_model_at_its_target_within_the_rounding_of_budgets_keeps_its_zeros():
    model = pruned(0.8, "erk")
    before = zeros(model)
    sparsifier = sparing.sparsify_(model, GMP(sparsity=0.795, begin=0, every=1), steps=STEPS)
    assert sparsifier.clock.start == 1
    seen = []
    train(model, STEPS, sparsifier, each=lambda: seen.append(zeros(model)))
    assert min(seen) >= before


def test_n_of_m_keeps_the_zeros_of_a_sparser_model():
    model = pruned(0.8)
    before = zeros(model)
    sparsifier = sparing.sparsify_(model, GMP(pattern=NM(2, 4), begin=0, end=10, every=2), steps=STEPS)
    train(model, STEPS, sparsifier)
    assert zeros(model) >= before
    for layer in sparsifier.layers.values():
        assert (layer.effective_weight != 0).reshape(len(layer.weight), -1, 4).sum(2).max() <= 2


def test_zeros_within_groups_that_are_trained_again_are_counted_in_a_warning():
    model = pruned(0.5)
    with pytest.warns(
        SparsityWarning, match=r"STR: [0-9,]+ of the zeros are in groups .* as Block\(n=4\) prunes whole"
    ):
        sparing.sparsify_(model, STR(sparsity=0.9, pattern=Block(4)), steps=STEPS)


# A checkpoint of another target

TARGETED = [name for name in SETTINGS if "sparsity" in method_class(name).__dataclass_fields__ and name != "str"]


@pytest.mark.parametrize("name", TARGETED)
def test_a_checkpoint_of_another_target_is_refused_with_both_numbers_and_changes_no_target(name):
    models = []
    for sparsity in (0.5, 0.75):
        model, _ = build("linear")
        models.append((model, sparing.sparsify_(model, make(name, sparsity=sparsity), steps=20)))
    (theirs, _), (ours, sparsifier) = models
    with pytest.raises(InputError, match=r"sparsity=0.5, this run has sparsity=0.75.*retarget\(\)"):
        ours.load_state_dict(theirs.state_dict())
    assert sparsifier.clock.method["sparsity"] == 0.75
    if type(sparsifier.method).retargets:
        return
    with pytest.raises(InputError, match=r"cannot change its sparsity during training: call densify_\(\), then"):
        sparsifier.retarget(make(name, sparsity=0.9), steps=20)


@pytest.mark.parametrize("name", ["gmp", "gmp_global", "st3", "st3_sigma", "feather", "str", "str_feather"])
def test_retarget_from_a_checkpoint_is_never_less_sparse_than_the_checkpoint(name):
    method = RAMPS[name]
    first = type(method)(**{**vars(method), "sparsity": 0.8})
    trained, model = mlp(), mlp()
    train(trained, STEPS, sparing.sparsify_(trained, first, steps=STEPS))
    sparsifier = sparing.sparsify_(model, first, steps=STEPS)
    model.load_state_dict(trained.state_dict())
    before = zeros(model)
    sparsifier.retarget(method, steps=STEPS)
    seen = []
    train(model, STEPS, sparsifier, each=lambda: seen.append(zeros(model)))
    slack = 0.03 * before if name == "str" else 0  # its thresholds learn between two updates
    assert min(seen) >= before - slack
    assert sparing.report(model).missed == ()


# Zeros that stay


def test_a_fixed_mask_keeps_the_zeros_of_every_layer_and_trains_the_other_weights():
    model = pruned(budget="uniform")
    before = copy.deepcopy(model)
    sparsifier = sparing.sparsify_(model, FixedMask())
    train(model, STEPS, sparsifier)
    sparing.densify_(model)
    for name, weight in weights_of(model).items():
        old = weights_of(before)[name]
        assert torch.equal(weight == 0, old == 0)
        assert ((weight != old) | (old == 0)).float().mean() > 0.9


def test_a_fixed_mask_of_a_dense_model_warns_at_its_first_step_and_not_when_it_is_resumed():
    model = pruned()
    sparsifier = sparing.sparsify_(model, FixedMask())
    train(model, 2, sparsifier)
    fresh = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = sparing.sparsify_(fresh, FixedMask())
        fresh.load_state_dict(model.state_dict())
        train(fresh, 1, again)
    assert zeros(fresh) == zeros(model)
    dense = mlp()
    with pytest.warns(SparsityWarning, match="FixedMask: no weight was zero when the model was sparsified"):
        train(dense, 1, sparing.sparsify_(dense, FixedMask()))


# Updates that are merged


@pytest.mark.parametrize("method", [None, STR(init=-2.5), GMP(sparsity=0.5, begin=0, end=0), Feather(sparsity=0.5)])
def test_an_update_is_merged_where_the_effective_weight_is_not_zero(method):
    model = pruned(0.5)
    if method is not None:
        train(model, 20, sparing.sparsify_(model, method, steps=20))
    zero = (model[0].weight == 0).clone()
    assert 0 < zero.sum() < zero.numel()
    layer = sparing.layers.find_layers(model)["0"]
    dense = layer.weight.detach().clone()
    delta = 1e-3 * torch.randn(48, 2) @ torch.randn(2, 16)
    dropped = sparing.merge_(model[0], delta)
    assert torch.equal(layer.weight, dense + torch.where(zero, 0.0, delta))
    assert (model[0].weight[zero] == 0).all()
    assert dropped == pytest.approx(float(delta[zero].norm() / delta.norm()))


def test_a_merge_takes_other_dtypes_other_names_and_a_copy_keeps_its_masks():
    model = pruned(0.5).bfloat16()
    assert sparing.merge_(model[0], torch.zeros(48, 16, dtype=torch.float64)) == 0
    cell = nn.LSTMCell(4, 4)
    old = cell.weight_hh.detach().clone()
    assert sparing.merge_(cell, torch.ones(16, 4), "weight_hh") == 0
    assert torch.equal(cell.weight_hh, old + 1)
    model = mlp()
    sparsifier = sparing.sparsify_(model, GMP(sparsity=0.5, begin=0, end=2, every=1), steps=4)
    replica = copy.deepcopy(model)
    train(model, 3, sparsifier)
    assert sparing.merge_(replica[0], torch.ones(48, 16)) == 0
    assert sparing.report(replica).total.nonzero == sparing.report(replica).total.weights


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (None, [torch.ones(16, 48)], r"delta has shape \(16, 48\), the weight \(48, 16\)"),
        (None, [torch.ones(48, 16, dtype=torch.int8)], "must be floating point, got torch.float32 and torch.int8"),
        (None, [3.0], "must be floating point, got torch.float32 and 3.0"),
        (None, [torch.full((48, 16), torch.nan)], "delta holds 768 values that are NaN or infinite, of 768"),
        (None, [torch.ones(48, 16), "kernel"], "'kernel' of Linear is no parameter of its own"),
        (nn.utils.parametrizations.weight_norm, [torch.ones(48, 16)], "'weight' of .*Linear is no parameter"),
        (nn.Linear.half, [torch.ones(48, 16).long()], "must be floating point, got torch.float16 and torch.int64"),
    ],
)
def test_an_update_that_does_not_fit_is_refused(change, arguments, message):
    module = nn.Linear(16, 48)
    if change is not None:
        change(module)
    with pytest.raises(InputError, match=message):
        sparing.merge_(module, *arguments)


# Dense checkpoints


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.norm = nn.BatchNorm1d(8)
        self.decoder = nn.Linear(8, 20, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens):
        return self.decoder(self.norm(self.embedding(tokens)))


def on_meta(method):
    with torch.device("meta"):
        model, _ = build("conv2d")
        sparing.sparsify_(model, method, steps=20)
    return model.to_empty(device="cpu")


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_dense_checkpoint_that_is_loaded_before_the_first_step_gives_the_same_run_as_before_sparsify(name, meta):
    pretrained, _ = build("conv2d", seed=5)
    if name == "fixed_mask":
        pruned(0.5, model=pretrained)
    state = copy.deepcopy(pretrained.state_dict())
    if meta:
        model = on_meta(make(name))
    else:
        model, _ = build("conv2d")
        sparing.sparsify_(model, make(name), steps=20)
    sparing.load_dense_state_dict(model, state)
    sparing.sparsify_(pretrained, make(name), steps=20)
    expected = pretrained.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    # It is the inverse of dense_state_dict.
    sparing.load_dense_state_dict(model, sparing.dense_state_dict(model))
    assert zeros(model) >= zeros(pretrained)


def test_a_sparse_checkpoint_starts_the_ramp_at_its_zeros_and_a_sparser_one_is_refused_and_changes_nothing():
    state = pruned().state_dict()
    model = mlp()
    sparsifier = sparing.sparsify_(model, GMP(sparsity=0.95, every=5), steps=STEPS)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="above the target"):
        sparing.load_dense_state_dict(model, pruned(0.99, "uniform").state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    sparing.load_dense_state_dict(model, state)
    assert sparsifier.clock.start > 0.8
    seen = [zeros(model)]
    train(model, STEPS, sparsifier, each=lambda: seen.append(zeros(model)))
    assert min(seen) == seen[0] >= 0.79 * sparing.report(model).total.weights


def test_after_the_first_step_masks_stay_so_that_weights_can_be_rewound():
    model = mlp()
    initial = copy.deepcopy(model.state_dict())
    sparsifier = sparing.sparsify_(model, GMP(sparsity=0.5, begin=5, end=5), steps=10)
    train(model, 10, sparsifier)
    masks = {name: layer.parametrization.mask.clone() for name, layer in sparsifier.layers.items()}
    sparing.load_dense_state_dict(model, initial)
    for name, layer in sparsifier.layers.items():
        assert torch.equal(layer.effective_weight, initial[f"{name}.weight"] * masks[name])
    assert sparsifier.step == 10


def test_a_dense_checkpoint_of_tied_weights_another_dtype_and_without_counters():
    torch.manual_seed(0)
    pretrained, model = Tied(), Tied()
    sparsifier = sparing.sparsify_(model, STR(init=-3.0), select=["embedding"])
    state = {
        key: value.double() if value.is_floating_point() else value for key, value in pretrained.state_dict().items()
    }
    del state["norm.num_batches_tracked"]
    sparing.load_dense_state_dict(model, state)
    assert torch.equal(sparsifier.layers["embedding"].weight, pretrained.embedding.weight)
    assert sparsifier.layers["embedding"].weight.dtype == torch.float32
    assert torch.equal(model.embedding.weight, model.decoder.weight)
    state["decoder.weight"] = state["decoder.weight"] + 1
    with pytest.raises(InputError, match="'embedding.weight' and 'decoder.weight' are one tied weight .* and differ"):
        sparing.load_dense_state_dict(model, state)


def with_(**changes):
    """Return a change of a checkpoint: new values of some keys, None for a key that is missing."""

    def change(state):
        for key, value in changes.items():
            state[key] = value
            if value is None:
                del state[key]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_(**{"0.weight": None}), "missing keys '0.weight'. Give"),
        (with_(fc=torch.ones(1)), "unexpected keys 'fc'. Give"),
        (with_(**{"2.bias": None, "fc": torch.ones(1)}), "missing keys '2.bias'; unexpected keys 'fc'"),
        (with_(**{"4.weight": torch.ones(8, 25)}), r"has shape \(8, 25\) of torch.float32, the model's is \(8, 24\)"),
        (with_(**{"4.bias": torch.ones(9)}), r"'4.bias' has shape \(9,\)"),
        (with_(**{"4.weight": torch.ones(8, 24, dtype=torch.int8)}), "of torch.int8, the model's"),
        (with_(**{"4.weight": [1.0]}), r"'4.weight' must be a tensor, got \[1.0\]"),
        (with_(**{"4.weight": torch.full((8, 24), torch.nan)}), "'4.weight' holds 192 weights that are NaN"),
        (with_(**{"0.parametrizations.weight.original": torch.ones(1)}), r"load it with load_state_dict\(\)"),
    ],
)
def test_a_dense_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    model = mlp()
    sparing.sparsify_(model, DNW(sparsity=0.5))
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    state = nn.Sequential(*(type(m)(m.in_features, m.out_features) if isinstance(m, nn.Linear) else m for m in mlp()))
    state = copy.deepcopy(state.state_dict())
    change(state)
    with pytest.raises(InputError, match=message):
        sparing.load_dense_state_dict(model, state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_dense_checkpoint_is_refused_where_masks_would_be_stale_or_nothing_can_be_loaded():
    state = mlp().state_dict()
    model = mlp()
    sparing.sparsify_(model, DNW(sparsity=0.5))
    with pytest.raises(InputError, match="the masks of dnw were made from other weights, and this copy"):
        sparing.load_dense_state_dict(copy.deepcopy(model), state)
    with pytest.raises(InputError, match="layers '0', '2' were sparsified together"):
        sparing.load_dense_state_dict(model[4], nn.Linear(24, 8).state_dict())
    with pytest.raises(InputError, match="the state dict must be a mapping, got str"):
        sparing.load_dense_state_dict(model, "run.pt")
    with pytest.raises(InputError, match="'0.bias' of the model is on the meta device"):
        sparing.load_dense_state_dict(copy.deepcopy(model).to("meta"), state)
    learned = mlp()
    sparing.sparsify_(learned, STR(init=-3.0))
    replica = copy.deepcopy(learned)
    sparing.load_dense_state_dict(replica, state)
    assert all(
        torch.equal(layer.weight, state[f"{name}.weight"]) for name, layer in sparing.sparse_layers(replica).items()
    )


def test_a_copied_run_makes_its_masks_anew_and_leaves_the_first_as_it_is():
    model = mlp()
    sparsifier = sparing.sparsify_(model, DNW(sparsity=0.5))
    both = copy.deepcopy((model, sparsifier))
    before = copy.deepcopy(model.state_dict())
    other = nn.Sequential(*(copy.deepcopy(module) for module in mlp()))
    with torch.no_grad():
        other[0].weight.copy_(other[0].weight.flip(0))
    sparing.load_dense_state_dict(both[0], other.state_dict())
    fresh = sparing.sparsify_(other, DNW(sparsity=0.5))
    for name, layer in both[1].layers.items():
        assert torch.equal(layer.parametrization.mask, fresh.layers[name].parametrization.mask)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_dense_checkpoint_loads_into_a_model_of_two_runs_and_normalized_layers():
    model, plain = mlp(), mlp()
    for each in (model, plain):
        nn.utils.parametrizations.weight_norm(each[4])
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(parameter.flip(0))
    state = copy.deepcopy(plain.state_dict())
    for each in (model, plain):
        sparing.sparsify_(each, DNW(sparsity=0.5), select=["0", "4"])
        sparing.sparsify_(each, STR(init=-3.0), select=["2"])
    sparing.load_dense_state_dict(model, state)
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in model.state_dict().items())


# Layers that are replaced, removed, added or unfrozen


@pytest.mark.parametrize(
    "method",
    [
        STR(sparsity=0.8, every=1),
        GMP(sparsity=0.8, every=1),
        GMP(sparsity=0.8, budget="global", every=1),
        GMP(budget=Budget({"0": 0.8, "2": 0.8, "4": 0.5}), every=1),
        RigL(sparsity=0.8, budget="uniform", every=5),
    ],
    ids=repr,
)
@pytest.mark.parametrize("kind", [nn.Linear, nn.Identity])
def test_a_layer_that_is_replaced_or_removed_is_named_and_the_others_reach_the_target(method, kind):
    model = mlp()
    sparsifier = sparing.sparsify_(model, method, steps=STEPS)
    model[4] = kind(24, 8)
    with pytest.warns(
        SparsityWarning,
        match=r"no longer in the model.*: 4. The target is now that of the other 2 layers.*select=\['4'\]",
    ):
        optimizer = train(model, 0, sparsifier) or torch.optim.SGD(model.parameters(), lr=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, STEPS, optimizer=optimizer)
    assert list(sparsifier.layers) == ["0", "2"]
    kept = sum(layer.nonzero() for layer in sparsifier.layers.values())
    assert kept <= sparsifier.clock.goal == count_kept(16 * 48, 0.8) + count_kept(48 * 24, 0.8)
    assert sparsifier.clock.goal - kept <= 1
    assert sparing.report(model).missed == ()


@pytest.mark.parametrize("method", [GMP(sparsity=0.8, budget="global"), ACDC(sparsity=0.8), Spartan(sparsity=0.8)])
def test_a_target_missed_because_a_layer_left_after_the_masks_were_made_says_so(method):
    model = mlp()
    sparsifier = sparing.sparsify_(model, method, steps=STEPS)
    optimizer = train(model, STEPS - 1, sparsifier)
    model[2] = nn.Linear(48, 24)
    with pytest.warns(SparsityWarning) as caught:
        train(model, 1, optimizer=optimizer)
    assert "layers left the run after these masks were made" in str(caught[-1].message)


@pytest.mark.parametrize(
    "method",
    [
        RigL(sparsity=0.8, budget="uniform"),
        sparing.DSR(sparsity=0.7),
        sparing.StaticRandom(sparsity=0.9, budget="uniform"),
    ],
    ids=repr,
)
def test_random_masks_choose_among_the_weights_that_are_not_zero(method):
    model = mlp()
    sparing.sparsify_(model, GMP(sparsity=0.8, begin=0, end=0))
    sparing.densify_(model)
    before = {name: module.weight != 0 for name, module in model.named_children() if isinstance(module, nn.Linear)}
    sparsifier = sparing.sparsify_(model, method, steps=10)
    for name, layer in sparsifier.layers.items():
        active = layer.parametrization.mask
        few, many = sorted((active, before[name]), key=lambda mask: int(mask.sum()))
        assert bool((few <= many).all())


def test_a_sparse_layer_beside_large_dense_ones_keeps_its_zeros():
    model = nn.Sequential(nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 4))
    sparing.sparsify_(model, GMP(sparsity=0.9, begin=0, end=0), select=["2"])
    sparing.densify_(model)
    zero = model[2].weight == 0
    sparsifier = sparing.sparsify_(model, GMP(sparsity=0.95, every=1), steps=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sparsifier.attach(optimizer)
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.randn(8, 200)).square().mean().backward()
        optimizer.step()
        assert not model[2].weight[zero].any()


def test_a_new_layer_is_added_as_a_run_of_its_own():
    model = mlp()
    first = sparing.sparsify_(model, STR(sparsity=0.9, every=1), steps=STEPS)
    model[4] = nn.Linear(24, 6)
    second = sparing.sparsify_(model, GMP(sparsity=0.5, every=1), select=["4"], steps=STEPS)
    with pytest.warns(SparsityWarning, match="no longer in the model"):
        optimizer = train(model, 0, first, second)
    train(model, STEPS, optimizer=optimizer)
    assert second.layers["4"].nonzero() == 72
    assert sum(layer.nonzero() for layer in first.layers.values()) == count_kept(16 * 48 + 48 * 24, 0.9)
    assert sparing.report(model).missed == ()


@pytest.mark.parametrize("method", [STR(sparsity=0.9, every=1), GMP(sparsity=0.9, every=1)], ids=lambda m: m.name)
def test_a_layer_that_is_densified_and_sparsified_anew_belongs_to_the_second_run_alone(method):
    model = mlp()
    first = sparing.sparsify_(model, method, steps=STEPS)
    train(model, STEPS // 2, first)
    sparing.densify_(model[4])
    second = sparing.sparsify_(model, GMP(sparsity=0.95, every=1), select=["4"], steps=STEPS)
    train(model, STEPS, second, first)
    assert (list(first.layers), list(second.layers)) == (["0", "2"], ["4"])
    assert second.layers["4"].nonzero() == count_kept(24 * 8, 0.95)
    assert sum(layer.nonzero() for layer in first.layers.values()) <= count_kept(16 * 48 + 48 * 24, 0.9)


@pytest.mark.parametrize("finish", [False, True])
def test_a_layer_that_is_replaced_during_the_run_is_named_at_its_end(finish):
    model = mlp()
    sparsifier = sparing.sparsify_(model, GMP(sparsity=0.9, every=1), steps=10)
    optimizer = train(model, 5, sparsifier)
    model[4] = nn.Linear(24, 8)
    train(model, 4, optimizer=optimizer)
    with pytest.warns(SparsityWarning, match="no longer in the model.*: 4"):
        sparsifier.finish() if finish else train(model, 1, optimizer=optimizer)
    assert sparsifier.step == 10
    assert sparing.report(model).missed == ()


def test_a_run_whose_layers_are_all_gone_says_so_and_does_nothing():
    model = nn.Sequential(nn.Linear(16, 8))
    sparsifier = sparing.sparsify_(model, GMP(sparsity=0.9, every=1), steps=10)
    model[0] = nn.Linear(16, 8)
    with pytest.warns(SparsityWarning, match="that of the other 0 layers"):
        optimizer = train(model, 0, sparsifier)
    train(model, 10, optimizer=optimizer)
    assert sparing.report(model).total.sparsity == 0


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize(
    "method", [STR(sparsity=0.9, every=1), GMP(sparsity=0.9, every=1), RigL(sparsity=0.9, every=2)]
)
def test_a_layer_whose_parametrization_is_removed_is_named_and_the_others_reach_their_target(method, again):
    model = mlp()
    sparsifier = sparing.sparsify_(model, method, steps=20)
    optimizer = train(model, 10, sparsifier)
    parametrize.remove_parametrizations(model[4], "weight")
    with pytest.warns(SparsityWarning, match="parametrizations removed: 4"):
        train(model, 10, sparsifier if again else None, optimizer=None if again else optimizer)
    assert list(sparsifier.layers) == ["0", "2"]
    assert sparing.report(model).missed == ()


def test_finishing_a_run_that_never_began_prunes_nothing_and_says_why():
    model = mlp()
    sparsifier = sparing.sparsify_(model, GMP(sparsity=0.9, every=1), steps=10)
    with pytest.warns(SparsityWarning, match="the method did nothing, because no optimizer step was counted; call"):
        sparsifier.finish()
    assert sparing.report(model).total.sparsity == 0
    assert "no optimizer step was counted" in sparing.report(model).missed[0]


def test_layers_that_are_frozen_during_the_run_are_named_at_its_end():
    model = mlp()
    sparsifier = sparing.sparsify_(model, GMP(sparsity=0.9, every=1), steps=10)
    optimizer = train(model, 5, sparsifier)
    sparsifier.layers["0"].weight.requires_grad_(False)
    with pytest.warns(SparsityWarning, match=r"1 of 3 layers \(0\) are frozen"):
        train(model, 5, optimizer=optimizer)


@pytest.mark.parametrize("method", [GMP(sparsity=0.9, every=1), STR(sparsity=0.9)], ids=lambda method: method.name)
def test_layers_that_are_frozen_for_the_step_of_another_optimizer_are_not_warned_of(method, recwarn):
    """So do GANs, and `toggle_optimizer` of Lightning."""
    model = mlp()
    sparsifier = sparing.sparsify_(model, method, steps=10)
    parts = [model[:2], model[2:]]
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts]
    sparsifier.attach(*optimizers)
    for _ in range(10):
        for part, optimizer in zip(parts, optimizers, strict=True):
            model.requires_grad_(False)
            part.requires_grad_(True)
            model(torch.randn(16, 16)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert sparsifier.step == 10
    assert not [warning for warning in recwarn if "are frozen" in str(warning.message)]


@pytest.mark.parametrize("strict", [True, False])
def test_a_dense_checkpoint_is_refused_by_load_state_dict_with_the_name_of_the_right_call(strict):
    pretrained, model = mlp().state_dict(), mlp()
    sparing.sparsify_(model, STR(init=-8.0))
    with pytest.raises(RuntimeError, match=r"0.weight is of a dense model: .* sparing.load_dense_state_dict"):
        model.load_state_dict(pretrained, strict=strict)


@pytest.mark.parametrize(("ours", "theirs"), [("", "module."), ("", "_orig_mod."), ("0.", "")])
def test_a_checkpoint_under_another_prefix_is_refused_where_torch_would_leave_it_out(ours, theirs):
    saved, model = mlp(), mlp()
    for each in (saved, model):
        sparing.sparsify_(each, GMP(sparsity=0.9), steps=STEPS)
    state = {theirs + key: value for key, value in saved.state_dict().items()}
    wrapped = nn.Sequential(model) if ours else model
    with pytest.raises(RuntimeError, match=f"{ours}0.parametrizations.weight.original is called {theirs}0.param"):
        wrapped.load_state_dict(state, strict=False)
    adapters = {f"{ours}4.adapter": torch.zeros(1), f"{ours}4.bias": torch.zeros(8)}
    assert adapters.keys() >= set(wrapped.load_state_dict(adapters, strict=False).unexpected_keys)


def test_a_layer_wrapped_in_another_module_is_still_in_the_model():
    model = mlp()
    sparsifier = sparing.sparsify_(model, GMP(sparsity=0.9, every=1), steps=10)
    model[4] = nn.Sequential(model[4], nn.Identity())
    train(model, 10, sparsifier)
    assert len(sparsifier.layers) == 3
    assert sparing.report(model).missed == ()


def test_a_layer_that_was_frozen_is_sparsified_once_it_is_not():
    model = mlp()
    model[0].requires_grad_(False)
    with pytest.warns(SparsityWarning, match="frozen and stay dense: 0"):
        first = sparing.sparsify_(model, GMP(sparsity=0.9, every=1), steps=20)
    optimizer = train(model, 10, first)
    model[0].requires_grad_(True)
    second = sparing.sparsify_(model, GMP(sparsity=0.5, every=1), select=["0"], steps=10)
    optimizer.add_param_group({"params": [second.layers["0"].weight]})
    second.attach(optimizer)
    train(model, 10, optimizer=optimizer)
    assert second.layers["0"].nonzero() == 8 * 48
    assert list(first.layers) == ["2", "4"]
    assert sparing.report(model).missed == ()
    assert not parametrize.is_parametrized(sparing.densify_(model)[0])


@pytest.mark.parametrize("method", [sparing.RigL(sparsity=0.5), sparing.SET(sparsity=0.5)], ids=lambda each: each.name)
def test_training_without_attach_is_warned_of_where_no_target_tells(method):
    untrained, model = nn.Linear(8, 8), nn.Linear(8, 8)
    for each in (untrained, model):
        sparing.sparsify_(each, method, steps=10)
    sparing.densify_(untrained)
    model(torch.randn(4, 8)).sum().backward()
    with pytest.warns(SparsityWarning, match=f"{method.name}: the method did nothing, because no optimizer step"):
        sparing.densify_(model)


@pytest.mark.parametrize("method", [RigL(sparsity=0.5), sparing.DST(alpha=0.1), sparing.StaticRandom(sparsity=0.5)])
def test_a_copy_that_is_trained_without_its_sparsifier_is_warned_of_where_the_method_acts(method):
    model = nn.Linear(8, 8)
    sparing.sparsify_(model, method, steps=10)
    sparing.densify_(copy.deepcopy(model))  # not trained: no warning, which would be an error
    alone = copy.deepcopy(model)
    alone(torch.randn(4, 8)).sum().backward()
    with pytest.warns(SparsityWarning, match="trained without a sparsifier") if method.acts else nullcontext():
        sparing.densify_(alone)


def test_an_optimizer_that_is_built_anew_and_not_attached_is_warned_of():
    model = nn.Linear(8, 8)
    sparsifier = sparing.sparsify_(model, sparing.RigL(sparsity=0.5), steps=10)
    sparsifier.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    with pytest.warns(SparsityWarning, match="no optimizer step was counted; attach the optimizer that trains the mod"):
        sparing.densify_(model)


class Wrapper(torch.optim.Optimizer):
    """As those of sharpness-aware minimization: holds the parameters, and an optimizer that steps."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.base_optimizer = optimizer

    def step(self, closure=None):
        return self.base_optimizer.step(closure)


@pytest.mark.parametrize("method", [RigL(sparsity=0.5), GMP(sparsity=0.5)], ids=lambda each: each.name)
@pytest.mark.parametrize("kind", [torch.optim.SGD, partial(torch.optim.AdamW, fused=True), torch.optim.Adafactor])
@pytest.mark.parametrize("attached", [5, 0])
def test_an_optimizer_that_is_not_attached_is_warned_of_while_it_trains(method, kind, attached):
    model = mlp()
    sparsifier = sparing.sparsify_(model, method, steps=40)
    train(model, attached, sparsifier)
    optimizer = kind(model.parameters(), lr=0.001)
    train(model, 9, optimizer=optimizer)
    where = "10 steps of another optimizer followed the last step that was counted, which is step 5 of 40"
    with pytest.warns(SparsityWarning, match=where if attached else "no optimizer step was counted; attach the opt"):
        train(model, 1, optimizer=optimizer)
    train(model, 9, optimizer=optimizer)
    with pytest.warns(SparsityWarning, match="call sparsifier.attach" if attached else "attach the optimizer"):
        sparsifier.finish()


def test_wrappers_and_optimizers_of_other_parts_do_not_count_as_not_attached():
    model, head = mlp(), nn.Linear(8, 8)
    sparsifier = sparing.sparsify_(model, RigL(sparsity=0.5), steps=40)
    wrapper = Wrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    other = torch.optim.SGD([*head.parameters(), model[0].bias], lr=0.1)
    head.weight.grad = torch.zeros(8, 8)
    sparsifier.attach(wrapper)
    train(model, 20, each=other.step, optimizer=wrapper)
    assert sparsifier.step == 20


def test_a_sparsifier_that_is_gone_watches_no_optimizers():
    gc.collect()
    before, model = len(_watching()), mlp()
    sparing.sparsify_(model, RigL(sparsity=0.5), steps=40)
    assert len(_watching()) == before + 1
    del model
    gc.collect()
    assert len(_watching()) == before


@pytest.mark.parametrize(("taken", "warns"), [(920, False), (400, True)])
def test_finishing_a_run_that_ended_early_warns_if_the_weights_could_not_adapt(taken, warns):
    model = nn.Linear(8, 4)
    sparsifier = sparing.sparsify_(model, GMP(sparsity=0.5, begin=0, end=1.0, every=50), steps=1000)
    sparsifier.clock.step = taken
    with pytest.warns(SparsityWarning, match="prunes at once .* in 600 more steps") if warns else nullcontext():
        sparsifier.finish()
    assert sparsifier.sparsity() == 0.5
