"""STR that is asked for a total: whether it gets there.

    python bench/target.py [--pairs resnet8-mnist5k ...] [--out runs/target]

Trains the recipes of recipes/targets/, four networks and data sets, asked for 80, 90, 95 and 98 % of zeros and for
20, 10 and 5 % of the dense MACs, and dense; one seed. Each finished run is a file of results/target/<pair>/ and is
not trained again; one that was cut short goes on from its last epoch. `python bench/results.py table` builds the
table of docs/methods/str.md. What a total is worth beside other methods is in bench/frontier.py.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console

from ledger import ROOT, train_into
from results import MACS_ASKED, PAIRS, ZEROS_ASKED

# What is asked → the method; a percentage is of zeros or of MACs.
ROWS = {
    "dense": lambda percent: None,
    "str_sparsity": lambda percent: {"name": "str", "sparsity": percent / 100},
    "str_macs": lambda percent: {"name": "str", "macs": percent / 100},
}


def run(pair, row, percent, out, console):
    """Train one, unless it is in the ledger."""
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
    asked = [("dense", 0)]
    asked += [("str_sparsity", percent) for percent in ZEROS_ASKED] + [("str_macs", each) for each in MACS_ASKED]
    for pair in options.pairs:
        for row, percent in asked:
            run(pair, row, percent, options.out, console)


if __name__ == "__main__":
    main()
