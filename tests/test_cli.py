"""Test the command line: its options, output and exit status."""

import contextlib
import functools
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import typing
import warnings
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import typer
from rich.console import Console

import offline
from sparing import __version__, tables
from sparing.__main__ import main as entry_point
from sparing.cli import Format, app, main
from sparing.formats import FORMATS
from tolerance import near, relative_error

RECIPE = """# test
model: {name: resnet8, width: 2}
data: {name: small_run:noise, batch_size: 4}
method: {name: str, init: -4.0}
optimizer: {lr: 0.1, threshold_weight_decay: 0.05}
schedule: {epochs: 2}
tensorboard: false
"""

SHORT = "method={name: gmp, budget: short.json, every: 2}"

FROZEN = {
    "train": {"--set", "--out", "--resume", "--stop-after", "--json", "--help"},
    "sweep": {"--trials", "--out", "--storage", "--json", "--help"},
    "eval": {"--part", "--weights", "--recipe", "--set", "--json", "--help"},
    "report": {"--weights", "--csv", "--html", "--json", "--help"},
    "export": {"--to", "--out", "--shrink", "--json", "--help"},
    "bench": {"--threads", "--batch", "--json", "--help"},
    "methods": {"--json", "--help"},
    "convert": {"--arch", "--out", "--keep-thresholds", "--names", "--json", "--help"},
    "budget list": {"--json", "--help"},
    "budget show": {"--model", "--json", "--help"},
    "budget extract": {"--out", "--weights", "--help"},
}
"""The options of each command. They are part of the public interface: new settings belong in the recipe."""


def process(*arguments, cwd, env=None):
    env = env or os.environ | {"PYTHONPATH": str(Path(__file__).parent)}  # has the data of the recipe
    command = [sys.executable, "-m", "sparing.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def sparing(*arguments, cwd):
    """Run the command line in this process, which saves the seconds that starting Python and importing torch take."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["sparing", *arguments])
        patch.setattr(warnings, "showwarning", warnings.showwarning)
        warnings.simplefilter("default")
        with pytest.raises(SystemExit) as end:
            main()
    return subprocess.CompletedProcess(arguments, end.value.code or 0, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a directory with a recipe and a finished run of it in runs/recipe."""
    place = tmp_path_factory.mktemp("cli")
    (place / "recipe.yaml").write_text(RECIPE)
    done = process("train", "recipe.yaml", cwd=place, env=offline.environment(place))
    assert done.returncode == 0, done.stderr
    assert not (place / "network.log").exists(), "training, or the measurement of latency, used the network"
    assert "epoch   2/2" in done.stdout
    assert "Test results" in done.stdout
    assert re.search(r"File size: [\d,]+ bytes dense, [\d,]+ bytes compressed(, [\d.]+x smaller)?\n", done.stdout)
    assert re.search(r"Latency(: not measured| \(batch 1, one thread\): .* ms sparse in the engine)", done.stdout)
    return place


@pytest.fixture(autouse=True)
def _no_timing(monkeypatch):
    """Skip the latency measurement, except in the process that creates `place`."""
    monkeypatch.setattr("sparing.latency.available", lambda: False)


def test_the_commands_have_exactly_the_frozen_options():
    def options(command):
        return {o for p in command.params for o in p.opts if o.startswith("--")} | {"--help"}

    commands = dict(typer.main.get_command(app).commands)
    commands |= {f"budget {name}": command for name, command in commands.pop("budget").commands.items()}
    assert {name: options(command) for name, command in commands.items()} == FROZEN


def test_a_file_that_is_not_smaller_is_not_called_smaller():
    sizes = {"dense_bytes": 1000, "compressed_bytes": 400}
    assert tables.sizes_line(sizes) == "File size: 1,000 bytes dense, 400 bytes compressed, 2.5x smaller"
    sizes["compressed_bytes"] = 2000
    assert tables.sizes_line(sizes) == "File size: 1,000 bytes dense, 2,000 bytes compressed"


@pytest.mark.slow
def test_train_with_json_prints_only_json(place):
    done = sparing("train", "recipe.yaml", "--json", "--resume", "auto", cwd=place)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == json.loads((place / "runs/recipe/metrics.json").read_text())


@pytest.mark.slow
def test_stop_after_and_resume_continue_a_run(place):
    # A name with brackets, which rich would read as markup if markup were on.
    first = sparing("train", "recipe.yaml", "--out", "parts[a]", "--stop-after", "1", "--set", "seed=3", cwd=place)
    assert first.returncode == 0
    assert "continue with: sparing train recipe.yaml --set seed=3 --out 'parts[a]' --resume auto" in first.stdout
    second = sparing("train", "recipe.yaml", "--out", "parts[a]", "--resume", "auto", "--set", "seed=3", cwd=place)
    assert second.returncode == 0
    assert "continuing after epoch 1 of 2" in second.stdout
    assert "Latency: not measured; pip install 'sparing[export]'" in second.stdout


def test_eval_agrees_with_train(place):
    metrics = json.loads((place / "runs/recipe/metrics.json").read_text())
    done = sparing("eval", "runs/recipe", "--json", cwd=place)
    output = json.loads(done.stdout)
    assert {key: output[key] for key in ("accuracy", "nonzero", "macs")} == {
        key: metrics[key] for key in ("accuracy", "nonzero", "macs")
    }
    text = sparing("eval", "runs/recipe", "--part", "validation", "--weights", "best", cwd=place)
    assert text.stdout.startswith("accuracy ")
    assert "of 40, validation" in text.stdout


def test_eval_of_a_file_agrees_with_eval_of_its_run(place):
    of_run = json.loads(sparing("eval", "runs/recipe", "--weights", "dense", "--json", cwd=place).stdout)
    file = ("eval", "runs/recipe/model.safetensors")
    of_file = json.loads(sparing(*file, "--recipe", "recipe.yaml", "--json", cwd=place).stdout)
    assert of_file == of_run
    assert of_run["accuracy"] <= of_run["top5_accuracy"] <= 1
    assert "top-5 " in sparing(*file, "--recipe", "recipe.yaml", "--part", "validation", cwd=place).stdout


def test_report_writes_text_csv_html_and_json(place):
    done = sparing("report", "runs/recipe", "--csv", "table.csv", "--html", "table.html", cwd=place)
    assert done.returncode == 0
    assert "layer3.0.conv2" in done.stdout
    assert (place / "table.csv").read_text().startswith("name,kind,shape")
    assert "<table" in (place / "table.html").read_text()
    as_json = json.loads(sparing("report", "runs/recipe", "--json", cwd=place).stdout)
    assert as_json == json.loads((place / "runs/recipe/report.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "absent.yaml"], "recipe absent.yaml: cannot be read: No such file"),
        (["train", "typo.yaml"], "unknown key 'optimiser'; did you mean 'optimizer'"),
        (["train", "recipe.yaml", "--set", "schedule.epochs=ten"], "schedule.epochs: .*valid integer.*got 'ten'"),
        (["train", "recipe.yaml"], "runs/recipe exists already"),
        (["train", "recipe.yaml", "--resume", "auto", "--set", "seed=9"], "they differ in seed"),
        (["train", "recipe.yaml", "--out", "recipe.yaml"], "recipe.yaml is a file"),
        (["train", "recipe.yaml", "--resume", "always"], "is not one of 'never', 'auto'"),
        (["eval", "absent"], "absent is not a run directory: there is no such directory"),
        (["eval", "recipe.yaml"], "recipe.yaml is a file; give its model and data with --recipe"),
        (["eval", "recipe.yaml", "--recipe", "recipe.yaml"], "recipe.yaml is not a .safetensors file"),
        (["eval", "runs/recipe", "--recipe", "recipe.yaml"], "is a run directory with its own recipe; remove --recipe"),
        (["eval", "runs/recipe", "--set", "seed=1"], "--set requires --recipe"),
        (["eval", "absent.safetensors", "--recipe", "recipe.yaml"], "absent.safetensors: unreadable or truncated"),
        (
            ["eval", "runs/recipe/model.safetensors", "--recipe", "recipe.yaml", "--set", "model.width=3"],
            "does not fit the recipe's resnet8",
        ),
        (["eval", "damaged"], "checkpoint damaged/checkpoint.pt: is damaged"),
        (["report", "damaged", "--weights", "best"], "damaged has no best.pt; training writes it after an epoch"),
        (["export", "damaged", "--to", "onnx"], "damaged has no model.safetensors; .* at the end of the run"),
        (["report", "runs/recipe", "--csv", "nowhere/table.csv"], "nowhere/table.csv cannot be written"),
        (["report", "runs/recipe", "--csv", "/dev/null"], "/dev/null cannot be written: not a regular file"),
        (
            ["train", "recipe.yaml", "--out", "x", "--set", "optimizer.lr=.inf"],
            "optimizer.lr: input should be a finite",
        ),
        (["budget", "show", "resnet50-str-90.32"], "did you mean 'resnet50-str-90.23'"),
        (["budget", "show", "absent.json"], "budget absent.json: cannot be read"),
        (["budget", "show", "resnet50-str-90.23", "--model", "resnet18"], "model 'resnet18' has no layer"),
        (["budget", "show", "recipe.yaml"], "budget recipe.yaml: the suffix must be .json or .csv"),
        (["budget", "show", "short.json", "--model", "resnet8"], "'resnet8' does not take color images of 224 x 224"),
        (["budget", "extract", "runs/recipe", "--out", "b.txt"], "suffix must be .json or .csv"),
        (["train", "recipe.yaml", "--out", "x", "--set", SHORT], "the budget misses 9 of 10 layers"),
        (["export", "absent", "--to", "onnx"], "absent is not a run directory"),
        (
            ["export", "runs/recipe", "--to", "tflite"],
            "is not one of 'compressed', 'safetensors', 'engine', 'onnx', 'mnn', 'openvino'",
        ),
        (["export", "runs/recipe", "--to", "compressed", "--out", "nowhere/x"], "nowhere/x cannot be written"),
        (
            ["export", "runs/recipe", "--to", "compressed", "--shrink"],
            "--shrink changes the shapes of layers.*choose another format: engine, onnx, mnn, openvino",
        ),
        (["bench", "absent"], "absent is not a run directory"),
        (["bench", "runs/recipe", "--batch", "0"], "Invalid value for .--batch."),
        (["explode"], "No such command 'explode'"),
        (["eval", 300 * "a"], "sparing: a{300}: File name too long"),
        (["convert", 300 * "a", "--arch", "resnet50", "--out", "x"], "sparing: a{300}: File name too long"),
        (["train", "recipe.yaml", "--set", f"model.width={10**30}"], "'resnet8' cannot be built from .*Overflow"),
    ],
)
def test_invalid_input_prints_one_sentence_and_exits_with_status_2(place, arguments, message):
    (place / "typo.yaml").write_text(RECIPE + "optimiser: {}\n")
    damaged = place / "damaged"
    damaged.mkdir(exist_ok=True)
    (damaged / "recipe.yaml").write_text((place / "runs/recipe/recipe.yaml").read_text())
    (damaged / "checkpoint.pt").write_bytes((place / "runs/recipe/checkpoint.pt").read_bytes()[:5000])
    if not (place / "pipe").exists():
        os.mkfifo(place / "pipe")
    (place / "short.json").write_text('{"conv1": 0.5}')
    before = sorted(Path(place, "runs/recipe").rglob("*"))
    done = sparing(*arguments, cwd=place)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    # typer prints its own errors with the usage.
    assert len(done.stderr.splitlines()) == 1 or "Usage:" in done.stderr
    assert re.search(message, " ".join(done.stderr.replace("│", " ").split())), done.stderr
    assert sorted(Path(place, "runs/recipe").rglob("*")) == before


def test_a_full_disk_behind_standard_output_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr("sparing.tables.methods_list", Mock(side_effect=OSError(28, "No space left on device")))
    done = sparing("methods", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "sparing: No space left on device\n")


def test_a_missing_package_of_the_command_line_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "sparing.cli")
    with pytest.raises(SystemExit) as exit_:
        entry_point()
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "sparing: typer is not installed; run pip install 'sparing[train]'\n"


@pytest.mark.slow
def test_an_error_is_one_line_in_a_new_process(place):
    done = process("eval", "absent", cwd=place)
    message = "sparing: absent is not a run directory: there is no such directory\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


@pytest.mark.slow
def test_a_warning_is_one_line(place):
    done = process("train", "recipe.yaml", "--out", "empty", "--set", "method.init=9", "--stop-after", "1", cwd=place)
    assert done.returncode == 0
    assert re.match(r"sparing: warning: step 0: every weight of 'conv1' .* is zero", done.stderr)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_other_methods_meet_an_extracted_budget_exactly(place):
    done = sparing("budget", "extract", "runs/recipe", "--out", "learned.json", cwd=place)
    assert done.returncode == 0
    learned = json.loads((place / "learned.json").read_text())
    rows = json.loads((place / "runs/recipe/report.json").read_text())["layers"]
    assert learned == {row["name"]: row["sparsity"] for row in rows}
    for name in ("gmp", "rigl"):
        change = f"method={{name: {name}, budget: learned.json, every: 2}}"
        done = sparing("train", "recipe.yaml", "--set", change, "--out", f"runs/{name}", "--json", cwd=place)
        assert done.returncode == 0, done.stderr
        layers = json.loads(sparing("report", f"runs/{name}", "--json", cwd=place).stdout)["layers"]
        assert [row["nonzero"] for row in layers] == [row["nonzero"] for row in rows]


@pytest.mark.parametrize("to", ["compressed", "safetensors"])
def test_weights_are_exported_compressed_and_dense(place, to):
    from safetensors.torch import load_file

    from sparing.export import compressed

    done = sparing("export", "runs/recipe", "--to", to, "--out", f"{to}.file", "--json", cwd=place)
    output = json.loads(done.stdout)
    assert output["path"] == f"{to}.file"
    assert output["bytes"] == (place / f"{to}.file").stat().st_size
    expected = load_file(place / "runs/recipe/model.safetensors")
    got = (compressed.load if to == "compressed" else load_file)(place / f"{to}.file")
    assert {key: tensor.tolist() for key, tensor in got.items()} == {key: t.tolist() for key, t in expected.items()}
    metrics = json.loads((place / "runs/recipe/metrics.json").read_text())
    assert output["bytes"] == metrics["compressed_bytes" if to == "compressed" else "dense_bytes"]


@pytest.mark.slow
def test_a_shrunk_network_is_exported_to_onnx(place):
    pytest.importorskip("onnxscript", reason="sparing[export] is not installed")
    pytest.importorskip("torch_pruning", reason="sparing[export] is not installed")
    done = sparing("export", "runs/recipe", "--to", "onnx", "--shrink", cwd=place)
    assert re.match(
        r"Written to runs/recipe/model.onnx: [\d,]+ bytes \([\d,]+ bytes dense\); maximum relative error against "
        r"PyTorch \d",
        done.stdout,
    )


@pytest.fixture
def sparse_run(place):
    """Return a copy of the finished run in which 80 % of the weights of each layer are zero."""
    from safetensors.torch import load_file, save_file

    run = place / "runs/sparse"
    shutil.copytree(place / "runs/recipe", run, dirs_exist_ok=True)
    state = load_file(run / "model.safetensors")
    for weight in (tensor for tensor in state.values() if tensor.dim() > 1):
        weight[weight.abs() < weight.abs().quantile(0.8)] = 0
    save_file(state, run / "model.safetensors")
    return run


@pytest.mark.slow
@pytest.mark.parametrize("shrink", [[], ["--shrink"]])
def test_export_to_engine_writes_a_file_with_matching_outputs(sparse_run, shrink):
    from sparing import engine
    from sparing.run.run import Run

    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("the engine requires a C++ compiler")
    if shrink:
        pytest.importorskip("torch_pruning", reason="sparing[export] is not installed")
    done = sparing("export", str(sparse_run), "--to", "engine", *shrink, "--json", cwd=sparse_run)
    output = json.loads(done.stdout)
    assert output["path"] == str(sparse_run / "model.engine")
    assert output["bytes"] == (sparse_run / "model.engine").stat().st_size
    network = engine.load(sparse_run / "model.engine")
    run = Run.open(sparse_run)
    model = run.model("dense")
    x = torch.randn(3, *run.resolved.input_size[1:])
    assert output["error"] < relative_error(model, x)
    close = near(model, x)
    with torch.inference_mode():
        torch.testing.assert_close(network(x), model(x), **close)


def test_export_accepts_exactly_the_formats_of_the_table():
    assert list(typing.get_args(Format)) == list(FORMATS)


@pytest.mark.parametrize("page", ["README.md", "docs/export.md"])
def test_every_documented_format_is_a_choice_of_export(page):
    text = Path(__file__).parent.parent.joinpath(page).read_text()
    named = {name for group in re.findall(r"--to ([a-z|]+)", text) for name in group.split("|")}
    assert "engine" in named
    assert named <= set(FORMATS)


def test_the_readme_names_every_export_format():
    readme = Path(__file__).parent.parent.joinpath("README.md").read_text()
    (named,) = re.findall(r"sparing export RUN --to ([a-z|]+)", readme)
    assert sorted(named.split("|")) == sorted(FORMATS)


@pytest.mark.parametrize(
    ("command", "defaults"),
    [
        ("train", ["runs/NAME-OF-RECIPE", "never", "the last epoch"]),
        ("sweep", ["as in the file", "runs/NAME-OF-SWEEP", "an SQLite file in --out"]),
        ("eval", ["test", "last", "that of the run"]),
        ("report", ["last"]),
        ("export", ["a file in RUN"]),
        ("bench", ["1 and the number of CPUs", "1 and 16"]),
        ("methods", ["list all"]),
        ("convert", ["sparing"]),
        ("budget show", ["that of the budget"]),
        ("budget extract", ["last"]),
    ],
)
def test_help_shows_the_defaults(tmp_path, command, defaults):
    done = sparing(*command.split(), "--help", cwd=tmp_path)
    shown = re.findall(r"\[default: \(?([^)\];]+)", " ".join(done.stdout.split()).replace("- ", "-"))
    assert shown == defaults


@pytest.mark.slow
def test_bench_prints_and_writes_its_measurements(place, monkeypatch):
    from sparing import latency
    from sparing.latency.backends import BACKENDS

    if not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))):
        pytest.skip("sparing[export] is not installed")
    chosen = {name: BACKENDS[name] for name in ("engine", "ONNX Runtime")}
    quick = functools.partial(latency.measure, backends=chosen, sweep=(), rounds=1, turn=0.001)
    monkeypatch.setattr(latency, "measure", quick)
    done = sparing("bench", "runs/recipe", "--threads", "1", "--batch", "3", "--json", cwd=place)
    output = json.loads(done.stdout)
    assert done.stderr.splitlines() == [
        "writing the files of the runtimes", "measuring with 1 thread: engine, ONNX Runtime"
    ]  # fmt: skip
    assert [(row["name"], row["batch"], row["threads"]) for row in output["rows"]] == [
        ("engine", 3, 1), ("ONNX Runtime", 3, 1)
    ]  # fmt: skip
    assert output == json.loads((place / "runs/recipe/latency.json").read_text())
    assert (place / "runs/recipe/figures/latency.png").read_bytes().startswith(b"\x89PNG")


def test_methods_are_listed_with_description_source_and_file(place, monkeypatch):
    from sparing import METHODS

    listed = json.loads(sparing("methods", "--json", cwd=place).stdout)
    assert [row["name"] for row in listed] == list(METHODS)
    for row in listed:
        assert row["summary"].endswith(".")
        assert "20" in row["source"]
        assert Path(__file__).parent.parent.joinpath("src/sparing", row["file"]).is_file()
    for width in (60, 80):
        monkeypatch.setenv("COLUMNS", str(width))
        lines = sparing("methods", cwd=place).stdout.splitlines()
        assert max(map(len, lines)) <= width
        assert [line.split()[0] for line in lines if line[0] != " "] == list(METHODS)


def test_the_card_of_a_method_explains_every_setting(place):
    from sparing import METHODS

    for name, method in METHODS.items():
        card = json.loads(sparing("methods", name, "--json", cwd=place).stdout)
        assert [setting["name"] for setting in card["settings"]] == [field.name for field in fields(method)]
        unexplained = [setting["name"] for setting in card["settings"] if not setting["meaning"]]
        assert not unexplained, f"the docstrings of {name} do not explain {unexplained}"
        assert "=" in card["formula"] or "prune" in card["formula"]
        assert "Source:" not in card["formula"]
    lines = sparing("methods", "gmp", cwd=place).stdout.splitlines()
    assert lines[0] == "gmp: Prune the smallest weights, more and more of them, while training."
    assert "    S   = W ⊙ M,   dW = dS ⊙ M" in lines
    assert any(re.match(r"  every +100 +optimizer steps between two updates", line) for line in lines)
    assert any(re.match(r"  alpha +required +α, the weight", line) for line in run_lines("methods", "dst", cwd=place))
    assert run_lines("methods", "sparing.methods.gmp:GMP", cwd=place) == lines
    assert "did you mean 'rigl'" in sparing("methods", "rigle", cwd=place).stderr


def run_lines(*arguments, cwd):
    return sparing(*arguments, cwd=cwd).stdout.splitlines()


def test_the_version_is_printed_with_those_of_pytorch_and_python(tmp_path):
    printed = sparing("--version", cwd=tmp_path).stdout
    assert printed == f"sparing {__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}\n"


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("sparing exp", "export"),
        ("sparing export RUN --to comp", "compressed"),
        ("sparing methods rig", "rigl"),
        ("sparing budget show resnet50-erk-9", "resnet50-erk-90"),
    ],
)
def test_a_shell_can_complete_commands_and_values(tmp_path, monkeypatch, words, completed):
    asked = {"_SPARING_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    assert completed in sparing(cwd=tmp_path).stdout.split()


def test_a_spinner_is_shown_only_on_a_terminal_and_not_with_json(place, monkeypatch):
    seen = []
    monkeypatch.setattr("sparing.cli.Console", lambda **options: seen.append(Recording(**options)) or seen[-1])
    for terminal, options, shown in [(True, [], True), (False, [], False), (True, ["--json"], False)]:
        monkeypatch.setattr(Recording, "is_terminal", terminal)
        assert sparing("eval", "runs/recipe", *options, cwd=place).returncode == 0
        assert ("evaluating" in seen[-1].file.getvalue()) is shown


class Recording(Console):
    """A console whose output can be read."""

    def __init__(self, **options):
        super().__init__(**options | {"file": io.StringIO(), "color_system": None})


def test_the_published_budgets_are_listed(tmp_path):
    names = sparing("budget", "list", cwd=tmp_path).stdout.splitlines()
    assert "resnet50-str-90.23" in names
    assert json.loads(sparing("budget", "list", "--json", cwd=tmp_path).stdout) == names


def test_a_published_budget_is_shown_with_its_counts(place):
    shown = sparing("budget", "show", "resnet50-str-90.23", cwd=place).stdout
    assert "layer4.2.conv3" in shown
    total = shown.splitlines()[-1].split()
    assert total[:2] == ["total", "25,502,912"]
    assert abs(int(total[2].replace(",", "")) - 2_492_045) < 100
    assert "resnet50-erk-90" in sparing("budget", "list", cwd=place).stdout
    assert json.loads(sparing("budget", "show", "resnet50-str-90.23", "--json", cwd=place).stdout)["fc"] == 0.645
