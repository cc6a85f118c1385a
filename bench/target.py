"""STR that is asked for a total, beside STR as it is, ST-3 and Feather: 90, 95 and 98 %, three seeds.

    python bench/target.py [--rows str_sparsity str] [--percents 95] [--seeds 0 1 2] [--out runs/target]

Runs recipes/mnist5k/gmp.yaml with the method swapped, and the rows of OTHERS on recipes of their own. A run is one
directory, finished ones are kept, so an interrupted benchmark goes on where it stopped; each finished run is
written to results/target/<row>-<percent>-seed<n>.json. `python bench/results.py table` builds the table.

STR as it is cannot be told a sparsity. DECAY has the weight decay on s that brings it near, found by trial on
seed 0; where it lands with each seed is in the table.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console

from sparing.files import write_text
from sparing.train.recipe import load_recipe
from sparing.train.run import train_run

ROOT = Path(__file__).parent.parent
MNIST = "recipes/mnist5k/gmp.yaml"
FASHION = ["data={name: fashion_mnist, batch_size: 128, shift: 2}", "schedule.epochs=3"]

DECAY = {90: 0.0125, 95: 0.02, 98: 0.04}

# Row → the method at a percentage of zeros, and changes of the recipe beside it.
ROWS = {
    "str_sparsity": lambda percent: ({"name": "str", "sparsity": percent / 100}, []),
    "str": lambda percent: ({"name": "str", "init": -20.0}, [f"optimizer.threshold_weight_decay={DECAY[percent]}"]),
    "st3": lambda percent: ({"name": "st3", "sparsity": percent / 100}, []),
    "feather": lambda percent: ({"name": "feather", "sparsity": percent / 100}, []),
}
# Rows that are asked for only by name: a percentage of zeros, or of the dense MACs.
OTHERS = {
    "str_macs": lambda percent: ({"name": "str", "macs": 1 - percent / 100}, []),
    "dense": lambda percent: (None, []),
    "fashion_mnist_str_sparsity": lambda percent: ({"name": "str", "sparsity": percent / 100}, FASHION),
    "fashion_mnist_st3": lambda percent: ({"name": "st3", "sparsity": percent / 100}, FASHION),
    "fashion_mnist_feather": lambda percent: ({"name": "feather", "sparsity": percent / 100}, FASHION),
}


def run(row, percent, seed, out, ledger):
    """Train one, unless it is in the ledger."""
    entry = ledger / f"{row}-{percent}-seed{seed}.json"
    if entry.exists():
        return json.loads(entry.read_text())
    method, changes = (ROWS | OTHERS)[row](percent)
    overrides = [f"method={json.dumps(method)}", f"seed={seed}", "tensorboard=false", *changes]
    folder = out / f"{row}-{percent}-seed{seed}"
    metrics = train_run(load_recipe(ROOT / MNIST, overrides), folder, resume=True, console=Console(quiet=True))
    layers = json.loads((folder / "report.json").read_text())["layers"]
    written = {"row": row, "percent": percent, "recipe": MNIST, "arguments": method, "changes": changes, **metrics}
    written["nonzero_of_layers"] = {layer["name"]: layer["nonzero"] for layer in layers}
    write_text(entry, json.dumps(written, indent=2) + "\n")
    return written


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=[*ROWS, *OTHERS])
    parser.add_argument("--percents", type=int, nargs="+", default=[95, 98, 90])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "target")
    parser.add_argument("--ledger", type=Path, default=ROOT / "results" / "target")
    options = parser.parse_args()
    options.ledger.mkdir(parents=True, exist_ok=True)
    console = Console()
    for seed in options.seeds:
        for percent in options.percents:
            for row in options.rows:
                entry = run(row, percent, seed, options.out, options.ledger)
                console.print(
                    f"{row}, {percent} %, seed {seed}: accuracy {100 * entry['accuracy']:.2f} %, "
                    f"sparsity {100 * entry['sparsity']:.2f} %, MACs {entry['macs']:,}, {entry['seconds']:.0f} s"
                )


if __name__ == "__main__":
    main()
