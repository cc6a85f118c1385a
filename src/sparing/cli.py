"""Command line interface: `sparing train | sweep | eval | report | export | bench | budget | methods | convert`."""

import inspect
import json
import re
import shlex
import sys
import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from sparing import latency
from sparing.budget import Budget
from sparing.errors import InputError, nearest
from sparing.export import str_release
from sparing.export.runtimes import UnavailableError
from sparing.export.shrink import shrink
from sparing.files import atomic_write, write_text
from sparing.formats import FORMATS
from sparing.layers import find_layers, sparse_layers
from sparing.macs import count_applications
from sparing.masks import count_kept
from sparing.method import Method
from sparing.methods import METHODS
from sparing.models import MODELS
from sparing.plots import latency_bars
from sparing.rnn import ranks
from sparing.sweep import load_sweep, run_sweep
from sparing.train.distributed import is_first_process
from sparing.train.recipe import load_recipe
from sparing.train.run import evaluate_file, evaluate_run, load_run, report_run, train_run

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
WEIGHTS_ONLY = ("compressed", "safetensors")
"""Formats that hold tensors but no network."""

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
    except KeyboardInterrupt:
        print(f"sparing: interrupted; finished epochs are saved, continue with: {resume_command}", file=sys.stderr)
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
    print(report_run(out))
    console.print(_comparison(metrics))
    console.print(_sizes(metrics), highlight=False, soft_wrap=True)
    console.print(_latency(out), highlight=False, soft_wrap=True)
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
        result = run_sweep(loaded, out, storage=storage, trials=trials, console=Console(quiet=as_json, markup=False))
    except KeyboardInterrupt:
        resume_command = shlex.join(["sparing", "sweep", str(sweep), *given])
        print(f"sparing: interrupted; finished trials are saved, continue with: {resume_command}", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps({"out": str(out), **result}))
    else:
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
        result, layer_report = evaluate_run(run, part.value, weights.value)
    output = {
        "accuracy": result.accuracy,
        "top5_accuracy": result.top5_accuracy,
        "loss": result.loss,
        "correct": result.correct,
        "count": result.count,
        "sparsity": layer_report.total.sparsity,
        "weights": layer_report.total.weights,
        "nonzero": layer_report.total.nonzero,
        "macs": layer_report.total.macs,
        "part": part.value,
    }
    if as_json:
        print(json.dumps(output))
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
    layer_report = report_run(run, weights.value)
    for path, text in ((csv, layer_report.to_csv), (html, layer_report.to_html)):
        if path is not None:
            try:
                write_text(path, text())
            except OSError as error:
                raise InputError(f"{path} cannot be written: {error.strerror}") from error
    if as_json:
        print(layer_report.to_json())
        return
    print(layer_report)
    low_rank = ranks(load_run(run, weights.value)[0])
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
    model, _, data = load_run(run, SavedWeights.dense.value)
    if remove_filters:
        if to.value in WEIGHTS_ONLY:
            raise InputError(
                f"--shrink changes the shapes of layers, but --to {to.value} writes weights without layers; "
                f"choose another format: {', '.join(name for name in FORMATS if name not in WEIGHTS_ONLY)}"
            )
        model = shrink(model, data["input_size"])
    name, save = FORMATS[to.value]
    written = save(model, out or run / name, data["input_size"])
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
    model, _, data = load_run(run, SavedWeights.dense.value)
    measured = latency.measure(model, data["input_size"], batches=batch or (1, 16), threads=threads)
    write_text(run / "latency.json", measured.to_json() + "\n")
    (run / "figures").mkdir(exist_ok=True)
    with atomic_write(run / "figures" / "latency.png") as temporary:
        latency_bars(measured.bars()).savefig(temporary, format="png", dpi=120)
    if as_json:
        print(measured.to_json())
        return
    print(measured)
    print(f"Written to {run / 'latency.json'} and {run / 'figures' / 'latency.png'}")


@app.command()
def methods(as_json: JsonOption = False) -> None:
    """List the sparsification methods."""
    rows = [_describe(name, method) for name, method in METHODS.items()]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "description", "source", "file"):
        table.add_column(heading)
    for row in rows:
        table.add_row(row["name"], row["summary"], row["source"], row["file"])
    Console(markup=False).print(table, highlight=False)


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
    try:
        with atomic_write(out) as temporary:
            save_file({key: tensor.contiguous() for key, tensor in state.items()}, temporary)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}") from error
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
    is_file = Path(budget).suffix in (".json", ".csv")
    sparsities = Budget.load(budget) if is_file else Budget.published(budget)
    if as_json:
        print(json.dumps(dict(sparsities)))
        return
    # A published budget is named after its model.
    name = model or (None if is_file else budget.partition("-")[0])
    without_counts = "\n".join(f"{layer}  {100 * sparsity:.2f} %" for layer, sparsity in sparsities.items())
    print(without_counts if name is None else _budget_table(sparsities, name))


@budget_app.command("extract")
def budget_extract(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="Output file (.json or .csv).")],
    weights: WeightsOption = SavedWeights.last,
) -> None:
    """Write the learned budget of a run to a file.

    Other methods read the file with --set method.budget=FILE.
    """
    model, _, _ = load_run(run, weights.value)
    layers = sparse_layers(model) or find_layers(model)
    sparsities = Budget({name: layer.sparsity() for name, layer in layers.items()})
    try:
        sparsities.save(out)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}") from error
    print(f"Written to {out}: {len(sparsities)} layers")


def main() -> None:
    """Run the command line. Print an `InputError` as one line and exit with status 2."""
    warnings.showwarning = _print_warning
    try:
        app()
    except InputError as error:
        print(f"sparing: {error}", file=sys.stderr)
        sys.exit(2)


def _print_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    print(f"sparing: warning: {message}", file=sys.stderr)


def _describe(name: str, method: type[Method]) -> dict[str, str]:
    """Return a method's name, description, source and file, taken from its docstrings."""
    module = inspect.getmodule(method)
    text = " ".join((module.__doc__ or "").split()) if module else ""
    source = re.search(r"Source: (.*?)(?: Deviations?:|$)", text)
    return {
        "name": name,
        "summary": (method.__doc__ or "").strip().splitlines()[0],
        "source": source.group(1) if source else "",
        "file": f"methods/{Path(inspect.getfile(method)).name}",
    }


def _budget_table(sparsities: Budget, name: str) -> str:
    """Return a table of the weights and MACs that a budget keeps in a model, at 224 x 224 pixels."""
    if name not in MODELS:
        raise InputError(f"unknown model {name!r}; {nearest(name, MODELS)}")
    with torch.device("meta"):
        model = MODELS[name]()
    layers, uses = find_layers(model), count_applications(model, (1, 3, 224, 224))
    unknown = [layer for layer in sparsities if layer not in layers]
    if unknown:
        raise InputError(f"model {name!r} has no layer {unknown[0]!r}; {nearest(unknown[0], layers)}")
    kept = {n: count_kept(layers[n].weight.numel(), sparsity) for n, sparsity in sparsities.items()}
    macs = {n: uses[n] * count for n, count in kept.items()}
    rows = [(n, layers[n].weight.numel(), kept[n], macs[n]) for n in sparsities]
    rows.append(("total", sum(row[1] for row in rows), sum(kept.values()), sum(macs.values())))
    lines = [f"{'layer':<24}{'weights':>12}{'nonzero':>12}{'sparsity':>11}{'MACs':>16}"]
    for layer, weights, nonzero, layer_macs in rows:
        sparsity = 100 * (1 - nonzero / weights)
        lines.append(f"{layer:<24}{weights:>12,}{nonzero:>12,}{sparsity:>9.2f} %{layer_macs:>16,}")
    return "\n".join(lines)


def _comparison(metrics: dict[str, Any]) -> Table:
    table = Table(title="Test results")
    for heading in ("", "accuracy", "nonzero", "weights", "sparsity", "MACs", "seconds"):
        table.add_column(heading, justify="left" if not heading else "right")
    if "dense_accuracy" in metrics:
        table.add_row(
            "dense", f"{100 * metrics['dense_accuracy']:.2f} %", f"{metrics['weights']:,}", f"{metrics['weights']:,}",
            "0 %", f"{metrics['dense_macs']:,}", f"{metrics['dense_seconds']:.0f}",
        )  # fmt: skip
    table.add_row(
        metrics["method"], f"{100 * metrics['accuracy']:.2f} %", f"{metrics['nonzero']:,}", f"{metrics['weights']:,}",
        f"{100 * metrics['sparsity']:.2f} %", f"{metrics['macs']:,}", f"{metrics['seconds']:.0f}",
    )  # fmt: skip
    return table


def _sizes(metrics: dict[str, Any]) -> str:
    if "compressed_bytes" not in metrics:  # written by an older version
        return "File size: run sparing export --to compressed"
    dense, compressed = metrics["dense_bytes"], metrics["compressed_bytes"]
    return f"File size: {compressed:,} bytes compressed, {dense:,} bytes dense ({dense / compressed:.1f}x smaller)"


def _latency(run: Path) -> str:
    """Return one line with a short latency measurement, or the reason why there is none."""
    if not latency.available():
        return "Latency: not measured; pip install 'sparing[export]', then run sparing bench"
    model, _, data = load_run(run, SavedWeights.dense.value)
    try:
        brief = latency.measure_briefly(model, data["input_size"])
    except (InputError, UnavailableError) as error:
        return f"Latency: not measured: {error}"
    return f"Latency (batch 1, one thread): {brief}; compare all backends with: sparing bench {run}"


if __name__ == "__main__":
    main()
