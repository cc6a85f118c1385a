"""Whether it helps STR that is asked for a sparsity to leave thresholds alone once it is reached.

    python bench/freezing.py [--variants asked fixed lifted] [--percents 95 98] [--seeds 0 1 2] [--out runs/freezing]

Three ways to spend the last fifth of the run, on recipes/targets/resnet8-mnist5k.yaml:

    asked     STR as it is: s goes on learning, and is pulled to the total every 16 steps
    fixed     s moves no more; the last step alone pulls once again, so that the total is exact
    lifted    W ← S and the threshold goes down to 1e-7: survivors are trained without it, the dead stay dead

The last two are no methods of the library. Writes results/freezing/<variant>-<percent>-seed<n>.json.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from rich.console import Console

from ledger import ROOT, train_into
from sparing import METHODS, STR
from sparing.parametrizations import SoftThreshold
from sparing.schedules import to_step
from sparing.target import FARTHEST, rescale

RECIPE = ROOT / "recipes" / "targets" / "resnet8-mnist5k.yaml"


@dataclass(frozen=True)
class Fixed(STR):
    """STR whose s stays where it is from `freeze` on."""

    name: ClassVar[str] = "str_fixed"

    freeze: float = 0.8

    def is_frozen(self, step):
        return step > to_step(self.freeze, self.steps)

    def before_step(self, sparsifier):
        if self.is_frozen(sparsifier.step):
            for _, part in sparsifier.each(SoftThreshold):
                part.s.grad = None  # optimizers pass it by: no decay and no momentum either

    def after_step(self, sparsifier):
        if not self.is_frozen(sparsifier.step) or sparsifier.step == self.steps:
            super().after_step(sparsifier)


@dataclass(frozen=True)
class Lifted(Fixed):
    """STR that drops its thresholds at `freeze` and goes on with the weights that are left."""

    name: ClassVar[str] = "str_lifted"

    @torch.no_grad()
    def after_step(self, sparsifier):
        if not self.is_frozen(sparsifier.step):
            super().after_step(sparsifier)
        elif not self.is_frozen(sparsifier.step - 1):
            rescale(sparsifier.layers, sparsifier.plan, sparsifier.plan.final)
            for layer, part in sparsifier.each(SoftThreshold):
                layer.weight.copy_(layer.effective_weight)
                part.s.fill_(-FARTHEST)
                for optimizer in sparsifier.optimizers:
                    # A dead weight has no gradient and no decay; without momentum it stays zero.
                    for moment in optimizer.state.get(layer.weight, {}).values():
                        if torch.is_tensor(moment) and moment.shape == layer.weight.shape:
                            moment[layer.weight == 0] = 0


VARIANTS = {"asked": STR, "fixed": Fixed, "lifted": Lifted}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--percents", type=int, nargs="+", default=[95, 98])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "freezing")
    options = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    METHODS.update({method.name: method for method in VARIANTS.values()})  # for the recipe to know them
    for seed in options.seeds:
        for percent in options.percents:
            for variant in options.variants:
                method = {"name": VARIANTS[variant].name, "sparsity": percent / 100}
                name = f"{variant}-{percent}-seed{seed}"
                entry = ROOT / "results" / "freezing" / f"{name}.json"
                if entry.is_file():
                    continue
                metrics = train_into(
                    entry,
                    RECIPE,
                    [f"method={json.dumps(method)}", f"seed={seed}"],
                    options.out / name,
                    variant=variant,
                    percent=percent,
                    arguments=method,
                )
                console.print(
                    f"{name}: accuracy {100 * metrics['accuracy']:.2f} %, sparsity {100 * metrics['sparsity']:.3f} %"
                )


if __name__ == "__main__":
    main()
