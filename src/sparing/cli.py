"""Command line interface: `sparing train | sweep | eval | report | export | bench | budget | methods | convert`."""

import contextlib
import json
import platform
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import torch
import typer
from rich.console import Console
from rich.status import Status

from sparing import __version__, tables
from sparing.budget import Budget
from sparing.errors import InputError
from sparing.export import str_release
from sparing.files import printable
from sparing.formats import FORMATS
from sparing.methods import METHODS
from sparing.run.distributed import is_first_process
from sparing.run.interrupt import SAVED, Interrupted
from sparing.run.recipe import load_recipe
from sparing.run.run import Run, WeightsSource, evaluate_file
from sparing.run.summary import write_page
from sparing.run.sweep import run_sweep
from sparing.run.sweep_file import load_sweep
from sparing.run.training import train_run

app = typer.Typer(
    help="Sparse training with learned per-layer sparsity.",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich would read the brackets of a help text as markup and drop them
    pretty_exceptions_enable=False,
)
budget_app = typer.Typer(help="Show and extract layer-wise budgets.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(budget_app, name="budget")

# From the table of formats, so that the command accepts exactly those that exist.
Format: TypeAlias = Literal[tuple(FORMATS)]  # type: ignore[valid-type]

JsonOption = Annotated[bool, typer.Option("--json", help="Print only the result, as JSON.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key, such as optimizer.lr=0.05. Repeatable."),
]
RunArgument = Annotated[Path, typer.Argument(help="Run directory.")]
WeightsOption = Annotated[WeightsSource, typer.Option(help="last checkpoint, best epoch or dense model.safetensors.")]


def _completing(names: Iterable[str]) -> Callable[[str], list[str]]:
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"sparing {__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the versions and exit.")
    ] = False,
) -> None: ...


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML), for example recipes/mnist5k/demo.yaml.")],
    set_: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="Run directory.", show_default="runs/NAME-OF-RECIPE")] = None,
    resume: Annotated[
        Literal["never", "auto"],
        typer.Option(help="auto: continue the run if the directory exists; never: fail if it exists."),
    ] = "never",
    stop_after: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after this many epochs; --resume auto goes on.", show_default="the last epoch"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a recipe into a run directory."""
    loaded = load_recipe(recipe, set_ or [])
    out = out or Path("runs") / recipe.stem
    console = Console(quiet=as_json, markup=False)
    changes = [argument for change in set_ or [] for argument in ("--set", change)]
    again = shlex.join(["sparing", "train", str(recipe), *changes, "--out", str(out), "--resume", "auto"])
    with _interruptible(again):
        metrics = train_run(loaded, out, resume=resume == "auto", stop_after=stop_after, console=console)
    if not is_first_process():
        return
    if as_json:
        print(json.dumps({"finished": False, "out": str(out)} if metrics is None else metrics))
    elif metrics is None:
        print(f"stopped early; continue with: {again}")
    else:
        run = Run.open(out)
        print(run.report())
        console.print(tables.results_table(metrics))
        print(tables.sizes_line(metrics))
        print(tables.latency_line(run))
        print(f"Written to {out}")


@app.command()
def sweep(
    sweep: Annotated[Path, typer.Argument(help="Sweep file (YAML), for example recipes/sweeps/str-mnist5k.yaml.")],
    trials: Annotated[
        int | None,
        typer.Option(min=1, help="Total number of trials, finished ones included.", show_default="as in the file"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Study directory.", show_default="runs/NAME-OF-SWEEP")] = None,
    storage: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Database that workers share.", show_default="an SQLite file in --out"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Search a recipe's settings with Optuna.

    The objectives are high validation accuracy and few nonzero weights or MACs. Run the same command
    again to continue a stopped sweep, or while it runs to add a worker.
    """
    loaded = load_sweep(sweep)
    out = out or Path("runs") / sweep.stem
    with _interruptible(shlex.join(["sparing", *sys.argv[1:]])):
        table = run_sweep(loaded, out, storage=storage, trials=trials, console=Console(quiet=as_json, markup=False))
    result = {"out": str(out), "trials": json.loads(table.to_json(orient="records"))}
    print(json.dumps(result) if as_json else f"{tables.front_table(table)}\nWritten to {out}")


@app.command("eval")
def eval_(
    run: Annotated[Path, typer.Argument(help="Run directory, or a .safetensors file if --recipe is given.")],
    part: Annotated[Literal["test", "validation"], typer.Option(help="Split to evaluate on.")] = "test",
    weights: WeightsOption = "last",
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Model and data of a weights file.", show_default="that of the run"),
    ] = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate the model of a run, or a weights file."""
    if recipe is not None and run.is_dir():
        raise InputError(f"{run} is a run directory with its own recipe; remove --recipe")
    if recipe is None and run.is_file():
        raise InputError(f"{run} is a file; give its model and data with --recipe")
    if recipe is None and set_:
        raise InputError("--set requires --recipe: the recipe of a run directory cannot be changed")
    with _busy("evaluating", as_json):
        if recipe is not None:
            result, report = evaluate_file(run, load_recipe(recipe, set_ or []), part)
        else:
            opened = Run.open(run)
            result, report = opened.evaluate(part, weights), opened.report(weights)
    counts = {key: getattr(report.total, key) for key in ("sparsity", "weights", "nonzero", "macs")}
    shown = tables.evaluation_line(result, report.total.sparsity, part)
    print(json.dumps({**result.as_dict(), **counts, "part": part}) if as_json else shown)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run directories.")],
    weights: WeightsOption = "last",
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the table of one run as CSV.")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a page with figures, or a comparison of the runs.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show sparsity, weights and MACs per layer."""
    opened = [Run.open(run) for run in runs]
    if len(opened) > 1 and (csv is not None or as_json):
        raise InputError(f"--csv and --json take one run, got {len(opened)}; --html compares several")
    if csv is not None:
        opened[0].report(weights).to_csv(csv)
    if html is not None:
        write_page(opened, html, weights)
    if as_json:
        print(opened[0].report(weights).to_json())
        return
    for run in opened:
        ranks = run.ranks(weights)
        heading = [str(run.path)] if len(opened) > 1 else []
        print(*heading, run.report(weights), *([f"\n{ranks}"] if ranks.rows else []), sep="\n")
    for path in filter(None, (csv, html)):
        print(f"Written to {path}")


@app.command()
def export(
    run: RunArgument,
    to: Annotated[Format, typer.Option(help="File format.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Output file.", show_default="a file in RUN")] = None,
    remove_filters: Annotated[bool, typer.Option("--shrink", help="Remove all-zero filters before export.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Export the model of a run to a file.

    The outputs of an exported network are checked against PyTorch.
    """
    with _busy(f"exporting to {to}", as_json):
        written = Run.open(run).export(to, out, remove_filters)
    dense = (run / "model.safetensors").stat().st_size
    result = {**vars(written), "path": str(written.path), "dense_bytes": dense}
    checked = f"; maximum relative error against PyTorch {written.error:.1g}" if written.error else ""
    shown = f"Written to {written.path}: {written.bytes:,} bytes ({dense:,} bytes dense){checked}"
    print(json.dumps(result) if as_json else shown)


@app.command()
def bench(
    run: RunArgument,
    threads: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Number of threads. Can be repeated.", show_default="1 and the number of CPUs"),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch size. Can be repeated.", show_default="1 and 16")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the latency of a run's model.

    Compares the sparse model with the dense model in the installed runtimes.
    """
    with _busy("measuring", as_json) as status:
        measured = Run.open(run).bench(tuple(batch or (1, 16)), threads, _teller(status))
    written = f"Written to {run / 'latency.json'} and {run / 'figures' / 'latency.png'}"
    print(measured.to_json() if as_json else f"{measured}\n{written}")


@app.command()
def methods(
    name: Annotated[
        str | None,
        typer.Argument(help="Method to describe.", show_default="list all", autocompletion=_completing(METHODS)),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the sparsification methods, or show formula, settings and source of one."""
    described = tables.describe_methods() if name is None else tables.describe_method(name)
    shown = tables.methods_list(described) if isinstance(described, list) else tables.method_card(described)
    print(json.dumps(described) if as_json else shown)


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="Checkpoint of the 2020 STR release.")],
    arch: Annotated[str, typer.Option(help=f"Architecture: {', '.join(str_release.ARCHITECTURES)}.")],
    out: Annotated[Path, typer.Option(help="Output file (.safetensors).")],
    keep_thresholds: Annotated[
        bool,
        typer.Option("--keep-thresholds", help="Keep weights and thresholds apart, for a model after sparsify_()."),
    ] = False,
    names: Annotated[
        str_release.Naming,
        typer.Option(help="Library whose ResNet loads the file. torchvision and timm need a classifier bias of 0."),
    ] = "sparing",
    as_json: JsonOption = False,
) -> None:
    """Convert a checkpoint of the STR release."""
    written = str_release.convert_file(file, arch, out, keep_thresholds=keep_thresholds, names=names)
    result = {"out": str(out), "arch": arch, **written}
    print(json.dumps(result) if as_json else f"Written to {out}: {arch}, {tables.converted_counts(written)}")


@budget_app.command("list")
def budget_list(as_json: JsonOption = False) -> None:
    """List the published budgets by name."""
    names = Budget.published_names()
    print(json.dumps(names) if as_json else "\n".join(names))


@budget_app.command("show")
def budget_show(
    budget: Annotated[
        str, typer.Argument(help="Published budget, or a file.", autocompletion=_completing(Budget.published_names()))
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Model of sparing.models to count weights and MACs of.", show_default="that of the budget"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the sparsity of each layer of a budget."""
    print(json.dumps(dict(Budget.find(budget))) if as_json else tables.budget_table(budget, model))


@budget_app.command("extract")
def budget_extract(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="Output file (.json or .csv).")],
    weights: WeightsOption = "last",
) -> None:
    """Write the learned budget of a run to a file.

    Other methods read the file with --set method.budget=FILE.
    """
    budget = Run.open(run).budget(weights)
    budget.save(out)
    print(f"Written to {out}: {len(budget)} layers")


def main() -> None:
    """Run the command line. Print an `InputError` or `OSError` as one line and exit with status 2."""
    warnings.showwarning = _print_warning
    try:
        app()
    except InputError as error:
        _fail(str(error))
    except OSError as error:  # of a path that cannot be read, or of a full disk behind standard output
        _fail(": ".join(str(part) for part in (error.filename, error.strerror or error) if part is not None))


def _fail(message: str) -> None:
    print(f"sparing: {printable(message)}", file=sys.stderr)
    sys.exit(2)


def _print_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    print(f"sparing: warning: {printable(str(message))}", file=sys.stderr)


@contextlib.contextmanager
def _interruptible(command: str) -> Iterator[None]:
    """If Ctrl-C or a signal stops the block, say how to continue, and exit with a status that says what was saved."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if is_first_process():
            print(f"sparing: {str(stop) or 'interrupted'}, continue with: {command}", file=sys.stderr)
        raise typer.Exit(SAVED if isinstance(stop, Interrupted) else 130) from None


def _busy(what: str, quiet: bool) -> Status:
    """Show a spinner on standard error while the block runs; nothing if it is not a terminal."""
    return Console(stderr=True, quiet=quiet).status(what)


def _teller(status: Status) -> Callable[[str], object]:
    """Return what shows the stages of long work: the spinner, or lines on standard error if it is not a terminal."""
    return status.update if status.console.is_terminal else lambda stage: print(stage, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
