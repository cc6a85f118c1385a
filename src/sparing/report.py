"""Report the weights and MACs of a model, layer by layer: counted, not estimated."""

import csv
import html
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparing.goal import missed_targets
from sparing.layers import Layer, find_layers
from sparing.macs import Example, count_applications

FIELDS = ("name", "kind", "shape", "weights", "nonzero", "sparsity", "threshold", "dense_macs", "macs")


@dataclass(frozen=True)
class Row:
    """The counts of one layer, or of several together.

    Attributes:
        name: the layer's name, "total" or "backbone".
        kind: the class of its module, such as "Conv2d".
        shape: of the weight.
        weights: how many weights it has.
        nonzero: how many effective weights are not zero.
        threshold: the threshold in force, the mean where a layer has several, None where it has none.
        dense_macs: multiply-accumulates of one forward pass if no weight were zero; None without input size.
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

    def as_dict(self) -> dict[str, Any]:
        """Every field by name, sparsity among them."""
        return {field: getattr(self, field) for field in FIELDS}


@dataclass(frozen=True)
class Report:
    """The counts of a model. Printing it gives a table.

    Attributes:
        layers: one row for every convolution, Linear and recurrent weight, sparsified or not, and
            for whatever else is sparsified.
        total: all of them.
        backbone: all but the last Linear, the classifier, which the papers leave out under this name.
        missed: a sentence for each target that is not met, with both numbers.
    """

    layers: tuple[Row, ...]
    total: Row
    backbone: Row
    missed: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The report in plain Python values."""
        return {
            "layers": [row.as_dict() for row in self.layers],
            "total": self.total.as_dict(),
            "backbone": self.backbone.as_dict(),
            "missed": list(self.missed),
        }

    def to_json(self) -> str:
        """The report as a JSON object with keys layers, total and backbone."""
        return json.dumps(self.as_dict(), indent=2)

    def to_csv(self) -> str:
        """The report as CSV: a header, one row per layer, then total and backbone. Shapes read 64x3x7x7."""
        text = io.StringIO()
        writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
        writer.writeheader()
        for row in (*self.layers, self.total, self.backbone):
            writer.writerow({**row.as_dict(), "shape": _shape(row)})
        return text.getvalue()

    def to_html(self) -> str:
        """The report as one self-contained HTML page."""
        header, *rows = self._cells()
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "\n".join(f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>" for row in rows)
        return _PAGE.format(head=head, body=body)

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
        lines = [
            "  ".join(_align(cell, width, i) for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in cells
        ]
        rule = "-" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:-2], rule, *lines[-2:], *self.missed])

    def _cells(self) -> list[list[str]]:
        rows = (*self.layers, self.total, self.backbone)
        cells = [["layer", "kind", "shape", "weights", "nonzero", "sparsity", "threshold", "dense MACs", "MACs"]]
        for row in rows:
            threshold = "" if row.threshold is None else f"{row.threshold:.4g}"
            macs = ["" if count is None else f"{count:,}" for count in (row.dense_macs, row.macs)]
            counts = [f"{row.weights:,}", f"{row.nonzero:,}", _percent(row)]
            cells.append([row.name, row.kind, _shape(row), *counts, threshold, *macs])
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
    layers = find_layers(model)
    counts = None if input_size is None else count_applications(model, input_size)
    rows = tuple(_row(layer, None if counts is None else counts[name]) for name, layer in layers.items())
    linear = [row for row in rows if row.kind == "Linear"]
    backbone = [row for row in rows if not linear or row is not linear[-1]]
    return Report(rows, _sum("total", rows), _sum("backbone", backbone), tuple(missed_targets(model)))


def _row(layer: Layer, applications: int | None) -> Row:
    threshold, weights, nonzero = layer.threshold, layer.weight.numel(), layer.nonzero()
    return Row(
        name=layer.name,
        kind=layer.kind,
        shape=tuple(layer.weight.shape),
        weights=weights,
        nonzero=nonzero,
        threshold=None if threshold is None else float(threshold.detach().mean()),
        dense_macs=None if applications is None else applications * weights,
        macs=None if applications is None else applications * nonzero,
    )


def _sum(name: str, rows: Iterable[Row]) -> Row:
    rows = list(rows)
    counted = bool(rows) and all(row.macs is not None for row in rows)
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


def _percent(row: Row) -> str:
    if not row.weights:
        return ""
    # Never rounded up to 100 while a weight is nonzero.
    return f"{min(100 * row.sparsity, 99.99):.2f} %" if row.nonzero else "100 %"


def _align(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 3 else cell.rjust(width)


_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>sparing report</title>
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2em; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: 0.2em 0.8em; text-align: right; border-bottom: 1px solid #ddd; }}
th:nth-child(-n+3), td:nth-child(-n+3) {{ text-align: left; }}
</style></head>
<body>
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table>
</body>
</html>
"""
