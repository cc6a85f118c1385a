"""Latency of ResNet-50 and MobileNetV1, sparse in MNN against dense in its rivals, budget against budget.

    python bench/latency.py [--network resnet50/str-90.23 ...] [--rounds 7] [--batch 1 16] [--threads 1 2]

A network is a file in results/export/, written when it is finished: stopped and started again, the script goes
on with those that are not there. Weights are random, thresholded to the budget and scaled so that numbers keep
their size from layer to layer: time depends on how many live, and where, not on what they are. The
sweep, which finds the sparsity from which zeros pay, is done once a model, on its first uniform network.

Needs a machine with nothing else to do, and `pip install 'sparing[export]'`.
"""

import argparse
import json
import subprocess
from math import prod
from pathlib import Path

import torch

import sparing
from sparing.export import latency
from sparing.files import write_text
from sparing.masks import count_kept, keep_top

ROOT = Path(__file__).parent.parent

# Uniform at the sparsity of each published budget; MobileNetV1's budgets are not published as data.
NETWORKS = {
    "resnet50": ("str-90.23", "uniform-90.23", "str-95.15", "uniform-95.15", "str-98.05", "uniform-98.05"),
    "mobilenet_v1": ("uniform-90", "uniform-95"),
}
NAMES = [f"{model}/{budget}" for model, budgets in NETWORKS.items() for budget in budgets]
SWEPT = ("resnet50/uniform-90.23", "mobilenet_v1/uniform-90")


@torch.no_grad()
def network(name):
    """The model of a name such as resnet50/str-90.23."""
    kind, budget = name.split("/")
    rule, share = budget.split("-")
    model = sparing.models.MODELS[kind]()
    uniform = rule == "uniform"
    shares = (
        sparing.Budget.uniform(model, float(share) / 100) if uniform else sparing.Budget.published(f"{kind}-{budget}")
    )
    for layer_name, layer in sparing.layers.find_layers(model).items():
        weight = layer.weight
        # Without zeros in the first and in depthwise convolutions, as GMP prunes a MobileNetV1: they have a few
        # weights a channel, and a channel that has none is dead, and with it what reads it.
        dense = kind == "mobilenet_v1" and (layer.module.weight.shape[1] in (1, 3))
        mask = keep_top(weight.abs(), count_kept(weight.numel(), 0.0 if dense else shares[layer_name]))
        weight.copy_(torch.where(mask, weight, 0.0))
        # Without this, numbers shrink to where arithmetic is slow.
        weight *= (2 / prod(weight.shape[1:])) ** 0.5 / weight.square().mean().sqrt().clamp(min=1e-12)
    first, second = model.eval()(torch.randn(2, 3, 224, 224))
    assert not torch.equal(first, second), f"{name}: nothing passes through, so there is nothing to check"
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", default=NAMES, choices=NAMES, metavar="MODEL/BUDGET")
    parser.add_argument("--backend", nargs="+", default=list(latency.BACKENDS), choices=list(latency.BACKENDS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turn", type=float, default=0.5, help="seconds a turn is meant to last")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--threads", type=int, nargs="+", default=None, help="default: 1 and all there are")
    parser.add_argument("--no-sweep", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "export")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.network:
        path = options.out / f"latency-{name.replace('/', '-')}.json"
        if path.exists():
            print(f"{name}: {path} is there")
            continue
        torch.manual_seed(0)
        measured = latency.measure(
            network(name), (1, 3, 224, 224), batches=options.batch, threads=options.threads,
            backends=options.backend, rounds=options.rounds, turn=options.turn,
            sweep=latency.SWEEP if name in SWEPT and not options.no_sweep else (),
        )  # fmt: skip
        print(f"\n{name}\n{measured}", flush=True)
        result = {"recipe": "bench/latency.py", "network": name, "commit": commit or None, "seed": 0, "runs": 1}
        write_text(path, json.dumps(result | json.loads(measured.to_json()), indent=2) + "\n")


if __name__ == "__main__":
    main()
