"""Budgets: by rule and as published, against the papers' totals on ResNet-50 and cases done by hand."""

import pytest
import torch
from torch import nn

import sparing
from sparing import NM, Block, Budget, Filters, InputError, Unstructured
from sparing.allocation import Allocation, magnitude, random_score
from sparing.budget import check_target

POOL = 100_352  # MACs that the papers' tables count for the last pooling


@pytest.fixture(scope="module")
def resnet():
    with torch.device("meta"):
        return sparing.models.resnet50()


@pytest.fixture(scope="module")
def cost(resnet):
    """Return a function that counts the weights and MACs that a budget leaves of ResNet-50, in millions."""
    layers = sparing.layers.find_layers(resnet)
    applications = sparing.count_applications(resnet, (1, 3, 224, 224))

    def count(budget):
        assert list(budget) == list(layers)
        kept = {name: layer.weight.numel() * (1 - budget[name]) for name, layer in layers.items()}
        return sum(kept.values()) / 1e6, sum(applications[name] * weights for name, weights in kept.items()) / 1e6

    return count


@pytest.mark.parametrize(
    ("sparsity", "macs", "digits", "dense"),
    [
        (0.80, 1692, 0, 8),
        (0.90, 989, 0, 1),
        (0.95, 498, 0, 0),
        (0.965, 348, 0, 0),
        (0.98, 199, 0, 0),
        (0.99, 99.52, 2, 0),
    ],
)
def test_erk_on_resnet50_has_the_macs_of_its_reference(resnet, cost, sparsity, macs, digits, dense):
    budget = Budget.erk(resnet, sparsity)
    weights, multiplications = cost(budget)
    assert round(multiplications, digits) == macs
    assert sum(value == 0 for value in budget.values()) == dense
    # What is kept is rounded up in each of the 54 layers.
    assert 0 <= weights - 25.502912 * (1 - sparsity) < 54e-6


@pytest.mark.parametrize(
    ("sparsity", "macs"), [(0.80, 912), (0.90, 515), (0.95, 317), (0.965, 257), (0.98, 197), (0.99, 158)]
)
def test_uniform_on_resnet50_with_a_dense_first_layer(resnet, cost, sparsity, macs):
    budget = Budget.uniform(resnet, sparsity, dense=["conv1"])
    assert round(cost(budget)[1]) == macs
    assert budget["conv1"] == 0
    assert set(budget.values()) == {0, sparsity}


def test_erk_at_90_percent_layer_by_layer(resnet):
    budget = Budget.erk(resnet, 0.9)
    percent = {name: round(100 * value, 1) for name, value in budget.items()}
    assert percent["conv1"] == 58.0
    assert percent["layer1.0.conv1"] == 0.0
    assert [percent[f"layer1.{block}.conv2"] for block in range(3)] == [82.3] * 3
    assert percent["layer1.0.conv3"] == 4.1
    assert percent["layer2.0.conv1"] == 42.5
    assert percent["layer2.1.conv2"] == 91.3
    assert percent["fc"] == 92.7


PUBLISHED = {
    "79.55": (5.216, 766.6), "81.27": (4.776, 705.4), "87.70": (3.136, 401.7), "90.23": (2.492, 342.7),
    "90.55": (2.409, 341.5), "94.80": (1.327, 181.7), "95.03": (1.269, 158.7), "95.15": (1.238, 162.3),
    "96.11": (0.992, 127.0), "96.53": (0.884, 117.2), "97.78": (0.565, 80.2), "98.05": (0.498, 72.9),
    "98.22": (0.454, 68.3), "98.79": (0.308, 53.7), "98.98": (0.260, 47.4), "99.10": (0.230, 43.8),
}  # fmt: skip
AT_90 = {
    "str": (90.23, 2.492, 342.6), "uniform": (90.00, 2.550, 408.9), "erk": (90.07, 2.532, 990.5),
    "snfs": (90.06, 2.536, 1625.9), "vd": (90.27, 2.483, 792.8), "gs": (89.54, 2.667, 596.3),
}  # fmt: skip


@pytest.mark.parametrize("total", PUBLISHED)
def test_the_budgets_that_str_learned_have_their_published_totals(cost, total):
    weights, macs = cost(Budget.published(f"resnet50-str-{total}"))
    assert round(weights, 3) == PUBLISHED[total][0]
    assert macs + POOL / 1e6 == pytest.approx(PUBLISHED[total][1], abs=0.1)
    # Named by their total, in percent.
    assert round(100 * (1 - weights / 25.502912), 2) == pytest.approx(float(total), abs=0.011)


@pytest.mark.parametrize("rule", AT_90)
def test_the_six_ways_to_spend_90_percent_have_their_published_totals(cost, rule):
    weights, macs = cost(Budget.published(f"resnet50-{rule}-90"))
    sparsity, millions, multiplications = AT_90[rule]
    assert round(100 * (1 - weights / 25.502912), 2) == sparsity
    assert round(weights, 3) == millions
    assert round(macs, 1) == multiplications


def test_these_are_all_that_is_published():
    expected = {f"resnet50-str-{total}" for total in PUBLISHED} | {f"resnet50-{rule}-90" for rule in AT_90}
    assert set(Budget.published_names()) == expected


def test_erk_by_hand():
    """The raws are 0.2, 0.075 and 1, the kept 100 − 90 = 10, 800 − 720 = 80 and 4 − ⌊3.6⌋ = 1.

    With all three sparse Σ raw · N is 20 + 60 + 4, so ε = 91 / 84 would make c denser than 1. With c
    dense, ε = (10 + 80 − 3) / 80 = 1.0875, and the kept are 21.75, 65.25 and 4: 91 again.
    """
    shapes = {"a": (10, 10), "b": (40, 20), "c": (2, 2)}
    budget = Budget.from_sizes(shapes, "erk", 0.9)
    assert dict(budget) == pytest.approx({"a": 1 - 21.75 / 100, "b": 1 - 65.25 / 800, "c": 0.0}, abs=1e-12)


def test_erk_makes_up_for_layers_that_are_to_be_dense():
    """a dense keeps 16, so b has 8 + 8 − 8 of 16 left to keep."""
    shapes = {"a": (4, 4), "b": (4, 4)}
    assert Budget.from_sizes(shapes, "erk", 0.5, dense=["a"]) == {"a": 0.0, "b": 1.0}
    assert Budget.from_sizes(shapes, "erk", 0.25, dense=["a"]) == {"a": 0.0, "b": 0.5}


def test_erk_leaves_out_layers_without_weights():
    assert Budget.from_sizes({"a": (4, 4), "none": (0, 4)}, "erk", 0.5) == {"a": 0.5, "none": 0.0}


def test_uniform_by_model_and_by_sizes():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    assert Budget.uniform(model, 0.75) == {"0": 0.75, "4": 0.75}
    assert Budget.uniform(model, 0.75, dense=["4"]) == {"0": 0.75, "4": 0.0}
    assert Budget.from_sizes({"0": (8, 3, 3, 3), "4": (2, 8)}, "uniform", 0.75) == Budget.uniform(model, 0.75)


@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_budgets_are_saved_and_loaded_exactly(tmp_path, suffix):
    budget = Budget({"conv1": 1 / 3, "layer, odd": 0.9, "fc": 0.0})
    budget.save(tmp_path / f"budget{suffix}")
    loaded = Budget.load(tmp_path / f"budget{suffix}")
    assert loaded == budget
    assert hash(loaded) == hash(budget)


def test_a_budget_is_read_off_a_model():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.fill_(1.0)[:3] = 0.0
        model[1].weight.fill_(1.0)
    assert Budget.from_model(model) == {"0": 0.75, "1": 0.0}


SHAPES = {"conv1": (8, 3, 3, 3), "fc": (10, 8)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Budget({"fc": 1.5}), r"the sparsity of layer 'fc' must be in \[0, 1\], got 1.5"),
        (lambda: Budget([0.5]), r"not a table of layer and sparsity, but \[0.5\]"),
        (lambda: Budget.published(90), "none is published as 90; choose from"),
        (lambda: Budget({0: 0.5}), "the name of a layer must be a str, got 0"),
        (lambda: Budget({"fc": True}), r"the sparsity of layer 'fc' must be in \[0, 1\], got True"),
        (lambda: Budget({"fc": float("nan")}), r"the sparsity of layer 'fc' must be in \[0, 1\], got nan"),
        (lambda: Budget.published("resnet50-str-90.32"), "none is published as 'resnet50-str-90.32'; did you mean "),
        (lambda: Budget.published("resnet50-rk-90"), "did you mean 'resnet50-erk-90'?"),
        (lambda: Budget.from_sizes(SHAPES, "erc", 0.5), "unknown rule 'erc'; did you mean 'erk'?"),
        (lambda: Budget.from_sizes(SHAPES, "erk", 1.0), r"sparsity must be in \[0, 1\), got 1.0"),
        (lambda: Budget.from_sizes(SHAPES, "uniform", -0.1), r"sparsity must be in \[0, 1\), got -0.1"),
        (lambda: Budget.from_sizes(SHAPES, "erk", "half"), r"sparsity must be in \[0, 1\), got 'half'"),
        (lambda: Budget.from_sizes(SHAPES, "erk", True), r"sparsity must be in \[0, 1\), got True"),
        (lambda: Budget.from_sizes(SHAPES, "erk", 0.5, dense=["conv"]), "dense names no layer 'conv'; .* 'conv1'?"),
        (lambda: Budget.from_sizes(SHAPES, "erk", 0.9, dense=["conv1"]), "with conv1 dense, sparsity 0.9 cannot be"),
        (lambda: Budget.from_sizes(SHAPES, "erk", 0.1, dense=list(SHAPES)), "with conv1, fc dense, sparsity 0.1 can"),
        (lambda: Budget.load("budget.yaml"), "the suffix must be .json or .csv"),
        (lambda: Budget.load("nowhere/budget.json"), "cannot be read: No such file"),
    ],
)
def test_bad_budgets_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", "[1, 2]"),
        ("a.json", "{"),
        ("a.csv", "name,share\nfc,0.5\n"),
        ("a.csv", "layer,sparsity\nfc,much\n"),
        ("a.csv", ""),
        ("a.csv", "layer,sparsity,sparsity\nfc,0.5,0.9\n"),
    ],
)
def test_files_that_hold_no_budget_are_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=f"{name}: not a table of layer and sparsity"):
        Budget.load(tmp_path / name)


@pytest.mark.parametrize(
    ("sparsity", "budget"),
    [(0.9, "uniform"), (0.0, "uniform"), (0.5, "erk"), (0.5, "global"), (None, Budget({"fc": 0.5})), (None, "a.csv")],
)
def test_a_complete_target_passes(sparsity, budget):
    check_target("GMP", sparsity, budget)


@pytest.mark.parametrize(
    ("sparsity", "budget", "message"),
    [
        (None, "uniform", r"GMP: give sparsity=, a fraction in \[0, 1\), or a Budget as budget="),
        (None, "global", r"GMP: give sparsity=, a fraction in \[0, 1\), or a Budget as budget="),
        (0.5, Budget({"fc": 0.5}), "GMP: give sparsity= or a budget= with sparsities of its own, not both"),
        (0.5, "budget.json", "GMP: give sparsity= or a budget= with sparsities of its own, not both"),
        (1.0, "uniform", r"GMP: sparsity must be a fraction in \[0, 1\), got 1.0"),
        (90, "erk", r"GMP: sparsity must be a fraction in \[0, 1\), got 90"),
        (False, "uniform", r"GMP: sparsity must be a fraction in \[0, 1\), got False"),
        (float("nan"), "uniform", r"GMP: sparsity must be a fraction in \[0, 1\), got nan"),
        (
            0.5,
            {"fc": 0.5},
            "GMP: budget must be 'uniform', 'erk', 'global', a Budget, a file or a published name, got {",
        ),
        (0.5, None, "GMP: budget must be .* got None"),
    ],
)
def test_an_incomplete_or_contradictory_target_is_refused(sparsity, budget, message):
    with pytest.raises(InputError, match=message):
        check_target("GMP", sparsity, budget)


@pytest.fixture
def layers():
    return sparing.layers.find_layers(nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 4)))


def resolve(layers, sparsity, budget, pattern=None):
    return Allocation.resolve(layers, pattern or Unstructured(), sparsity, budget)


def test_numbers_of_weights_to_keep_by_hand(layers, tmp_path):
    assert resolve(layers, 0.9, "uniform").kept == {"0": 10, "2": 4}
    assert resolve(layers, 0.9, "global").kept == 14
    assert resolve(layers, None, Budget({"2": 0.5, "0": 0.27})).kept == {"0": 73, "2": 20}
    Budget({"0": 0.0, "2": 0.975}).save(tmp_path / "budget.csv")
    assert resolve(layers, None, str(tmp_path / "budget.csv")).kept == {"0": 100, "2": 1}
    # ERK: ε = (100 − 50 + 40 − 20) / (20 + 14); the first layer keeps 20 ε, the second 14 ε.
    assert resolve(layers, 0.5, "erk").kept == {"0": 41, "2": 29}


def test_numbers_of_groups_to_keep_by_hand(layers):
    # 50 and 20 blocks of two weights; 10 and 4 filters of ten weights.
    blocks = resolve(layers, 0.9, "uniform", Block(2))
    assert (blocks.kept, blocks.goal) == ({"0": 5, "2": 2}, 14)
    assert resolve(layers, 0.9, "global", Block(2)).kept == 14
    filters = resolve(layers, 0.75, "uniform", Filters())
    assert (filters.kept, filters.goal) == ({"0": 2, "2": 1}, 30)
    assert resolve(layers, 0.75, "global", Filters()).kept == 40  # 4 of 14 filters
    # The sparsity of N:M is that of the pattern, in every layer.
    fifths = resolve(layers, None, "global", NM(2, 5))
    assert (fifths.kept, fifths.goal) == ({"0": 40, "2": 16}, 56)


@pytest.mark.parametrize(
    ("budget", "pattern"),
    [
        ("uniform", Unstructured()),
        ("erk", Block(2)),
        ("global", Unstructured()),
        ("global", Filters()),
        ("uniform", NM(2, 5)),
    ],
)
def test_masks_keep_the_largest_and_fewer_of_them_on_the_way_to_the_target(layers, budget, pattern):
    sparsity = None if isinstance(pattern, NM) else 0.7
    allocation = resolve(layers, sparsity, budget, pattern)
    before = dict.fromkeys(layers, torch.tensor(True))
    for progress in (0.0, 0.3, 0.30001, 0.9, 1.0):
        masks = allocation.masks(magnitude, progress)
        for name, layer in layers.items():
            mask, norm = masks[name], allocation.units[name].norm(layer.weight)
            assert (mask.shape, mask.dtype) == (layer.weight.shape, torch.bool)
            mask.logical_not_().logical_not_()  # would fail if elements of an expanded mask shared memory
            assert not (mask & ~before[name]).any()
            if budget != "global" and not isinstance(pattern, NM) and 0 < int(mask.sum()) < mask.numel():
                size = allocation.units[name].expand(norm)
                assert size[mask].min() > size[~mask].max()
        before = masks
    assert sum(int(mask.sum()) for mask in masks.values()) == allocation.goal


@pytest.mark.parametrize("pattern", [Unstructured(), Block(2), Filters()])
@pytest.mark.parametrize("budget", ["uniform", "global"])
def test_thresholds_separate_what_the_masks_keep(budget, pattern):
    layers = sparing.layers.find_layers(nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 16)))
    allocation = resolve(layers, 0.7, budget, pattern)
    for progress in (0.5, 1.0):
        masks, thresholds = allocation.masks(magnitude, progress), allocation.thresholds(magnitude, progress)
        for name, layer in layers.items():
            units = allocation.units[name]
            assert torch.equal(units.expand(units.norm(layer.weight) > thresholds[name]), masks[name])
        if budget == "global":
            assert thresholds["0"] == thresholds["2"]


def test_groups_of_different_sizes_are_kept_in_the_order_of_their_norm_as_many_as_fit():
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(5, 2, bias=False))
    for module, norms in zip(model, ([5.0, 1.0, 3.0], [4.0, 2.0]), strict=True):
        module.weight.data = torch.tensor(norms)[:, None].expand_as(module.weight).clone()
    layers = sparing.layers.find_layers(model)
    # 16 weights, of which round(16 · 0.4) = 6 are pruned: 2 of norm 5, 5 of norm 4, 2 of norm 3, and no 5 of norm 2.
    masks = resolve(layers, 0.4, "global", Filters()).masks(magnitude)
    assert [mask[:, 0].tolist() for mask in masks.values()] == [[True, False, True], [True, False]]


def test_random_scores_follow_the_seed_and_differ_between_layers():
    layers = sparing.layers.find_layers(nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10)))
    kept = [resolve(layers, 0.5, "uniform").masks(random_score(layers, seed)) for seed in (0, 0, 1)]
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in layers)
    assert not torch.equal(kept[0]["0"], kept[2]["0"])
    assert not torch.equal(kept[0]["0"], kept[0]["1"])


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            Budget({"0": 0.5, "2": 0.5, "20": 0.5}),
            "the budget names layer '20', which is not sparsified; did you mean '2'?",
        ),
        (Budget({"2": 0.5}), "the budget misses 1 of 2 layers, '0' first; add them, or leave them out with select="),
        ("resnet50-str-90.23", "the budget names layer 'conv1', which is not sparsified; choose from 0, 2"),
        ("resnet50", "none is published as 'resnet50'; "),
        ("nowhere.json", "budget nowhere.json: cannot be read"),
    ],
)
def test_a_budget_that_does_not_fit_the_layers_is_refused(layers, budget, message):
    with pytest.raises(InputError, match=message):
        resolve(layers, None, budget)
    with pytest.raises(InputError, match=r"NM\(n=2, m=5\) fixes the sparsity of every layer at 0.6: leave budget out"):
        resolve(layers, None, budget, NM(2, 5))


def test_a_budget_that_empties_layers_warns(layers):
    with pytest.warns(
        sparing.SparsityWarning, match=r"no weight in 2 of 2 layers \('0': sparsity 0.999 of 100 weights or groups\)"
    ):
        assert resolve(layers, 0.999, "uniform").kept == {"0": 0, "2": 0}


def test_a_budget_that_keeps_a_weight_in_each_layer_warns_if_those_are_too_many():
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    message = r"'erk' at sparsity 0.9999 keeps 2 of 576 weights, which is a sparsity of 0.9965"
    with pytest.warns(sparing.SparsityWarning, match=message):
        sparing.sparsify_(model, sparing.RigL(sparsity=0.9999), steps=10)
