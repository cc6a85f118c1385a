"""The ledger of our own runs, and the tables of README and docs that are built from it.

    python bench/results.py add RUN RECIPE    copy the metrics of a finished run into results/
    python bench/results.py table             write the tables into README.md and the pages of docs/
    python bench/results.py figures           draw docs/figures/

A row of accuracy is the mean over the seeds of one recipe at one commit, with the sample standard
deviation where there are several. Nothing in the tables is typed by hand.
"""

import csv
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SPARSITIES = (0.8, 0.9, 0.95, 0.98, 0.99)
FRONTIER = {
    "dense": "dense",
    "str": "STR",
    "str_sparsity": "STR, asked for the sparsity",
    "str_matched": "STR, asked for what STR reached",
    "str_feather": "STR-Feather",
    "gmp": "GMP, uniform",
    "gmp_str_budget": "GMP, with the budget STR learned",
    "rigl": "RigL, ERK",
    "st3_as_released": "ST-3, as released",
    "feather": "Feather",
    "feather_as_released": "Feather, as released",
    "global_magnitude": "global magnitude",
    "acdc": "AC/DC",
    "str_macs": "STR, asked for the MACs of Feather as released",
    "str_feather_macs": "STR-Feather, asked for the MACs of Feather as released",
}
"""What bench/frontier.py trains: name → what the tables call it."""
PAIRS = {
    "resnet8-mnist5k": "resnet8, MNIST-5k",
    "resnet8-fashion-mnist": "resnet8, Fashion-MNIST",
    "mobilenet_v1-fashion-mnist": "MobileNetV1 × 0.25, Fashion-MNIST",
    "fastgrnn-watch": "FastGRNN, watch",
}
ZEROS_ASKED, MACS_ASKED = (80, 90, 95, 98), (20, 10, 5)
"""What bench/target.py trains: recipes of recipes/targets/, and percentages."""
FREEZING = {
    "fixed": "s fixed for the last fifth",
    "lifted": "thresholds lifted for the last fifth",
}
"""What bench/freezing.py trains beside STR as it is."""
BEGIN, END = "<!-- {}: built by bench/results.py from results/ -->", "<!-- end -->"


def add(run, recipe):
    """Put a finished run into the ledger, one file a seed."""
    metrics = json.loads(Path(run, "metrics.json").read_text())
    folder = ROOT / "results" / Path(recipe).with_suffix("").relative_to("recipes")
    folder.mkdir(parents=True, exist_ok=True)
    layers = json.loads(Path(run, "report.json").read_text())["layers"]
    entry = {"recipe": str(recipe), **metrics, "budget": {layer["name"]: layer["sparsity"] for layer in layers}}
    (folder / f"seed{metrics['seed']}.json").write_text(json.dumps(entry, indent=2) + "\n")


def spread(values, scale=1.0, form=".2f"):
    """The mean, with the standard deviation if the values differ."""
    mean = f"{scale * statistics.mean(values):{form}}"
    return mean if len(set(values)) == 1 else f"{mean} ± {scale * statistics.stdev(values):{form.lstrip('+')}}"


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
    # In the order of their names: what was timed again stands in a file of its own and counts.
    timings = [json.loads(p.read_text()) for p in sorted(ROOT.joinpath("results/step_overhead").glob("methods*.json"))]
    step = {row["variant"]: row["ratio"] for timed in timings for row in timed["rows"]}
    first = timings[0]["rows"][0]
    rounds = ", ".join(map(str, sorted({timed["options"]["rounds"] for timed in timings})))
    model = f"{first['model']}, batch {first['batch']}, rounds: {rounds}"
    entries = [json.loads(path.read_text()) for path in ROOT.joinpath("results/all_methods").glob("*.json")]
    by_method = {}
    for entry in sorted(entries, key=lambda entry: entry["seed"]):
        by_method.setdefault(entry["method"], []).append(entry)
    mean = {name: statistics.mean(e["accuracy"] for e in runs) for name, runs in by_method.items()}
    floor = mean.get("static_random", 0)
    for name in sorted(mean, key=mean.get, reverse=True):
        values = {key: [e[key] for e in by_method[name]] for key in ("accuracy", "sparsity", "macs")}
        above = "" if name in ("dense", "static_random") else ("yes" if mean[name] > floor else "no")
        time = f"{step[name]:.2f}" if name in step else "not run"
        rows.append(
            f"| {name} | {spread(values['accuracy'], 100)} | {spread(values['sparsity'], 100)} "
            f"| {round(statistics.mean(values['macs'])):,} | {above} | {time} |"
        )
    notes = {f"{e['device']}, torch {e['torch']}, commit {(e['commit'] or 'none')[:7]}" for e in entries}
    count = {len(runs) for runs in by_method.values()}
    seeds = f"{min(count, default=0)} seed(s)"
    return [*rows, "", f"Recipe gmp with one word swapped; {seeds}; {'; '.join(sorted(notes))}. Step time: {model}."]


def frontier(data):
    """The runs of the frontier study on one data set: (name, asked sparsity) → entries by seed; 0 for dense."""
    found = {}
    for path in sorted(ROOT.joinpath("results/frontier", data).glob("*.json")):
        entry = json.loads(path.read_text())
        found.setdefault((entry["variant"], entry["asked"]), []).append(entry)
    return found


def frontier_table():
    """Accuracy and MACs of every method at every sparsity; "not run" where there is no run."""
    folders = {path.name for path in ROOT.joinpath("results/frontier").glob("*/")} | {"fashion_mnist"}
    rows = []
    for data in sorted(folders, key=lambda name: (name != "fashion_mnist", name)):
        found = frontier(data)
        columns = [f"{100 * sparsity:g} %" for sparsity in SPARSITIES]
        for title, cell in (("test accuracy, %", frontier_accuracy), ("MACs, millions", frontier_macs)):
            rows += [f"| {data}: {title} | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
            for name, label in FRONTIER.items():
                asked = [0 if name == "dense" else sparsity for sparsity in SPARSITIES]
                cells = [cell(found[name, a], a) if (name, a) in found else "not run" for a in asked]
                rows.append(f"| {label} | {' | '.join(cells)} |")
            rows.append("")
        rows += [f"| {data}: differences, points | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
        rows += [*frontier_differences(found), ""]
        entries = [entry for group in found.values() for entry in group]
        seeds = sorted({len(group) for group in found.values()})
        if entries:
            count = f"{seeds[0]} to {seeds[-1]}" if seeds[1:] else f"{seeds[0]}"
            rows += [f"Mean ± standard deviation; {count} seed(s) a cell; {ran_on(entries)}.", ""]
    return rows[:-1]


def frontier_differences(found):
    """Accuracy of one less that of another with the same seed and as many zeros, or as many MACs."""
    others = ("gmp", "rigl", "st3_as_released", "feather", "feather_as_released", "global_magnitude", "acdc")
    pairs = [("str_matched", "str")]
    pairs += [("str_sparsity", name) for name in others]
    pairs += [("str_feather", name) for name in ("str_sparsity", "feather", "feather_as_released")]
    pairs += [("str_macs", "feather_as_released"), ("str_feather_macs", "feather_as_released")]
    rows = []
    for name, other in pairs:
        cells = [points_apart(found.get((name, asked), []), found.get((other, asked), [])) for asked in SPARSITIES]
        rows.append(f"| {FRONTIER[name]} − {FRONTIER[other]} | {' | '.join(cells)} |")
    return rows


def points_apart(entries, others):
    """Accuracy of runs less that of others with the same seeds."""
    mine, theirs = ({entry["seed"]: entry["accuracy"] for entry in group} for group in (entries, others))
    points = [100 * (mine[seed] - theirs[seed]) for seed in sorted(mine.keys() & theirs.keys())]
    return spread(points, form="+.2f") if points else "not run"


def frontier_accuracy(entries, asked):
    reached = statistics.mean(entry["sparsity"] for entry in entries)
    # To the last digit that is shown.
    at = f" (at {100 * reached:.2f} %)" if round(100 * reached, 2) != round(100 * asked, 2) else ""
    return spread([entry["accuracy"] for entry in entries], 100) + at


def frontier_macs(entries, asked):
    return f"{statistics.mean(entry['macs'] for entry in entries) / 1e6:.3f}"


def frontier_figure():
    """Accuracy against the weights kept and against MACs, a line a method, where there are runs."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    found = frontier("fashion_mnist")
    if not found:
        return
    # Left out: what lies on the line of another.
    same = ("str_matched", "str_macs", "str_feather_macs", "feather_as_released")
    drawn = [name for name in FRONTIER if name != "dense" and name not in same]
    figure = Figure(figsize=(11, 4), layout="constrained")
    costs = {"weights kept, of all": lambda e: e["nonzero"] / e["weights"], "MACs": lambda e: e["macs"]}
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
    lowest = 0.75  # below it there is one line after another straight down, to chance
    figure.axes[0].set(ylabel="test accuracy", ylim=(lowest, 0.92))
    figure.legend(*figure.axes[1].get_legend_handles_labels(), loc="outside right", frameon=False, fontsize="small")
    path = ROOT / "docs" / "figures" / "frontier.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


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


def ranks_table():
    """Learned against fixed ranks, run by run at equal ranks."""
    rows = [
        "| data | weight decay of s | ranks of W, U | weights in both | learned | fixed, random start "
        "| fixed, SVD start | learned − random start | learned − SVD start |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    notes, gains = set(), {"Learned − random start": [], "Learned − SVD start": [], "SVD start − random start": []}
    for folder in sorted(ROOT.joinpath("results/rnn").glob("*/")):
        entries = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
        by_kind = {}
        for entry in entries:
            by_kind.setdefault(entry["kind"], {})[entry["seed"]] = entry
        notes |= {
            f"{e['epochs']} epochs, {e['device']}, torch {e['torch']}, commit {(e['commit'] or 'none')[:7]}"
            for e in entries
        }
        sizes = entries[0]["examples"]
        rows.append(
            f"| {folder.name}, {sizes['train']:,} / {sizes['test']:,} examples " + _ranks_row("full", by_kind["full"])
        )
        for kind in sorted(kind for kind in by_kind if kind.startswith("learned-")):
            pressure = kind.removeprefix("learned-")
            others = [by_kind.get(f"{other}-{pressure}", {}) for other in ("fixed", "fixed_svd")]
            rows.append("| " + _ranks_row(pressure, by_kind[kind], *others))
            for found, (one, other) in zip(
                gains.values(), ((by_kind[kind], others[0]), (by_kind[kind], others[1]), others[::-1]), strict=True
            ):
                found += [one[seed]["accuracy"] - other[seed]["accuracy"] for seed in one if seed in other]
    overall = [
        f"- {what}: {spread(found, 100)} points over all {len(found)} pairs, above zero in {sum(x > 0 for x in found)}"
        for what, found in gains.items()
    ]
    notes = "; ".join(sorted(notes))
    return [*rows, "", *overall, "", f"Test accuracy in %, mean ± standard deviation (runs); {notes}."]


def _ranks_row(pressure, runs, *others):
    """One budget: its ranks seed by seed, its accuracy, those of the others and the differences at equal seeds."""
    ranks = "; ".join("/".join(str(row["rank"]) for row in run["weight_ranks"].values()) for run in runs.values())
    weights = [sum(row["compact_parameters"] for row in run["weight_ranks"].values()) for run in runs.values()]

    def cell(values):
        return f"{spread(values, 100)} ({len(values)})" if values else "not run"

    accuracies = [cell([run["accuracy"] for run in side.values()]) for side in (runs, *others)]
    gains = [cell([runs[seed]["accuracy"] - other[seed]["accuracy"] for seed in other]) for other in others]
    blank = [""] * 4 if not others else []
    return " | ".join(
        ["", pressure, ranks, f"{round(statistics.mean(weights)):,}", *accuracies, *gains, *blank, ""]
    ).strip()


def rnn_speed_table():
    """FastGRNN as a ratio to GRU, and lower ranks as a ratio to full rank."""
    rows = ["| | batch | side | time, of the first side | milliseconds |", "|---|---|---|---|---|"]
    notes = set()
    for path in sorted(ROOT.joinpath("results/rnn_speed").glob("*.json")):
        result = json.loads(path.read_text())
        rounds = " or ".join(map(str, sorted({row["rounds"] for row in result["rows"]})))
        notes.add(
            f"{result['device']}, {result['threads']} thread(s), torch {result['torch']}, "
            f"{rounds} interleaved rounds, commit {result['commit'][:7]}"
        )
        for row in result["rows"]:
            ratio = f"{row['ratio']:.2f} ({row['lower']:.2f} to {row['upper']:.2f})"
            what = f"{row['what']}, {row['steps']} steps × {row['features']}"
            rows.append(f"| {what} | {row['batch']} | {row['side']} | {ratio} | {row['milliseconds']:.2f} |")
    return [*rows, "", f"Medians and quartiles; {'; '.join(sorted(notes))}."]


def paper_table():
    """The rows of the paper that have a recipe: what it reports, how we know, and what we ran."""
    rows = [
        "| recipe | top-1, % | weights | MACs | known | λ | init | known | our run |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    known = {"SRC": "read", "MEM-hi": "recalled", "MEM-med": "recalled, less surely"}
    with ROOT.joinpath("recipes/imagenet/paper.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    for row in table:
        ours = "not run"
        entries = [json.loads(path.read_text()) for path in sorted(ROOT.glob(f"results/imagenet/{row['name']}/seed*"))]
        if entries:
            accuracy, sparsity = (spread([entry[key] for entry in entries], 100) for key in ("accuracy", "sparsity"))
            ours = f"{accuracy} at {sparsity} % zeros, {len(entries)} run(s), commit {entries[0]['commit'][:7]}"
        rows.append(
            f"| {row['name']} | {row['top1']} | {row['weights']} | {row['macs']} | {known[row['label']]} "
            f"| {float(row['weight_decay']):.4g} | {row['init']} | {known[row['settings_label']]} | {ours} |"
        )
    return rows


def wishes_table():
    """Sparsities wished for with for_sparsity, and what came out."""
    rows = ["| wished for | learned | test accuracy, % | init | weight decay of s |", "|---|---|---|---|---|"]
    notes, seeds = set(), set()
    for path in sorted(ROOT.joinpath("results/for_schedule").glob("*.json")):
        entry = json.loads(path.read_text())
        seeds.add(str(entry["seed"]))
        notes.add(f"{entry['device']}, torch {entry['torch']}, commit {entry['commit'][:7]}")
        rows.append(
            f"| {100 * entry['wish']:g} % | {100 * entry['sparsity']:.2f} % | {100 * entry['accuracy']:.2f} "
            f"| {entry['init']:g} | {entry['threshold_weight_decay']:.4f} |"
        )
    text = f"Recipe mnist5k/gmp with the method swapped, a run a row, seed {', '.join(sorted(seeds))}"
    return [*rows, "", f"{text}; {'; '.join(sorted(notes))}."]


def sizes_table():
    """Bytes on disk of published and uniform networks, and how near the bound they are."""
    result = json.loads(ROOT.joinpath("results/export/size.json").read_text())
    rows = [
        "| network | budget | sparsity, % | dense, bytes | compressed, bytes | smaller | bf16 values, bytes | smaller "
        "| weights, of the bound |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        dense = row["dense_bytes"]
        cells = [f"{row['compressed_bytes']:,} | {dense / row['compressed_bytes']:.1f}x"]
        cells.append(f"{row['bf16_bytes']:,} | {dense / row['bf16_bytes']:.1f}x | {row['ratio_to_bound']:.3f}")
        rows.append(
            f"| {row['model']} | {row['budget']} | {100 * row['sparsity']:.2f} | {dense:,} | {' | '.join(cells)} |"
        )
    note = f"Random weights thresholded to the budget, seed {result['seed']}; commit {result['commit'][:7]}."
    return [*rows, "", note]


# As in bench/latency.py, which writes a file for each.
LATENCIES = (
    "resnet50-str-90.23", "resnet50-uniform-90.23", "resnet50-str-95.15", "resnet50-uniform-95.15",
    "resnet50-str-98.05", "resnet50-uniform-98.05", "mobilenet_v1-uniform-90", "mobilenet_v1-uniform-95",
)  # fmt: skip
RIVALS = ("MNN dense", "ONNX Runtime", "OpenVINO fp32", "OpenVINO bf16", "torch eager", "torch compiled")
FP32_RIVALS = tuple(rival for rival in RIVALS if rival != "OpenVINO bf16")


def latency_table():
    """How many times as fast each sparse runtime is as its rivals, and below which sparsity MNN's is none."""
    rows = [
        "| network | batch | threads | sparse in | ms | of the fastest fp32 "
        f"| {' | '.join(f'of {rival}' for rival in RIVALS)} |",
        f"|---|---|---|---|---|---|{'---|' * len(RIVALS)}",
    ]
    notes, sweeps = set(), []
    for name in LATENCIES:
        path = ROOT / "results" / "export" / f"latency-{name}.json"
        if not path.is_file():
            rows.append(f"| {name} | not run | | | | | {' | ' * (len(RIVALS) - 1)}|")
            continue
        result = json.loads(path.read_text())
        versions = ", ".join(f"{package} {version}" for package, version in result["machine"]["versions"].items())
        notes.add(
            f"{result['machine']['processor']}, {result['machine']['processors']} processors, {result['rounds']} "
            f"interleaved rounds, {versions}, commit {result['commit'][:7]}"
        )
        if result["sweep"]:
            shares = ", ".join(f"{100 * float(share):g} %: {ratio:.2f}" for share, ratio in result["sweep"].items())
            sweeps.append(f"{result['network'].split('/')[0]}: {shares}")
        for batch, threads in dict.fromkeys((row["batch"], row["threads"]) for row in result["rows"]):
            mine = {r["name"]: r for r in result["rows"] if (r["batch"], r["threads"]) == (batch, threads)}
            for sparse in ("torch", "MNN"):
                own = mine.get(f"{sparse} sparse")
                if own is None or own["seconds"] is None:
                    note = "not run" if own is None else own["note"]
                    rows.append(f"| {name} | {batch} | {threads} | {sparse} | {note} | | {' | ' * (len(RIVALS) - 1)}|")
                    continue
                cells = [_ratio(mine.get(rival), own) for rival in RIVALS]
                best = min(mine[r]["ratio"] for r in FP32_RIVALS if r in mine and mine[r]["ratio"]) / own["ratio"]
                rows.append(
                    f"| {name} | {batch} | {threads} | {sparse} | {1000 * own['seconds']:.2f} | {best:.2f} "
                    f"| {' | '.join(cells)} |"
                )
    swept = "; ".join(sweeps) or "not run"
    text = (
        f"Zeros at random places, every layer alike, MNN, times as fast as the fastest of three fp32 rivals: {swept}."
    )
    return [
        *rows,
        "",
        text,
        "",
        f"Seconds of the rival / seconds of the sparse network, medians; {'; '.join(sorted(notes))}.",
    ]


def _ratio(row, own):
    if row is None:
        return "not run"
    return row["note"] if row["ratio"] is None else f"{row['ratio'] / own['ratio']:.2f}"


def kernels_table():
    """What the sparse kernels do in a second, layer by layer."""
    result = json.loads((ROOT / "results" / "export" / "kernels.json").read_text())
    columns = [(kind, sparsity) for sparsity in (0.9, 0.95) for kind in ("native", "mnn")]
    names = {"native": "torch sparse", "mnn": "MNN sparse"}
    heads = [f"{names[kind]}, {100 * sparsity:.0f} %" for kind, sparsity in columns]
    rows = [f"| layer | {' | '.join(heads)} | torch dense |", f"|---|{'---|' * len(columns)}---|"]
    for channels, filters, kernel, side in dict.fromkeys(tuple(row["layer"]) for row in result["rows"]):
        mine = {row["sparsity"]: row for row in result["rows"] if row["layer"] == [channels, filters, kernel, side]}
        cells = [f"{mine[s]['nonzero_macs'] / mine[s]['seconds'][kind] / 1e9:.0f}" for kind, s in columns]
        dense = mine[0.9]["macs"] / mine[0.9]["seconds"]["torch_dense"] / 1e9
        layer = f"{channels} → {filters}, {kernel}×{kernel}, {side}×{side} pixels"
        rows.append(f"| {layer} | {' | '.join(cells)} | {dense:.0f} |")
    versions = result["machine"]["versions"]
    note = (
        f"10⁹ multiplications of nonzero weights (dense: of all) a second, one thread, batch 1, the least of "
        f"{result['rounds']} executions in turns; {result['machine']['processor']}, torch {versions['torch']}, "
        f"mnn {versions['mnn']}, commit {result['commit'][:7]}."
    )
    return [*rows, "", note]


def target_entries(pair):
    """The runs of bench/target.py on one pair: (row, percentage) → entries by seed."""
    found = {}
    for path in sorted(ROOT.joinpath("results/target", pair).glob("*.json")):
        entry = json.loads(path.read_text())
        found.setdefault((entry["row"], entry["percent"]), []).append(entry)
    return found


def ran_on(entries):
    """Machines and commits of runs."""
    machines = {f"{e['device']}, {e['threads']} thread(s), torch {e['torch']}" for e in entries}
    commits = sorted({(e["commit"] or "none")[:7] for e in entries})
    return f"{'; '.join(sorted(machines))}; commit {', '.join(commits)}"


def requests_table():
    """Totals that STR was asked for, and what came out of one run each."""
    rows = ["| network, data | dense accuracy, % | asked for | reached | test accuracy, % |", "|---|---|---|---|---|"]
    asked = [("str_sparsity", percent) for percent in ZEROS_ASKED] + [("str_macs", percent) for percent in MACS_ASKED]
    shown = []
    for pair, name in PAIRS.items():
        found = target_entries(pair)
        dense = [f"{100 * entry['accuracy']:.2f}" for entry in found.get(("dense", 0), [])]
        for row, percent in asked:
            what = f"{percent} % zeros" if row == "str_sparsity" else f"{percent} % of MACs"
            entry = next((each for each in found.get((row, percent), []) if each["seed"] == 0), None)
            if entry is None:
                rows.append(f"| {name} | {''.join(dense) or 'not run'} | {what} | not run | not run |")
                continue
            reached = entry["sparsity"] if row == "str_sparsity" else entry["macs"] / entry["dense_macs"]
            shown.append(entry)
            rows.append(
                f"| {name} | {''.join(dense) or 'not run'} | {what} | {100 * reached:.3f} % "
                f"| {100 * entry['accuracy']:.2f} |"
            )
    return [*rows, "", f"One run each, seed 0, no setting changed but the total; {ran_on(shown)}."]


def freezing_table():
    """What became of STR whose thresholds were left alone at the end, less what became of STR as it is."""
    found = {}
    for path in sorted(ROOT.joinpath("results/freezing").glob("*.json")):
        entry = json.loads(path.read_text())
        found.setdefault((entry["variant"], entry["percent"]), []).append(entry)
    percents = sorted({percent for _, percent in found})
    rows = [f"| points of test accuracy, less STR as it is | {' | '.join(f'{p} %' for p in percents)} |"]
    rows.append(f"|---|{'---|' * len(percents)}")
    for name, label in FREEZING.items():
        cells = [
            points_apart(found.get((name, percent), []), found.get(("asked", percent), [])) for percent in percents
        ]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    seeds = {len(entries) for entries in found.values()}
    note = ran_on([entry for entries in found.values() for entry in entries])
    count = " or ".join(map(str, sorted(seeds)))
    return [*rows, "", f"Mean ± standard deviation of the differences at equal seeds, {count} of them; {note}."]


def target_cost_table():
    """A step of STR with a total, of one without."""
    result = json.loads(ROOT.joinpath("results/step_overhead/target.json").read_text())
    names = {"str_sparsity": "`sparsity=`", "str_macs": "`macs=`"}
    rows = ["| | step time, of plain STR | the pulls alone, of a step |", "|---|---|---|"]
    for row in result["rows"]:
        if row["variant"] in names:
            ratio = f"{row['ratio']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"
            rows.append(f"| {names[row['variant']]} | {ratio} | {100 * row['update_share']:.2f} % |")
    first, options = result["rows"][0], result["options"]
    clock = "processor time" if options["cpu_time"] else "wall time"
    precision = "bf16 autocast" if options["amp"] else "float32"
    how = f"{first['model']}, batch {first['batch']}, {first['size']}², {precision}, {clock}"
    note = f"Medians, lowest and highest of {options['rounds']} interleaved rounds; {how}; {result['device']}, "
    return [*rows, "", f"{note}torch {result['torch']}, commit {result['commit'][:7]}."]


TABLES = {
    "runs": runs_table,
    "overhead": overhead_table,
    "methods": methods_table,
    "paper": paper_table,
    "wishes": wishes_table,
    "sizes": sizes_table,
    "latency": latency_table,
    "kernels": kernels_table,
    "frontier": frontier_table,
    "ranks": ranks_table,
    "rnn_speed": rnn_speed_table,
    "requests": requests_table,
    "freezing": freezing_table,
    "target_cost": target_cost_table,
}
PAGES = (
    "README.md",
    "docs/comparison.md",
    "docs/choosing.md",
    "docs/paper.md",
    "docs/export.md",
    "docs/rnn.md",
    "docs/methods/str.md",
)


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
            frontier_figure()
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
