"""The command line: `sparing train`, `sparing eval`, `sparing report`."""

import json
import shlex
import sys
import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sparing.errors import InputError
from sparing.files import write_text
from sparing.train.recipe import load_recipe
from sparing.train.run import evaluate_run, report_run, train_run

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
    console = Console(quiet=as_json)
    changes = [part for change in set_ or [] for part in ("--set", change)]
    again = shlex.join(["sparing", "train", str(recipe), *changes, "--out", str(out), "--resume", "auto"])
    try:
        metrics = train_run(loaded, out, resume=resume is Resume.auto, stop_after=stop_after, console=console)
    except KeyboardInterrupt:
        print(f"sparing: interrupted; finished epochs are kept, continue with: {again}", file=sys.stderr)
        raise typer.Exit(130) from None
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
    console.print(f"Written to {out}", highlight=False, soft_wrap=True)


@app.command("eval")
def eval_(
    run: Run,
    part: Annotated[Part, typer.Option(help="Part of the data to evaluate on.")] = Part.test,
    weights: WhichWeights = Weights.last,
    as_json: Json = False,
) -> None:
    """Evaluate the model of a run."""
    result, account = evaluate_run(run, part.value, weights.value)
    answer = {
        "accuracy": result.accuracy,
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
        print(
            f"accuracy {100 * result.accuracy:.2f} % ({result.correct} of {result.count}, {part.value})  "
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
    print(account.to_json() if as_json else account)


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


if __name__ == "__main__":
    main()
