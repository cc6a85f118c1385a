"""The ledger of our own runs, and the tables of README and docs that are built from it.

    python bench/results.py add RUN RECIPE    copy the metrics of a finished run into results/
    python bench/results.py table             write the tables into README.md and the pages of docs/
    python bench/results.py figures           draw docs/figures/

A row of accuracy is the mean over the seeds of one recipe at one commit, with the sample standard
deviation where there are several. Nothing in the tables is typed by hand.
"""

import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- {}: built by bench/results.py from results/ -->", "<!-- end -->"


def add(run, recipe):
    """Put a finished run into the ledger, one file a seed."""
    metrics = json.loads(Path(run, "metrics.json").read_text())
    folder = ROOT / "results" / Path(recipe).with_suffix("").relative_to("recipes")
    folder.mkdir(parents=True, exist_ok=True)
    layers = json.loads(Path(run, "report.json").read_text())["layers"]
    entry = {"recipe": str(recipe), **metrics, "budget": {layer["name"]: layer["sparsity"] for layer in layers}}
    (folder / f"seed{metrics['seed']}.json").write_text(json.dumps(entry, indent=2) + "\n")


def spread(values, scale=1.0, digits=2):
    """The mean, with the standard deviation if there are several values."""
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"


def recipes():
    """The finished runs, a list of seeds for each recipe: dense first, then by sparsity."""
    folders = {path.parent for path in ROOT.joinpath("results").rglob("seed*.json")}
    found = [[json.loads(path.read_text()) for path in sorted(folder.glob("seed*.json"))] for folder in folders]
    return sorted(found, key=lambda entries: (Path(entries[0]["recipe"]).parent, entries[0]["sparsity"]))


def runs_table():
    """A sparse row a recipe, and a dense row where it was trained beside it."""
    rows = [
        "| recipe | | test accuracy, % | sparsity, % | weights kept | MACs | runs |",
        "|---|---|---|---|---|---|---|",
    ]
    hardware = {}
    for entries in recipes():
        first, recipe, count = entries[0], Path(entries[0]["recipe"]), len(entries)
        (commit,) = {entry["commit"] for entry in entries}
        machine = {f"{e['device']}, {e['threads']} thread(s), torch {e['torch']}, commit {commit[:7]}" for e in entries}
        hardware.setdefault("; ".join(sorted(machine)), set()).add(recipe.parent.name)
        cell = f"[{recipe.parent.name}/{recipe.stem}]({recipe})"
        if "dense_accuracy" in first:
            dense = spread([entry["dense_accuracy"] for entry in entries], 100)
            rows.append(f"| {cell} | dense | {dense} | 0 | {first['weights']:,} | {first['dense_macs']:,} | {count} |")
            cell = ""
        values = {key: [entry[key] for entry in entries] for key in ("accuracy", "sparsity", "nonzero", "macs")}
        rows.append(
            f"| {cell} | {first['method']} | {spread(values['accuracy'], 100)} | {spread(values['sparsity'], 100)} "
            f"| {round(statistics.mean(values['nonzero'])):,} | {round(statistics.mean(values['macs'])):,} | {count} |"
        )
    notes = [f"{', '.join(sorted(names))}: {machine}" for machine, names in hardware.items()]
    return [*rows, "", f"Seeds 0 up; mean ± standard deviation; {'; '.join(notes)}."]


def budget_figure():
    """Learned budgets by depth, ours on Fashion-MNIST beside the paper's on ImageNet."""
    from matplotlib.figure import Figure

    from sparing import Budget

    ours = [entries[0] for entries in recipes() if "fashion-mnist/str" in entries[0]["recipe"]]
    left = {f"{100 * entry['sparsity']:.2f} %": entry["budget"] for entry in ours}
    names = ("resnet50-str-90.23", "resnet50-str-95.15", "resnet50-str-98.05")
    right = {f"{name.rpartition('-')[2]} %": dict(Budget.published(name)) for name in names}
    figure = Figure(figsize=(9, 4), layout="constrained")
    titles = ("ours: small ResNet, Fashion-MNIST, seed 0", "the paper's: ResNet-50, ImageNet")
    for axes, title, budgets in zip(figure.subplots(1, 2, sharey=True), titles, (left, right), strict=True):
        for label, budget in budgets.items():
            depth = [index / (len(budget) - 1) for index in range(len(budget))]
            axes.plot(depth, list(budget.values()), marker=".", linewidth=1, label=label)
        axes.set(title=title, xlabel="depth, from the first layer to the last", ylim=(0, 1))
        axes.legend(frameon=False, title="sparsity")
    figure.axes[0].set_ylabel("sparsity of the layer")
    path = ROOT / "docs" / "figures" / "budget_by_depth.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def methods_table():
    """Every method at 90 % on one recipe, best first, beside static random and dense."""
    rows = [
        "| method | test accuracy, % | sparsity, % | MACs | above static random | step time, of dense |",
        "|---|---|---|---|---|---|",
    ]
    timed = json.loads(ROOT.joinpath("results/step_overhead/methods.json").read_text())
    step = {row["variant"]: row["ratio"] for row in timed["rows"]}
    model = f"{timed['rows'][0]['model']}, batch {timed['rows'][0]['batch']}, {timed['options']['rounds']} rounds"
    entries = [json.loads(path.read_text()) for path in ROOT.joinpath("results/all_methods").glob("*.json")]
    by_method = {}
    for entry in sorted(entries, key=lambda entry: entry["seed"]):
        by_method.setdefault(entry["method"], []).append(entry)
    mean = {name: statistics.mean(e["accuracy"] for e in runs) for name, runs in by_method.items()}
    floor = mean.get("static_random", 0)
    for name in sorted(mean, key=mean.get, reverse=True):
        values = {key: [e[key] for e in by_method[name]] for key in ("accuracy", "sparsity", "macs")}
        above = "" if name in ("dense", "static_random") else ("yes" if mean[name] > floor else "no")
        rows.append(
            f"| {name} | {spread(values['accuracy'], 100)} | {spread(values['sparsity'], 100)} "
            f"| {round(statistics.mean(values['macs'])):,} | {above} | {step[name]:.2f} |"
        )
    notes = {f"{e['device']}, torch {e['torch']}, commit {(e['commit'] or 'none')[:7]}" for e in entries}
    count = {len(runs) for runs in by_method.values()}
    seeds = f"{min(count, default=0)} seed(s)"
    return [*rows, "", f"Recipe gmp with one word swapped; {seeds}; {'; '.join(sorted(notes))}. Step time: {model}."]


def overhead_table():
    """The cost of a step as ratios to dense."""
    rows = ["| step time, of dense | STR | formula left to autograd |", "|---|---|---|"]
    notes = set()
    for path in sorted(ROOT.joinpath("results/step_overhead").glob("cpu*.json")):
        result = json.loads(path.read_text())
        notes.add(
            f"{result['device']}, torch {result['torch']}, {result['options']['rounds']} interleaved rounds, "
            f"commit {result['commit'][:7]}"
        )
        for model in dict.fromkeys(row["model"] for row in result["rows"]):
            mine = {row["variant"]: row for row in result["rows"] if row["model"] == model}
            cells = [
                f"{row['ratio']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"
                for row in (mine["str"], mine["naive"])
            ]
            rows.append(f"| {model}, batch {mine['str']['batch']}, {mine['str']['size']}² | {' | '.join(cells)} |")
        rows.append(f"| `import sparing`, of `import torch` | {result['import']['ratio']:.2f} | |")
    return [*rows, "", f"Medians, lowest and highest; {'; '.join(sorted(notes))}."]


def target_table():
    """STR asked for a total, beside STR as it is, ST-3 and Feather, at the same percentages of zeros."""
    found, notes = {}, set()
    for path in sorted(ROOT.joinpath("results/target").glob("*.json")):
        entry = json.loads(path.read_text())
        found.setdefault((entry["percent"], entry["row"]), []).append(entry)
        threads = f"{entry['threads']} thread(s), torch {entry['torch']}, commit {(entry['commit'] or 'none')[:7]}"
        notes.add(f"{entry['device']}, {threads}")
    rows = [
        "| asked for | | test accuracy, % | sparsity, % | MACs | weights of the emptiest layer | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    names = {"str_sparsity": "STR, `sparsity=`", "str": "STR, decay by trial", "st3": "ST-3", "feather": "Feather"}
    asked = [(percent, row) for percent in (90, 95, 98) for row in names]
    names["str_macs"] = "STR, `macs=`"
    for percent, row in [*asked, *(key for key in sorted(found) if key[1] == "str_macs")]:
        entries = found.get((percent, row))
        goal = f"{100 - percent} % of MACs" if row == "str_macs" else f"{percent} % zeros"
        if entries is None:
            rows.append(f"| {goal} | {names[row]} | not run | | | | 0 |")
            continue
        values = {key: [entry[key] for entry in entries] for key in ("accuracy", "sparsity", "macs")}
        emptiest = min(min(entry["nonzero_of_layers"].values()) for entry in entries)
        rows.append(
            f"| {goal} | {names[row]} | {spread(values['accuracy'], 100)} | {spread(values['sparsity'], 100)} "
            f"| {round(statistics.mean(values['macs'])):,} | {emptiest} | {len(entries)} |"
        )
    return [*rows, "", f"Seeds 0 up; mean ± standard deviation where there are several; {'; '.join(sorted(notes))}."]


TABLES = {"runs": runs_table, "overhead": overhead_table, "methods": methods_table, "target": target_table}
PAGES = ("README.md", "docs/comparison.md", "docs/methods/str.md")


def filled(text):
    """The text with every table between its marks built anew."""
    for name, build in TABLES.items():
        begin = BEGIN.format(name)
        before, mark, rest = text.partition(begin)
        if mark:
            text = "\n".join([before + begin, *build(), ""]) + rest[rest.index(END) :]
    return text


def main():
    match sys.argv[1:]:
        case ["add", run, recipe]:
            add(run, recipe)
        case ["table"]:
            for page in PAGES:
                path = ROOT / page
                path.write_text(filled(path.read_text()))
        case ["figures"]:
            budget_figure()
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
