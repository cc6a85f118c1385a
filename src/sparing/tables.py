"""Tables that the command line prints."""

import inspect
import re
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from sparing.budget import Budget
from sparing.errors import InputError, nearest
from sparing.files import printable
from sparing.layers import find_layers
from sparing.macs import count_applications
from sparing.masks import count_kept
from sparing.method import Method
from sparing.methods import METHODS
from sparing.models import MODELS


def describe_methods() -> list[dict[str, str]]:
    """Return name, description, source and file of every method, taken from its docstrings."""
    return [_describe(name, method) for name, method in METHODS.items()]


def _describe(name: str, method: type[Method]) -> dict[str, str]:
    module = inspect.getmodule(method)
    text = " ".join((module.__doc__ or "").split()) if module else ""
    source = re.search(r"Source: (.*?)(?: Deviations?:|$)", text)
    return {
        "name": name,
        "summary": (method.__doc__ or "").strip().splitlines()[0],
        "source": source.group(1) if source else "",
        "file": f"methods/{Path(inspect.getfile(method)).name}",
    }


def methods_table(rows: list[dict[str, str]]) -> Table:
    """Return the methods as a table."""
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "description", "source", "file"):
        table.add_column(heading)
    for row in rows:
        table.add_row(row["name"], row["summary"], row["source"], row["file"])
    return table


def budget_table(budget: Budget, name: str) -> str:
    """Return a table of the weights and MACs that a budget keeps in a model, at 224 x 224 pixels.

    Args:
        budget: the budget.
        name: model of `sparing.models`.

    Raises:
        InputError: the model is unknown, or has no layer of that name.
    """
    if name not in MODELS:
        raise InputError(f"unknown model {name!r}; {nearest(name, MODELS)}")
    with torch.device("meta"):
        model = MODELS[name]()
    layers, uses = find_layers(model), count_applications(model, (1, 3, 224, 224))
    unknown = [layer for layer in budget if layer not in layers]
    if unknown:
        raise InputError(f"model {name!r} has no layer {unknown[0]!r}; {nearest(unknown[0], layers)}")
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
    return f"File size: {compressed:,} bytes compressed, {dense:,} bytes dense ({dense / compressed:.1f}x smaller)"
