"""Run directories: written by `sparing train`, read by the other commands."""

import copy
import json
import platform
import subprocess
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import nn

import sparing
from sparing.data import SplitDataset, check_split
from sparing.errors import CheckpointError, InputError
from sparing.export import compressed
from sparing.files import atomic_write, write_text
from sparing.macs import count_applications
from sparing.methods import STR
from sparing.plots import budget_by_depth, layers_over_time
from sparing.report import Report, report
from sparing.rnn import compact_
from sparing.rnn import ranks as ranks_of
from sparing.sparsify import dense_state_dict, sparsify_
from sparing.train.build import build_data, build_model, build_sparsifier, pick_device
from sparing.train.checkpoint import load_checkpoint
from sparing.train.distributed import Ranks, join
from sparing.train.evaluate import Evaluation, evaluate
from sparing.train.log import read_history
from sparing.train.loop import Fitted, fit
from sparing.train.recipe import Recipe, load_recipe

WeightsSource = Literal["last", "best", "dense"]


def train_run(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    stop_after: int | None = None,
    console: Console | None = None,
) -> dict[str, Any] | None:
    """Train a recipe into a run directory.

    Args:
        recipe: recipe of the run.
        out: run directory; created if it does not exist.
        resume: continue the run in the directory, or return its metrics if it is finished.
        stop_after: stop after this many epochs; `resume` continues the run later.
        console: console to print to; None prints nothing.

    Returns:
        The content of `metrics.json`, or None if the run was stopped before its last epoch.

    Raises:
        InputError: the directory is not empty and `resume` is not set, or it holds a run of another recipe; the recipe
            does not fit its data.
    """
    out = Path(out)
    console = console or Console(quiet=True)
    with join(recipe.device) as ranks:
        return _train(recipe, out, ranks, resume, stop_after, console if ranks.first else Console(quiet=True))


def _train(
    recipe: Recipe, out: Path, ranks: Ranks, resume: bool, stop_after: int | None, console: Console
) -> dict[str, Any] | None:
    # Checked before anything is written, so that an invalid recipe leaves no directory behind.
    data = build_data(recipe.data)
    recipe = check_fits(recipe, data, ranks)
    finished = ranks.run_on_first(lambda: _prepare_directory(out, recipe, resume))
    if finished is not None:
        console.print(f"{out} is finished")
        return finished

    dense: dict[str, Any] | None = None
    if recipe.dense_baseline:
        console.print("dense:")
        dense = _train(recipe.dense(), out / "dense", ranks, True, stop_after, console)
        if dense is None:
            return None
        console.print(f"{recipe.method['name'] if recipe.method else ''}:")
    data = data.to(ranks.device)
    fitted = fit(recipe, data, ranks, out, console, stop_after)
    if fitted is None:
        return None
    test = evaluate(fitted.model, data.evaluation("test", ranks.rank, ranks.count), ranks)
    return ranks.run_on_first(lambda: _finish(recipe, data, ranks, out, fitted, test, dense))


def check_fits(recipe: Recipe, data: SplitDataset, ranks: Ranks) -> Recipe:
    """Check that a recipe can be trained, without computing anything.

    Returns:
        The recipe with `for_sparsity` resolved (see `Recipe.settled`).

    Raises:
        InputError: model, method and batch size do not fit the data or each other.
    """
    if recipe.data.batch_size < ranks.count * recipe.data.accumulate:
        raise InputError(
            f"data.batch_size={recipe.data.batch_size} must be at least the number of ranks ({ranks.count}) times "
            f"data.accumulate ({recipe.data.accumulate})"
        )
    steps = len(data.training(recipe.data.batch_size, recipe.seed, ranks.rank, ranks.count))
    # The steps of one rank, since the resolved recipe must not depend on the number of ranks.
    recipe = recipe.settled(len(data.training(recipe.data.batch_size, recipe.seed)))
    trial = build_model(recipe.model, data.model_arguments()).to("meta")
    build_sparsifier(recipe, trial, recipe.schedule.epochs * steps, data.input_size)
    count_applications(trial, data.input_size)
    return recipe


def _finish(
    recipe: Recipe,
    data: SplitDataset,
    ranks: Ranks,
    out: Path,
    fitted: Fitted,
    test: Evaluation,
    dense: dict[str, Any] | None,
) -> dict[str, Any]:
    """Write the files of a finished run and return its metrics."""
    counts = report(fitted.model, data.input_size)
    device = ranks.device
    _write_model(out, fitted.model)
    write_text(out / "report.json", counts.to_json() + "\n")
    _write_figures(out, counts)
    metrics = {
        "accuracy": test.accuracy,
        **({"dense_accuracy": dense["accuracy"]} if dense else {}),
        "sparsity": counts.total.sparsity,
        "backbone_sparsity": counts.backbone.sparsity,
        "weights": counts.total.weights,
        "nonzero": counts.total.nonzero,
        "dense_macs": counts.total.dense_macs,
        "macs": counts.total.macs,
        **_compacted(fitted.model, data),
        **({"top5_accuracy": test.top5_accuracy} if test.top5_accuracy is not None else {}),
        "dense_bytes": (out / "model.safetensors").stat().st_size,
        "compressed_bytes": (out / "compressed.safetensors").stat().st_size,
        "test_correct": test.correct,
        "test_count": test.count,
        "validation_accuracy": fitted.validation_accuracy,
        "seconds": fitted.seconds,
        **({"dense_seconds": dense["seconds"]} if dense else {}),
        "method": recipe.method["name"] if recipe.method else "dense",
        "seed": recipe.seed,
        "epochs": recipe.schedule.epochs,
        "commit": _commit(),
        "sparing": sparing.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "ranks": ranks.count,
    }
    # Written last: a run counts as finished once its metrics exist.
    write_text(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def _compacted(model: nn.Module, data: SplitDataset) -> dict[str, Any]:
    """Return the ranks of low-rank layers, and the counts after `sparing.rnn.compact_`; empty without such layers."""
    found = ranks_of(model)
    if not found.rows:
        return {}
    total = report(compact_(copy.deepcopy(model)), data.input_size).total
    return {"weight_ranks": found.as_dict(), "compact_weights": total.nonzero, "compact_macs": total.macs}


def load_run(run: str | Path, weights: WeightsSource = "last") -> tuple[nn.Module, Recipe, dict[str, Any]]:
    """Load the model of a run directory, on the CPU, in evaluation mode.

    Args:
        run: the run directory.
        weights: "last", the last checkpoint; "best", the best epoch; "dense", plain modules with the effective weights
            of `model.safetensors`.

    Returns:
        The model, the recipe, and the section "data" of the checkpoint: "input_size", "model_arguments", "steps".

    Raises:
        InputError: it is not a run directory.
        CheckpointError: the file cannot be read, or does not fit the recipe.
    """
    run = Path(run)
    recipe = _read_recipe(run)
    path = run / ("best.pt" if weights == "best" else "checkpoint.pt")
    saved = load_checkpoint(path)
    missing = [key for key in ("data", "model") if key not in saved]
    if missing:
        raise CheckpointError(f"checkpoint {path}: does not fit the recipe (it has no {missing[0]!r})")
    model = build_model(recipe.model, saved["data"]["model_arguments"])
    if weights == "dense":
        path = run / "model.safetensors"
        state = _read_model(path)
    else:
        # On the meta device, so that sparsify_() does not warn about the initial weights.
        model = model.to("meta")
        build_sparsifier(recipe, model, saved["data"]["steps"], tuple(saved["data"]["input_size"]))
        model = model.to_empty(device="cpu")
        state = saved["model"]
        if weights == "last" and "average" in saved:
            state = {k.removeprefix("module."): v for k, v in saved["average"].items() if k.startswith("module.")}
    try:
        model.load_state_dict(state)
    except (InputError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint {path}: does not fit the recipe ({str(error).splitlines()[-1].strip()})"
        ) from error
    return model.eval(), recipe, saved["data"]


def evaluate_run(run: str | Path, part: str = "test", weights: WeightsSource = "last") -> tuple[Evaluation, Report]:
    """Evaluate the model of a run directory on a split of its data, "test" or "validation"."""
    model, recipe, _ = load_run(run, weights)
    return _evaluate(model, build_data(recipe.data), recipe.device, part)


def evaluate_file(path: str | Path, recipe: Recipe, part: str = "test") -> tuple[Evaluation, Report]:
    """Evaluate a file of weights in the model of a recipe, on a split of the recipe's data.

    Args:
        path: a .safetensors file of effective weights, such as `model.safetensors` of a run, or of weights and
            thresholds, as `sparing convert --keep-thresholds` writes it.
        recipe: gives `model`, `data` and `device`; its other keys are not used.
        part: split of the data, "test" or "validation".

    Raises:
        InputError: the file is not a .safetensors file.
        CheckpointError: it cannot be read, or does not fit the model.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(
            f"{path} is no .safetensors file; convert a checkpoint of the STR release with sparing convert"
        )
    state = _read_model(path)
    data = build_data(recipe.data)
    model = build_model(recipe.model, data.model_arguments())
    suffix = ".parametrizations.weight.0.s"
    thresholded = [key.removesuffix(suffix) for key in state if key.endswith(suffix)]
    try:
        if thresholded:
            # On the meta device, as in load_run.
            sparsify_(model.to("meta"), STR(), thresholded)
            model = model.to_empty(device="cpu")
        model.load_state_dict(state)
    except (InputError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"checkpoint {path}: does not fit the recipe's {recipe.model.name} ({reason})") from error
    return _evaluate(model, data, recipe.device, part)


def _evaluate(model: nn.Module, data: SplitDataset, device_name: str, part: str) -> tuple[Evaluation, Report]:
    try:
        device = pick_device(device_name)
    except InputError:  # the run was trained on another machine
        device = pick_device("auto")
    split = check_split(part)
    if not data.size(split):
        raise InputError(f"the data has no {split} split")
    data = data.to(device)
    return evaluate(model.to(device), data.evaluation(split)), report(model, data.input_size)


def report_run(run: str | Path, weights: WeightsSource = "last") -> Report:
    """Report the counts of the model of a run directory; the data is not needed."""
    model, _, data = load_run(run, weights)
    return report(model, data["input_size"])


def _prepare_directory(out: Path, recipe: Recipe, resume: bool) -> dict[str, Any] | None:
    """Create the run directory, or check that it holds a run of this recipe; return its metrics if it is finished."""
    try:
        _create_or_check(out, recipe, resume)
    except OSError as error:
        raise InputError(f"{out} cannot be created: {error.strerror}; choose another directory with --out") from error
    return _read_metrics(out)


def _create_or_check(out: Path, recipe: Recipe, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; choose another directory with --out")
    # Interrupted atomic writes leave hidden files.
    if not out.exists() or all(path.name.startswith(".") for path in out.iterdir()):
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "recipe.yaml", recipe.to_yaml())
        return
    if not resume:
        raise InputError(
            f"{out} exists already; continue it with --resume auto, or choose another directory with --out"
        )
    different = differing_keys(what_is_computed(_read_recipe(out)), what_is_computed(recipe))
    if different:
        raise InputError(
            f"{out} holds a run of another recipe (they differ in {', '.join(different)}); "
            "choose another directory with --out"
        )


def _read_recipe(run: Path) -> Recipe:
    if not (run / "recipe.yaml").is_file():
        reason = "there is no such directory" if not run.is_dir() else "it has no recipe.yaml"
        raise InputError(f"{run} is not a run directory: {reason}")
    return load_recipe(run / "recipe.yaml")


def _read_metrics(out: Path) -> dict[str, Any] | None:
    path = out / "metrics.json"
    if not path.is_file():
        return None
    try:
        metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: unreadable ({error}); delete it and resume the run to write it again") from error
    return metrics


def what_is_computed(recipe: Recipe) -> dict[str, Any]:
    """Return the keys of a recipe that affect its results: all but device, data location and logging."""
    return recipe.model_dump(mode="json", exclude={"device": True, "tensorboard": True, "data": {"root", "workers"}})


def differing_keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the keys, in dotted form, in which two nested mappings differ."""
    before, now = _flatten(before), _flatten(now)
    return sorted(key for key in (now | before) if before.get(key) != now.get(key))


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _write_model(out: Path, model: nn.Module) -> None:
    from safetensors.torch import save_file

    # Cloned because safetensors rejects tensors that share memory, and contiguous because it has no memory formats.
    plain = {
        k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in dense_state_dict(model).items()
    }
    with atomic_write(out / "model.safetensors") as temporary:
        save_file(plain, temporary)
    compressed.save(plain, out / "compressed.safetensors")


def _read_model(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(path, "pt") as file:
            if "sparing.compressed" in (file.metadata() or {}):
                return dict(compressed.load(path))
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path}: unreadable or truncated ({error})") from error


def _write_figures(out: Path, counts: Report) -> None:
    history = read_history(out)
    figures = {"budget": budget_by_depth(counts), "sparsity": layers_over_time(history, "sparsity")}
    if any(row.threshold is not None for row in counts.layers):
        figures["threshold"] = layers_over_time(history, "threshold")
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    for name, figure in figures.items():
        with atomic_write(folder / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=120)


def _commit() -> str | None:
    """Return the commit of the source tree that runs; None for an installed package."""
    try:
        source = Path(sparing.__file__).parent
        tracked = subprocess.run(["git", "ls-files", "--error-unmatch", "__init__.py"], cwd=source, capture_output=True)
        if tracked.returncode != 0:
            return None
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, cwd=source, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None
