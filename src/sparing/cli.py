"""Command line interface: `sparing train | sweep | eval | report | export | bench | budget | methods | convert`."""

import json
import shlex
import sys
import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from sparing import latency
from sparing.budget import Budget
from sparing.errors import InputError
from sparing.export import str_release
from sparing.export.runtimes import UnavailableError
from sparing.files import atomic_write, printable, write_text
from sparing.formats import FORMATS
from sparing.run.distributed import is_first_process
from sparing.run.interrupt import SAVED, Interrupted
from sparing.run.recipe import load_recipe
from sparing.run.run import Run, evaluate_file
from sparing.run.sweep import load_sweep, run_sweep
from sparing.run.training import train_run
from sparing.tables import budget_table, describe_methods, methods_table, results_table, sizes_line

app = typer.Typer(
    help="Sparse training with learned per-layer sparsity.",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich would read the brackets of a help text as markup and drop them
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Resume(str, Enum):
    """Behaviour if the run directory exists."""

    never = "never"
    auto = "auto"


class Split(str, Enum):
    """Splits of a data set to evaluate on."""

    test = "test"
    validation = "validation"


class SavedWeights(str, Enum):
    """Sets of weights that a run saves."""

    last = "last"
    best = "best"
    dense = "dense"


class Naming(str, Enum):
    """Libraries whose tensor names `convert` can write."""

    sparing = "sparing"
    torchvision = "torchvision"
    timm = "timm"


# Made from the table of exporters, so that the command accepts exactly the formats that exist.
Format = Enum("Format", [(name, name) for name in FORMATS], type=str)  # type: ignore[misc]

budget_app = typer.Typer(
    help="Show and extract layer-wise sparsity budgets.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(budget_app, name="budget")

JsonOption = Annotated[bool, typer.Option("--json", help="Print only the result, as JSON.")]
RunArgument = Annotated[Path, typer.Argument(help="Run directory.")]
WeightsOption = Annotated[
    SavedWeights,
    typer.Option(help="last: last checkpoint; best: best epoch; dense: the exported model.safetensors."),
]


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML), for example recipes/mnist5k/demo.yaml.")],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a recipe key, for example optimizer.lr=0.05. Can be repeated."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory.", show_default="runs/NAME-OF-RECIPE")] = None,
    resume: Annotated[
        Resume,
        typer.Option(help="auto: continue the run if the directory exists; never: fail if it exists."),
    ] = Resume.never,
    stop_after: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many epochs. Continue later with --resume auto.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a recipe into a run directory."""
    loaded = load_recipe(recipe, set_ or [])
    out = out or Path("runs") / recipe.stem
    console = Console(quiet=as_json, markup=False)
    changes = [argument for change in set_ or [] for argument in ("--set", change)]
    resume_command = shlex.join(["sparing", "train", str(recipe), *changes, "--out", str(out), "--resume", "auto"])
    try:
        metrics = train_run(loaded, out, resume=resume is Resume.auto, stop_after=stop_after, console=console)
    except Interrupted as stop:
        if is_first_process():
            print(f"sparing: {stop}, continue with: {resume_command}", file=sys.stderr)
        raise typer.Exit(SAVED) from None
    except KeyboardInterrupt:
        print(f"sparing: interrupted; continue with: {resume_command}", file=sys.stderr)
        raise typer.Exit(130) from None
    if not is_first_process():
        return
    if metrics is None:
        console.print(f"stopped early; continue with: {resume_command}", highlight=False, soft_wrap=True)
        if as_json:
            print(json.dumps({"finished": False, "out": str(out)}))
        return
    if as_json:
        print(json.dumps(metrics))
        return
    finished = Run.open(out)
    print(finished.report())
    console.print(results_table(metrics))
    console.print(sizes_line(metrics), highlight=False, soft_wrap=True)
    console.print(_latency(finished), highlight=False, soft_wrap=True)
    console.print(f"Written to {out}", highlight=False, soft_wrap=True)


@app.command()
def sweep(
    sweep: Annotated[Path, typer.Argument(help="Sweep file (YAML), for example recipes/sweeps/str-mnist5k.yaml.")],
    trials: Annotated[
        int | None,
        typer.Option(
            min=1, help="Total number of trials, including finished ones.", show_default="the sweep file's trials"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Study directory.", show_default="runs/NAME-OF-SWEEP")] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Database that workers on several machines share.",
            show_default="an SQLite file in the study directory",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Search a recipe's settings with Optuna.

    The objectives are high validation accuracy and few nonzero weights or MACs. Run the same command
    again to continue a stopped sweep, or while it runs to add a worker.
    """
    loaded = load_sweep(sweep)
    out = out or Path("runs") / sweep.stem
    options = [("--trials", trials), ("--out", out), ("--storage", storage)]
    given = [argument for name, value in options if value is not None for argument in (name, str(value))]
    try:
        table = run_sweep(loaded, out, storage=storage, trials=trials, console=Console(quiet=as_json, markup=False))
    except KeyboardInterrupt as stop:
        resume_command = shlex.join(["sparing", "sweep", str(sweep), *given])
        print(f"sparing: interrupted; finished trials are saved, continue with: {resume_command}", file=sys.stderr)
        raise typer.Exit(SAVED if isinstance(stop, Interrupted) else 130) from None
    if as_json:
        print(json.dumps({"out": str(out), "trials": json.loads(table.to_json(orient="records"))}))
    else:
        front = table[table["front"]].filter(regex="^(number|values|params)")
        print(front.to_string(index=False) if len(front) else "No trial has finished: see trials.csv.")
        print(f"Written to {out}")


@app.command("eval")
def eval_(
    run: Annotated[Path, typer.Argument(help="Run directory, or a .safetensors file if --recipe is given.")],
    part: Annotated[Split, typer.Option(help="Split to evaluate on.")] = Split.test,
    weights: WeightsOption = SavedWeights.last,
    recipe: Annotated[
        Path | None, typer.Option(metavar="RECIPE", help="Recipe with the model and data for a weights file.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key of --recipe. Can be repeated."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate the model of a run, or a weights file."""
    if recipe is not None:
        if run.is_dir():
            raise InputError(f"{run} is a run directory with its own recipe; remove --recipe")
        result, layer_report = evaluate_file(run, load_recipe(recipe, set_ or []), part.value)
    elif run.is_file():
        raise InputError(f"{run} is a file; give its model and data with --recipe")
    elif set_:
        raise InputError("--set requires --recipe: the recipe of a run directory cannot be changed")
    else:
        opened = Run.open(run)
        result, layer_report = opened.evaluate(part.value, weights.value), opened.report(weights.value)
    if as_json:
        counts = {key: getattr(layer_report.total, key) for key in ("sparsity", "weights", "nonzero", "macs")}
        print(json.dumps({**result.as_dict(), **counts, "part": part.value}))
    else:
        top5 = "" if result.top5_accuracy is None else f"top-5 {100 * result.top5_accuracy:.2f} %  "
        print(
            f"accuracy {100 * result.accuracy:.2f} % ({result.correct} of {result.count}, {part.value})  {top5}"
            f"loss {result.loss:.4f}  sparsity {100 * layer_report.total.sparsity:.2f} %"
        )


@app.command()
def report(
    run: RunArgument,
    weights: WeightsOption = SavedWeights.last,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the table as CSV.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the table as HTML.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show sparsity, weights and MACs per layer."""
    opened = Run.open(run)
    layer_report = opened.report(weights.value)
    for path, text in ((csv, layer_report.to_csv), (html, layer_report.to_html)):
        if path is not None:
            write_text(path, text())
    if as_json:
        print(layer_report.to_json())
        return
    print(layer_report)
    low_rank = opened.ranks(weights.value)
    if low_rank.rows:
        print(f"\n{low_rank}")


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
    written = Run.open(run).export(to.value, out, remove_filters)
    dense = (run / "model.safetensors").stat().st_size
    if as_json:
        output = {"path": str(written.path), "bytes": written.bytes, "dense_bytes": dense, "error": written.error}
        print(json.dumps(output))
        return
    checked = f"; maximum relative error against PyTorch {written.error:.1g}" if written.error else ""
    print(f"Written to {written.path}: {written.bytes:,} bytes ({dense:,} bytes dense){checked}")


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
    measured = Run.open(run).bench(tuple(batch or (1, 16)), threads)
    if as_json:
        print(measured.to_json())
        return
    print(measured)
    print(f"Written to {run / 'latency.json'} and {run / 'figures' / 'latency.png'}")


@app.command()
def methods(as_json: JsonOption = False) -> None:
    """List the sparsification methods."""
    rows = describe_methods()
    if as_json:
        print(json.dumps(rows))
        return
    Console(markup=False).print(methods_table(rows), highlight=False)


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="Checkpoint of the 2020 STR release.")],
    arch: Annotated[str, typer.Option(help=f"Architecture: {', '.join(str_release.ARCHITECTURES)}.")],
    out: Annotated[Path, typer.Option(help="Output file (.safetensors).")],
    keep_thresholds: Annotated[
        bool,
        typer.Option(
            "--keep-thresholds", help="Keep weights and thresholds separate, to load into a model after sparsify_()."
        ),
    ] = False,
    names: Annotated[
        Naming,
        typer.Option(help="Library whose ResNet loads the file. torchvision and timm need a classifier bias of 0."),
    ] = Naming.sparing,
    as_json: JsonOption = False,
) -> None:
    """Convert a checkpoint of the STR release."""
    from safetensors.torch import save_file

    state = str_release.convert(file, arch, keep_thresholds=keep_thresholds)
    if names is not Naming.sparing:
        state = str_release.with_bias(state, arch)
    with atomic_write(out) as temporary:
        # Clone because safetensors rejects tensors that share memory.
        save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, temporary)
    weights = [tensor for tensor in state.values() if tensor.dim() > 1]
    output = {
        "out": str(out),
        "arch": arch,
        "weights": sum(weight.numel() for weight in weights),
        "nonzero": None if keep_thresholds else sum(int(torch.count_nonzero(weight)) for weight in weights),
        "thresholds": sum(key.endswith(".s") for key in state),
    }
    if as_json:
        print(json.dumps(output))
    elif keep_thresholds:
        print(f"Written to {out}: {arch}, {output['weights']:,} weights and {output['thresholds']} thresholds")
    else:
        print(f"Written to {out}: {arch}, {output['nonzero']:,} of {output['weights']:,} weights are nonzero")


@budget_app.command("list")
def budget_list() -> None:
    """List the published budgets by name."""
    print("\n".join(Budget.published_names()))


@budget_app.command("show")
def budget_show(
    budget: Annotated[str, typer.Argument(help="Name of a published budget, or a .json or .csv file.")],
    model: Annotated[
        str | None, typer.Option(help="Model of sparing.models for which to count weights and MACs.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the sparsity of each layer of a budget."""
    sparsities = Budget.find(budget)
    if as_json:
        print(json.dumps(dict(sparsities)))
        return
    # A published budget is named after its model.
    name = model or (budget.partition("-")[0] if budget in Budget.published_names() else None)
    without_counts = "\n".join(f"{printable(layer)}  {100 * sparsity:.2f} %" for layer, sparsity in sparsities.items())
    print(without_counts if name is None else budget_table(sparsities, name))


@budget_app.command("extract")
def budget_extract(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="Output file (.json or .csv).")],
    weights: WeightsOption = SavedWeights.last,
) -> None:
    """Write the learned budget of a run to a file.

    Other methods read the file with --set method.budget=FILE.
    """
    sparsities = Run.open(run).budget(weights.value)
    sparsities.save(out)
    print(f"Written to {out}: {len(sparsities)} layers")


def main() -> None:
    """Run the command line. Print an `InputError` as one line and exit with status 2."""
    warnings.showwarning = _print_warning
    try:
        app()
    except InputError as error:
        print(f"sparing: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)


def _print_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    print(f"sparing: warning: {printable(str(message))}", file=sys.stderr)


def _latency(run: Run) -> str:
    """Return one line with a short latency measurement, or the reason why there is none."""
    if not latency.available():
        return "Latency: not measured; pip install 'sparing[export]', then run sparing bench"
    try:
        brief = latency.measure_briefly(run.model("dense"), run.resolved.input_size)
    except (InputError, UnavailableError) as error:
        return f"Latency: not measured: {error}"
    return f"Latency (batch 1, one thread): {brief}; compare all backends with: sparing bench {run.path}"


if __name__ == "__main__":
    main()
