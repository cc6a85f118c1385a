"""Measure accuracy against sparsity and against MACs for several methods, from 80 % to 99 % sparsity.

    python bench/frontier.py                                     all runs on Fashion-MNIST, three seeds
    python bench/frontier.py --variants dense str gmp --sparsities 0.9 --seeds 0
    python bench/frontier.py --data cifar10_jpeg --data-root data/cifar10-jpeg.tar.xz --device cuda

Trains recipes/fashion-mnist/frontier.yaml with another method. Every run has a directory under --out. A finished run
writes results/frontier/<data>/<variant>-<sparsity>-seed<n>.json and is not repeated; an interrupted run continues from
its last epoch. Several machines can share the runs, each with other --seeds or --variants. With --epochs, the results
stay under --out and are not part of the study.

`python bench/results.py table` and `figures` build the table and the figure of docs/choosing.md.

Methods with a target sparsity run with their defaults. ST-3, Feather and STR-Feather run with clipped gradients, as in
the authors' code of the first two; ST-3 and Feather "as released" also update the threshold at every step. STR without
a target has the weight decays in DECAY. `gmp_str_budget` uses the budgets of these runs, and `str_matched` has their
sparsities as targets. The targets of `feather_macs` are the MACs of Feather as released; bench/small_runs.py compares
methods at equal MACs. recipes/sweeps/str-fashion-mnist.yaml searches for better settings of STR without a target.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console

from frontier_tables import FRONTIER, SPARSITIES
from ledger import CLIPPED, ROOT, train_into
from sparing import InputError
from sparing.data import DATASETS
from sparing.run.recipe import load_recipe

RECIPE = ROOT / "recipes" / "fashion-mnist" / "frontier.yaml"

INIT = -20.0
DECAY = {0.8: 2.65e-3, 0.9: 5e-3, 0.95: 9e-3, 0.98: 2.1e-2, 0.99: 3.9e-2}
"""Sparsity → weight decay of the thresholds with which STR ends near it; found with one trial each, with seed 0."""


class Study:
    """The runs on one data set, with one number of epochs."""

    def __init__(self, changes, out, ledger):
        self.changes = changes
        self.out = out
        self.ledger = ledger

    def name(self, variant, sparsity, seed):
        return f"{variant}-seed{seed}" if variant == "dense" else f"{variant}-{100 * sparsity:g}-seed{seed}"

    def entry(self, variant, sparsity, seed):
        """Return the results file of a run."""
        return self.ledger / f"{self.name(variant, sparsity, seed)}.json"

    def method(self, variant, sparsity, seed):
        """Return the section `method` of the recipe, None for dense, and other changes of the recipe.

        Raises:
            InputError: the variant needs the results of another run, which is not finished.
        """
        if variant == "dense":
            return None, []
        if variant == "str":
            return {"name": "str", "init": INIT}, [f"optimizer.threshold_weight_decay={DECAY[sparsity]}"]
        if variant == "str_sparsity":
            return {"name": "str", "sparsity": sparsity}, []
        if variant == "str_matched":
            return {"name": "str", "sparsity": self.finished("str", sparsity, seed)["sparsity"]}, []
        if variant == "global_magnitude":
            return {"name": "gmp", "budget": "global", "sparsity": sparsity}, []
        if variant in ("feather", "str_feather"):
            return {"name": variant, "sparsity": sparsity}, CLIPPED
        if variant == "feather_macs":
            return {"name": "feather", "macs": self.finished("feather_as_released", sparsity, seed)["macs"]}, CLIPPED
        if variant == "gmp_str_budget":
            budget = self.out / f"{self.name('str', sparsity, seed)}-budget.json"
            budget.parent.mkdir(parents=True, exist_ok=True)
            budget.write_text(json.dumps(self.finished("str", sparsity, seed)["budget"]))
            return {"name": "gmp", "budget": str(budget)}, []
        if variant in ("st3_as_released", "feather_as_released"):
            return {"name": variant.removesuffix("_as_released"), "sparsity": sparsity, "every": 1}, CLIPPED
        return {"name": variant, "sparsity": sparsity}, []

    def finished(self, variant, sparsity, seed):
        """Return the results of a run whose sparsity, budget or MACs another run uses.

        Raises:
            InputError: the run is not finished.
        """
        entry = self.entry(variant, sparsity, seed)
        if not entry.is_file():
            raise InputError(f"needs {entry.name}, which does not exist")
        return json.loads(entry.read_text())

    def run(self, variant, sparsity, seed):
        """Train a variant and write its results file."""
        method, changes = self.method(variant, sparsity, seed)
        return train_into(
            self.entry(variant, sparsity, seed),
            RECIPE,
            [*self.changes, f"method={json.dumps(method)}", f"seed={seed}", *changes],
            self.out / self.name(variant, sparsity, seed),
            variant=variant,
            asked=0 if variant == "dense" else sparsity,
            changes=changes,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(FRONTIER), choices=list(FRONTIER))
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(SPARSITIES), choices=SPARSITIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", default="fashion_mnist", choices=list(DATASETS))
    parser.add_argument("--data-root", help="folder of the data set")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "frontier")
    options = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)

    recipe = load_recipe(RECIPE)
    changes = [f"device={options.device}"]
    if options.data != recipe.data.name:  # with the default augmentation of that data set
        changes.append(f"data={{name: {options.data}, batch_size: {recipe.data.batch_size}}}")
    if options.data_root:
        changes.append(f"data.root={json.dumps(options.data_root)}")
    out, ledger = options.out / options.data, ROOT / "results" / "frontier" / options.data
    if options.epochs not in (None, recipe.schedule.epochs):
        changes += [f"schedule.epochs={options.epochs}", "schedule.warmup_epochs=0"]
        out = out / f"{options.epochs}-epochs"
        ledger = out / "ledger"
    study = Study(changes, out, ledger)
    for seed in options.seeds:
        for sparsity in options.sparsities:
            # In the order of FRONTIER: some variants use the results of earlier ones.
            for variant in (name for name in FRONTIER if name in options.variants):
                name = study.name(variant, sparsity, seed)
                if study.entry(variant, sparsity, seed).is_file():
                    continue
                try:
                    metrics = study.run(variant, sparsity, seed)
                except InputError as error:
                    console.print(f"{name}: not run: {error}")
                    continue
                console.print(
                    f"{name}: accuracy {100 * metrics['accuracy']:.2f} %  sparsity {100 * metrics['sparsity']:.2f} %  "
                    f"MACs {metrics['macs']:,}  {metrics['seconds']:.0f} s"
                )


if __name__ == "__main__":
    main()
