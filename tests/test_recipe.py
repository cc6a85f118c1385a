"""Recipes: every one shipped loads, and a wrong one is refused in one sentence."""

from pathlib import Path

import pytest

from sparing import InputError
from sparing.train.recipe import Recipe, build_method, load_recipe

FILES = sorted(Path(__file__).parent.parent.joinpath("recipes").rglob("*.yaml"))
RECIPES = [path for path in FILES if path.parent.name != "sweeps"]  # those have a test of their own
MINIMAL = "model: {name: resnet8, width: 2}\ndata: {name: mnist5k}\n"


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_says_what_to_expect(path):
    assert load_recipe(path)
    assert path.read_text().startswith("#"), "a recipe begins with a comment on what to expect"


def test_there_are_recipes():
    assert RECIPES


def test_a_resolved_recipe_reads_back_equal(tmp_path):
    text = MINIMAL + "method: {name: str, init: -7, g: exp}\noptimizer: {lr: 1e-3, weight_decay: .5E-4}\n"
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.optimizer.lr == 0.001
    assert recipe.optimizer.weight_decay == 0.00005
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe
    assert recipe.model.model_extra == {"width": 2}


def test_overrides_apply_in_order(tmp_path):
    path = write(tmp_path, MINIMAL)
    recipe = load_recipe(path, ["optimizer.lr=1e-2", "schedule.epochs=3", "optimizer.lr=0.5", "method={name: str}"])
    assert (recipe.optimizer.lr, recipe.schedule.epochs, recipe.method) == (0.5, 3, {"name": "str"})


def test_a_number_in_exponent_notation_reaches_the_method_as_a_number(tmp_path):
    recipe = load_recipe(write(tmp_path, MINIMAL + "method: {name: str, init: -1e1, scale: 5e-1}\n"))
    assert (build_method(recipe.method, 1).init, build_method(recipe.method, 1).scale) == (-10.0, 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {name: resnet8}", "unknown key 'modle'; did you mean 'model'"),
        ("optimizer: {weight_decey: 0.1}", "unknown key 'optimizer.weight_decey'; did you mean 'weight_decay'"),
        ("optimizer: {name: sdg}", "optimizer.name: input should be 'sgd' or 'adamw', got 'sdg'"),
        ("optimizer: {lr: fast}", "optimizer.lr: .*valid number.*, got 'fast'"),
        ("optimizer: {lr: true}", "optimizer.lr: .*valid number.*, got True"),
        ("optimizer: {betas: [0.9, 1.5]}", "optimizer.betas.1: input should be less than 1, got 1.5"),
        ("seed: '3'", "seed: .*valid integer.*, got '3'"),
        ("method: {name: [str]}", r"unknown name \['str'\]; did you mean 'str'"),
        ("method: {name: str, g: [sigmoid]}", r"unknown g \['sigmoid'\]"),
        ("optimizer: {lr: -1}", "optimizer.lr: input should be greater than 0, got -1"),
        ("schedule: {epochs: 2, warmup_epochs: 2}", "schedule: warmup_epochs=2 must be below epochs=2"),
        ("method: {init: -5}", "method: method needs a name; choose from str, str_feather, gmp"),
        ("method: {name: sttr}", "method: unknown name 'sttr'; did you mean 'str'"),
        ("method: {name: str, inti: -5}", "method: method 'str' has no argument 'inti'; did you mean 'init'"),
        ("method: {name: str, init: low}", "init must be a finite number, got 'low'"),
        ("method: str", "method: input should be a valid dictionary, got 'str'"),
        ("dense_baseline: true", "dense_baseline: true needs a method"),
        ("amp: float8", "amp: input should be 'none', 'bf16' or 'fp16', got 'float8'"),
        ("label_smoothing: [", "not valid YAML"),
    ],
)
def test_a_wrong_recipe_is_refused_with_place_and_choices(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as error:
        load_recipe(write(tmp_path, MINIMAL + text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must be a mapping of keys, such as 'model:', not list"),
        ("", "must be a mapping of keys"),
        ("data: {name: mnist5k}", "the key 'model' is missing"),
        ("model: {name: resnet9}\ndata: {name: mnist5k}", "model.name: unknown name 'resnet9'; did you mean 'resnet8'"),
        ("model: {name: resnet8}\ndata: {name: mnist}", "data.name: unknown name 'mnist'; did you mean 'mnist5k'"),
    ],
)
def test_an_incomplete_recipe_is_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        load_recipe(write(tmp_path, text))


def test_an_unreadable_recipe_is_refused(tmp_path):
    with pytest.raises(InputError, match="absent.yaml: cannot be read: No such file"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match="is not a text file"):
        load_recipe(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr", "write key=value"),
        ("=3", "write key=value"),
        ("optimizer.lr.fast=3", "'lr' holds no keys"),
        ("schedule.epoch=3", "unknown key 'schedule.epoch'; did you mean 'epochs'"),
        ("optimizer.lr=[", "not valid YAML"),
    ],
)
def test_a_wrong_override_is_refused(tmp_path, override, message):
    with pytest.raises(InputError, match=message):
        load_recipe(write(tmp_path, MINIMAL + "optimizer: {lr: 0.1}"), [override])


def test_every_key_of_a_recipe_is_used_by_the_code():
    source = "".join(
        path.read_text() for path in Path(__file__).parent.parent.joinpath("src/sparing/train").glob("*.py")
    )
    for part in ("", "schedule", "optimizer", "data"):
        model = Recipe if not part else Recipe.model_fields[part].annotation
        for key in model.model_fields:
            assert f".{key}" in source, f"no code reads {part}.{key}"
