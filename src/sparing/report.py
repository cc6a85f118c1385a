"""Report the weights and MACs of a model, layer by layer: counted, not estimated."""

import csv
import io
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, overload

from torch import nn

from sparing.errors import SparsityWarning, listed
from sparing.files import escape_cell, printable, write_text
from sparing.layers import Layer, all_layers
from sparing.macs import Example, find_applications
from sparing.missed import missed_targets
from sparing.page import Entry, count_facts, render
from sparing.products import Applications

FIELDS = ("name", "kind", "shape", "weights", "nonzero", "sparsity", "threshold", "dense_macs", "macs")


@dataclass(frozen=True)
class Row:
    """The counts of one layer, or of several together.

    Attributes:
        name: the layer's name, "total", "sparsified" or "backbone".
        kind: the class of its module, such as "Conv2d".
        shape: of the weight.
        weights: how many weights it has.
        nonzero: how many effective weights are not zero.
        threshold: the threshold in force, the mean where a layer has several, None where it has none.
        dense_macs: multiply-accumulates of one forward pass if no weight were zero; None without input size, or
            where they are not known.
        macs: the same without those of zero weights.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    weights: int
    nonzero: int
    threshold: float | None
    dense_macs: int | None
    macs: int | None

    @property
    def sparsity(self) -> float:
        """The fraction of zero weights, in [0, 1]."""
        return (self.weights - self.nonzero) / self.weights if self.weights else 0.0

    @property
    def percent(self) -> str:
        """The sparsity as text, never rounded up to 100 % while a weight is nonzero; "" without weights."""
        if not self.weights:
            return ""
        return f"{min(100 * self.sparsity, 99.99):.2f} %" if self.nonzero else "100 %"

    def as_dict(self) -> dict[str, Any]:
        """Every field by name, sparsity among them."""
        return {field: getattr(self, field) for field in FIELDS}


@dataclass(frozen=True)
class Report:
    """The counts of a model. Printing it gives a table.

    Attributes:
        layers: one row for every matrix and kernel among the parameters, sparsified or not: embeddings too, but no
            biases, normalizations or other vectors.
        total: all of them.
        backbone: all but the last Linear, the classifier, which the papers leave out under this name.
        sparsified: the sparsified layers; None if none or all of them are.
        missed: a sentence for each target that is not met, with both numbers.
        notes: a sentence for each kind of layers whose MACs are not those of their nonzero weights, or whose weights
            are not counted.
    """

    layers: tuple[Row, ...]
    total: Row
    backbone: Row
    sparsified: Row | None = None
    missed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def sums(self) -> tuple[Row, ...]:
        """The rows of several layers together: total, sparsified, backbone."""
        return tuple(row for row in (self.total, self.sparsified, self.backbone) if row is not None)

    def as_dict(self) -> dict[str, Any]:
        """The report in plain Python values."""
        return {
            "layers": [row.as_dict() for row in self.layers],
            **{row.name: row.as_dict() for row in self.sums},
            "missed": list(self.missed),
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """The report as a JSON object: the layers, a key for each sum, missed and notes."""
        return json.dumps(self.as_dict(), indent=2)

    @overload
    def to_csv(self) -> str: ...
    @overload
    def to_csv(self, path: str | Path) -> None: ...
    def to_csv(self, path: str | Path | None = None) -> str | None:
        """Return or write the report as CSV: a header, one row per layer, then the sums. Shapes read 64x3x7x7.

        A name that spreadsheets would take for a formula has an apostrophe in front.

        Args:
            path: file to write; None returns the text.
        """
        text = io.StringIO()
        writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
        writer.writeheader()
        for row in (*self.layers, *self.sums):
            writer.writerow({**row.as_dict(), "name": escape_cell(row.name), "shape": _shape(row)})
        return _deliver(text.getvalue(), path)

    @overload
    def to_html(self) -> str: ...
    @overload
    def to_html(self, path: str | Path) -> None: ...
    def to_html(self, path: str | Path | None = None) -> str | None:
        """Return or write the report as one HTML page, which loads nothing.

        Args:
            path: file to write; None returns the text.
        """
        return _deliver(render("sparing report", [self._entry()]), path)

    def _repr_html_(self) -> str:
        """The report in a notebook."""
        return render("sparing report", [self._entry()], fragment=True)

    def _entry(self) -> Entry:
        return Entry("model", count_facts(self), self)

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
        lines = [
            "  ".join(_align(cell, width, i) for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in cells
        ]
        rule = "-" * max(map(len, lines))
        sums = len(self.sums)
        return "\n".join([lines[0], rule, *lines[1:-sums], rule, *lines[-sums:], *self.missed, *self.notes])

    def _cells(self) -> list[list[str]]:
        rows = (*self.layers, *self.sums)
        cells = [["layer", "kind", "shape", "weights", "nonzero", "sparsity", "threshold", "dense MACs", "MACs"]]
        for row in rows:
            threshold = "" if row.threshold is None else f"{row.threshold:.4g}"
            macs = ["" if count is None else f"{count:,}" for count in (row.dense_macs, row.macs)]
            counts = [f"{row.weights:,}", f"{row.nonzero:,}", row.percent]
            cells.append([printable(row.name), row.kind, _shape(row), *counts, threshold, *macs])
        # Drop empty columns.
        keep = [i for i in range(len(cells[0])) if any(row[i] for row in cells[1:])]
        return [[row[i] for i in keep] for row in cells]


def report(model: nn.Module, input_size: Example | None = None) -> Report:
    """Count the weights and multiply-accumulates of a model, layer by layer.

    A pure function of the model: sparsified, densified and dense models give the same counts for
    the same effective weights.

    Args:
        model: any module; count on the bare model, not on a compiled or distributed wrapper.
        input_size: the shape of one input, batch included, as `(1, 3, 224, 224)`, or example
            tensors (see `count_applications`); without it the MACs stay None.

    Raises:
        InputError: the model does not run on such an input.

    Examples:
        >>> report(nn.Conv2d(3, 8, 3, padding=1), (1, 3, 32, 32)).total.macs
        221184
    """
    layers = all_layers(model)
    found = None if input_size is None else find_applications(model, input_size)
    rows = {name: _row(layer, found) for name, layer in layers.items()}
    notes = (*(found.notes() if found else ()), *_packed(model))
    for note in notes:
        warnings.warn(note, SparsityWarning, stacklevel=2)
    sparse = [rows[name] for name, layer in layers.items() if layer.is_sparsified]
    classifier = _classifier(model, layers)
    return Report(
        layers=tuple(rows.values()),
        total=_sum("total", rows.values()),
        backbone=_sum("backbone", [row for name, row in rows.items() if name != classifier]),
        sparsified=_sum("sparsified", sparse) if 0 < len(sparse) < len(rows) else None,
        missed=tuple(missed_targets(model)),
        notes=notes,
    )


def _packed(model: nn.Module) -> list[str]:
    """Return a sentence that names the layers whose weights are no parameters, as torch.ao.quantization makes them."""
    names = [
        name
        for name, module in model.named_modules()
        if ".quantized." in type(module).__module__ and hasattr(module, "set_weight_bias") and name[-6:] != "params"
    ]
    text = f"the weights of {listed(map(repr, names), 3)} are quantized and packed, and are in no sum"
    return [text] if names else []


def _classifier(model: nn.Module, layers: Mapping[str, Layer]) -> str | None:
    """Return the layer that the last Linear uses; with tied weights it may bear the name of an embedding."""
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    return next((name for name, layer in layers.items() if any(place.module in last for place in layer.places)), None)


def _row(layer: Layer, found: Applications | None) -> Row:
    threshold = layer.threshold
    return Row(
        name=layer.name,
        kind=layer.kind,
        shape=layer.shape,
        weights=prod(layer.shape),
        nonzero=layer.nonzero(),
        threshold=None if threshold is None else float(threshold.detach().mean()),
        dense_macs=None if found is None else found.dense_macs(layer),
        macs=None if found is None else found.sparse_macs(layer),
    )


def _sum(name: str, rows: Iterable[Row]) -> Row:
    rows = list(rows)
    counted = any(row.macs is not None for row in rows)
    return Row(
        name=name,
        kind="",
        shape=(),
        weights=sum(row.weights for row in rows),
        nonzero=sum(row.nonzero for row in rows),
        threshold=None,
        dense_macs=sum(row.dense_macs or 0 for row in rows) if counted else None,
        macs=sum(row.macs or 0 for row in rows) if counted else None,
    )


def _shape(row: Row) -> str:
    return "x".join(map(str, row.shape))


def _align(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 3 else cell.rjust(width)


def _deliver(text: str, path: str | Path | None) -> str | None:
    if path is None:
        return text
    write_text(path, text)
    return None
