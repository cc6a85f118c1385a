"""Test whether STR reaches its target sparsity or number of MACs, and what small networks lose with several methods.

    python bench/target.py [--pairs resnet8-mnist5k ...] [--out runs/target]
    python bench/target.py --compare

Trains the recipes of recipes/targets/, four networks and data sets: dense, with target sparsities of 80, 90, 95 and
98 %, and with targets of 20, 10 and 5 % of the dense MACs; one seed. With --compare, trains three targets at which STR
loses 20 points or more, `HIGH_SPARSITY_TARGETS`, with the methods `COMPARED_METHODS`, three seeds; Feather and
STR-Feather clip gradients at norm 3.

A finished run has a file in results/target/<pair>/ and is not repeated; an interrupted run continues from its last
epoch. `python bench/results.py table` builds the tables of docs/methods/str.md and docs/choosing.md. bench/frontier.py
compares STR with other methods at five sparsities.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console

from ledger import CLIPPED, ROOT, train_into
from results import COMPARED_METHODS, HIGH_SPARSITY_TARGETS, MACS_TARGETS, PAIRS, SPARSITY_TARGETS


def run(pair, name, kind, percent, seed, out, console):
    """Train a recipe with a method and a target, "sparsity" or "macs", or dense, unless its results exist."""
    row = name if name == "dense" else f"{name}_{kind}"
    stem = f"{row}-seed{seed}" if name == "dense" else f"{row}-{percent}-seed{seed}"
    entry = ROOT / "results" / "target" / pair / f"{stem}.json"
    if entry.is_file():
        return
    method = None if name == "dense" else {"name": name, kind: percent / 100}
    if name == "gmp_global":
        method |= {"name": "gmp", "budget": "global"}
    changes = CLIPPED if "feather" in name else []
    metrics = train_into(
        entry,
        ROOT / "recipes" / "targets" / f"{pair}.yaml",
        [f"method={json.dumps(method)}", f"seed={seed}", *changes],
        out / pair / stem,
        row=row,
        percent=percent,
        arguments=method,
        changes=changes,
    )
    console.print(
        f"{pair}, {stem}: accuracy {100 * metrics['accuracy']:.2f} %, sparsity {100 * metrics['sparsity']:.2f} %, "
        f"MACs {100 * metrics['macs'] / metrics['dense_macs']:.3f} %, {metrics['seconds']:.0f} s"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--compare", action="store_true", help="compare methods at high sparsity")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "target")
    options = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    if options.compare:
        wanted = [
            (pair, name, kind, percent, seed)
            for seed in (0, 1, 2)
            for pair, kind, percent in HIGH_SPARSITY_TARGETS
            for name in COMPARED_METHODS
            if pair in options.pairs and (kind, name) != ("macs", "gmp_global")  # GMP has no target in MACs
        ]
    else:
        targets = [("dense", "", 0)]
        targets += [("str", "sparsity", percent) for percent in SPARSITY_TARGETS]
        targets += [("str", "macs", percent) for percent in MACS_TARGETS]
        wanted = [(pair, *target, 0) for pair in options.pairs for target in targets]
    for each in wanted:
        run(*each, options.out, console)


if __name__ == "__main__":
    main()
