"""What the command line prints: tables and lines made from results, methods and budgets."""

import dataclasses
import inspect
import re
import shlex
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from sparing import latency
from sparing.budget import Budget
from sparing.errors import InputError, nearest
from sparing.export.runtimes import UnavailableError
from sparing.files import printable
from sparing.layers import find_layers
from sparing.macs import count_applications
from sparing.masks import count_kept
from sparing.method import Method
from sparing.methods import METHODS, find_method
from sparing.models import MODELS
from sparing.run.evaluate import Evaluation
from sparing.run.run import Run

if TYPE_CHECKING:
    import pandas as pd


def describe_methods() -> list[dict[str, str]]:
    """Return name, description, source and file of every method, taken from its docstrings."""
    return [_describe(method) for method in METHODS.values()]


def describe_method(name: str) -> dict[str, Any]:
    """Return what `describe_methods` returns, and formula, settings and deviations of one method.

    Args:
        name: a name or import path, as `find_method` takes it.

    Raises:
        InputError: there is no such method.

    Examples:
        >>> describe_method("gmp")["settings"][0]["name"]
        'sparsity'
    """
    method = find_method(name)
    documented: dict[str, str] = {}
    for base in reversed(method.__mro__):
        arguments = re.search(r"^Args:\n((?: {4}.*\n?)+)", inspect.cleandoc(base.__doc__ or ""), re.MULTILINE)
        entries = re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", arguments[1] if arguments else "", re.MULTILINE)
        documented |= {argument: " ".join(text.split()) for argument, text in entries}
    settings = [
        {
            "name": field.name,
            "default": None if field.default is dataclasses.MISSING else repr(field.default),
            "meaning": documented.get(field.name, ""),
        }
        for field in dataclasses.fields(method)
    ]
    # After the title, and before the source.
    formula = re.search(r"\n\n(.*?)(?=\nSource: |\Z)", _module_text(method), re.DOTALL)
    return {
        **_describe(method), "formula": formula[1].rstrip() if formula else "", "settings": settings,
        "deviations": _paragraph(method, "Deviations?"),
    }  # fmt: skip


def _describe(method: type[Method]) -> dict[str, str]:
    return {
        "name": method.name,
        "summary": (method.__doc__ or "").strip().partition("\n")[0],
        "source": _paragraph(method, "Source"),
        "file": f"methods/{Path(inspect.getfile(method)).name}",
    }


def _module_text(method: type[Method]) -> str:
    return inspect.cleandoc(getattr(inspect.getmodule(method), "__doc__", None) or "")


def _paragraph(method: type[Method], heading: str) -> str:
    """Return the paragraph of the module's docstring that begins with a heading and a colon."""
    found = re.search(rf"^{heading}: (.*?)(?=^Deviations?: |^$|\Z)", _module_text(method), re.MULTILINE | re.DOTALL)
    return " ".join(found[1].split()) if found else ""


def methods_list(rows: list[dict[str, str]]) -> str:
    """Return a line for every method, with its name and description, as wide as the terminal."""
    start = max(len(row["name"]) for row in rows) + 2
    short = (textwrap.shorten(row["summary"], _width() - start, placeholder=" …") for row in rows)
    return "\n".join(f"{row['name']:<{start}}{summary}" for row, summary in zip(rows, short, strict=True))


def method_card(method: dict[str, Any]) -> str:
    """Return formula, settings and source of a method that `describe_method` describes, as wide as the terminal."""
    settings = [
        ("", setting["name"], setting["default"] or "required", setting["meaning"]) for setting in method["settings"]
    ]
    parts = [f"{method['name']}: {method['summary']}", method["formula"]]
    parts += [f"Settings, with defaults:\n{_columns(settings)}"] if settings else []
    paragraphs = [f"{key.capitalize()}: {method[key]}" for key in ("source", "deviations") if method[key]]
    return "\n\n".join([*filter(None, parts), *(textwrap.fill(text, _width()) for text in paragraphs)])


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Return rows in aligned columns; the last column continues below itself."""
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)][:-1]
    lines = []
    for *cells, last in rows:
        start = "".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append(textwrap.fill(last, _width(), initial_indent=start, subsequent_indent=" " * sum(widths)) or start)
    return "\n".join(lines)


def _width() -> int:
    return shutil.get_terminal_size().columns


def budget_table(name: str, model_name: str | None = None) -> str:
    """Return a table of a budget, with the weights and MACs that it keeps in a model at 224 x 224 pixels.

    Args:
        name: name of a published budget, or a budget file.
        model_name: model of `sparing.models`. A published budget is named after its model; without a model a table of
            another budget has no counts.

    Raises:
        InputError: budget or model is unknown, or the model has no layer of that name.
    """
    budget = Budget.find(name)
    if model_name is None and name in Budget.published_names():
        model_name = name.partition("-")[0]
    if model_name is None:
        return "\n".join(f"{printable(layer)}  {100 * sparsity:.2f} %" for layer, sparsity in budget.items())
    if model_name not in MODELS:
        raise InputError(f"unknown model {model_name!r}; {nearest(model_name, MODELS)}")
    with torch.device("meta"):
        model = MODELS[model_name]()
    layers = find_layers(model)
    unknown = [layer for layer in budget if layer not in layers]
    if unknown:
        raise InputError(f"model {model_name!r} has no layer {unknown[0]!r}; {nearest(unknown[0], layers)}")
    try:
        uses = count_applications(model, (1, 3, 224, 224))
    except InputError as error:
        raise InputError(
            f"model {model_name!r} does not take color images of 224 x 224 pixels, at which MACs are counted here; "
            "sparing report counts those of a run"
        ) from error
    kept = {n: count_kept(layers[n].weight.numel(), sparsity) for n, sparsity in budget.items()}
    macs = {n: uses[n] * count for n, count in kept.items()}
    rows = [(n, layers[n].weight.numel(), kept[n], macs[n]) for n in budget]
    rows.append(("total", sum(row[1] for row in rows), sum(kept.values()), sum(macs.values())))
    lines = [f"{'layer':<24}{'weights':>12}{'nonzero':>12}{'sparsity':>11}{'MACs':>16}"]
    for layer, weights, nonzero, layer_macs in rows:
        sparsity = 100 * (1 - nonzero / weights)
        lines.append(f"{printable(layer):<24}{weights:>12,}{nonzero:>12,}{sparsity:>9.2f} %{layer_macs:>16,}")
    return "\n".join(lines)


def results_table(metrics: dict[str, Any]) -> Table:
    """Return the test results of a run, next to those of its dense baseline if it has one."""
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


def sizes_line(metrics: dict[str, Any]) -> str:
    """Return the sizes of the files of weights, in bytes."""
    dense, compressed = metrics["dense_bytes"], metrics["compressed_bytes"]
    smaller = f", {dense / compressed:.1f}x smaller" if compressed < dense else ""
    return f"File size: {dense:,} bytes dense, {compressed:,} bytes compressed{smaller}"


def latency_line(run: Run) -> str:
    """Measure the latency of a run's model for a few seconds; return the result, or the reason why there is none."""
    if not latency.available():
        return "Latency: not measured; pip install 'sparing[export]', then run sparing bench"
    try:
        brief = latency.measure_briefly(run.model("dense"), run.resolved.input_size)
    except (InputError, UnavailableError) as error:
        return f"Latency: not measured: {error}"
    return (
        f"Latency (batch 1, one thread): {brief}; compare all backends with: sparing bench {shlex.quote(str(run.path))}"
    )


def evaluation_line(result: Evaluation, sparsity: float, part: str) -> str:
    """Return accuracy, loss and sparsity of a model on a split of the data."""
    top5 = "" if result.top5_accuracy is None else f"top-5 {100 * result.top5_accuracy:.2f} %  "
    return (
        f"accuracy {100 * result.accuracy:.2f} % ({result.correct} of {result.count}, {part})  {top5}"
        f"loss {result.loss:.4f}  sparsity {100 * sparsity:.2f} %"
    )


def converted_counts(written: dict[str, int | None]) -> str:
    """Return the counts of a converted checkpoint, which `export.str_release.convert_file` returns, as text."""
    if written["nonzero"] is None:
        return f"{written['weights']:,} weights and {written['thresholds']} thresholds"
    return f"{written['nonzero']:,} of {written['weights']:,} weights are nonzero"


def front_table(trials: "pd.DataFrame") -> str:
    """Return the trials of a sweep that are on the Pareto front: their objectives and settings."""
    front = trials[trials["front"]].filter(regex="^(number|values|params)")
    return str(front.to_string(index=False)) if len(front) else "No trial has finished: see trials.csv."
