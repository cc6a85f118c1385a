"""Train every method with the same recipe to 90 % sparsity: a small ResNet on the 5,000 MNIST digits.

    python bench/all_methods.py [--seeds 0 1] [--methods gmp rigl] [--out runs/all_methods]

Trains recipes/mnist5k/gmp.yaml without a method and with each variant below. Finished runs are not repeated, so an
interrupted benchmark continues where it stopped. Each run writes results/all_methods/<variant>-seed<n>.json;
`bench/results.py table` builds the table.

Methods without a target sparsity have settings with which they end near 90 %, chosen by validation accuracy and
sparsity. The other methods run with their defaults.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console

from ledger import ROOT, train_into
from sparing import METHODS

RECIPE = ROOT / "recipes" / "mnist5k" / "gmp.yaml"
TARGET = 0.9

# Variant → method, arguments of the method, and other changes of the recipe.
SETTINGS = {
    "str": ("str", {"init": -20.0}, ["optimizer.threshold_weight_decay=0.0145"]),
    "dst": ("dst", {"alpha": 7e-4}, ["optimizer.threshold_weight_decay=0"]),
    "continuous_sparsification": ("continuous_sparsification", {"weight": 4e-5}, []),
    "variational_dropout": ("variational_dropout", {"kl_weight": 3e-4}, []),
    "str_target": ("str", {"sparsity": TARGET}, []),
    "gmp_global": ("gmp", {"sparsity": TARGET, "budget": "global"}, []),
    "gmp_one_shot": ("gmp", {"sparsity": TARGET, "begin": 0, "end": 0}, []),
    "gmp_one_shot_global": ("gmp", {"sparsity": TARGET, "begin": 0, "end": 0, "budget": "global"}, []),
}
VARIANTS = ["dense", *dict.fromkeys([*METHODS, *SETTINGS])]
VARIANTS.remove("fixed_mask")  # it prunes nothing


def settings(variant):
    """Return the method of a variant, the arguments of the method, and other changes of the recipe."""
    return SETTINGS.get(variant, (variant, {"sparsity": TARGET}, []))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--methods", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "all_methods")
    options = parser.parse_args()
    ledger = ROOT / "results" / "all_methods"
    console = Console()
    for seed in options.seeds:
        for name in options.methods:
            console.print(f"{name}, seed {seed}")
            method, arguments, changes = settings(name)
            chosen = "null" if name == "dense" else json.dumps({"name": method, **arguments})
            metrics = train_into(
                ledger / f"{name}-seed{seed}.json",
                RECIPE,
                [f"method={chosen}", f"seed={seed}", "tensorboard=false", *changes],
                options.out / f"{name}-seed{seed}",
                variant=name,
                arguments=arguments,
                changes=changes,
            )
            console.print(f"  accuracy {100 * metrics['accuracy']:.2f} %  sparsity {100 * metrics['sparsity']:.2f} %")


if __name__ == "__main__":
    main()
