"""Train a recipe into a run directory."""

import copy
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import sparing
from sparing.data import SplitDataset
from sparing.errors import InputError
from sparing.files import remove_temporaries, write_text
from sparing.plots import budget_by_depth, layers_over_time
from sparing.report import Report, report
from sparing.rnn import compact_, ranks
from sparing.run.build import build_data
from sparing.run.distributed import Ranks, join
from sparing.run.evaluate import Evaluation, evaluate
from sparing.run.interrupt import Interrupted, StopSignals
from sparing.run.lock import RunLock
from sparing.run.log import read_history
from sparing.run.loop import Fitted, fit
from sparing.run.recipe import Recipe
from sparing.run.resolve import check_schedule, differing_keys, flatten, resolve, what_is_computed
from sparing.run.run import Run, write_figure
from sparing.run.weights import write_weights


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
        recipe: recipe of the run; it is resolved first (see `sparing.run.resolve`).
        out: run directory; created if it does not exist.
        resume: continue the run in the directory, or return its metrics if it is finished.
        stop_after: stop after this many epochs; `resume` continues the run later.
        console: console to print to; None prints nothing.

    Returns:
        The content of `metrics.json`, or None if the run was stopped before its last epoch.

    Raises:
        InputError: the directory is not empty and `resume` is not set, or it holds a run of another recipe; another
            process trains in it; a file cannot be written; the recipe does not fit its data; the ranks differ.
        Interrupted: a signal (Ctrl-C, SIGTERM, SIGUSR1) stopped the run after its state was saved.
    """
    out = Path(out)
    console = console or Console(quiet=True)
    with join(recipe.device, recipe.rank_timeout) as ranks:
        # Resolved before anything is written, so that an invalid recipe leaves no directory behind.
        data = build_data(recipe.data)
        recipe = resolve(recipe, data, ranks.count)
        _check_ranks(recipe, data, ranks, {"--resume": resume, "--stop-after": stop_after})
        console = console if ranks.first else Console(quiet=True)
        try:
            with StopSignals() as stop:
                return _train(recipe, data, out, ranks, resume, stop_after, console, stop)
        except OSError as error:
            raise InputError(
                f"{error.filename or out}: {error.strerror or error}; the last checkpoint, if any, is kept, continue "
                "with --resume auto"
            ) from error


def _check_ranks(recipe: Recipe, data: SplitDataset, ranks: Ranks, options: dict[str, Any]) -> None:
    """Check that all ranks train the same recipe on the same data, with the same versions.

    Raises:
        InputError: they differ.
    """
    if ranks.count == 1:
        return
    versions = recipe.resolved.versions if recipe.resolved is not None else {}
    ranks.check_same("recipes or options", {**flatten(what_is_computed(recipe)), **options, **versions})
    ranks.check_same("data", data.fingerprint())


def _train(
    recipe: Recipe,
    data: SplitDataset,
    out: Path,
    ranks: Ranks,
    resume: bool,
    stop_after: int | None,
    console: Console,
    stop: StopSignals,
) -> dict[str, Any] | None:
    with RunLock(out) as lock:
        recipe, finished = ranks.run_on_first(lambda: _prepare_directory(out, recipe, data, resume, lock))
        if finished is not None:
            console.print(f"{out} is finished")
            return finished

        dense: dict[str, Any] | None = None
        if recipe.dense_baseline:
            console.print("dense:")
            dense = _train(recipe.dense(), data, out / "dense", ranks, True, stop_after, console, stop)
            if dense is None:
                return None
            console.print(f"{recipe.method['name'] if recipe.method else ''}:")
        on_device = data.to(ranks.device)
        fitted = fit(recipe, on_device, ranks, out, console, stop, stop_after)
        if fitted is None:
            return None

        def leave() -> None:
            if stop.received and ranks.count == 1:
                raise Interrupted(stop.received)

        batches = on_device.evaluation("test", ranks.rank, ranks.count)
        test = evaluate(fitted.model, batches, ranks, leave, data.size("test"))
        return ranks.run_on_first(lambda: _finish(recipe, data, ranks, out, fitted, test, dense))


def _prepare_directory(
    out: Path, recipe: Recipe, data: SplitDataset, resume: bool, lock: RunLock
) -> tuple[Recipe, dict[str, Any] | None]:
    """Create the run directory, or check that it holds a run of this recipe; lock it and clean it up.

    Returns:
        The recipe to train, and the metrics if the run is finished.
    """
    try:
        if out.exists() and not out.is_dir():
            raise InputError(f"{out} is a file; choose another directory with --out")
        # Interrupted atomic writes leave hidden files.
        if not out.exists() or all(path.name.startswith(".") for path in out.iterdir()):
            check_schedule(recipe, len(data.training(recipe.data.batch_size, recipe.seed)))
            out.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            if not (out / "recipe.yaml").exists():  # another process may have started the run meanwhile
                remove_temporaries(out)
                write_text(out / "recipe.yaml", recipe.to_yaml())
                return recipe, None
    except OSError as error:
        raise InputError(f"{out} cannot be created: {error.strerror}; choose another directory with --out") from error
    if not resume:
        raise InputError(
            f"{out} exists already; continue it with --resume auto, or choose another directory with --out"
        )
    run = Run.open(out)
    different = differing_keys(what_is_computed(run.recipe), what_is_computed(recipe))
    if different:
        before, now = (each.method["name"] if each.method else None for each in (run.recipe, recipe))
        how = f"they differ in {', '.join(different)}"
        if before != now:  # the arguments of two methods say nothing
            how = f"its method is {before!r}, and not {now!r}"
        raise InputError(
            f"{out} holds a run of another recipe ({how}); continue it with {out / 'recipe.yaml'}, or choose another "
            "directory with --out"
        )
    if run.metrics is None:
        lock.acquire()
        remove_temporaries(out)
    # The length of the run stays as it was, also on another number of ranks; the data may have moved.
    recipe = recipe.model_copy(update={"resolved": run.resolved})
    if recipe != run.recipe:
        write_text(out / "recipe.yaml", recipe.to_yaml())
    return recipe, run.metrics


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
    write_weights(fitted.model, out)
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
    found = ranks(model)
    if not found.rows:
        return {}
    total = report(compact_(copy.deepcopy(model)), data.input_size).total
    return {"weight_ranks": found.as_dict(), "compact_weights": total.nonzero, "compact_macs": total.macs}


def _write_figures(out: Path, counts: Report) -> None:
    history = read_history(out)
    figures = {"budget": budget_by_depth(counts), "sparsity": layers_over_time(history, "sparsity")}
    if any(row.threshold is not None for row in counts.layers):
        figures["threshold"] = layers_over_time(history, "threshold")
    for name, figure in figures.items():
        write_figure(figure, out / "figures" / f"{name}.png")


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
