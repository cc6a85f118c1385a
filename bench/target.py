"""Test whether STR reaches its target sparsity or number of MACs.

    python bench/target.py [--pairs resnet8-mnist5k ...] [--out runs/target]

Trains the recipes of recipes/targets/, four networks and data sets: dense, with target sparsities of 80, 90, 95 and
98 %, and with targets of 20, 10 and 5 % of the dense MACs; one seed. A finished run has a file in
results/target/<pair>/ and is not repeated; an interrupted run continues from its last epoch.
`python bench/results.py table` builds the table of docs/methods/str.md. bench/frontier.py compares STR with other
methods.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console

from ledger import ROOT, train_into
from results import MACS_TARGETS, PAIRS, SPARSITY_TARGETS

# Kind of target → section `method` of the recipe; the percentage is of zero weights or of MACs.
ROWS = {
    "dense": lambda percent: None,
    "str_sparsity": lambda percent: {"name": "str", "sparsity": percent / 100},
    "str_macs": lambda percent: {"name": "str", "macs": percent / 100},
}


def run(pair, row, percent, out, console):
    """Train a recipe with one target, unless its results exist."""
    name = f"{row}-seed0" if row == "dense" else f"{row}-{percent}-seed0"
    entry = ROOT / "results" / "target" / pair / f"{name}.json"
    if entry.is_file():
        return
    method = ROWS[row](percent)
    metrics = train_into(
        entry,
        ROOT / "recipes" / "targets" / f"{pair}.yaml",
        [f"method={json.dumps(method)}", "seed=0"],
        out / pair / name,
        row=row,
        percent=percent,
        arguments=method,
    )
    console.print(
        f"{pair}, {name}: accuracy {100 * metrics['accuracy']:.2f} %, sparsity {100 * metrics['sparsity']:.2f} %, "
        f"MACs {100 * metrics['macs'] / metrics['dense_macs']:.3f} %, {metrics['seconds']:.0f} s"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "target")
    options = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    targets = [("dense", 0)]
    targets += [("str_sparsity", percent) for percent in SPARSITY_TARGETS]
    targets += [("str_macs", percent) for percent in MACS_TARGETS]
    for pair in options.pairs:
        for row, percent in targets:
            run(pair, row, percent, options.out, console)


if __name__ == "__main__":
    main()
