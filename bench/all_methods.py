"""Every method on the same recipe at 90 %: a small ResNet on the 5,000 MNIST digits.

    python bench/all_methods.py [--seeds 0 1] [--methods gmp rigl] [--out runs/all_methods]

Runs recipes/mnist5k/gmp.yaml with one word swapped, dense and with each method of METHODS. A run is
one directory, finished ones are kept, so an interrupted benchmark goes on where it stopped. Of each
it writes results/all_methods/<method>-seed<n>.json; `bench/results.py table` builds the table.

Methods that learn their sparsity cannot be told 90 %; SETTINGS has what brings them near it here, found
by their validation accuracy and sparsity. The others run with their defaults.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console

from ledger import ROOT, train_into
from sparing import METHODS

RECIPE = ROOT / "recipes" / "mnist5k" / "gmp.yaml"
TARGET = 0.9

# Method → its arguments, and changes of the recipe beside it.
SETTINGS = {
    "str": ({"init": -20.0}, ["optimizer.threshold_weight_decay=0.0145"]),
    "dst": ({"alpha": 7e-4}, ["optimizer.threshold_weight_decay=0"]),
    "continuous_sparsification": ({"penalty": 4e-5}, ["optimizer.threshold_weight_decay=0"]),
    "variational_dropout": ({"kl_weight": 3e-4}, ["optimizer.threshold_weight_decay=0"]),
}


def method(name):
    """Arguments of the method, and changes of the recipe beside it."""
    return ({}, []) if name == "dense" else SETTINGS.get(name, ({"sparsity": TARGET}, []))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--methods", nargs="+", default=["dense", *METHODS], choices=["dense", *METHODS])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "all_methods")
    options = parser.parse_args()
    ledger = ROOT / "results" / "all_methods"
    console = Console()
    for seed in options.seeds:
        for name in options.methods:
            console.print(f"{name}, seed {seed}")
            arguments, changes = method(name)
            chosen = "null" if name == "dense" else json.dumps({"name": name, **arguments})
            metrics = train_into(
                ledger / f"{name}-seed{seed}.json",
                RECIPE,
                [f"method={chosen}", f"seed={seed}", "tensorboard=false", *changes],
                options.out / f"{name}-seed{seed}",
                arguments=arguments,
                changes=changes,
            )
            console.print(f"  accuracy {100 * metrics['accuracy']:.2f} %  sparsity {100 * metrics['sparsity']:.2f} %")


if __name__ == "__main__":
    main()
