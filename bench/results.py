"""Build the tables of README and docs from the results of our runs.

    python bench/results.py add RUN RECIPE    copy the metrics of a finished run into results/
    python bench/results.py table             write the tables into README.md and the pages of docs/
    python bench/results.py figures           draw docs/figures/

An accuracy is the mean over the seeds of one recipe, with the sample standard deviation if there are several. All
numbers in the tables come from results/.
"""

import csv
import json
import statistics
import sys
from functools import partial
from pathlib import Path

import engine_tables
import peers_tables
from entries import grouped, number_of_seeds, points_apart, ran_on, spread
from frontier_tables import equal_macs_table, frontier_figure, frontier_table
from pattern_tables import patterns_figure, patterns_table

ROOT = Path(__file__).parent.parent
RENAMED = {
    "magnitude": "gmp_one_shot",
    "global_magnitude": "gmp_global",
    "global_magnitude_one_shot": "gmp_one_shot_global",
}
"""Former methods in results/ that are now arguments of GMP: name → variant of bench/all_methods.py."""
PAIRS = {
    "resnet8-mnist5k": "resnet8, MNIST-5k",
    "resnet8-fashion-mnist": "resnet8, Fashion-MNIST",
    "mobilenet_v1-fashion-mnist": "MobileNetV1 × 0.25, Fashion-MNIST",
    "fastgrnn-watch": "FastGRNN, watch",
}
SPARSITY_TARGETS, MACS_TARGETS = (80, 90, 95, 98), (20, 10, 5)
"""Targets that bench/target.py trains, in percent; `PAIRS` has the recipes of recipes/targets/."""
HIGH_SPARSITY_TARGETS = (
    ("mobilenet_v1-fashion-mnist", "sparsity", 98),
    ("mobilenet_v1-fashion-mnist", "macs", 5),
    ("fastgrnn-watch", "sparsity", 95),
)
COMPARED_METHODS = {
    "str": "STR",
    "str_feather": "STR-Feather",
    "feather": "Feather",
    "gmp_global": "GMP, global budget",
}
"""Targets and methods of bench/target.py --compare."""
FINETUNE = {
    "dense": "dense",
    "gmp": "GMP, uniform",
    "gmp_global": "GMP, global",
    "feather": "Feather",
    "feather_uniform": "Feather, uniform",
    "str": "STR",
    "str_feather": "STR-Feather",
}
"""Variants that bench/finetune.py trains: name in results/ → label in the table."""
ONE_SHOT = {
    "magnitude": "|W|",
    "calibrated": "`calibrate`",
    "calibrated_rows": "|W| · ‖x‖, equally many weights of each output (Wanda)",
    "magnitude_global": "|W|, global",
    "calibrated_global": "`calibrate`, global",
    "calibrated_unscaled_global": "|W| · ‖x‖, compared over all layers",
}
"""Variants of bench/one_shot.py: name in results/ → label in the table."""
FREEZING = {
    "fixed": "s fixed for the last fifth of the run",
    "lifted": "thresholds removed for the last fifth of the run",
}
"""Variants of STR that bench/freezing.py compares with STR: name in results/ → label in the table."""
BEGIN, END = "<!-- {}: built by bench/results.py from results/ -->", "<!-- end -->"


def add(run, recipe):
    """Copy the metrics of a finished run into results/, in one file per seed."""
    metrics = json.loads(Path(run, "metrics.json").read_text())
    folder = ROOT / "results" / Path(recipe).with_suffix("").relative_to("recipes")
    folder.mkdir(parents=True, exist_ok=True)
    layers = json.loads(Path(run, "report.json").read_text())["layers"]
    entry = {"recipe": str(recipe), **metrics, "budget": {layer["name"]: layer["sparsity"] for layer in layers}}
    (folder / f"seed{metrics['seed']}.json").write_text(json.dumps(entry, indent=2) + "\n")


def recipes():
    """Return the entries of each recipe, one per seed; recipes are sorted by folder and sparsity."""
    folders = {path.parent for path in ROOT.joinpath("results").rglob("seed*.json")}
    found = [[json.loads(path.read_text()) for path in sorted(folder.glob("seed*.json"))] for folder in folders]
    return sorted(found, key=lambda entries: (Path(entries[0]["recipe"]).parent, entries[0]["sparsity"]))


def runs_table():
    """Return one row per recipe, and a row for its dense baseline if it has one."""
    rows = [
        "| recipe | | test accuracy, % | sparsity, % | weights kept | MACs | runs |",
        "|---|---|---|---|---|---|---|",
    ]
    hardware = {}
    for entries in recipes():
        first, recipe, count = entries[0], Path(entries[0]["recipe"]), len(entries)
        hardware.setdefault(recipe.parent.name, []).extend(entries)
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
    notes = [f"{folder}: {ran_on(entries)}" for folder, entries in hardware.items()]
    return [*rows, "", f"Seeds from 0; mean ± standard deviation; {'; '.join(notes)}."]


def budget_figure():
    """Draw learned budgets by depth: ours on Fashion-MNIST, and those of the paper on ImageNet."""
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
    """Return one row per method at 90 % sparsity with one recipe, sorted by accuracy."""
    rows = [
        "| method | test accuracy, % | sparsity, % | MACs | above static random | step time, relative to dense |",
        "|---|---|---|---|---|---|",
    ]
    # Sorted by name: timings that were repeated are in later files and replace the first ones.
    timings = [json.loads(p.read_text()) for p in sorted(ROOT.joinpath("results/step_overhead").glob("methods*.json"))]
    step = {RENAMED.get(row["variant"], row["variant"]): row["ratio"] for timed in timings for row in timed["rows"]}
    first = timings[0]["rows"][0]
    rounds = ", ".join(map(str, sorted({timed["options"]["rounds"] for timed in timings})))
    model = f"{first['model']}, batch {first['batch']}, rounds: {rounds}"
    entries = [json.loads(path.read_text()) for path in ROOT.joinpath("results/all_methods").glob("*.json")]
    by_method = {}
    for entry in sorted(entries, key=lambda entry: entry["seed"]):
        name = entry.get("variant", entry["method"])
        by_method.setdefault(RENAMED.get(name, name), []).append(entry)
    mean = {name: statistics.mean(e["accuracy"] for e in runs) for name, runs in by_method.items()}
    floor = mean.get("static_random", 0)
    for name in sorted(mean, key=mean.get, reverse=True):
        values = {key: [e[key] for e in by_method[name]] for key in ("accuracy", "sparsity", "macs")}
        above = "" if name in ("dense", "static_random") else ("yes" if mean[name] > floor else "no")
        time = f"{step[name]:.2f}" if name in step else "not run"
        rows.append(
            f"| {name} | {spread(values['accuracy'], 100)} "
            f"| {spread(values['sparsity'], 100)} | {round(statistics.mean(values['macs'])):,} | {above} | {time} |"
        )
    notes = {f"{e['device']}, torch {e['torch']}, commit {(e['commit'] or 'none')[:7]}" for e in entries}
    seeds = number_of_seeds(by_method.values())
    note = f"Recipe mnist5k/gmp with each method; {seeds}; {'; '.join(sorted(notes))}. Step time: {model}."
    return [*rows, "", note]


def overhead_table():
    """Return the time of a training step relative to dense training, by network and batch."""
    names = {"str": "STR", "naive": "formula with autograd", "static_random": "fixed mask", "rigl": "RigL"}
    found, notes = {}, set()
    for path in ROOT.joinpath("results/step_overhead").glob("shape_*.json"):
        result = json.loads(path.read_text())
        notes.add(f"{result['device']}, torch {result['torch']}, commit {result['commit'][:7]}")
        for row in result["rows"]:
            key = (row["model"], row["batch"], row["size"] or 0, row.get("mode", "eager"))
            found.setdefault(key, {})[row["variant"]] = row
    rows = [f"| network | step | {' | '.join(names.values())} |", "|---|---|" + "---|" * len(names)]
    for (model, batch, size, mode), mine in sorted(found.items()):
        cells = []
        for row in (mine.get(name) for name in names):
            fastest = f" ({row['fastest']:.2f})" if row and "fastest" in row else ""
            cells.append(f"{row['ratio']:.2f}{fastest}" if row else "")
        rows.append(f"| {model}, batch {batch}{f', {size}²' if size else ''} | {mode} | {' | '.join(cells)} |")
    how = "Median of the ratios of neighbouring steps (ratio of the fastest steps)"
    return [*rows, "", f"{how}; {'; '.join(sorted(notes))}."]


def ranks_table():
    """Return the comparison of learned ranks with fixed ranks of the same size."""
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
    """Return a row: ranks per seed, accuracy, accuracies with fixed ranks, and differences at equal seeds."""
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
    """Return the time of FastGRNN relative to GRU, and of low rank relative to full rank."""
    rows = ["| | batch | network | time, relative to the first of its group | milliseconds |", "|---|---|---|---|---|"]
    notes = set()
    for path in sorted(ROOT.joinpath("results/rnn_speed").glob("*.json")):
        result = json.loads(path.read_text())
        rounds = " or ".join(map(str, sorted({row["rounds"] for row in result["rows"]})))
        notes.add(
            f"{result['device']}, {result['threads']} thread{'s' * (result['threads'] > 1)}, torch {result['torch']}, "
            f"{rounds} interleaved rounds, commit {result['commit'][:7]}"
        )
        for row in result["rows"]:
            ratio = f"{row['ratio']:.2f} ({row['lower']:.2f} to {row['upper']:.2f})"
            what = f"{row['what']}, {row['steps']} steps × {row['features']}"
            rows.append(f"| {what} | {row['batch']} | {row['side']} | {ratio} | {row['milliseconds']:.2f} |")
    return [*rows, "", f"Medians and quartiles; {'; '.join(sorted(notes))}."]


def paper_table():
    """Return the rows of the paper's tables: reported values, how we know them, and our runs."""
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
    """Return the sparsities requested with for_sparsity and the sparsities reached."""
    rows = ["| requested | reached | test accuracy, % | init | weight decay of s |", "|---|---|---|---|---|"]
    notes, seeds = set(), set()
    for path in sorted(ROOT.joinpath("results/for_schedule").glob("*.json")):
        entry = json.loads(path.read_text())
        seeds.add(str(entry["seed"]))
        notes.add(f"{entry['device']}, torch {entry['torch']}, commit {entry['commit'][:7]}")
        rows.append(
            f"| {100 * entry['wish']:g} % | {100 * entry['sparsity']:.2f} % | {100 * entry['accuracy']:.2f} "
            f"| {entry['init']:g} | {entry['threshold_weight_decay']:.4f} |"
        )
    text = f"Recipe mnist5k/gmp with STR, one run per row, seed {', '.join(sorted(seeds))}"
    return [*rows, "", f"{text}; {'; '.join(sorted(notes))}."]


def sizes_table():
    """Return the file sizes of networks with published and uniform budgets."""
    result = json.loads(ROOT.joinpath("results/export/size.json").read_text())
    rows = [
        "| network | budget | sparsity, % | dense, bytes | compressed, bytes | smaller | bf16 values, bytes | smaller "
        "| weights, relative to the bound |",
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


def target_entries(pair):
    """Return the runs of bench/target.py on a pair of network and data: (row, percentage) → entries."""
    return grouped(Path("target", pair), "row", "percent")


def requests_table():
    """Return the targets of STR and the values reached, one run per row."""
    rows = ["| network, data | dense accuracy, % | target | reached | test accuracy, % |", "|---|---|---|---|---|"]
    targets = [("str_sparsity", percent) for percent in SPARSITY_TARGETS]
    targets += [("str_macs", percent) for percent in MACS_TARGETS]
    shown = []
    for pair, name in PAIRS.items():
        found = target_entries(pair)
        dense = [f"{100 * entry['accuracy']:.2f}" for entry in found.get(("dense", 0), [])]
        for row, percent in targets:
            what = f"{percent} % sparsity" if row == "str_sparsity" else f"{percent} % of the MACs"
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
    return [*rows, "", f"One run each, seed 0, no setting changed but the target; {ran_on(shown)}."]


def high_sparsity_table():
    """Return the accuracy of several methods at targets at which STR loses 20 points or more."""
    rows = [
        f"| network, data | target | {' | '.join(COMPARED_METHODS.values())} |",
        f"|---|---|{'---|' * len(COMPARED_METHODS)}",
    ]
    shown = []
    for pair, kind, percent in HIGH_SPARSITY_TARGETS:
        found = target_entries(pair)
        groups = [found.get((f"{name}_{kind}", percent), []) for name in COMPARED_METHODS]
        cells = [spread([entry["accuracy"] for entry in group], 100) if group else "not run" for group in groups]
        what = f"{percent} % sparsity" if kind == "sparsity" else f"{percent} % of the MACs"
        rows.append(f"| {PAIRS[pair]} | {what} | {' | '.join(cells)} |")
        shown += [entry for group in groups for entry in group]
    return [*rows, "", f"Test accuracy in percent, mean ± standard deviation of up to three seeds; {ran_on(shown)}."]


def freezing_table():
    """Return the difference in accuracy between STR with fixed thresholds at the end of the run and STR."""
    found = grouped("freezing", "variant", "percent")
    percents = sorted({percent for _, percent in found})
    rows = [f"| difference to STR in test accuracy, points | {' | '.join(f'{p} %' for p in percents)} |"]
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


def finetune_table(folder="finetune"):
    """Return the accuracies of fine-tuned and pruned networks, and the differences to STR-Feather at equal seeds."""
    found = grouped(folder, "variant", "percent")
    entries = [entry for group in found.values() for entry in group]
    percents = sorted({entry["percent"] for entry in entries} - {0})
    columns = [f"{percent} % sparsity" for percent in percents]
    rows = [
        f"| method | {' | '.join(columns)} | {' | '.join(f'STR-Feather − method, {p} %' for p in percents)} |",
        f"|---|{'---|' * 2 * len(percents)}",
    ]
    for name, label in FINETUNE.items():
        groups = [found.get((name, 0 if name == "dense" else percent), []) for percent in percents]
        if not any(groups):
            continue
        cells = [f"{spread([e['accuracy'] for e in g], 100)} ({len(g)})" if g else "not run" for g in groups]
        ours = [found.get(("str_feather", percent), []) for percent in percents]
        cells += ["" if name == "str_feather" else points_apart(a, b) for a, b in zip(ours, groups, strict=True)]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    steps = " or ".join(sorted({str(entry["steps"]) for entry in entries}))
    note = f"Test accuracy in %, mean ± standard deviation (seeds); differences in points at equal seeds; {steps} steps"
    package = "transformers" if folder == "finetune" else "efficientnet"
    versions = ", ".join(sorted({f"{package} {entry[package]}" for entry in entries}))
    return [*rows, "", f"{note}; {versions}; {ran_on(entries)}."]


def one_shot_table():
    """Return what is left of a network that was pruned in one step, without training."""
    entries = [json.loads(path.read_text()) for path in sorted(ROOT.joinpath("results/one_shot").glob("*.json"))]
    keys = {"cosine": (1, ".3f"), "neighbours": (100, ".1f")}
    rows = ["| score | sparsity | mean cosine | same nearest neighbour, % |", "|---|---|---|---|"]
    for percent in sorted({entry["percent"] for entry in entries}):
        for name, label in ONE_SHOT.items():
            found = [entry for entry in entries if (entry["variant"], entry["percent"]) == (name, percent)]
            if found:
                cells = [spread([e[key] for e in found], scale, form) for key, (scale, form) in keys.items()]
                rows.append(f"| {label.replace('|', '&#124;')} | {percent} % | {' | '.join(cells)} |")
    seeds = max(len({entry["seed"] for entry in entries if entry["variant"] == name}) for name in ONE_SHOT)
    note = f"Mean ± standard deviation of {seeds} draws of 128 sentences to calibrate on"
    return [*rows, "", f"{note}; {ran_on(entries).partition('; commit')[0]}."]


def quantized_table():
    """Return the accuracies of dense and sparse networks with int2 weights."""
    result = json.loads(ROOT.joinpath("results/quantization.json").read_text())
    columns = {
        "float32": "float32",
        "rounded": "int2, rounded after training",
        "aware": "int2 and sparse from the start",
        "tuned": "int2, 3 more epochs",
    }
    rows = [f"| | {' | '.join(columns.values())} |", "|---|---|---|---|---|"]
    for sparse, label in ((False, "dense"), (True, f"{100 * result['sparsity']:.0f} % of the hidden layers zero")):
        found = [row for row in result["rows"] if row["sparse"] == sparse]
        rows.append(f"| {label} | {' | '.join(spread([row[key] for row in found], 100, '.1f') for key in columns)} |")
    note = f"Test accuracy in %, mean ± standard deviation of {len(found)} seeds; {ran_on([result])}."
    return [*rows, "", note]


def target_cost_table():
    """Return the time of a step of STR with a target, relative to STR without a target."""
    result = json.loads(ROOT.joinpath("results/step_overhead/target.json").read_text())
    names = {"str_sparsity": "`sparsity=`", "str_macs": "`macs=`"}
    rows = ["| | step time, relative to STR without a target | rescaling alone, share of a step |", "|---|---|---|"]
    for row in result["rows"]:
        if row["variant"] in names:
            ratio = f"{row['ratio']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"
            rows.append(f"| {names[row['variant']]} | {ratio} | {100 * row['update_share']:.2f} % |")
    first, options = result["rows"][0], result["options"]
    clock = "processor time" if options["cpu_time"] else "wall time"
    precision = "bf16 autocast" if options["amp"] else "float32"
    how = f"{first['model']}, batch {first['batch']}, {first['size']}², {precision}, {clock}"
    note = f"Median (minimum to maximum) of {options['rounds']} interleaved rounds; {how}; {result['device']}, "
    return [*rows, "", f"{note}torch {result['torch']}, commit {result['commit'][:7]}."]


def faults_table():
    """Return what bench/faults.py tried, how often, and what was lost."""
    rows = ["| experiment | what was tried | tries | lost | how the tries ended |", "|---|---|---|---|---|"]
    entries = [json.loads(path.read_text()) for path in sorted(ROOT.joinpath("results/faults").glob("*.json"))]
    for entry in entries:
        ends = "; ".join(f"{outcome}: {count:,}" for outcome, count in entry["outcomes"].items())
        figures = [f"{name}: {_figure(value)}" for name, value in entry["figures"].items()]
        cells = (entry["name"], entry["experiment"], f"{entry['tried']:,}", f"{entry['lost']:,}")
        rows.append(f"| {' | '.join(cells)} | {'; '.join([ends, *figures])} |")
    machines = sorted({f"{entry['device']}, torch {entry['torch']}" for entry in entries})
    commits = sorted({entry["commit"][:7] for entry in entries})
    return [*rows, "", f"{'; '.join(machines)}; commit {', '.join(commits)}."]


def _figure(value):
    """Return a figure of bench/faults.py as text."""
    if isinstance(value, dict):
        return ", ".join(f"{_figure(each)} {name}" for name, each in value.items())
    if isinstance(value, list):
        return " → ".join(map(_figure, value))
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


TABLES = {
    "runs": runs_table,
    "overhead": overhead_table,
    "methods": methods_table,
    "paper": paper_table,
    "wishes": wishes_table,
    "sizes": sizes_table,
    "frontier": frontier_table,
    "equal_macs": equal_macs_table,
    "ranks": ranks_table,
    "rnn_speed": rnn_speed_table,
    "requests": requests_table,
    "high_sparsity": high_sparsity_table,
    "freezing": freezing_table,
    "finetune": finetune_table,
    "finetune_images": partial(finetune_table, "finetune_images"),
    "patterns": patterns_table,
    "one_shot": one_shot_table,
    "quantized": quantized_table,
    "target_cost": target_cost_table,
    "faults": faults_table,
    **engine_tables.TABLES,
    **peers_tables.TABLES,
}
PAGES = (
    "README.md",
    "docs/comparison.md",
    "docs/cost.md",
    "docs/choosing.md",
    "docs/paper.md",
    "docs/reliability.md",
    "docs/engine.md",
    "docs/export.md",
    "docs/rnn.md",
    "docs/methods/str.md",
    "docs/finetuning.md",
    "docs/one_shot.md",
    "docs/libraries.md",
    "docs/quantization.md",
)


def filled(text):
    """Return the text with the table between each pair of markers replaced."""
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
            patterns_figure()
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
