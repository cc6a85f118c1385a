"""Figures from reports and histories. matplotlib is imported only when one is drawn."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparing.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AXIS = {
    "sparsity": "sparsity",
    "threshold": "threshold (units of the weight)",
    "nonzero": "weights that are not zero",
    "macs": "multiply-accumulates",
}


def layers_over_time(history: Sequence[Mapping[str, Any]], quantity: str) -> "Figure":
    """One line a layer over the epochs, dark for the first layer and light for the last.

    Args:
        history: the lines of `history.jsonl`.
        quantity: "sparsity" or "threshold".
    """
    figure = _figure()
    axes = figure.subplots()
    layers = [name for name, values in history[-1]["layers"].items() if values[quantity] is not None]
    epochs = [line["epoch"] for line in history]
    for index, name in enumerate(layers):
        values = [line["layers"][name][quantity] for line in history]
        axes.plot(epochs, values, color=_shade(index, len(layers)), label=name)
    axes.set(xlabel="epoch", ylabel=AXIS[quantity])
    axes.set_ylim(bottom=0)
    # A deep network's legend would be larger than its lines.
    if len(layers) <= 24:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", frameon=False)
    return figure


def budget_by_depth(report: Report) -> "Figure":
    """A bar a layer in the order of the network: how sparse each is, and the total as a line."""
    figure = _figure()
    axes = figure.subplots()
    rows = report.layers
    axes.bar(range(len(rows)), [row.sparsity for row in rows], color=[_shade(i, len(rows)) for i in range(len(rows))])
    axes.axhline(report.total.sparsity, color="black", linewidth=1, linestyle="--", label="total")
    axes.set_xticks(range(len(rows)), [row.name for row in rows], rotation=90, fontsize="small")
    axes.set(ylabel="sparsity", ylim=(0, 1))
    axes.legend(frameon=False)
    return figure


def latency_bars(groups: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> "Figure":
    """A bar a contestant in each group, with a whisker from the lowest to the highest.

    Args:
        groups: title of the group → contestant → median, lowest and highest seconds.
    """
    figure = _figure()
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    names = list(dict.fromkeys(name for timings in groups.values() for name in timings))
    for axes, (title, timings) in zip(panels, groups.items(), strict=True):
        for name, (median, lowest, highest) in timings.items():
            whisker = [[1000 * (median - lowest)], [1000 * (highest - median)]]
            axes.barh(name, 1000 * median, xerr=whisker, color=_shade(names.index(name), len(names)))
        axes.invert_yaxis()
        axes.set_title(title, fontsize="small")
        axes.set_xlabel("ms")
        axes.tick_params(labelsize="small", labelleft=axes is panels[0])
    return figure


def pareto_front(points: Sequence[tuple[float, float]], front: Sequence[tuple[float, float]], cost: str) -> "Figure":
    """What each trial of a sweep costs and how accurate it is, and the best accuracy for a cost as steps.

    Args:
        points: cost and validation accuracy, in [0, 1], of each trial.
        front: those of them that no other beats in both, from the lowest cost up.
        cost: "nonzero" or "macs".
    """
    figure = _figure()
    axes = figure.subplots()
    costs, accuracies = zip(*points, strict=True)
    axes.scatter(costs, accuracies, color=_shade(1, 2), label="trials")
    costs, accuracies = zip(*front, strict=True)
    axes.step(costs, accuracies, where="post", color=_shade(0, 2), marker="o", label="front")
    axes.set(xlabel=AXIS[cost], ylabel="validation accuracy", xscale="log")
    axes.legend(frameon=False)
    return figure


def _figure() -> "Figure":
    # Not through pyplot, which keeps every figure in a global list.
    from matplotlib.figure import Figure

    return Figure(figsize=(8, 4.5), layout="constrained")


def _shade(index: int, count: int) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * index / max(count - 1, 1))
