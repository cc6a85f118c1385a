"""Table and figure of the results of bench/patterns.py, for bench/results.py."""

import json
from statistics import mean

from engine_tables import FP32, best
from entries import RESULTS, grouped, spread

LABELS = {
    "dense": "dense",
    "single": "single weights",
    "block4": "blocks of 4",
    "block8": "blocks of 8",
    "filters": "filters",
    "two_of_four": "2:4",
}


def points():
    """Return accuracies, sparsity, engine rows by backend and the seeds of each pattern and percentage."""
    found = grouped("patterns", "variant", "asked", pattern="*-seed*.json")
    found = {(name, round(100 * asked)): entries for (name, asked), entries in found.items()}
    timed = {}
    for pattern, percent in found:
        path = RESULTS / "patterns" / "time" / f"{pattern}-{percent}.json"
        if path.is_file():
            timed[pattern, percent] = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    order = list(LABELS)
    return {key: (found[key], timed.get(key)) for key in sorted(found, key=lambda key: (order.index(key[0]), key[1]))}


def patterns_table():
    """Return accuracy and time of each pattern and sparsity."""
    rows = [
        "| zeros | sparsity, % | test accuracy, % | engine, µs per image | speedup over the fastest dense fp32 |",
        "|---|---|---|---|---|",
    ]
    for (pattern, _), (entries, timed) in points().items():
        accuracy = spread([entry["accuracy"] for entry in entries], 100)
        sparsity = 100 * mean(entry["sparsity"] for entry in entries)
        if timed:
            engine, dense = timed["engine"], best(timed, FP32)
            cells = f"{engine['seconds'] / engine['batch'] * 1e6:.1f} | {dense['seconds'] / engine['seconds']:.2f}"
        else:
            cells = "not run | not run"
        rows.append(f"| {LABELS[pattern]} | {sparsity:.1f} | {accuracy} ({len(entries)}) | {cells} |")
    return [*rows, "", "Mean ± standard deviation (seeds). Batch 64, one thread, the network of seed 0."]


def patterns_figure():
    """Draw accuracy against the time per image on the engine, with one line per pattern."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for pattern, label in LABELS.items():
        found = [(entries, timed) for (name, _), (entries, timed) in points().items() if name == pattern and timed]
        xs = [timed["engine"]["seconds"] / timed["engine"]["batch"] * 1e6 for _, timed in found]
        ys = [mean(entry["accuracy"] for entry in entries) for entries, _ in found]
        if not found:
            continue
        axes.plot(xs, ys, marker="o", markersize=4, linewidth=1, label=label)
        for x, y, (entries, _) in zip(xs, ys, found, strict=True):
            percent = f"{100 * mean(entry['sparsity'] for entry in entries):.0f} %"
            axes.annotate(percent, (x, y), (3, 4), textcoords="offset points", fontsize="x-small")
    if axes.lines:
        axes.set(xlabel="engine, µs per image (batch 64, one thread)", ylabel="test accuracy")
        axes.legend(frameon=False)
        figure.savefig(RESULTS.parent / "docs" / "figures" / "patterns.png", dpi=110, metadata={"Software": None})
