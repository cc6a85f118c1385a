"""Geometry of the figures of a page: bars by depth and lines over time.

The template draws them with inline SVG and CSS, so that they follow the width and the colors of the page. Text stays
text: it does not shrink with the figure.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from sparing.report import Report, Row

SIZE = 500
"""Width and height of the coordinates of lines; the template stretches them."""
MAX_POINTS = 60
"""Points of a line. More would make the page large, and are not visible."""

Tick = tuple[float, str]
"""Position on an axis in percent, and label."""
Series = Sequence[tuple[float, float | None]]
"""(x, y) of a line. It has a gap where y is None, infinite or NaN."""


@dataclass(frozen=True)
class Bar:
    """The bars of one layer.

    Attributes:
        name: end of the layer's name.
        title: text of the tooltip.
        heights: in percent of the axis.
    """

    name: str
    title: str
    heights: tuple[float, ...]


@dataclass(frozen=True)
class Bars:
    """A figure with a group of bars per layer, in the order of the network.

    Attributes:
        title: of the figure.
        legend: meaning of the bars of a group.
        bars: one per layer.
        ticks: of the vertical axis.
        mark: height of a dashed line, in percent of the axis; None draws none.
    """

    title: str
    legend: tuple[str, ...]
    bars: tuple[Bar, ...]
    ticks: tuple[Tick, ...]
    mark: float | None = None


@dataclass(frozen=True)
class Line:
    """One line of a figure.

    Attributes:
        name: text of the tooltip and the legend.
        path: data of an SVG path.
        kind: "layer", "total", "run" or "dense".
        position: of a layer: depth in [0, 1]; of a run: its index.
    """

    name: str
    path: str
    kind: str
    position: float


@dataclass(frozen=True)
class Lines:
    """A figure with lines over the epochs."""

    title: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def sparsity_by_depth(report: "Report") -> Bars:
    """Return the sparsity of each layer, with a mark at the total sparsity."""
    bars = [
        _bar(row, f"{row.percent} of {row.weights:,} weights are zero", 100 * row.sparsity) for row in report.layers
    ]
    total = report.total
    legend = ("sparsity of the layer", f"total: {total.percent}")
    return Bars("Sparsity by depth", legend, tuple(bars), _ticks(0, 1, percent=True), round(100 * total.sparsity, 1))


def shares_by_depth(report: "Report", quantity: Literal["weights", "MACs"]) -> Bars:
    """Return the share of each layer in the weights or MACs, before and after sparsification."""
    rows, total = report.layers, report.total
    if quantity == "MACs":
        counts = [(row.dense_macs or 0, row.macs or 0) for row in rows]
        sums = (total.dense_macs or 0, total.macs or 0)
    else:
        counts = [(row.weights, row.nonzero) for row in rows]
        sums = (total.weights, total.nonzero)
    shares = [
        tuple(count / whole if whole else 0.0 for count, whole in zip(pair, sums, strict=True)) for pair in counts
    ]
    top = max((max(pair) for pair in shares), default=0) or 1
    bars = [
        _bar(row, f"{kept:,} of {dense:,} {quantity}", *(100 * share / top for share in pair))
        for row, (dense, kept), pair in zip(rows, counts, shares, strict=True)
    ]
    legend = (f"share of the {sums[0]:,} dense {quantity}", f"share of the {sums[1]:,} {quantity} that remain")
    return Bars(f"Where the {quantity} are", legend, tuple(bars), _ticks(0, top, percent=True))


def _bar(row: "Row", text: str, *heights: float) -> Bar:
    name = row.name if len(row.name) <= 24 else f"…{row.name[-23:]}"
    return Bar(name, f"{row.name}: {text}", tuple(round(height, 1) for height in heights))


def lines(
    title: str,
    series: Mapping[tuple[str, str, float], Series],
    percent: bool = False,
    span: tuple[float, float] | None = None,
) -> Lines | None:
    """Return a figure of lines; None without a point.

    Args:
        title: of the figure.
        series: from (kind, name, position), as in `Line`, to the points.
        percent: the values are fractions, and the labels percentages.
        span: lowest and highest value of the vertical axis; None takes those of the points.
    """
    points = [(x, y) for values in series.values() for x, y in values if y is not None and math.isfinite(y)]
    if not points:
        return None
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = span or (min(y for _, y in points), max(y for _, y in points))
    if span is None:
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        low, high = (max(low - margin, 0.0) if low >= 0 else low - margin), high + margin
    drawn = [
        Line(name, _path(values, (left, right), (low, high)), kind, round(position, 3))
        for (kind, name, position), values in series.items()
    ]
    return Lines(
        title,
        tuple(line for line in drawn if line.path),
        tuple(tick for tick in _ticks(left, right) if float(tick[1]).is_integer()),
        _ticks(low, high, percent),
    )


def _path(values: Series, x_axis: tuple[float, float], y_axis: tuple[float, float]) -> str:
    """Return the data of an SVG path, in relative coordinates since these are shorter."""
    stride = math.ceil(len(values) / MAX_POINTS)
    kept = [values[i] for i in range(len(values)) if i % stride == 0 or i == len(values) - 1]
    text, last = "", None
    for x, y in kept:
        if y is None or not math.isfinite(y):
            last = None
            continue
        here = (_scale(x, *x_axis), SIZE - _scale(y, *y_axis))
        # A path with one point is drawn as a dot.
        text += f"M{here[0]} {here[1]}l0 0" if last is None else f" {here[0] - last[0]} {here[1] - last[1]}"
        last = here
    return text


def _scale(value: float, low: float, high: float) -> int:
    return round(SIZE * (value - low) / (high - low)) if high > low else 0


def _ticks(low: float, high: float, percent: bool = False) -> tuple[Tick, ...]:
    """Return at most six round values between two numbers."""
    if high <= low:
        return ((0, _label(low, percent)),)
    rough = (high - low) / 5
    magnitude = 10 ** math.floor(math.log10(rough))
    step = next(magnitude * factor for factor in (1, 2, 5, 10) if magnitude * factor >= rough * 0.999)
    values = [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return tuple((round(100 * (value - low) / (high - low), 1), _label(value, percent)) for value in values)


def _label(value: float, percent: bool) -> str:
    return f"{100 * value:.6g} %" if percent else f"{value:.6g}"
