"""Tables of the results of bench/peers.py, bench/peers_job.py and bench/lenet.py, for bench/results.py."""

import json
from statistics import mean

from entries import RESULTS, spread

TASK = {
    "dense": "without pruning",
    "str": "STR",
    "str_feather": "STR-Feather",
    "feather": "Feather",
    "gmp": "GMP",
    "gmp_global": "GMP, global budget",
    "rigl": "RigL",
    "torch_prune": "`global_unstructured` after each of 4 epochs",
    "sparsimony_rigl": "RigL",
    "torchao_pat": "PAT, `GlobalMinSparsityConstraint`",
    "nncf_global": "magnitude, global",
    "nncf_local": "magnitude, local",
    "nncf_learned": "learned masks (RB)",
    "pquant_pdp": "PDP",
    "pquant_mdmm": "MDMM",
    "pquant_autosparse": "AutoSparse",
}
"""Variant of bench/peers.py → method, as text."""
NAMES = {"torch": "torch", "pquant-ml": "PQuantML", "nncf": "NNCF", "torchao": "torchao"}
LENET = {
    "snfs": "SNFS", "str": "STR", "str_feather": "STR-Feather", "feather": "Feather", "gmp": "GMP",
    "gmp_global": "GMP, global budget", "rigl": "RigL",
}  # fmt: skip
PUBLISHED = {"snfs": {5: "1.53 ± 0.02", 2: "1.99 ± 0.02", 1: "2.36 ± 0.04"}}
PERCENTS = (5, 2, 1)


def entries(folder, variants):
    """Return the results of each variant, by name, of the variants that have any. Results of a GPU take precedence."""
    paths = {path.name: path for place in (folder, f"gpu/{folder}") for path in (RESULTS / place).glob("*-seed*.json")}
    found = [json.loads(path.read_text()) for _, path in sorted(paths.items())]
    grouped = {name: [entry for entry in found if entry["variant"] == name] for name in variants}
    return {name: group for name, group in grouped.items() if group}


def library(entry):
    """Return the name of the library of a result, with its version."""
    version = (entry["version"] or "").split("+")[0]
    return f"{NAMES.get(entry['package'], entry['package'])} {version}".strip()


def peers_table():
    """Rows of the task of bench/peers.py, the most accurate first, and at the end those that missed the target."""
    found = sorted(entries("peers", TASK).items(), key=lambda item: _rank(item[1]))
    rows = []
    for name, group in found:
        first = group[0]
        zeros = sorted({entry["zeros"] for entry in group})
        share = f"{100 * mean(zeros) / first['weights']:.2f}"
        count = f"{zeros[0]:,}" if len(zeros) == 1 else f"{zeros[0]:,} to {zeros[-1]:,}"
        asked = "no target" if name == "pquant_autosparse" else f"{100 * first['asked']:g}" if first["asked"] else ""
        extra = first["lines"] - first["dense_lines"]
        rows.append(
            f"| {library(first)} | {TASK[name]} | {asked} | {share} | {count} | "
            f"{spread([entry['accuracy'] for entry in group], 100)} | {extra or ''} |"
        )
    seeds = sorted({len(group) for _, group in found})
    weights = f"{found[0][1][0]['weights']:,}"
    return [
        "| library | method | zeros asked, % | zeros, % | zeros | test accuracy, % | lines |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"{weights} weights; {' or '.join(map(str, seeds))} seeds; mean ± standard deviation; "
        f"x86_64 CPU, torch {found[0][1][0]['torch']}.",
    ]


def _rank(group):
    """Order by whether the zeros are within half a point of the target, then by accuracy."""
    missed = abs(mean(entry["zeros"] / entry["weights"] for entry in group) - group[0]["asked"]) > 0.005
    return missed, -mean(entry["accuracy"] for entry in group)


def job_table():
    """Rows of the job of bench/peers_job.py."""
    results = json.loads((RESULTS / "peers" / "job.json").read_text())
    names = {"Sparing": "sparing", "TorchPrune": "torch.nn.utils.prune", "Sparsimony": "sparsimony", "NNCF": "NNCF"}
    rows = []
    for each in results["libraries"]:
        average = each["average"]
        kept = "copying fails" if isinstance(average, str) else "yes" if average["same_zeros"] else "no"
        version = (each["version"] or "").split("+")[0]
        rows.append(
            f"| {names[each['library']]} {version}".rstrip() + f" | {each['lines']} | {each['zeros']:,} | "
            f"{'yes' if each['plain_equal'] else 'no'} | {_resumed(each)} | {kept} |"
        )
    first = results["libraries"][0]
    return [
        f"| library | lines | zeros of {first['weights']:,} | in a plain file | resumed run | in an average |",
        "|---|---|---|---|---|---|",
        *rows,
    ]


def _resumed(each):
    """Say how a resumed run ended."""
    safe, unsafe = each["resumed"], each["resumed_unsafe"]
    if isinstance(unsafe, str):
        return "fails"
    end = "equal to the last bit" if unsafe["equal"] else f"differs, {unsafe['zeros']:,} zeros"
    return end + ("; the checkpoint needs `weights_only=False`" if isinstance(safe, str) else "")


def lenet_table():
    """Rows of bench/lenet.py: our test errors, and the published ones."""
    found = entries("lenet", LENET)

    def cell(group, percent):
        errors = [entry["error"] for entry in group if entry["percent"] == percent]
        return spread(errors, 100) if errors else "not run"

    rows = {
        name: " | ".join([*(cell(group, percent) for percent in PERCENTS), *_published(name)])
        for name, group in found.items()
    }
    order = sorted(found, key=lambda name: mean(entry["error"] for entry in found[name]))
    heads = [f"ours, {percent} %" for percent in PERCENTS] + [f"published, {percent} %" for percent in PERCENTS]
    return [
        f"| test error, %, by density | {' | '.join(heads)} |",
        f"|---|{'---|' * len(heads)}",
        *(f"| {LENET[name]} | {rows[name]} |" for name in order),
        "",
        "LeNet-300-100 on MNIST, 266,200 weights; mean ± standard deviation of the seeds; one seed without ±."
        + _dense(entries("lenet", ("dense",))),
    ]


def _published(name):
    return [PUBLISHED.get(name, {}).get(percent, "") for percent in PERCENTS]


def _dense(found):
    return f" Without pruning: {spread([entry['error'] for entry in found['dense']], 100)} %." if found else ""


def bayes_table():
    """Rows of variational dropout: ours and the published one."""
    rows = []
    for entry in entries("lenet", ("variational_dropout",)).get("variational_dropout", []):
        layers = " / ".join(f"{100 * share:.1f}" for share in entry["budget"].values())
        rows.append(f"| ours | {100 * entry['error']:.2f} | {100 * entry['sparsity']:.2f} | {layers} |")
    return [
        "| variational dropout | test error, % | sparsity, % | per layer, % |",
        "|---|---|---|---|",
        *(rows or ["| ours | not run | | |"]),
        "| published | 1.92 | | 98.9 / 97.2 / 62.0 |",
    ]


TABLES = {"peers": peers_table, "peers_job": job_table, "lenet": lenet_table, "lenet_bayes": bayes_table}
