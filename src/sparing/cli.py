"""The command line: `sparing train | sweep | eval | report | export | bench | budget | methods | convert`."""

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

from sparing.budget import Budget
from sparing.errors import InputError, nearest
from sparing.export import latency, str_release
from sparing.export.formats import FORMATS
from sparing.export.runtimes import UnavailableError
from sparing.export.shrink import shrink
from sparing.files import atomic_write, write_text
from sparing.layers import find_layers
from sparing.macs import count_uses
from sparing.masks import count_kept
from sparing.methods import METHODS
from sparing.models import MODELS
from sparing.plots import latency_bars
from sparing.rnn import ranks
from sparing.sparsify import Method, sparse_layers
from sparing.sweep import load_sweep, run_sweep
from sparing.train.distributed import is_first_process
from sparing.train.recipe import load_recipe
from sparing.train.run import evaluate_file, evaluate_run, load_run, report_run, train_run

app = typer.Typer(
    help="Train sparse neural networks whose layers learn how much of themselves to keep.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Resume(str, Enum):
    """What to do with a run directory that exists."""

    never = "never"
    auto = "auto"


class Part(str, Enum):
    """Parts of the data to evaluate on."""

    test = "test"
    validation = "validation"


class Weights(str, Enum):
    """Which weights of a run."""

    last = "last"
    best = "best"
    dense = "dense"


class Names(str, Enum):
    """Whose names of tensors."""

    sparing = "sparing"
    torchvision = "torchvision"
    timm = "timm"


class Format(str, Enum):
    """What to write a network as."""

    compressed = "compressed"
    safetensors = "safetensors"
    onnx = "onnx"
    mnn = "mnn"
    openvino = "openvino"


budget_app = typer.Typer(help="Budgets: the sparsity of each layer.", no_args_is_help=True)
app.add_typer(budget_app, name="budget")

Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON, and nothing else.")]
Run = Annotated[Path, typer.Argument(help="A run directory.")]
WhichWeights = Annotated[Weights, typer.Option(help="last checkpoint, best epoch, or the exported dense file.")]


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, as those under recipes/.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the recipe, e.g. optimizer.lr=0.05."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run directory. [default: runs/NAME-OF-RECIPE]")] = None,
    resume: Annotated[Resume, typer.Option(help="auto: continue what the directory holds.")] = Resume.never,
    stop_after: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many epochs; continue later with --resume auto.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a recipe into a run directory."""
    loaded = load_recipe(recipe, set_ or [])
    out = out or Path("runs") / recipe.stem
    console = Console(quiet=as_json, markup=False)
    changes = [part for change in set_ or [] for part in ("--set", change)]
    again = shlex.join(["sparing", "train", str(recipe), *changes, "--out", str(out), "--resume", "auto"])
    try:
        metrics = train_run(loaded, out, resume=resume is Resume.auto, stop_after=stop_after, console=console)
    except KeyboardInterrupt:
        print(f"sparing: interrupted; finished epochs are kept, continue with: {again}", file=sys.stderr)
        raise typer.Exit(130) from None
    if not is_first_process():
        return
    if metrics is None:
        console.print(f"stopped early; continue with: {again}", highlight=False, soft_wrap=True)
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
    sweep: Annotated[Path, typer.Argument(help="A sweep, as those under recipes/sweeps/.")],
    trials: Annotated[
        int | None, typer.Option(min=1, help="How many in all, finished ones included. [default: the sweep's]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The study's directory. [default: runs/NAME-OF-SWEEP]")] = None,
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="A database for many machines. [default: SQLite in the directory]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Search settings of a recipe for accuracy and few weights or MACs; run again to continue or to help."""
    loaded = load_sweep(sweep)
    out = out or Path("runs") / sweep.stem
    options = [("--trials", trials), ("--out", out), ("--storage", storage)]
    given = [part for name, value in options if value is not None for part in (name, str(value))]
    try:
        result = run_sweep(loaded, out, storage=storage, trials=trials, console=Console(quiet=as_json, markup=False))
    except KeyboardInterrupt:
        again = shlex.join(["sparing", "sweep", str(sweep), *given])
        print(f"sparing: interrupted; finished trials are kept, continue with: {again}", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps({"out": str(out), **result}))
    else:
        print(f"Written to {out}")


@app.command("eval")
def eval_(
    run: Annotated[Path, typer.Argument(help="A run directory; or, with --recipe, a .safetensors file of weights.")],
    part: Annotated[Part, typer.Option(help="Part of the data to evaluate on.")] = Part.test,
    weights: WhichWeights = Weights.last,
    recipe: Annotated[
        Path | None, typer.Option(metavar="RECIPE", help="For a file: the recipe whose model and data to use.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key of --recipe.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Evaluate the model of a run, or a file of weights."""
    if recipe is not None:
        if run.is_dir():
            raise InputError(f"{run} is a run directory, which has a recipe of its own; leave --recipe out")
        result, account = evaluate_file(run, load_recipe(recipe, set_ or []), part.value)
    elif run.is_file():
        raise InputError(f"{run} is a file; say with --recipe which model and data it is for")
    elif set_:
        raise InputError("--set changes the recipe given with --recipe, and a run keeps its own")
    else:
        result, account = evaluate_run(run, part.value, weights.value)
    answer = {
        "accuracy": result.accuracy,
        "top5_accuracy": result.top5_accuracy,
        "loss": result.loss,
        "correct": result.correct,
        "count": result.count,
        "sparsity": account.total.sparsity,
        "weights": account.total.weights,
        "nonzero": account.total.nonzero,
        "macs": account.total.macs,
        "part": part.value,
    }
    if as_json:
        print(json.dumps(answer))
    else:
        top5 = "" if result.top5_accuracy is None else f"top-5 {100 * result.top5_accuracy:.2f} %  "
        print(
            f"accuracy {100 * result.accuracy:.2f} % ({result.correct} of {result.count}, {part.value})  {top5}"
            f"loss {result.loss:.4f}  sparsity {100 * account.total.sparsity:.2f} %"
        )


@app.command()
def report(
    run: Run,
    weights: WhichWeights = Weights.last,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table as CSV.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table as a page of HTML.")] = None,
    as_json: Json = False,
) -> None:
    """Show what each layer of a run's model keeps."""
    account = report_run(run, weights.value)
    for path, text in ((csv, account.to_csv), (html, account.to_html)):
        if path is not None:
            try:
                write_text(path, text())
            except OSError as error:
                raise InputError(f"{path} cannot be written: {error.strerror}") from error
    if as_json:
        print(account.to_json())
        return
    print(account)
    of_low_rank = ranks(load_run(run, weights.value)[0])
    if of_low_rank.rows:
        print(f"\n{of_low_rank}")


@app.command()
def export(
    run: Run,
    to: Annotated[Format, typer.Option(help="The format.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The file to write. [default: in RUN]")] = None,
    smaller: Annotated[bool, typer.Option("--shrink", help="Cut dead filters out first, for another runtime.")] = False,
    as_json: Json = False,
) -> None:
    """Write the network of a run as a file for other programs, and check it."""
    model, _, data = load_run(run, Weights.dense.value)
    if smaller:
        if to in (Format.compressed, Format.safetensors):
            raise InputError(
                f"--shrink changes the layers, and a file of --to {to.value} holds none; use another format"
            )
        model = shrink(model, data["input_size"])
    name, save = FORMATS[to.value]
    written = save(model, out or run / name, data["input_size"])
    dense = (run / "model.safetensors").stat().st_size
    if as_json:
        answer = {"path": str(written.path), "bytes": written.bytes, "dense_bytes": dense, "error": written.error}
        print(json.dumps(answer))
        return
    checked = f"; largest difference to torch {written.error:.1g} of the largest output" if written.error else ""
    print(f"Written to {written.path}: {written.bytes:,} bytes, of {dense:,} dense{checked}")


@app.command()
def bench(
    run: Run,
    threads: Annotated[list[int] | None, typer.Option(min=1, help="[default: 1 and all there are]")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="[default: 1 and 16]")] = None,
    as_json: Json = False,
) -> None:
    """Time the sparse network of a run against the same network dense, in the runtimes installed."""
    model, _, data = load_run(run, Weights.dense.value)
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
def methods(as_json: Json = False) -> None:
    """List the methods a recipe can name."""
    rows = [_describe(name, method) for name, method in METHODS.items()]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "what it does", "source", "file"):
        table.add_column(heading)
    for row in rows:
        table.add_row(row["name"], row["summary"], row["source"], row["file"])
    Console(markup=False).print(table, highlight=False)


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="A checkpoint of the 2020 release of STR.")],
    arch: Annotated[str, typer.Option(help=f"Its network: {', '.join(str_release.ARCHITECTURES)}.")],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    keep_thresholds: Annotated[
        bool, typer.Option("--keep-thresholds", help="Keep weights and thresholds apart, for a model after sparsify_.")
    ] = False,
    names: Annotated[Names, typer.Option(help="For whose ResNet; theirs have a classifier bias.")] = Names.sparing,
    as_json: Json = False,
) -> None:
    """Make a safetensors file of a checkpoint of the 2020 release."""
    from safetensors.torch import save_file

    state = str_release.convert(file, arch, keep_thresholds=keep_thresholds)
    if names is not Names.sparing:
        state = str_release.with_bias(state, arch)
    try:
        with atomic_write(out) as temporary:
            save_file({key: tensor.contiguous() for key, tensor in state.items()}, temporary)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}") from error
    weights = [tensor for tensor in state.values() if tensor.dim() > 1]
    answer = {
        "out": str(out),
        "arch": arch,
        "weights": sum(weight.numel() for weight in weights),
        "nonzero": None if keep_thresholds else sum(int(torch.count_nonzero(weight)) for weight in weights),
        "thresholds": sum(key.endswith(".s") for key in state),
    }
    if as_json:
        print(json.dumps(answer))
    elif keep_thresholds:
        print(f"Written to {out}: {arch}, {answer['weights']:,} weights and {answer['thresholds']} thresholds")
    else:
        print(f"Written to {out}: {arch}, {answer['nonzero']:,} of {answer['weights']:,} weights are not zero")


@budget_app.command("list")
def budget_list() -> None:
    """List the published budgets."""
    print("\n".join(Budget.published_names()))


@budget_app.command("show")
def budget_show(
    budget: Annotated[str, typer.Argument(help="A published name, or a .json or .csv file.")],
    model: Annotated[str | None, typer.Option(help="Count weights and MACs on this model of sparing.models.")] = None,
    as_json: Json = False,
) -> None:
    """Show the sparsity of each layer of a budget."""
    is_file = Path(budget).suffix in (".json", ".csv")
    shares = Budget.load(budget) if is_file else Budget.published(budget)
    if as_json:
        print(json.dumps(dict(shares)))
        return
    # A published budget is named after its model.
    name = model or (None if is_file else budget.partition("-")[0])
    plain = "\n".join(f"{layer}  {100 * share:.2f} %" for layer, share in shares.items())
    print(plain if name is None else _spend(shares, name))


@budget_app.command("extract")
def budget_extract(
    run: Run,
    out: Annotated[Path, typer.Option(help="The .json or .csv file to write.")],
    weights: WhichWeights = Weights.last,
) -> None:
    """Write the budget that a run has learned, for other methods to spend: --set method.budget=FILE."""
    model, _, _ = load_run(run, weights.value)
    layers = sparse_layers(model) or find_layers(model)
    shares = Budget({name: layer.sparsity() for name, layer in layers.items()})
    try:
        shares.save(out)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}") from error
    print(f"Written to {out}: {len(shares)} layers")


def main() -> None:
    """Run the command line; bad input ends in one sentence and status 2."""
    warnings.showwarning = _one_line
    try:
        app()
    except InputError as error:
        print(f"sparing: {error}", file=sys.stderr)
        sys.exit(2)


def _one_line(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    print(f"sparing: warning: {message}", file=sys.stderr)


def _describe(name: str, method: type[Method]) -> dict[str, str]:
    """One line about a method, read off its docstrings."""
    module = inspect.getmodule(method)
    text = " ".join((module.__doc__ or "").split()) if module else ""
    source = re.search(r"Source: (.*?)(?: Deviations?:|$)", text)
    return {
        "name": name,
        "summary": (method.__doc__ or "").strip().splitlines()[0],
        "source": source.group(1) if source else "",
        "file": f"methods/{Path(inspect.getfile(method)).name}",
    }


def _spend(shares: Budget, name: str) -> str:
    """A table of what a budget keeps of a model at the paper's image size."""
    if name not in MODELS:
        raise InputError(f"unknown model {name!r}; {nearest(name, MODELS)}")
    with torch.device("meta"):
        model = MODELS[name]()
    layers, uses = find_layers(model), count_uses(model, (1, 3, 224, 224))
    unknown = [layer for layer in shares if layer not in layers]
    if unknown:
        raise InputError(f"model {name!r} has no layer {unknown[0]!r}; {nearest(unknown[0], layers)}")
    kept = {n: count_kept(layers[n].weight.numel(), share) for n, share in shares.items()}
    macs = {n: uses[n] * count for n, count in kept.items()}
    rows = [(n, layers[n].weight.numel(), kept[n], macs[n]) for n in shares]
    rows.append(("total", sum(row[1] for row in rows), sum(kept.values()), sum(macs.values())))
    lines = [f"{'layer':<24}{'weights':>12}{'kept':>12}{'sparsity':>11}{'MACs':>16}"]
    for layer, weights, count, products in rows:
        lines.append(f"{layer:<24}{weights:>12,}{count:>12,}{100 * (1 - count / weights):>9.2f} %{products:>16,}")
    return "\n".join(lines)


def _comparison(metrics: dict[str, Any]) -> Table:
    table = Table(title="Test part, evaluated once")
    for heading in ("", "accuracy", "weights kept", "of", "sparsity", "MACs", "seconds"):
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
    if "compressed_bytes" not in metrics:  # a run of an older version
        return "On disk: see sparing export --to compressed"
    dense, small = metrics["dense_bytes"], metrics["compressed_bytes"]
    return f"On disk: {small:,} bytes without the zeros, of {dense:,} with them: {dense / small:.1f} times smaller"


def _latency(run: Path) -> str:
    """A short look at the speed, where there is something to look with."""
    if not latency.available():
        return "Latency: not measured; pip install 'sparing[export]', then sparing bench"
    model, _, data = load_run(run, Weights.dense.value)
    try:
        brief = latency.measure_briefly(model, data["input_size"])
    except (InputError, UnavailableError) as error:
        return f"Latency: not measured: {error}"
    return f"Latency, batch 1, one thread: {brief}; all rivals: sparing bench {run}"


if __name__ == "__main__":
    main()
