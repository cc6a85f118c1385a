"""Figures of reports and training histories.

matplotlib is imported only when a figure is drawn.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparing.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AXIS_LABELS = {
    "sparsity": "sparsity",
    "threshold": "threshold (same unit as the weights)",
    "nonzero": "nonzero weights",
    "macs": "multiply-accumulates (MACs)",
}


def layers_over_time(history: Sequence[Mapping[str, Any]], quantity: str) -> "Figure":
    """Plot a quantity of each layer over the epochs.

    The first layer is drawn in the darkest color and the last layer in the lightest.

    Args:
        history: the lines of `history.jsonl`.
        quantity: "sparsity" or "threshold".

    Returns:
        The figure, with one line per layer.
    """
    figure = _figure()
    axes = figure.subplots()
    last = history[-1]["layers"] if history else {}
    layers = [name for name, values in last.items() if values.get(quantity) is not None]
    epochs = [line["epoch"] for line in history]
    for index, name in enumerate(layers):
        values = [line["layers"].get(name, {}).get(quantity) for line in history]
        axes.plot(epochs, values, color=_shade(index, len(layers)), label=name)
    axes.set(xlabel="epoch", ylabel=AXIS_LABELS[quantity])
    axes.set_ylim(bottom=0)
    # With more layers the legend would not fit into the figure.
    if len(layers) <= 24:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", frameon=False)
    return figure


def budget_by_depth(report: Report) -> "Figure":
    """Plot the sparsity of each layer as a bar, in network order, and the total sparsity as a line."""
    figure = _figure()
    axes = figure.subplots()
    rows = report.layers
    axes.bar(range(len(rows)), [row.sparsity for row in rows], color=[_shade(i, len(rows)) for i in range(len(rows))])
    axes.axhline(report.total.sparsity, color="black", linewidth=1, linestyle="--", label="total")
    axes.set_xticks(range(len(rows)), [row.name for row in rows], rotation=90, fontsize="small")
    axes.set(ylabel="sparsity", ylim=(0, 1))
    axes.legend(frameon=False)
    return figure


def latency_bars(groups: Mapping[str, Mapping[str, tuple[float, float, float, str]]]) -> "Figure":
    """Plot the latency of each backend in milliseconds, with one panel per group.

    A bar shows the median, and its error bar the range from the lowest to the highest measurement. A label such as the
    speedup of the sparse network stands at the end of the bar.

    Args:
        groups: for each group title, a mapping from the backend to its median, lowest and highest
            latency in seconds, and its label.
    """
    figure = _figure()
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    names = list(dict.fromkeys(name for timings in groups.values() for name in timings))
    for axes, (title, timings) in zip(panels, groups.items(), strict=True):
        for name, (median, lowest, highest, label) in timings.items():
            error_bar = [[1000 * (median - lowest)], [1000 * (highest - median)]]
            axes.barh(name, 1000 * median, xerr=error_bar, color=_shade(names.index(name), len(names)))
            axes.text(1000 * highest, name, f"  {label}", va="center", fontsize="x-small")
        axes.margins(x=0.25)
        axes.invert_yaxis()
        axes.set_title(title, fontsize="small")
        axes.set_xlabel("latency (ms)")
        axes.tick_params(labelsize="small", labelleft=axes is panels[0])
    return figure


def _figure() -> "Figure":
    # pyplot would keep every figure in a global list.
    from matplotlib.figure import Figure

    return Figure(figsize=(8, 4.5), layout="constrained")


def _shade(index: int, count: int) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * index / max(count - 1, 1))
