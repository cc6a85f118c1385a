"""Training runs: resuming, run directories, damaged checkpoints, mixed precision, penalties, data and evaluation."""

import gzip
import io
import json
import os
import signal
from dataclasses import replace

import pytest
import torch
import yaml
from rich.console import Console

import small_run
import sparing
from sparing import CheckpointError, InputError, SparsityWarning
from sparing.data import ImageBatches, Images
from sparing.data.image import ImageData, fashion_mnist, mnist, mnist5k, stratified_split
from sparing.run import checkpoint, loop
from sparing.run.build import build_model, build_sparsifier
from sparing.run.checkpoint import FORMAT, load_checkpoint, save_checkpoint
from sparing.run.distributed import Ranks
from sparing.run.evaluate import evaluate
from sparing.run.log import RunLog, read_history
from sparing.run.loop import backward
from sparing.run.progress import check_finite, is_better
from sparing.run.recipe import Recipe
from sparing.run.resolve import resolve
from sparing.run.run import Run
from sparing.run.training import train_run
from sparing.schedules import warmup_cosine

NOISE = {"name": "small_run:noise", "batch_size": 4}


def recipe(**changes):
    base = {
        "model": {"name": "resnet8", "width": 2},
        "data": NOISE,
        "method": {"name": "str", "init": -4.0},
        "optimizer": {"lr": 0.1, "weight_decay": 5e-4, "threshold_weight_decay": 0.05},
        "schedule": {"epochs": 2, "warmup_epochs": 1},
        "tensorboard": False,
    }
    return Recipe.model_validate(base | changes)


def weights(run):
    return load_checkpoint(run / "checkpoint.pt")["model"]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("capability", "amp", "told"), [("AVX2", "bf16", True), ("AVX2", "none", False),
                                                         ("AVX512", "bf16", False)])  # fmt: skip
def test_a_precision_without_instructions_is_told(tmp_path, monkeypatch, capability, amp, told):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    console = Console(file=io.StringIO(), width=120)
    train_run(recipe(amp=amp, device="cpu"), tmp_path / "run", stop_after=1, console=console)
    assert ("amp: bf16 is emulated" in console.file.getvalue()) == told


def test_a_run_resumes_with_another_number_of_batches_per_epoch(tmp_path, monkeypatch):
    data = small_run.noise()
    # With two ranks, the last batch of 41 images is dropped, since it has one image.
    images = Images(torch.randint(0, 256, (41, 1, 8, 8), dtype=torch.uint8), torch.arange(41) % 10)

    def larger() -> ImageData:
        return replace(data, train=images)

    method = {"name": "gmp", "sparsity": 0.75, "end": 1.0, "every": 3}
    wanted = recipe(method=method, select=["layer*"], schedule={"epochs": 3})
    with monkeypatch.context() as patch:
        patch.setattr(small_run, "noise", larger)
        train_run(wanted, tmp_path / "run", stop_after=1)
    train_run(wanted, tmp_path / "run", resume=True)
    assert Run.open(tmp_path / "run").report().missed == ()
    run = Run.open(tmp_path / "run")
    model = run.model()
    layers = sparing.sparse_layers(model).values()
    assert {layer.parametrization.clock.step for layer in layers} == {run.resolved.steps} == {33}
    assert sum(layer.nonzero() for layer in layers) * 4 == sum(layer.weight.numel() for layer in layers)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, monkeypatch):
    wanted, calls = recipe(schedule={"epochs": 4}), []

    def killed_at_step_25(*arguments):
        calls.append(None)
        if len(calls) == 25:
            os.kill(os.getpid(), signal.SIGKILL)
        return backward(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "backward", killed_at_step_25)
        assert small_run.in_child(lambda: train_run(wanted, tmp_path / "killed")) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "metrics.json").exists()
    assert load_checkpoint(tmp_path / "killed" / "checkpoint.pt")["progress"]["epoch"] == 2
    train_run(wanted, tmp_path / "killed", resume=True)
    train_run(wanted, tmp_path / "straight")
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "straight"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "finished"
    wanted = recipe(dense_baseline=True, tensorboard=True)
    return out, wanted, train_run(wanted, out)


@pytest.mark.slow
def test_a_run_directory_contains_all_documented_files(finished):
    out, _, metrics = finished
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert {
        "recipe.yaml", "metrics.json", "history.jsonl", "checkpoint.pt", "best.pt", "report.json", "model.safetensors",
        "figures/sparsity.png", "figures/threshold.png", "figures/budget.png", "dense/metrics.json",
    } <= names  # fmt: skip
    assert any(name.startswith("tensorboard/") for name in names)
    assert len({path.stat().st_mode for path in out.glob("*.*")}) == 1, "some files are private"
    assert not [name for name in names if "/." in f"/{name}"], "temporary files are left"
    assert json.loads((out / "metrics.json").read_text()) == metrics
    documented = "accuracy dense_accuracy sparsity weights nonzero dense_macs macs seconds method seed commit"
    assert set(documented.split()) <= metrics.keys()
    assert metrics["method"] == "str"
    assert yaml.safe_load((out / "recipe.yaml").read_text())["schedule"]["update"] == "step"
    line = read_history(out)[-1]
    assert line["layers"].keys() == {row.name for row in Run.open(out).report().layers}
    assert line["sparsity"] == metrics["sparsity"]


def test_a_checkpoint_of_format_4_holds_all_sparse_state_in_the_model(finished):
    out, _, _ = finished
    assert FORMAT == 4
    saved = load_checkpoint(out / "checkpoint.pt")
    assert saved.keys() == {"format", "model", "optimizer", "scaler", "progress", "ranks"}
    assert load_checkpoint(out / "best.pt").keys() == {"format", "model", "progress"}
    clocks = [key for key in saved["model"] if key.endswith("_extra_state")]
    assert len(clocks) == len(Run.open(out).report().layers)
    model = Run.open(out).model()
    assert {layer.parametrization.clock.step for layer in sparing.sparse_layers(model).values()} == {20}


def test_evaluation_of_checkpoint_and_dense_file_agrees_with_the_metrics(finished):
    out, _, metrics = finished
    for which in ("last", "dense"):
        run = Run.open(out)
        result, counts = run.evaluate("test", which), run.report(which)
        assert (result.accuracy, result.correct, result.count) == (metrics["accuracy"], metrics["test_correct"], 40)
        assert (counts.total.nonzero, counts.total.macs) == (metrics["nonzero"], metrics["macs"])
    best = Run.open(out).evaluate("validation", "best")
    assert best.accuracy == max(line["validation_accuracy"] for line in read_history(out)[1:])
    model = Run.open(out).model("dense")
    assert not sparing.sparse_layers(model)
    assert Run.open(out / "dense").evaluate().accuracy == metrics["dense_accuracy"]


def test_resuming_a_finished_run_returns_its_metrics_without_training(finished):
    out, wanted, metrics = finished
    before = (out / "checkpoint.pt").stat().st_mtime_ns
    assert train_run(wanted, out, resume=True) == metrics
    assert (out / "checkpoint.pt").stat().st_mtime_ns == before


@pytest.mark.slow
def test_an_existing_directory_is_never_overwritten(finished, tmp_path):
    out, wanted, _ = finished
    with pytest.raises(InputError, match="exists already; continue it with --resume auto"):
        train_run(wanted, out)
    with pytest.raises(InputError, match=r"another recipe \(they differ in seed\)"):
        train_run(wanted.model_copy(update={"seed": 5}), out, resume=True)
    with pytest.raises(InputError, match=r"another recipe \(its method is 'str', and not 'gmp'\); continue it with"):
        train_run(wanted.model_copy(update={"method": {"name": "gmp", "sparsity": 0.9}}), out, resume=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not a run directory: it has no recipe.yaml"):
        train_run(wanted, tmp_path, resume=True)
    for nowhere in (tmp_path / "notes.txt" / "run", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match="cannot be created"):
            train_run(wanted, nowhere)
    with pytest.raises(InputError, match="is a file"):
        train_run(wanted, tmp_path / "notes.txt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt"]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "tpu"}, "device 'tpu' cannot be used here"),
        ({"select": ["conv9"]}, "no layer is named 'conv9'; did you mean 'conv1'"),
        ({"model": {"name": "resnet8", "widht": 2}}, "model 'resnet8' has no argument 'widht'; did you mean 'width'"),
        ({"model": {"name": "resnet8", "width": "wide"}}, "model 'resnet8' cannot be built"),
        ({"model": {"name": "resnet18"}}, "takes images of 3 channels; the data has 1"),
        ({"model": {"name": "resnet8", "num_classes": 5}}, "'num_classes' follows from the data"),
        ({"model": {"name": "resnet8", "in_channels": 3}}, "'in_channels' follows from the data"),
        ({"model": {"name": "resnet8", "width": 0}}, "width must be an integer >= 1, got 0"),
        ({"device": "meta"}, "device 'meta' cannot be used"),
    ],
)
def test_an_invalid_run_leaves_no_directory(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train_run(recipe(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    dense = recipe(optimizer={"lr": 0.1, "weight_decay": 0.0}, method=None)
    out = tmp_path / "run"
    train_run(dense, out, stop_after=1)
    saved = load_checkpoint(out / "checkpoint.pt")
    saved["model"]["fc.weight"].fill_(1e38)
    save_checkpoint(out / "checkpoint.pt", saved)
    before = (out / "checkpoint.pt").read_bytes()
    with pytest.raises(InputError, match=r"the loss became (nan|inf) in epoch 2: lower optimizer.lr"):
        train_run(dense, out, resume=True)
    assert (out / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("where", ["weight", "momentum_buffer"])
def test_a_weight_or_momentum_that_is_not_finite_is_named(where):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    check_finite(Ranks(torch.device("cpu")), 0.0, model, optimizer, "epoch 1")
    weight = model[0].weight
    (weight.data if where == "weight" else optimizer.state[weight][where])[0, 0] = torch.inf
    name = "'0.weight'" if where == "weight" else "'momentum_buffer of 0.weight'"
    with pytest.raises(InputError, match=f"^{name} became NaN or infinite in epoch 1"):
        check_finite(Ranks(torch.device("cpu")), 0.0, model, optimizer, "epoch 1")


def test_state_of_parameters_that_are_not_in_the_model_is_checked_one_by_one():
    others = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.SGD(others, lr=0.1, momentum=0.9)
    sum(other.sum() for other in others).backward()
    optimizer.step()
    optimizer.state[others[0]]["momentum_buffer"][0] = torch.nan
    with pytest.raises(InputError, match="'momentum_buffer of a parameter' became NaN or infinite"):
        check_finite(Ranks(torch.device("cpu")), 0.0, torch.nn.Linear(3, 2), optimizer, "epoch 1")


@pytest.mark.slow
def test_training_warns_if_all_weights_of_a_layer_are_zero_and_continues(tmp_path):
    too_sparse = recipe(optimizer={"lr": 0.1, "threshold_weight_decay": 1.0})
    with pytest.warns(SparsityWarning, match=r"step 10: every weight of 'layer.* threshold 0\.9.* is zero"):
        train_run(too_sparse, tmp_path / "run")
    assert len(read_history(tmp_path / "run")) == 2


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "foreign", "older", "newer", "absent"])
def test_an_unreadable_checkpoint_is_reported_in_one_sentence(tmp_path, monkeypatch, damage):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"model": {"w": torch.randn(1000)}})
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("no checkpoint at all")
    elif damage == "foreign":
        torch.save({"state_dict": {}}, path)
    elif damage in ("older", "newer"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "FORMAT", 3 if damage == "older" else 99)
            save_checkpoint(path, {})
    else:
        path.unlink()
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    if damage == "older":
        assert str(error.value).endswith("has format 3; this version reads 4")


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_the_recipe_is_reported(tmp_path):
    out = tmp_path / "run"
    train_run(recipe(), out, stop_after=1)
    saved = load_checkpoint(out / "checkpoint.pt")
    for broken in ({"model": {}}, {}):
        save_checkpoint(out / "checkpoint.pt", broken)
        with pytest.raises(CheckpointError, match="does not fit the recipe"):
            train_run(recipe(), out, resume=True)
        with pytest.raises(CheckpointError, match="does not fit the recipe"):
            Run.open(out).model()
    save_checkpoint(out / "checkpoint.pt", saved)
    resolved = Run.open(out).recipe
    other = resolved.model_copy(update={"method": {**resolved.method, "init": -3.0}})
    (out / "recipe.yaml").write_text(other.to_yaml())
    with pytest.raises(CheckpointError, match="init=-4.0, this run has init=-3.0"):
        Run.open(out).model()
    (out / "recipe.yaml").write_text(resolved.to_yaml())
    (out / "metrics.json").write_text('{"accuracy": ')
    with pytest.raises(InputError, match=r"metrics.json: unreadable"):
        train_run(recipe(), out, resume=True)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"epoch": 1})
    with pytest.raises(AttributeError):
        save_checkpoint(path, {"epoch": lambda: None})
    assert load_checkpoint(path)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_the_best_epoch_is_the_most_accurate_of_the_sparsest():
    def epoch(accuracy, sparsity):
        return {"validation_accuracy": accuracy, "sparsity": sparsity}

    assert is_better(epoch(0.5, 0.0), None, 0.0)
    assert is_better(epoch(0.6, 0.9), epoch(0.9, 0.1), 0.9), "much sparser"
    assert not is_better(epoch(0.9, 0.1), epoch(0.6, 0.9), 0.9), "less sparse"
    assert is_better(epoch(0.9, 0.898), epoch(0.8, 0.9), 0.9), "equally sparse and more accurate"
    assert not is_better(epoch(0.7, 0.901), epoch(0.8, 0.9), 0.901), "equally sparse and less accurate"
    assert not is_better(epoch(0.9, 0.894), epoch(0.8, 0.897), 0.9), "over half a point below the sparsest"
    assert is_better(epoch(None, 0.9), epoch(None, 0.9), 0.9), "without validation data, the later one"


@pytest.mark.slow
def test_without_a_validation_split_the_last_epoch_is_the_best(tmp_path, monkeypatch):
    data = small_run.noise()
    no_images = Images(data.validation.pixels[:0], data.validation.labels[:0])

    def all_trained() -> ImageData:
        return replace(data, validation=no_images)

    monkeypatch.setattr(small_run, "noise", all_trained)
    metrics = train_run(recipe(tensorboard=True), tmp_path / "run")
    assert metrics["validation_accuracy"] is None
    assert metrics["test_count"] == 40
    with pytest.raises(InputError, match="the data has no validation split"):
        Run.open(tmp_path / "run").evaluate("validation")
    assert [line["validation_accuracy"] for line in read_history(tmp_path / "run")] == [None, None]
    assert load_checkpoint(tmp_path / "run" / "best.pt")["progress"]["best"]["epoch"] == 2


# Mixed precision


def overflow(monkeypatch, steps):
    """Make the gradients of these steps of a run (from 1) overflow, and return the list of steps that were not."""
    number, taken = 0, []

    def backward_with_overflow(model, *arguments):
        nonlocal number
        loss = backward(model, *arguments)
        number += 1
        if number in steps:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(torch.inf)
        else:
            taken.append(number)
        return loss

    monkeypatch.setattr(loop, "backward", backward_with_overflow)
    return taken


FP16 = {
    "gmp": {"name": "gmp", "sparsity": 0.75, "begin": 0.2, "end": 1.0, "every": 3},
    "gmp, global": {"name": "gmp", "sparsity": 0.75, "begin": 0.2, "end": 1.0, "every": 3, "budget": "global"},
    "gmp, 2:4": {"name": "gmp", "end": 1.0, "every": 3, "pattern": {"name": "nm", "n": 1, "m": 2}},
    "acdc": {"name": "acdc", "sparsity": 0.75, "begin": 2, "end": 19, "phase": 3},
    "str": {"name": "str", "sparsity": 0.75, "end": 1.0, "every": 3},
    "feather": {"name": "feather", "sparsity": 0.75, "end": 1.0, "every": 3},
    "st3": {"name": "st3", "sparsity": 0.75, "end": 1.0, "every": 3},
    "spartan": {"name": "spartan", "sparsity": 0.75, "end": 1.0, "every": 3},
}


@pytest.mark.parametrize("name", FP16)
def test_a_run_whose_last_steps_overflow_in_fp16_ends_on_its_target(tmp_path, monkeypatch, name):
    taken = overflow(monkeypatch, {1, 2, 9, 18, 19, 20})
    wanted = recipe(method=FP16[name], select=["layer*"], amp="fp16", optimizer={"lr": 0.01, "weight_decay": 0.0})
    metrics = train_run(wanted, tmp_path / "run")
    assert len(taken) == 14
    model = Run.open(tmp_path / "run").model()
    layers = sparing.sparse_layers(model)
    assert {layer.parametrization.clock.step for layer in layers.values()} == {20}
    # With a target for each layer, the number of each is exact.
    sparsity = 0.5 if "nm" in str(FP16[name]) else 0.75
    total = sum(layer.weight.numel() for layer in layers.values())
    assert sum(layer.nonzero() for layer in layers.values()) == total - round(sparsity * total)
    assert Run.open(tmp_path / "run").report().missed == ()
    assert Run.open(tmp_path / "run").report("dense").total.nonzero == metrics["nonzero"]


@pytest.mark.slow
def test_steps_that_overflow_do_not_count_and_do_not_delay_the_learning_rate(tmp_path, monkeypatch):
    overflow(monkeypatch, {1, 5, 6})
    wanted = recipe(amp="fp16", schedule={"epochs": 2, "update": "epoch"})
    train_run(wanted, tmp_path / "run", stop_after=1)
    model = Run.open(tmp_path / "run").model()
    assert {layer.parametrization.clock.step for layer in sparing.sparse_layers(model).values()} == {7}
    rates = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD, "step", lambda self, *a, **k: (rates.append(self.param_groups[0]["lr"]), step(self, *a, **k))
    )
    overflow(monkeypatch, {3})
    train_run(wanted, tmp_path / "run", resume=True)
    assert rates == wanted.learning_rates(10)[11:]
    assert rates == pytest.approx([0.05] * 9)
    assert [line["lr"] for line in read_history(tmp_path / "run")] == pytest.approx([0.1, 0.05])


def test_the_moving_average_of_a_run_whose_last_steps_overflow_meets_the_target(tmp_path, monkeypatch):
    overflow(monkeypatch, {18, 19, 20})
    wanted = recipe(method=FP16["gmp"], select=["layer*"], amp="fp16", ema=0.9)
    train_run(wanted, tmp_path / "run")
    model = Run.open(tmp_path / "run").model()
    layers = sparing.sparse_layers(model)
    total = sum(layer.weight.numel() for layer in layers.values())
    assert sum(int(layer.parametrization.mask.sum()) for layer in layers.values()) == total / 4
    assert {layer.parametrization.clock.step for layer in layers.values()} == {20}
    assert Run.open(tmp_path / "run").report().missed == ()


# Penalties

PENALTIES = {
    "dst": {"name": "dst", "alpha": 0.3},
    "continuous_sparsification": {"name": "continuous_sparsification", "weight": 0.3},
    "variational_dropout": {"name": "variational_dropout", "kl_weight": 0.3, "begin": 0.0, "end": 0.0},
}


@pytest.mark.filterwarnings("ignore:.*are in evaluation mode")
@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("name", PENALTIES)
def test_the_penalty_is_added_once_and_in_full_to_the_loss(name, accumulate):
    wanted = recipe(
        model={"name": "resnet8", "width": 1}, method=PENALTIES[name], data={**NOISE, "accumulate": accumulate}
    )
    data = small_run.noise()
    model = build_model(wanted.model, data.model_arguments()).double().eval()  # without noise or batch statistics
    sparsifier = build_sparsifier(resolve(wanted, data), model)
    images, labels = next(iter(data.training(4, 0)))
    images = images.double()
    expected = torch.nn.functional.cross_entropy(model(images), labels) + sparsifier.penalty()
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(expected, parameters, allow_unused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    loss = backward(model, (images, labels), wanted, Ranks(torch.device("cpu")), scaler, sparsifier)
    torch.testing.assert_close(loss, 4 * (expected - sparsifier.penalty()).detach().float())
    thresholds = 0
    for (key, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad / 8, gradient, msg=lambda text, key=key: f"{key}: {text}")
            thresholds += "parametrizations" in key and not key.endswith("original")
    assert thresholds == len(sparsifier.layers)


@pytest.mark.slow
@pytest.mark.parametrize("name", PENALTIES)
def test_a_run_trains_with_the_penalty(tmp_path, monkeypatch, name):
    calls = []
    penalty = sparing.Sparsifier.penalty
    monkeypatch.setattr(sparing.Sparsifier, "penalty", lambda self: (calls.append(self.step), penalty(self))[1])
    method = {key: 0.003 if value == 0.3 else value for key, value in PENALTIES[name].items()}
    # It would warn, and the test fail, if a step was taken without the penalty.
    train_run(recipe(method=method, data={**NOISE, "accumulate": 2}), tmp_path / "run")
    assert calls == list(range(20))


# Logging


def test_the_progress_bar_shows_examples_per_second(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    batches = ImageBatches(images(), (0.0,), (1.0,), 3)
    log = RunLog(tmp_path, 0, False, console)
    assert len(list(log.progress(batches, 1, 2, 3))) == 3
    assert "epoch 1/2" in console.file.getvalue()
    assert "examples/s" in console.file.getvalue()


def test_the_moving_average_of_a_masked_model_is_as_sparse_as_the_model(tmp_path):
    method = {"name": "gmp", "sparsity": 0.75, "every": 1, "begin": 0.1, "end": 0.8}
    metrics = train_run(recipe(method=method, ema=0.9), tmp_path / "run")
    assert metrics["sparsity"] == pytest.approx(0.75, abs=0.001)


def test_a_history_is_read_without_damaged_lines(tmp_path):
    lines = [json.dumps({"epoch": epoch, "layers": {"fc": {"sparsity": 0.5}}}) for epoch in (1, 2, 3)]
    (tmp_path / "history.jsonl").write_text("\n".join(lines)[:-5])
    assert [line["epoch"] for line in read_history(tmp_path)] == [1, 2]
    for damage in ("5", "[1]", "{}", '{"epoch": "1", "layers": {}}', '{"epoch": 1, "layers": [1]}', "[" * 10**5, "\0"):
        (tmp_path / "history.jsonl").write_text("\n".join([lines[0], damage, lines[2], ""]))
        with pytest.warns(SparsityWarning, match=r"history.jsonl: line 2 is damaged, and left out"):
            assert [line["epoch"] for line in read_history(tmp_path)] == [1, 3]
    (tmp_path / "history.jsonl").unlink()
    (tmp_path / "history.jsonl").mkdir()
    with pytest.raises(InputError, match=r"history.jsonl: cannot be read \(not a regular file\)"):
        read_history(tmp_path)


# Data


def test_the_split_of_mnist5k_is_stratified_disjoint_and_fixed():
    data = mnist5k()
    for part, count in ((data.train, 350), (data.validation, 50), (data.test, 100)):
        assert torch.equal(part.labels.bincount(), torch.full((10,), count))
    pixels = torch.cat([data.train.pixels, data.validation.pixels, data.test.pixels]).flatten(1)
    assert len(pixels) == 5000
    # The same images on every machine: a sum over the test part that depends on their order.
    weighted = data.test.pixels.flatten(1).sum(dim=1) * torch.arange(1, 1001)
    assert int(weighted.sum()) == 12_805_108_307
    parts = stratified_split(torch.arange(20) % 4, (2, 1))
    assert not set(parts[0].tolist()) & set(parts[1].tolist())
    with pytest.raises(InputError, match="class 0 has 5 examples; the split needs 6"):
        stratified_split(torch.arange(20) % 4, (5, 1))


def images(count=7, size=5):
    return Images(torch.randint(0, 256, (count, 1, size, size), dtype=torch.uint8), torch.arange(count))


def test_batches_contain_each_image_once_in_an_order_given_by_seed_and_epoch():
    part = images()
    batches = ImageBatches(part, (0.0,), (1.0,), 3, shuffle=True, seed=1)
    assert len(batches) == 3
    orders = []
    for epoch in (1, 2, 1):
        batches.epoch = epoch
        orders.append(torch.cat([labels for _, labels in batches]).tolist())
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == list(range(7))
    assert torch.cat([labels for _, labels in ImageBatches(part, (0.0,), (1.0,), 3)]).tolist() == list(range(7))


def test_batches_normalize_and_shift_by_whole_pixels():
    part = images()
    plain = torch.cat([x for x, _ in ImageBatches(part, (0.5,), (0.25,), 3)])
    torch.testing.assert_close(plain, (part.pixels.float() / 255 - 0.5) / 0.25)
    shifted = torch.cat([x for x, _ in ImageBatches(part, (0.0,), (1.0,), 3, shift=2)])
    padded = torch.nn.functional.pad(part.pixels.float() / 255, (2, 2, 2, 2))
    offsets = set()
    for image, wide in zip(shifted, padded, strict=True):
        found = [(i, j) for i in range(5) for j in range(5) if torch.equal(wide[:, i : i + 5, j : j + 5], image)]
        assert len(found) == 1
        offsets.update(found)
    rows, columns = zip(*offsets, strict=True)
    assert len(set(rows)) > 1
    assert len(set(columns)) > 1


@pytest.mark.parametrize("changes", [{}, {"shift": 2}, {"flip": True}, {"shift": 1, "flip": True}], ids=repr)
def test_batches_have_the_strides_of_a_new_tensor(changes):
    """With other strides torch's convolutions corrupted memory on two threads, if images had one channel."""
    for x, _ in ImageBatches(images(), (0.0,), (1.0,), 3, **changes):
        assert x.stride() == torch.empty(x.shape).stride()


def test_every_rank_gets_a_share_of_every_training_batch():
    part = images(count=9)
    alone = ImageBatches(part, (0.0,), (1.0,), 4, shuffle=True, shift=1, flip=True, seed=3)
    shares = [
        ImageBatches(part, (0.0,), (1.0,), 4, shuffle=True, shift=1, flip=True, seed=3, rank=rank, ranks=2)
        for rank in range(2)
    ]
    # The last batch, of one image, is dropped with two ranks.
    assert [len(each) for each in (alone, *shares)] == [3, 2, 2]
    for whole, *parts in zip(alone, *shares, strict=False):
        for index in range(2):
            assert torch.equal(whole[index], torch.cat([part[index] for part in parts]))
    parts = [ImageBatches(part, (0.0,), (1.0,), 4, rank=rank, ranks=2) for rank in range(2)]
    assert sorted(torch.cat([labels for each in parts for _, labels in each]).tolist()) == list(range(9))


def test_flip_mirrors_about_half_of_the_images():
    part = images(count=200)
    flipped = torch.cat([x for x, _ in ImageBatches(part, (0.0,), (1.0,), 50, flip=True)])
    plain = part.pixels.float() / 255
    mirrored = [torch.equal(new, old.flip(-1)) for new, old in zip(flipped, plain, strict=True)]
    assert all(m or torch.equal(new, old) for m, new, old in zip(mirrored, flipped, plain, strict=True))
    assert 70 < sum(mirrored) < 130


def write_fashion(folder, name="train", count=60_000, kinds=("images-idx3", "labels-idx1")):
    for kind in kinds:
        shape = (count, 28, 28) if kind == "images-idx3" else (count,)
        header = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
        body = torch.arange(count, dtype=torch.int64).remainder(10).to(torch.uint8)
        body = body[:, None].expand(count, 784).contiguous() if len(shape) == 3 else body
        (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + body.numpy().tobytes(), 1))


def test_fashion_mnist_reads_the_original_files(tmp_path):
    write_fashion(tmp_path)
    with pytest.raises(InputError, match=r"t10k-images-idx3-ubyte.gz: cannot be read \(No such file"):
        fashion_mnist(str(tmp_path))
    write_fashion(tmp_path, "t10k", 10_000)
    data = fashion_mnist(str(tmp_path), shift=2, flip=True)
    assert [data.size(part) for part in ("train", "validation", "test")] == [55_000, 5_000, 10_000]
    assert data.model_arguments() == {"num_classes": 10, "in_channels": 1}
    for part in (data.train, data.validation, data.test):
        assert part.labels.bincount().tolist() == [len(part) // 10] * 10
        assert torch.equal(part.pixels[:, 0, 13, 13], part.labels.to(torch.uint8))
    digits = mnist(str(tmp_path))  # the same format, another split
    assert [digits.size(part) for part in ("train", "validation", "test")] == [54_000, 6_000, 10_000]
    labels = tmp_path / "t10k-labels-idx1-ubyte.gz"
    whole = labels.read_bytes()
    labels.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="truncated or damaged"):
        fashion_mnist(str(tmp_path))
    labels.write_bytes(gzip.compress(b"something else"))
    with pytest.raises(InputError, match="does not hold 10,000 items"):
        fashion_mnist(str(tmp_path))


def test_evaluate_counts_exactly_and_restores_the_mode():
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Dropout())
    logits = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [0, 2.0, 0]])
    result = evaluate(model, [(logits[:2], torch.tensor([0, 1])), (logits[2:], torch.tensor([2]))])
    assert (result.correct, result.count, result.accuracy) == (2, 3, 2 / 3)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2]))
    assert result.loss == pytest.approx(float(expected))
    assert model.training
    assert result.top5_accuracy is None


def test_top_5_accuracy_is_counted_with_more_than_five_classes():
    logits = torch.arange(12.0).reshape(2, 6)  # of each row the first class is the smallest
    labels = torch.tensor([0, 1])
    result = evaluate(torch.nn.Identity(), [(logits[:1], labels[:1]), (logits[1:], labels[1:])])
    assert (result.correct, result.top5_correct, result.top5_accuracy) == (0, 1, 0.5)
    assert evaluate(torch.nn.Identity(), [(logits[:, :5], labels)]).top5_correct is None


def test_warmup_cosine_equals_the_schedule_of_the_paper():
    # utils/schedulers.py of the 2020 release, written out.
    def paper(epoch):
        return (epoch + 1) / 5 if epoch < 5 else 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (epoch - 5) / 95)).item())

    for epoch in range(100):
        assert warmup_cosine(epoch, 100, 5) == pytest.approx(paper(epoch), abs=1e-6)
    assert warmup_cosine(4, 100, 5) == warmup_cosine(5, 100, 5) == 1.0
    assert warmup_cosine(100, 100, 5) == warmup_cosine(101, 100, 5) == 0.0
