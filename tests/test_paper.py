"""The paper's tables: recipes built from them, the training recipe they share, and counts that must agree."""

import csv
import functools
import math
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import sparing
from sparing import Budget
from sparing.data import DATASETS
from sparing.masks import count_kept
from sparing.run.build import build_optimizer
from sparing.run.method_section import build_method
from sparing.run.recipe import load_recipe
from sparing.run.resolve import with_settings
from sparing.schedules import warmup_cosine

FOLDER = Path(__file__).parent.parent / "recipes" / "imagenet"
SOURCE = FOLDER / "generate.py"
POOL = 100_352  # multiply-accumulates that the papers' tables count for ResNet-50's last pooling
STEPS = math.ceil(1_281_167 / 256)


def generator():
    namespace = {"__file__": str(SOURCE), "__name__": "generate"}
    exec(compile(SOURCE.read_text(), "generate.py", "exec"), namespace)
    return namespace


RECIPES = generator()["recipes"]()
ROWS = {row["name"]: row for row in generator()["rows"]()}


def named(*parts):
    """The rows whose names have all of these parts."""
    return [name for name in ROWS if all(part in name for part in parts)]


@pytest.fixture(autouse=True)
def _imagenet(monkeypatch):
    """Recipes are checked without the data."""
    monkeypatch.setitem(DATASETS, "imagenet", DATASETS.get("imagenet", lambda **arguments: None))


@functools.cache
def network(name):
    """The layers of an architecture, and how often each of their weights is used on one image."""
    with torch.device("meta"):
        model = sparing.models.MODELS[name]()
    return sparing.layers.find_layers(model), sparing.count_applications(model, (1, 3, 224, 224))


def test_the_recipes_are_what_the_table_makes_of_them():
    written = {path.name: path.read_text() for path in FOLDER.glob("*.yaml") if path.name in RECIPES}
    assert written == RECIPES, "run python recipes/imagenet/generate.py"
    by_hand = {path.name for path in FOLDER.glob("*.yaml")} - RECIPES.keys()
    assert "resnet50-str-modern.yaml" in by_hand


def test_every_row_of_the_tables_is_there():
    totals = {name.removeprefix("resnet50-str-") for name in Budget.published_names() if name.count(".") == 1}
    assert {name.removeprefix("resnet50-str-") for name in named("resnet50-str-")} == totals
    assert len(totals) == 16
    assert len(named("mobilenet_v1-str-")) == 5
    assert len(named("-dense")) == 2
    for method in ("dnw", "gmp"):
        assert named(f"resnet50-{method}-uniform")
        assert named(f"resnet50-{method}-str")
    assert {row["label"] for row in ROWS.values()} == {"SRC", "MEM-hi", "MEM-med"}


@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_is_the_papers(name):
    row, recipe = ROWS[name], load_recipe(FOLDER / f"{name}.yaml")
    schedule, optimizer = recipe.schedule, recipe.optimizer
    assert (schedule.epochs, schedule.warmup_epochs, schedule.update) == (100, 5, "epoch")
    assert (optimizer.name, optimizer.lr, optimizer.momentum) == ("sgd", 0.256, 0.875)
    assert optimizer.weight_decay == float(row["weight_decay"])
    # One weight decay for weights, thresholds and normalization.
    assert optimizer.threshold_weight_decay is optimizer.norm_weight_decay is None
    assert (recipe.data.batch_size, recipe.label_smoothing, recipe.ema) == (256, 0.1, None)
    assert recipe.data.model_extra == {"root": "data/imagenet", "size": 224, "validation_per_class": 0}
    if recipe.method:
        assert build_method(recipe.method).name == row["method"]
    text = (FOLDER / f"{name}.yaml").read_text()
    assert f"The paper reports {row['top1']} % top-1" in text
    assert text.count("recalled, not read") == (row["label"] != "SRC") + (row["settings_label"] != "SRC")
    assert max(map(len, text.splitlines())) <= 120


def test_the_modern_recipe_loads():
    recipe = load_recipe(FOLDER / "resnet50-str-modern.yaml")
    settled = with_settings(recipe, STEPS, (1, 3, 224, 224))
    # The rule comes out near the paper's own value for a like sparsity: 2.25e-5 at 90.23 %.
    assert settled.optimizer.threshold_weight_decay == pytest.approx(2.25e-5, rel=0.05)


def test_the_learning_rate_of_an_epoch_is_exactly_the_papers():
    """lr (e + 1) / 5 for five epochs, then lr ½ (1 + cos(π (e − 5) / 95)), set once an epoch."""
    recipe = load_recipe(FOLDER / "resnet50-dense.yaml")
    expected = [0.256 * ((e + 1) / 5 if e < 5 else 0.5 * (1 + math.cos(math.pi * (e - 5) / 95))) for e in range(100)]
    assert [0.256 * warmup_cosine(e, 100, 5) for e in range(100)] == expected
    assert recipe.learning_rates(STEPS)[::STEPS] == expected
    # As the training loop sets it.
    optimizer = build_optimizer(recipe.optimizer, nn.Linear(2, 2))
    scheduler = LambdaLR(optimizer, lambda epoch: warmup_cosine(epoch, 100, 5))
    for rate in expected:
        assert {group["lr"] for group in optimizer.param_groups} == {rate}
        assert {group["momentum"] for group in optimizer.param_groups} == {0.875}
        assert not any(group["nesterov"] for group in optimizer.param_groups)
        optimizer.step()
        scheduler.step()


# Backbone: all but the classifier. From the released budgets.
BACKBONE = {
    "79.55": 82.07, "81.27": 83.79, "87.70": 90.08, "90.23": 92.47, "90.55": 92.77, "94.80": 96.51, "95.03": 96.71,
    "95.15": 96.84, "96.11": 97.64, "96.53": 97.92, "97.78": 98.82, "98.05": 98.99, "98.22": 99.11, "98.79": 99.46,
    "98.98": 99.58, "99.10": 99.64,
}  # fmt: skip


@pytest.mark.parametrize("total", BACKBONE)
def test_the_backbone_sparsity_of_the_released_budgets(total):
    layers, _ = network("resnet50")
    budget = Budget.published(f"resnet50-str-{total}")
    backbone = {layer: budget[layer] for layer in layers if layer != "fc"}
    zeros = sum(layers[layer].weight.numel() * share for layer, share in backbone.items())
    assert round(100 * zeros / 23_454_912, 2) == BACKBONE[total]


def in_millions(text):
    return float(text[:-1]) * {"M": 1, "G": 1000}[text[-1]]


def last_digit(text):
    """One unit of the last printed digit, in millions."""
    return in_millions(f"{10.0 ** -len(text[:-1].partition('.')[2])}{text[-1]}")


# The budgets that MobileNetV1 learned were not released.
@pytest.mark.parametrize("row", sorted(ROWS.keys() - set(named("mobilenet_v1-str"))))
def test_what_is_printed_is_what_is_counted(row):
    """Weights and MACs of every row follow from its budget, but for one misprint."""
    row = ROWS[row]
    name = row["model"]
    layers, uses = network(name)
    sizes = {layer: found.weight.numel() for layer, found in layers.items()}
    match row["method"], row["budget"]:
        case "dense", _:
            budget = dict.fromkeys(sizes, 0.0)
        case _, "uniform":
            budget = dict.fromkeys(sizes, float(row["sparsity"]) / 100)
        case _, "pointwise":
            recipe = load_recipe(FOLDER / f"{row['name']}.yaml")
            chosen = [layer for layer in layers if any(fnmatch(layer, pattern) for pattern in recipe.select)]
            budget = {layer: recipe.method["sparsity"] if layer in chosen else 0.0 for layer in sizes}
        case _:
            budget = Budget.published(f"resnet50-str-{row['sparsity']}")
    kept = {layer: count_kept(size, budget[layer]) for layer, size in sizes.items()}
    weights = sum(kept.values()) / 1e6
    macs = (sum(uses[layer] * count for layer, count in kept.items()) + (POOL if name == "resnet50" else 0)) / 1e6
    # The 74.11 % of MobileNetV1's GMP is 1 − 1.09M / 4.21M, of numbers already rounded; counted it is 74.19 %.
    nearly = 0.081 if row["name"] == "mobilenet_v1-gmp-74.11" else 0.011
    assert 100 * (1 - weights * 1e6 / sum(sizes.values())) == pytest.approx(float(row["sparsity"]), abs=nearly)
    # 766.6M is printed as 766M, so a whole digit is no surprise.
    assert macs == pytest.approx(in_millions(row["macs"]), abs=0.7 * last_digit(row["macs"]))
    if row["name"] == "resnet50-str-81.27":
        assert (row["weights"], round(weights, 3)) == ("4.47M", 4.776)
        return
    if name == "resnet50" and row["budget"] in {"", "uniform"}:
        weights *= 25.6 / 25.502912  # the paper's dense 25.6M has batch normalization in it, and so its shares of it
    assert weights == pytest.approx(in_millions(row["weights"]), abs=0.6 * last_digit(row["weights"]))


def test_mobilenet_v1_pruned_but_for_its_first_and_depthwise_layers():
    """163.4 M and 82.3 M multiply-accumulates, the paper's rows of 74.11 % and 89.03 %, to 0.1 M."""
    layers, uses = network("mobilenet_v1")
    pruned = [name for name in layers if name == "fc" or name.endswith(".3")]
    assert len(pruned) == 14
    for share, macs, total in ((0.75, 163.4, 74.19), (0.90, 82.3, 89.03)):
        kept = {n: count_kept(x.weight.numel(), share if n in pruned else 0.0) for n, x in layers.items()}
        assert sum(uses[n] * count for n, count in kept.items()) / 1e6 == pytest.approx(macs, abs=0.1)
        assert round(100 * (1 - sum(kept.values()) / 4_209_088), 2) == total


def test_the_table_is_whole():
    with (FOLDER / "paper.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert {len(row) for row in rows} == {len(rows[0])}
    assert len({row[0] for row in rows}) == len(rows)
