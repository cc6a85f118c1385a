"""Measure the latency of sparse ResNet-50 and MobileNetV1 in PyTorch and MNN, and of dense baselines.

    python bench/latency.py [--network resnet50/str-90.23 ...] [--rounds 7] [--batch 1 16] [--threads 1 2]

The script writes one file per network to results/export/ and skips networks whose file exists. Weights are random,
thresholded to the budget and scaled so that activations have the same magnitude in all layers: the time depends on the
number and positions of nonzero weights, not on their values. The sweep for the break-even sparsity is run once per
model, on its first uniform network.

Requires an idle machine and `pip install 'sparing[export]'`.
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

# Uniform budgets have the sparsity of a published one; those of MobileNetV1 are not published as data.
NETWORKS = {
    "resnet50": ("str-90.23", "uniform-90.23", "str-95.15", "uniform-95.15", "str-98.05", "uniform-98.05"),
    "mobilenet_v1": ("uniform-90", "uniform-95"),
}
NAMES = [f"{model}/{budget}" for model, budgets in NETWORKS.items() for budget in budgets]
SWEPT = ("resnet50/uniform-90.23", "mobilenet_v1/uniform-90")


@torch.no_grad()
def network(name):
    """Return the model of a name such as resnet50/str-90.23."""
    kind, budget_name = name.split("/")
    rule, percent = budget_name.split("-")
    model = sparing.models.MODELS[kind]()
    if rule == "uniform":
        budget = sparing.Budget.uniform(model, float(percent) / 100)
    else:
        budget = sparing.Budget.published(f"{kind}-{budget_name}")
    for layer_name, layer in sparing.layers.find_layers(model).items():
        weight = layer.weight
        # The first convolution and depthwise convolutions of a MobileNetV1 stay dense, as with GMP in the paper. They
        # have few weights per channel, and a channel without weights would zero its inputs to the next layer.
        dense = kind == "mobilenet_v1" and (layer.module.weight.shape[1] in (1, 3))
        mask = keep_top(weight.abs(), count_kept(weight.numel(), 0.0 if dense else budget[layer_name]))
        weight.copy_(torch.where(mask, weight, 0.0))
        # Otherwise activations shrink to denormal numbers, whose arithmetic is slow.
        weight *= (2 / prod(weight.shape[1:])) ** 0.5 / weight.square().mean().sqrt().clamp(min=1e-12)
    first, second = model.eval()(torch.randn(2, 3, 224, 224))
    assert not torch.equal(first, second), f"{name}: the output does not depend on the input"
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", default=NAMES, choices=NAMES, metavar="MODEL/BUDGET")
    parser.add_argument("--backend", nargs="+", default=list(latency.BACKENDS), choices=list(latency.BACKENDS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turn", type=float, default=0.5, help="approximate seconds per round and backend")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--threads", type=int, nargs="+", default=None, help="default: 1 and the number of CPUs")
    parser.add_argument("--no-sweep", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "export")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.network:
        path = options.out / f"latency-{name.replace('/', '-')}.json"
        if path.exists():
            print(f"{name}: {path} exists")
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
