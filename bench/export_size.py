"""Measure file sizes: ResNet-50 and MobileNetV1 with published and uniform budgets, in every format of sparing.

    python bench/export_size.py [--json results/export/size.json]

Weights are random, thresholded to the budget: the size depends on the number of nonzero weights and hardly on their
positions. The lower bound is the entropy of the positions plus the bytes of the values
(`sparing.export.compressed.entropy_bound`); the tensors of batch normalization count with their bytes. Exit status 1
if a file is larger than 1.10 times the bound.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

import sparing
from ledger import commit, write_entry
from sparing.export import compressed
from sparing.masks import count_kept, keep_top

PUBLISHED = ("81.27", "90.23", "95.15", "98.05", "98.98")
UNIFORM = {"resnet50": (0.9, 0.95), "mobilenet_v1": (0.9, 0.95)}  # MobileNetV1's budgets are not published as data


def networks():
    """Yield (model name, budget name, model) for every row."""
    for sparsity in PUBLISHED:
        model = sparing.models.resnet50()
        yield "resnet50", f"str-{sparsity}", prune_(model, sparing.Budget.published(f"resnet50-str-{sparsity}"))
    for name, sparsities in UNIFORM.items():
        for sparsity in sparsities:
            model = sparing.models.MODELS[name]()
            yield name, f"uniform-{100 * sparsity:g}", prune_(model, sparing.Budget.uniform(model, sparsity))


@torch.no_grad()
def prune_(model, budget):
    """Set the smallest weights of each layer to zero, in place, and return the model."""
    for name, layer in sparing.layers.find_layers(model).items():
        mask = keep_top(layer.weight.abs(), count_kept(layer.weight.numel(), budget[name]))
        layer.weight.copy_(torch.where(mask, layer.weight, 0.0))
    return model


def measure(name, budget, model, folder):
    """Return the row of a model."""
    layers = sparing.layers.find_layers(model)
    state = model.state_dict()
    weights = {f"{layer}.weight": state[f"{layer}.weight"] for layer in layers}
    sizes = {}
    for key, content, values in (
        ("weights_only", weights, None), ("full", state, None), ("bf16", state, torch.bfloat16),
    ):  # fmt: skip
        path = Path(folder, key)
        compressed.save(content, path, values=values)
        sizes[key] = path.stat().st_size
    loaded = compressed.load(Path(folder, "full"))
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())
    bound = compressed.entropy_bound(weights)
    total = sum(tensor.numel() for tensor in weights.values())
    nonzero = sum(int(torch.count_nonzero(tensor)) for tensor in weights.values())
    return {
        "model": name, "budget": budget, "weights": total, "nonzero": nonzero, "sparsity": 1 - nonzero / total,
        "dense_bytes": sum(tensor.numel() * tensor.element_size() for tensor in state.values()),
        "bound_bytes": bound, "weights_bytes": sizes["weights_only"], "ratio_to_bound": sizes["weights_only"] / bound,
        "compressed_bytes": sizes["full"], "bf16_bytes": sizes["bf16"],
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="also write the rows to a file")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, budget, model in networks():
            rows.append(measure(name, budget, model, folder))
            row = rows[-1]
            print(
                f"{name:<13}{budget:<12}{100 * row['sparsity']:6.2f} %  dense {row['dense_bytes']:>11,}  compressed "
                f"{row['compressed_bytes']:>11,}  bf16 {row['bf16_bytes']:>11,}  weights / bound: "
                f"{row['ratio_to_bound']:.4f}",
                flush=True,
            )
    result = {"recipe": "bench/export_size.py", "commit": commit(), "seed": options.seed}
    result |= {"torch": torch.__version__, "runs": 1, "hardware": "any: sizes do not depend on it", "rows": rows}
    if options.json:
        write_entry(options.json, result)
    sys.exit(1 if any(row["ratio_to_bound"] > 1.10 for row in rows) else 0)


if __name__ == "__main__":
    main()
