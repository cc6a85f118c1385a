"""Resolved recipes, run directories that move, models and data of one's own, starting weights."""

import dataclasses
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import small_run
import sparing
from sparing import METHODS, Budget, CheckpointError, InputError
from sparing.data import DATASETS, Images
from sparing.run import run as run_module
from sparing.run.build import build_model
from sparing.run.checkpoint import load_checkpoint
from sparing.run.method_section import build_method, settings
from sparing.run.reading import MAX_BYTES, parse_yaml
from sparing.run.recipe import Recipe, build_recipe, load_recipe
from sparing.run.resolve import resolve, what_is_computed
from sparing.run.run import Run, evaluate_file
from sparing.run.training import train_run
from sparing.run.weights import load_weights

EXAMPLES = Path(__file__).parent.parent / "examples" / "02_own_model"
OWN = EXAMPLES / "own_model.yaml"
SHORT = ["schedule.epochs=2", "data.count=120", "model.width=4"]
BUDGET = {"conv1": 0.0, "conv2": 0.75, "fc": 0.5}


@pytest.fixture(scope="module", autouse=True)
def _own_module():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield
    sys.modules.pop("own_model", None)


def own(*changes):
    return load_recipe(OWN, [*SHORT, *changes])


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """A run that was started with relative paths, and then moved to another directory; with its metrics."""
    here = tmp_path_factory.mktemp("here")
    torch.manual_seed(1)
    recipe = own("method={name: gmp, budget: b.json, every: 2}", "weights=w.safetensors")
    start = build_model(recipe.model, {"num_classes": 4, "in_channels": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        Budget(BUDGET).save("b.json")
        save_file(start.state_dict(), "w.safetensors")
        train_run(recipe, "run", stop_after=1)
        there = tmp_path_factory.mktemp("there") / "moved"
        shutil.move("run", there)
    shutil.rmtree(here)
    return there


@pytest.mark.slow
def test_a_run_can_be_moved_and_resumed_and_read_from_anywhere(moved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metrics = train_run(load_recipe(moved / "recipe.yaml"), moved, resume=True)
    run = Run.open(moved)
    assert run.metrics == metrics
    assert [line["epoch"] for line in run.history] == [1, 2]
    report = run.report()
    assert {row.name: row.sparsity for row in report.layers} == pytest.approx(BUDGET, abs=0.02)
    assert run.budget() == Budget({row.name: row.sparsity for row in report.layers})
    assert run.evaluate().accuracy == metrics["accuracy"]
    written = run.export("compressed")
    assert written.path == moved / "compressed.safetensors"
    assert run.model("dense").state_dict().keys() == load_file(moved / "model.safetensors").keys()
    shutil.copytree(moved, tmp_path / "copy")
    assert Run.open("copy").report().total == report.total


def test_a_run_directory_holds_no_relative_path_and_all_settings(moved):
    recipe = yaml.safe_load((moved / "recipe.yaml").read_text())
    assert recipe["method"]["budget"] == BUDGET
    assert Path(recipe["weights"]).is_absolute()
    assert recipe["method"].keys() == {"name"} | {field.name for field in dataclasses.fields(METHODS["gmp"])}
    resolved = recipe["resolved"]
    assert (resolved["steps"], resolved["input_size"]) == (8, [1, 1, 12, 12])
    assert resolved["model_arguments"] == {"num_classes": 4, "in_channels": 1}
    assert len(resolved["weights_sha256"]) == 64
    assert resolved["versions"]["torch"] == torch.__version__


def test_nothing_is_read_twice(moved, monkeypatch):
    read = []
    for name in ("load_newest", "read_weights"):
        function = getattr(run_module, name)
        monkeypatch.setattr(run_module, name, lambda path, function=function: (read.append(path), function(path))[1])
    run = Run.open(moved)
    run.report()
    run.budget()
    assert run.model() is run.model()
    assert len(read) == 1


def test_bench_measures_nothing_if_its_file_cannot_be_written(moved, tmp_path, monkeypatch):
    shutil.copytree(moved, tmp_path / "run")
    (tmp_path / "run" / "latency.json").mkdir()
    monkeypatch.setattr(Run, "model", lambda self, weights: None)
    monkeypatch.setattr(run_module.latency, "measure", lambda *args, **kwargs: pytest.fail("measured"))
    with pytest.raises(InputError, match="latency.json cannot be written: not a regular file"):
        Run.open(tmp_path / "run").bench()


def test_an_error_of_a_measurement_is_none_of_writing(moved, monkeypatch):
    def measure(*args, **kwargs):
        raise FileNotFoundError("the library of a runtime")

    monkeypatch.setattr(run_module.latency, "measure", measure)
    monkeypatch.setattr(Run, "model", lambda self, weights: None)
    with pytest.raises(FileNotFoundError, match="the library of a runtime"):
        Run.open(moved).bench()
    assert not [path.name for path in moved.iterdir() if "latency" in path.name]


def test_resolving_again_changes_nothing_and_paths_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    resolved = resolve(own("method.budget=global"))
    assert resolve(resolved) == resolved
    assert build_recipe(yaml.safe_load(resolved.to_yaml())) == resolved
    assert what_is_computed(resolved) != what_is_computed(resolve(own("method.budget=erk")))
    with pytest.raises(InputError, match="the run has 40,000,000 optimizer steps; it must have 1 to 10,000,000"):
        resolve(own("schedule.epochs=100000", "data.count=600", "data.batch_size=1"))


def test_paths_of_data_become_absolute_and_urls_stay(tmp_path, monkeypatch):
    from own_model import stripes

    def load(train, test, root="pictures", cache=None):
        return stripes(120)

    monkeypatch.setitem(DATASETS, "shards", load)
    monkeypatch.chdir(tmp_path)
    url = "https://example.org/{0..3}.tar"
    resolved = resolve(own(f"data={{name: shards, train: [a.tar, '{url}'], test: ~/t.tar}}"))
    assert resolved.data.model_extra == {
        "train": [str(tmp_path / "a.tar"), url],
        "test": str(Path.home() / "t.tar"),
        "root": str(tmp_path / "pictures"),
    }


REQUIRED = {"alpha": 1e-3, "weight": 1e-4, "kl_weight": 1e-3, "sparsity": 0.5}


@pytest.mark.parametrize("name", METHODS)
def test_all_settings_of_a_method_are_written_and_read_back(name):
    fields = {field.name: field for field in dataclasses.fields(METHODS[name])}
    needed = {key: value for key, value in REQUIRED.items() if key in fields}
    method = build_method({"name": name, **needed})
    spec = settings(name, method)
    assert spec.keys() - {"name"} == fields.keys() - {"input_size"}
    assert build_method(parse_yaml(yaml.safe_dump(spec))) == method


def test_a_published_budget_is_written_out(monkeypatch):
    method = build_method({"name": "gmp", "budget": "resnet50-str-90.23"})
    assert settings("gmp", method)["budget"] == dict(Budget.published("resnet50-str-90.23"))
    assert build_method({"name": "gmp", "budget": {0: 0.5, "fc": 0.9}}).budget == Budget({"0": 0.5, "fc": 0.9})


# Models, data sets and methods by import path


def test_the_example_of_an_own_model_is_valid():
    recipe = load_recipe(OWN)
    assert type(build_model(recipe.model, {"num_classes": 4, "in_channels": 1})).__module__ == "own_model"
    assert resolve(recipe).resolved.steps == 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.name=own_model:SmallNett", "model 'own_model:SmallNett' cannot be imported: .*no attribute"),
        ("model.name=no_such:Net", "cannot be imported: No module named 'no_such'; install it, or add its directory"),
        (
            "model.name=own_model:SHAPES",
            "'own_model:SHAPES' must be a subclass of torch.nn",
        ),
        ("model={name: own_model:stripes}", "model 'own_model:stripes' must be a subclass of .* -> Module"),
        ("model={name: 'os:system', command: 'touch PWNED'}", "'os' is a module of Python, which has no model"),
        ("model={name: 'torch.hub:load', repo_or_dir: '.', model: x, source: local}", "must be a subclass of .*Module"),
        ("data={name: 'subprocess:call', args: 'touch PWNED', shell: true}", "module of Python, which has no data"),
        ("model.wdith=3", "model 'own_model:SmallNet' has no argument 'wdith'; did you mean 'width'"),
        ("model.num_classes=3", "'num_classes' follows from the data"),
        ("model={name: 'torch.nn:Flatten'}", r"model 'torch.nn:Flatten' returns 144 logits; the data has 4 classes"),
        ("model={name: 'torch.nn:Identity'}", r"it returned \(1, 1, 12, 12\)"),
        ("data={name: own_model:SmallNet, num_classes: 2, in_channels: 1}", "-> SplitDataset"),
        ("data.conut=3", "data 'own_model:stripes' has no argument 'conut'; did you mean 'count'"),
        ("model.name=/tmp/net.py:Net", "unknown name '/tmp/net.py:Net'; .*or an import path module:Name"),
        ("model.name=../net:Net", "unknown name"),
        ("data.name=own_model", "unknown name 'own_model'"),
        ("method.name=./own:Method", "method './own:Method' cannot be imported: write module:Name"),
    ],
)
def test_an_import_path_that_does_not_fit_is_reported(change, message):
    changes = [change] if change.startswith("data={") else [*SHORT[1:], change]
    if change.startswith("model={"):
        changes = [SHORT[1], "method=null", change]
    with pytest.raises(InputError, match=message) as error:
        resolve(load_recipe(OWN, changes))
    assert "\n" not in str(error.value)


def test_a_model_that_no_file_can_hold_is_reported_before_training(monkeypatch):
    import own_model

    class Rotary(own_model.SmallNet):
        def __init__(self, num_classes: int, in_channels: int, width: int = 8):
            super().__init__(num_classes, in_channels, width)
            self.register_buffer("table", torch.ones(3, dtype=torch.cfloat))

    class Stateful(own_model.SmallNet):
        def get_extra_state(self):
            return {"calls": 3}

    monkeypatch.setattr(own_model, "Rotary", Rotary, raising=False)
    monkeypatch.setattr(own_model, "Stateful", Stateful, raising=False)
    for name, message in (("Rotary", "'table' has dtype torch.complex64"), ("Stateful", "'_extra_state' .* got dict")):
        with pytest.raises(InputError, match=f"model 'own_model:{name}' cannot be written to a file: .*{message}"):
            resolve(own(f"model.name=own_model:{name}"))


def test_a_module_that_fails_and_a_function_with_free_keywords(tmp_path, monkeypatch):
    (tmp_path / "failing_of_test_run.py").write_text("1 / 0\n")
    (tmp_path / "free_of_test_run.py").write_text(
        "from own_model import SmallNet\ndef net(**keywords) -> SmallNet:\n    return SmallNet(**keywords)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="cannot be imported: ZeroDivisionError: division by zero"):
        resolve(own("model.name=failing_of_test_run:Net"))
    free = own("model={name: 'free_of_test_run:net', num_classes: 4, in_channels: 1}")
    assert resolve(free).resolved.steps == 8


# Starting weights


@pytest.fixture
def network():
    return build_model(own().model, {"num_classes": 4, "in_channels": 1})


@pytest.mark.parametrize("kind", ["safetensors", "compressed", "state dict", "checkpoint"])
def test_starting_weights_are_loaded_from_every_kind_of_file(tmp_path, network, kind):
    state = {key: torch.randn_like(tensor) for key, tensor in network.state_dict().items()}
    path = tmp_path / ("w.safetensors" if kind in ("safetensors", "compressed") else "w.pt")
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "compressed":
        sparing.export.compressed.save(state, path)
    else:
        torch.save(state if kind == "state dict" else {"epoch": 3, "state_dict": state}, path)
    load_weights(network, path)
    assert all(torch.equal(tensor, state[key]) for key, tensor in network.state_dict().items())


def test_a_run_starts_from_the_weights(tmp_path, network):
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    changes = [f"weights={tmp_path}/w.safetensors", "method=null", "optimizer.lr=1e-12", "optimizer.weight_decay=0"]
    train_run(own(*changes), tmp_path / "run")
    for key, tensor in load_file(tmp_path / "run" / "model.safetensors").items():
        torch.testing.assert_close(tensor, network.state_dict()[key])
    save_file({key: 2 * tensor for key, tensor in network.state_dict().items()}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"another recipe \(they differ in resolved.weights_sha256\)"):
        train_run(own(*changes), tmp_path / "run", resume=True)


def replaced(change):
    return lambda state: state.update({"fc.bias": change(state["fc.bias"])})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("fc.bias"), "does not fit the model: it misses 'fc.bias'"),
        (lambda state: state.update(head=torch.zeros(1)), "it has unexpected tensors 'head'"),
        (
            lambda state: state.update({"fc.bias": torch.zeros(9)}),
            r"'fc.bias' has shape \(9,\), the model needs \(4,\)",
        ),
        (lambda state: state["fc.bias"].fill_(torch.nan), "'fc.bias' holds values that are NaN or infinite"),
        (lambda state: state.update(evil=print), "unreadable, or no checkpoint with weights only"),
        (lambda state: state.update(epoch=3), "holds no state dict"),
        (replaced(lambda bias: bias.to_sparse()), "'fc.bias' has dtype torch.float32 and layout torch.sparse_coo"),
        (replaced(lambda bias: bias.to("meta")), "'fc.bias' is on the meta device and has no values"),
        (replaced(lambda bias: bias.to(torch.cfloat)), "'fc.bias' has dtype torch.complex64"),
        (replaced(lambda bias: torch.nested.nested_tensor([bias])), "'fc.bias' has dtype torch.float32 and is nested"),
        (replaced(lambda bias: bias.long()), "'fc.bias' has dtype torch.int64, the model needs torch.float32"),
        (replaced(lambda bias: bias.double().fill_(1e300)), "'fc.bias' holds values that are NaN or infinite"),
    ],
)
def test_starting_weights_that_do_not_fit_are_named(tmp_path, network, change, message):
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    state = {key: tensor.clone() for key, tensor in before.items()}
    change(state)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=message) as error:
        load_weights(network, tmp_path / "w.pt")
    assert str(tmp_path / "w.pt") in str(error.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


def test_a_tied_weight_needs_one_of_its_names(tmp_path):
    """`safetensors.torch.save_model` writes one."""
    tied = torch.nn.ModuleDict({name: torch.nn.Linear(3, 3, bias=False) for name in ("embed", "head")})
    save_file({"head.weight": torch.ones(3, 3)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="it misses 'embed.weight'"):
        load_weights(tied, tmp_path / "w.safetensors")
    tied["head"].weight = tied["embed"].weight
    load_weights(tied, tmp_path / "w.safetensors")
    assert (tied["embed"].weight == 1).all()


def test_missing_and_unfinished_weights_are_reported(tmp_path, moved, network):
    with pytest.raises(CheckpointError, match="absent.pt: unreadable or truncated"):
        resolve(own(f"weights={tmp_path}/absent.pt"))
    with pytest.raises(CheckpointError, match="/dev/zero: .*not a regular file"):
        resolve(own("weights=/dev/zero"))
    (tmp_path / "w.safetensors").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="w.safetensors: .*not a regular file"):
        load_weights(network, tmp_path / "w.safetensors")
    sparing.export.compressed.save(network.state_dict(), tmp_path / "c.safetensors")
    damaged = (tmp_path / "c.safetensors").read_bytes().replace(b"tensors", b"tensorz")
    (tmp_path / "c.safetensors").write_bytes(damaged)
    with pytest.raises(CheckpointError, match="^compressed file .*c.safetensors: the header is damaged$"):
        load_weights(network, tmp_path / "c.safetensors")
    torch.save(load_checkpoint(moved / "checkpoint.pt")["model"], tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="holds a sparsified model in training; give the model.safetensors"):
        load_weights(network, tmp_path / "w.pt")


def test_a_file_with_thresholds_is_evaluated_with_a_method(tmp_path):
    save_file({"conv1.parametrizations.weight.0.s": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="holds thresholds; give the recipe their method, such as --set 'method={name"):
        evaluate_file(tmp_path / "w.safetensors", own("method=null"))


# Recipes from strangers


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [1, 1]\nb: [*a, *a]",
        "2026-13-45",
        "!!int abc",
        "9" * 5000,
        "[" * 3000 + "]" * 3000,
        "!!python/object/apply:os.system [id]",
        "? [a]\n: b",
        "{[]: 1}",
        "a: !!binary =",
        "!!set {a, b}: 1",
        "- &x !!timestamp x",
        '"\\ud800"',
        '"\\0"',
    ],
)
def test_a_hostile_yaml_is_refused_in_one_sentence(text, tmp_path):
    for whole in (text, f"model: {{name: resnet8}}\nseed:\n  {text}".replace("\n", "\n  ")):
        (tmp_path / "recipe.yaml").write_text(whole)
        with pytest.raises(InputError) as caught:
            load_recipe(tmp_path / "recipe.yaml")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{a: &x [1], b: *x}", "aliases .* are not supported"),
        ("[" * 21 + "]" * 21, "more than 20 nested levels"),
        ("{a: {b: 1, c: 2, b: 3}}", "the key 'b' is repeated"),
    ],
)
def test_aliases_deep_nesting_and_repeated_keys_are_refused_in_every_value(value, message):
    with pytest.raises(ValueError, match=message):
        parse_yaml(value)
    with pytest.raises(InputError, match=f"not valid YAML: .*{message}"):
        own(f"method={value}")


def test_a_key_that_yaml_reads_as_a_boolean_is_named(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: {name: resnet8}\non: 3\n")
    with pytest.raises(InputError, match="keys must be text, got True; YAML reads on, off, yes and no as booleans"):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_large_recipe_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text("#" * (MAX_BYTES + 1))
    with pytest.raises(InputError, match="is larger than 4,194,304 bytes"):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_number_of_epochs_that_nobody_can_train_is_refused():
    with pytest.raises(InputError, match="schedule.epochs: input should be less than or equal to 100000"):
        own("schedule.epochs=10000000")
    assert isinstance(own(), Recipe)


def test_a_directory_without_a_resolved_recipe_is_no_run(tmp_path):
    (tmp_path / "recipe.yaml").write_text(OWN.read_text())
    with pytest.raises(InputError, match="its recipe.yaml was not written by sparing train"):
        Run.open(tmp_path)
    resolved = resolve(own()).to_yaml()
    (tmp_path / "recipe.yaml").write_text(resolved)
    assert (Run.open(tmp_path).metrics, Run.open(tmp_path).history) == (None, [])
    for text, message in {
        '{"accuracy": ': "unreadable",
        "3": "the content: input should be a valid dictionary",
        "{}": "method: field required",
    }.items():
        (tmp_path / "metrics.json").write_text(text)
        with pytest.raises(InputError, match=f"metrics.json: {message}"):
            _ = Run.open(tmp_path).metrics
    for name in ("metrics.json", "history.jsonl"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to("/dev/zero")
        with pytest.raises(InputError, match=rf"{name}: .*not a regular file"):
            _ = getattr(Run.open(tmp_path), name.split(".")[0])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 10]), r"labels of the test split must be from 0 to num_classes - 1 = 9, got 10"),
        (torch.tensor([0, -100]), "got -100"),
        (torch.tensor([0.0, 1.0]), r"int64 of shape \(N,\), got torch.float32 of shape \(2,\)"),
        (torch.tensor([[0], [1]]), r"got torch.int64 of shape \(2, 1\)"),
    ],
)
def test_labels_that_are_not_those_of_a_class_are_refused(labels, message):
    data = small_run.noise()
    with pytest.raises(InputError, match=message):
        dataclasses.replace(data, test=Images(data.test.pixels[:2], labels))


def test_data_without_test_examples_are_refused_before_training():
    data = small_run.noise()
    with pytest.raises(InputError, match="data 'small_run:noise' has no test examples"):
        resolve(small_run.recipe(), dataclasses.replace(data, test=data.test[:0]))
