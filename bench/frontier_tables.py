"""Tables and figure of the results of bench/frontier.py and bench/small_runs.py, for bench/results.py."""

import statistics
from pathlib import Path

from entries import RESULTS, grouped, number_of_seeds, points_apart, ran_on, spread

SPARSITIES = (0.8, 0.9, 0.95, 0.98, 0.99)
FRONTIER = {
    "dense": "dense",
    "str": "STR",
    "str_sparsity": "STR, target sparsity",
    "str_matched": "STR, target: the sparsity that STR reached",
    "str_feather": "STR-Feather",
    "gmp": "GMP, uniform",
    "gmp_str_budget": "GMP, budget learned by STR",
    "rigl": "RigL, ERK",
    "st3_as_released": "ST-3, as released",
    "feather": "Feather",
    "feather_as_released": "Feather, as released",
    "global_magnitude": "GMP, global",
    "acdc": "AC/DC",
    "feather_macs": "Feather, target: the MACs of Feather as released",
}
"""Variants that bench/frontier.py trains: name in results/ → label in the tables."""
EQUAL_MACS = {"feather_macs": "Feather", "str_feather_macs": "STR-Feather", "st3_macs": "ST-3", "str_macs": "STR"}
"""Variants of bench/small_runs.py with a target in MACs."""


def frontier(data):
    """Return the runs of the frontier study on a data set: (variant, target sparsity) → entries; 0 for dense."""
    return grouped(Path("frontier", data), "variant", "asked")


def frontier_table():
    """Return accuracy and MACs of each variant at each sparsity."""
    folders = {path.name for path in RESULTS.joinpath("frontier").glob("*/")} | {"fashion_mnist"}
    rows = []
    for data in sorted(folders, key=lambda name: (name != "fashion_mnist", name)):
        found = frontier(data)
        columns = [f"{100 * sparsity:g} %" for sparsity in SPARSITIES]
        for title, cell in (("test accuracy, %", frontier_accuracy), ("MACs, millions", frontier_macs)):
            rows += [f"| {data}: {title} | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
            for name, label in FRONTIER.items():
                asked = [0 if name == "dense" else sparsity for sparsity in SPARSITIES]
                cells = [cell(found[name, a], a) if (name, a) in found else "not run" for a in asked]
                if set(cells) != {"not run"}:
                    rows.append(f"| {label} | {' | '.join(cells)} |")
            rows.append("")
        rows += [f"| {data}: differences, points | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
        rows += [*frontier_differences(found), ""]
        entries = [entry for group in found.values() for entry in group]
        if entries:
            count = number_of_seeds(found.values())
            rows += [f"Mean ± standard deviation; {count} per cell; {ran_on(entries)}.", ""]
    return rows[:-1]


def frontier_differences(found):
    """Return rows with the difference in accuracy of two variants with the same seed and target."""
    others = ("gmp", "rigl", "st3_as_released", "feather", "feather_as_released", "global_magnitude", "acdc")
    pairs = [("str_matched", "str")]
    pairs += [("str_sparsity", name) for name in others]
    pairs += [("str_feather", name) for name in ("str_sparsity", "feather", "feather_as_released")]
    pairs += [("feather_macs", "feather_as_released")]
    rows = []
    for name, other in pairs:
        cells = [points_apart(found.get((name, asked), []), found.get((other, asked), [])) for asked in SPARSITIES]
        if set(cells) != {"not run"}:
            rows.append(f"| {FRONTIER[name]} − {FRONTIER[other]} | {' | '.join(cells)} |")
    return rows


def frontier_accuracy(entries, asked):
    reached = statistics.mean(entry["sparsity"] for entry in entries)
    # Compare with the precision of the table.
    at = f" (at {100 * reached:.2f} %)" if round(100 * reached, 2) != round(100 * asked, 2) else ""
    return spread([entry["accuracy"] for entry in entries], 100) + at


def frontier_macs(entries, asked):
    return f"{statistics.mean(entry['macs'] for entry in entries) / 1e6:.3f}"


def frontier_figure():
    """Draw accuracy against the weights kept and against MACs, with one line per variant."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    found = frontier("fashion_mnist")
    if not found:
        return
    # The lines of these variants coincide with those of other variants.
    same = ("str_matched", "feather_as_released")
    drawn = [name for name in FRONTIER if name != "dense" and name not in same]
    figure = Figure(figsize=(11, 4), layout="constrained")
    costs = {"fraction of weights kept": lambda e: e["nonzero"] / e["weights"], "MACs": lambda e: e["macs"]}
    for axes, (title, cost) in zip(figure.subplots(1, 2, sharey=True), costs.items(), strict=True):
        for index, name in enumerate(drawn):
            groups = [entries for (variant, _), entries in found.items() if variant == name]
            points = sorted(
                (statistics.mean(map(cost, group)), statistics.mean(e["accuracy"] for e in group)) for group in groups
            )
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, marker=".", linewidth=1, color=colormaps["tab10"](index), label=FRONTIER[name])
        for (variant, _), group in found.items():
            if variant == "dense":
                dense = statistics.mean(e["accuracy"] for e in group)
                axes.axhline(dense, color="black", linewidth=1, linestyle="--", label="dense")
        axes.set(xlabel=title, xscale="log")
    lowest = 0.75  # the figure omits lower accuracies
    figure.axes[0].set(ylabel="test accuracy", ylim=(lowest, 0.92))
    figure.legend(*figure.axes[1].get_legend_handles_labels(), loc="outside right", frameon=False, fontsize="small")
    path = RESULTS.parent / "docs" / "figures" / "frontier.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def equal_macs_table():
    """Return the accuracy and the sparsity of methods with the same target in MACs, and differences in accuracy."""
    rows = []
    for folder in sorted(RESULTS.glob("[cg]pu/*/")):
        found = grouped(folder, "variant", "asked", pattern="*_macs-*.json")
        if not found:  # a folder of another study
            continue
        entries = [entry for group in found.values() for entry in group]
        shares = {entry["asked"]: entry["macs"] / entry["dense_macs"] for entry in entries}
        runs = {name: [found.get((name, asked), []) for asked in sorted(shares)] for name in EQUAL_MACS}
        runs = {name: groups for name, groups in runs.items() if any(groups)}
        tables = {
            "test accuracy, %": {EQUAL_MACS[name]: _means(groups, "accuracy") for name, groups in runs.items()},
            "sparsity, %": {EQUAL_MACS[name]: _means(groups, "sparsity") for name, groups in runs.items()},
            "differences, points": {
                f"{EQUAL_MACS[learned]} − {EQUAL_MACS[name]}": list(map(points_apart, runs[learned], runs[name]))
                for learned in ("str_macs", "str_feather_macs")
                for name in ("feather_macs", "st3_macs")
                if learned in runs and name in runs
            },
        }
        columns = [f"{100 * shares[asked]:.0f} % of the MACs" for asked in sorted(shares)]
        for title, lines in tables.items():
            rows += [f"| {folder.name}: {title} | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
            rows += [*(f"| {label} | {' | '.join(cells)} |" for label, cells in lines.items()), ""]
        count = number_of_seeds(found.values())
        rows += [f"Mean ± standard deviation; {count} per cell; {ran_on(entries)}.", ""]
    return rows[:-1]


def _means(groups, key):
    return [spread([entry[key] for entry in group], 100) if group else "not run" for group in groups]
