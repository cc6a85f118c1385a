"""Test whether STR with a target sparsity benefits from fixed thresholds at the end of the run.

    python bench/freezing.py [--variants asked fixed lifted] [--percents 95 98] [--seeds 0 1 2] [--out runs/freezing]

Three variants of the last fifth of the run, with recipes/targets/resnet8-mnist5k.yaml:

    asked     STR: s is trained, and the thresholds are rescaled to the target every 16 steps
    fixed     s is constant; one rescaling at the last step makes the sparsity exact
    lifted    W ← S, and the thresholds are set to 1e-7: active weights train without shrinkage, pruned ones stay zero

The last two are not methods of the library. Writes results/freezing/<variant>-<percent>-seed<n>.json.
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
from sparing.optimizers import reset_state
from sparing.parametrizations import SoftThreshold
from sparing.schedules import to_step
from sparing.target import FARTHEST, rescale

RECIPE = ROOT / "recipes" / "targets" / "resnet8-mnist5k.yaml"


@dataclass(frozen=True, kw_only=True)
class Fixed(STR):
    """STR with constant s from the fraction `freeze` of the run on."""

    name: ClassVar[str] = "str_fixed"

    freeze: float = 0.8

    def is_frozen(self, step, steps):
        return step > to_step(self.freeze, steps)

    def before_step(self, sparsifier, optimizers):
        if self.is_frozen(sparsifier.step, sparsifier.steps):
            for _, part in sparsifier.each(SoftThreshold):
                part.s.grad = None  # optimizers skip it, so it gets no weight decay and no momentum

    def after_step(self, sparsifier, optimizers):
        step, steps = sparsifier.step, sparsifier.steps
        if not self.is_frozen(step, steps) or step == steps:
            super().after_step(sparsifier, optimizers)


@dataclass(frozen=True, kw_only=True)
class Lifted(Fixed):
    """STR that removes its thresholds at `freeze` and continues with the active weights."""

    name: ClassVar[str] = "str_lifted"

    @torch.no_grad()
    def after_step(self, sparsifier, optimizers):
        step, steps = sparsifier.step, sparsifier.steps
        if not self.is_frozen(step, steps):
            super().after_step(sparsifier, optimizers)
        elif not self.is_frozen(step - 1, steps):
            rescale(sparsifier.layers, sparsifier.plan, sparsifier.plan.final)
            for layer, part in sparsifier.each(SoftThreshold):
                layer.weight.copy_(layer.effective_weight)
                part.s.fill_(-FARTHEST)
                # A pruned weight has no gradient and no weight decay; without momentum it stays zero.
                reset_state(optimizers, layer.weight, layer.weight == 0)


VARIANTS = {"asked": STR, "fixed": Fixed, "lifted": Lifted}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--percents", type=int, nargs="+", default=[95, 98])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "freezing")
    options = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    METHODS.update({method.name: method for method in VARIANTS.values()})  # so that recipes can name them
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
