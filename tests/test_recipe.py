"""Reading recipes: shipped recipes, defaults, overrides, methods and patterns, error messages."""

import textwrap
from pathlib import Path

import pytest
from torch import nn

import sparing
from sparing import NM, Block, Filters, InputError, Unstructured
from sparing.run.build import build_optimizer
from sparing.run.method_section import build_method
from sparing.run.recipe import Recipe, load_recipe

FILES = sorted(Path(__file__).parent.parent.joinpath("recipes").rglob("*.yaml"))
RECIPES = [path for path in FILES if path.parent.name != "sweeps"]  # test_sweep.py reads the sweep files
MINIMAL = "model: {name: resnet8, width: 2}\ndata: {name: mnist5k}\n"


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_and_begins_with_a_comment(path):
    assert load_recipe(path)
    assert path.read_text().startswith("#"), "a recipe begins with a comment on what it trains"


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
    assert (build_method(recipe.method).init, build_method(recipe.method).scale) == (-10.0, 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {name: resnet8}", "unknown key 'modle'; did you mean 'model'"),
        ("optimizer: {weight_decey: 0.1}", "unknown key 'optimizer.weight_decey'; did you mean 'weight_decay'"),
        ("optimizer: {name: sdg}", "optimizer.name: input should be 'sgd' or 'adamw', got 'sdg'"),
        ("optimizer: {lr: fast}", "optimizer.lr: .*valid number.*, got 'fast'"),
        ("optimizer: {lr: true}", "optimizer.lr: .*valid number.*, got True"),
        ("optimizer: {betas: [0.9, 1.5]}", "optimizer.betas.1: input should be less than 1, got 1.5"),
        ("optimizer: {nesterov: 1}", "optimizer.nesterov: .*valid boolean, got 1"),
        (
            "optimizer: {nesterov: true, momentum: 0}",
            "optimizer: nesterov: true requires name: sgd and momentum > 0, got name: sgd and momentum: 0",
        ),
        ("optimizer: {nesterov: true, name: adamw}", "optimizer: nesterov: true requires name: sgd .* name: adamw"),
        ("seed: '3'", "seed: .*valid integer.*, got '3'"),
        ("method: {name: [str]}", "method: method needs a name, such as str or gmp"),
        ("method: {name: str, g: [sigmoid]}", r"method: (STR: unknown g|.*cannot be built from .*'g':) \['sigmoid'\]"),
        ("optimizer: {lr: -1}", "optimizer.lr: input should be greater than 0, got -1"),
        ("schedule: {epochs: 2, warmup_epochs: 2}", "schedule: warmup_epochs=2 must be below epochs=2"),
        ("schedule: {epochs: 3, drops: [3]}", r"drops: 3 must be in \[warmup_epochs, epochs\) = \[0, 3\)"),
        ("schedule: {drop_factor: 1}", "schedule.drop_factor: input should be less than 1, got 1"),
        ("method: {init: -5}", "method: method needs a name, such as str or gmp; `sparing methods` lists them"),
        ("method: {name: sttr}", "method: unknown method 'sttr'; did you mean 'str'"),
        ("method: {name: magnitude, sparsity: 0.9}", "method: unknown method 'magnitude'"),
        ("method: {name: str, inti: -5}", "method: method 'str' has no argument 'inti'; did you mean 'init'"),
        ("method: {name: str, steps: 100}", "method: method 'str' has no argument 'steps'"),
        ("method: {name: dst}", "method: method 'dst' needs alpha="),
        (
            "method: {name: continuous_sparsification, penalty: 1e-5}",
            "method 'continuous_sparsification' has no argument 'penalty'; choose from weight",
        ),
        ("method: {name: str, init: low}", r"method: STR: init must be a number in \(-inf, inf\), got 'low'"),
        ("method: {name: gmp, sparsity: 1.2}", r"method: GMP: sparsity must be a fraction in \[0, 1\), got 1.2"),
        ("method: str", "method: input should be a valid dictionary, got 'str'"),
        ("dense_baseline: true", "dense_baseline: true needs a method"),
        ("amp: float8", "amp: input should be 'none', 'bf16' or 'fp16', got 'float8'"),
        ("label_smoothing: [", "not valid YAML"),
    ],
)
def test_an_invalid_recipe_is_reported_with_its_key_and_the_valid_choices(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as error:
        load_recipe(write(tmp_path, MINIMAL + text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must be a mapping of keys, such as 'model:', not list"),
        ("", "must be a mapping of keys, such as 'model:', not an empty file"),
        ("data: {name: mnist5k}", "the key 'model' is missing"),
        ("model: {name: resnet9}\ndata: {name: mnist5k}", "model.name: unknown name 'resnet9'; did you mean 'resnet8'"),
        ("model: {name: resnet8}\ndata: {name: mnist4k}", "data.name: unknown name 'mnist4k'; did you mean 'mnist5k'"),
        ("model: {name: [resnet8]}\ndata: {name: mnist5k}", r"model.name: .*valid string, got \['resnet8'\]"),
    ],
)
def test_an_incomplete_recipe_is_reported(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        load_recipe(write(tmp_path, text))


def test_an_unreadable_recipe_file_is_reported(tmp_path):
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
        ("optimizer.lr.fast=3", "'lr' is not a mapping"),
        ("schedule.epoch=3", "unknown key 'schedule.epoch'; did you mean 'epochs'"),
        ("optimizer.lr=[", "not valid YAML"),
    ],
)
def test_an_invalid_override_is_reported(tmp_path, override, message):
    with pytest.raises(InputError, match=message):
        load_recipe(write(tmp_path, MINIMAL + "optimizer: {lr: 0.1}"), [override])


# Optimizer and schedule


def test_nesterov_momentum_reaches_the_optimizer(tmp_path):
    for given in (True, False):
        recipe = load_recipe(write(tmp_path, MINIMAL + f"optimizer: {{momentum: 0.8, nesterov: {given}}}"))
        optimizer = build_optimizer(recipe.optimizer, nn.Linear(2, 2))
        assert [(group["nesterov"], group["momentum"]) for group in optimizer.param_groups] == [(given, 0.8)]
    assert load_recipe(write(tmp_path, MINIMAL)).optimizer.nesterov is False


def test_each_drop_multiplies_the_learning_rate_by_the_drop_factor(tmp_path):
    text = MINIMAL + "schedule: {epochs: 5, drops: [2, 4], update: epoch"
    recipe = load_recipe(write(tmp_path, text + ", drop_factor: 0.2}"))
    assert recipe.schedule.factors(1) == pytest.approx([1, 1, 0.2, 0.2, 0.04])
    assert load_recipe(write(tmp_path, text + "}")).schedule.factors(1) == pytest.approx([1, 1, 0.1, 0.1, 0.01])


# Methods


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{name: block, n: 4}", Block(4)),
        ("{name: block}", Block()),
        ("block", Block()),
        ("{name: nm, n: 1, m: 8}", NM(1, 8)),
        ("nm", NM(2, 4)),
        ("filters", Filters()),
        ("{name: filters}", Filters()),
        ("unstructured", Unstructured()),
    ],
)
def test_a_recipe_names_a_pattern(tmp_path, pattern, expected):
    sparsity = "" if isinstance(expected, NM) else "sparsity: 0.5, "
    recipe = load_recipe(write(tmp_path, MINIMAL + f"method: {{name: gmp, {sparsity}pattern: {pattern}}}"))
    assert build_method(recipe.method).pattern == expected
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("blocks", "method.pattern: unknown pattern 'blocks'; did you mean 'block'"),
        ("{n: 4}", "method.pattern: unknown pattern None; choose from unstructured, block, nm, filters"),
        ("{name: [nm]}", r"method.pattern: unknown pattern \['nm'\]"),
        ("[nm]", "method.pattern: unknown pattern None"),
        ("{name: block, m: 4}", "method.pattern: 'block' has no argument 'm'; choose from n"),
        ("{name: filters, n: 4}", "method.pattern: 'filters' has no argument 'n'"),
        ("{name: block, n: 0}", "Block: n must be a whole number, at least 1, got 0"),
        ("{name: nm, n: 5, m: 4}", "NM: n must be at most m=4, got 5"),
        ("{name: nm, n: 1, m: 4}", "GMP: .* has sparsity 0.75, got sparsity=0.5"),
    ],
)
def test_an_invalid_pattern_is_reported(tmp_path, pattern, message):
    with pytest.raises(InputError, match=message) as error:
        load_recipe(write(tmp_path, MINIMAL + f"method: {{name: gmp, sparsity: 0.5, pattern: {pattern}}}"))
    assert "\n" not in str(error.value)


@pytest.fixture
def own_methods(tmp_path, monkeypatch):
    """A module with methods of its own, written to a directory on sys.path."""
    folder = tmp_path / "importable"
    folder.mkdir()
    (folder / "own_methods_of_test_recipe.py").write_text(
        textwrap.dedent(
            '''
            from dataclasses import dataclass, field

            from sparing.masks import count_kept, keep_top
            from sparing.method import Method
            from sparing.parametrizations import Mask


            @dataclass(frozen=True, kw_only=True)
            class TopKAST(Method):
                """Keep the largest weights of each layer, chosen again after every step."""

                name = "top_kast"
                density: float
                dense: list[str] = field(default_factory=list)

                def parametrizations(self, layers, plan):
                    return {name: Mask(self._mask(layer)) for name, layer in layers.items()}

                def after_step(self, sparsifier, optimizers):
                    sparsifier.set_masks({name: self._mask(layer) for name, layer in sparsifier.layers.items()})

                def _mask(self, layer):
                    density = 1.0 if layer.name in self.dense else self.density
                    return keep_top(layer.weight.detach().abs(), count_kept(layer.weight.numel(), 1 - density))


            NOT_A_METHOD = 3
            '''
        )
    )
    monkeypatch.syspath_prepend(str(folder))
    return "own_methods_of_test_recipe"


def test_a_method_of_another_package_is_named_by_its_import_path(tmp_path, own_methods):
    text = MINIMAL + f"method: {{name: '{own_methods}:TopKAST', density: 0.25"
    recipe = load_recipe(write(tmp_path, text + "}"))
    method = build_method(recipe.method)
    assert type(method).__module__ == own_methods
    assert (method.density, method.dense) == (0.25, [])
    model = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 4))
    sparing.sparsify_(model, method)
    assert [row.nonzero for row in sparing.report(model).layers] == [16, 4]
    assert build_method(load_recipe(write(tmp_path, text + ", dense: ['1']}")).method).dense == ["1"]
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{module}:TopKast", "method '{module}:TopKast' cannot be imported: .*no attribute 'TopKast'"),
        ("no_such_module_here:TopKAST", "cannot be imported: No module named 'no_such_module_here'"),
        ("{module}:NOT_A_METHOD", "method '{module}:NOT_A_METHOD' is 3, which is not a subclass of sparing.Method"),
        ("{module}", "unknown method '{module}'; .*or an import path module:Class"),
    ],
)
def test_an_import_path_that_names_no_method_is_reported(tmp_path, own_methods, name, message):
    text = MINIMAL + f"method: {{name: '{name.format(module=own_methods)}'}}"
    with pytest.raises(InputError, match=message.format(module=own_methods)):
        load_recipe(write(tmp_path, text))


def test_arguments_of_an_imported_method_are_checked(tmp_path, own_methods):
    name = f"{own_methods}:TopKAST"
    with pytest.raises(InputError, match=f"method '{name}' needs density="):
        load_recipe(write(tmp_path, MINIMAL + f"method: {{name: '{name}'}}"))
    with pytest.raises(InputError, match=f"method '{name}' has no argument 'densty'; did you mean 'density'"):
        load_recipe(write(tmp_path, MINIMAL + f"method: {{name: '{name}', densty: 0.5}}"))


def test_every_key_of_a_recipe_is_used_by_the_code():
    source = "".join(path.read_text() for path in Path(__file__).parent.parent.joinpath("src/sparing/run").glob("*.py"))
    for name in ("", "schedule", "optimizer", "data"):
        section = Recipe if not name else Recipe.model_fields[name].annotation
        for key in section.model_fields:
            assert f".{key}" in source, f"no code reads {name}.{key}"
