"""The cost of a training step: dense against STR against the formula written out.

    python bench/step_overhead.py [--model resnet50] [--variant str] [--batch 32] [--rounds 7] [--compile]

Copies of one model take turns, step by step, in one process: the machine's drift hits all of
them alike, and the median of the ratios of neighbouring steps is what is printed. A second part
compares `import sparing` with `import torch`, in fresh interpreters, in turn.

The naive formula is what the 2020 release runs, sign(w) · relu(|w| − sigmoid(s)), left to autograd.
"""

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import sparing


class Naive(nn.Module):
    """The formula, and nothing done about it."""

    def __init__(self):
        super().__init__()
        self.s = nn.Parameter(torch.full((1,), -5.0))

    def forward(self, weight):
        return torch.sign(weight) * torch.relu(weight.abs() - torch.sigmoid(self.s))


def dense_(model):
    """Leave the model as it is: the side the others are compared with."""


def str_(model):
    """Sparsify with STR."""
    sparing.sparsify_(model, sparing.STR(init=-5.0))


def naive_(model):
    """Put the formula on every layer that STR would sparsify."""
    for layer in sparing.select.find_layers(model).values():
        parametrize.register_parametrization(layer.module, "weight", Naive())


VARIANTS = {"dense": dense_, "str": str_, "naive": naive_}


def variants(name, wanted):
    """A copy of the same model for every variant wanted, dense first."""
    model = sparing.models.MODELS[name]()
    copies = {}
    for kind in dict.fromkeys(["dense", *wanted]):
        copies[kind] = copy.deepcopy(model)
        VARIANTS[kind](copies[kind])
    return copies


def stepper(model, images, labels, amp, compiled):
    """A function that takes one training step."""
    device = images.device
    model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(sparing.param_groups(model, weight_decay=1e-5), lr=1e-3, momentum=0.9)
    run = torch.compile(model) if compiled else model

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            loss = F.cross_entropy(run(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def measure(name, wanted, batch, size, rounds, amp, compiled, device):
    """Ratio of every variant to dense, and its peak memory on a GPU."""
    images = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch,), device=device)
    steps = {kind: stepper(model, images, labels, amp, compiled) for kind, model in variants(name, wanted).items()}
    peaks = {}
    for kind, step in steps.items():
        step()  # allocations, autotuning and compilation are not the question
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            peaks[kind] = torch.cuda.max_memory_allocated() - before
    seconds = {kind: [] for kind in steps}
    order = list(steps)
    for turn in range(rounds):
        for kind in order if turn % 2 == 0 else reversed(order):
            start = time.perf_counter()
            steps[kind]()
            seconds[kind].append(time.perf_counter() - start)
    rows = []
    for kind, times in seconds.items():
        ratios = [mine / dense for mine, dense in zip(times, seconds["dense"], strict=True)]
        row = {"model": name, "batch": batch, "size": size, "variant": kind, "ratio": statistics.median(ratios)}
        row |= {"lowest": min(ratios), "highest": max(ratios), "seconds": statistics.median(times)}
        if peaks:
            row["memory_ratio"] = peaks[kind] / peaks["dense"]
        rows.append(row)
    return rows


def import_ratio(rounds):
    """How much longer `import sparing` takes than `import torch`."""

    def seconds(module):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
        return time.perf_counter() - start

    seconds("sparing")
    ratios = []
    for _ in range(rounds):
        torch_alone = seconds("torch")
        ratios.append(seconds("sparing") / torch_alone)
    return {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["resnet50", "mobilenet_v1"])
    parser.add_argument("--variant", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--amp", action="store_true", help="bf16 autocast")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    print(f"torch {torch.__version__}, {where}, {torch.get_num_threads()} threads, {options.rounds} rounds")
    imports = import_ratio(options.rounds)
    print(
        f"import sparing / import torch: {imports['ratio']:.3f} ({imports['lowest']:.3f} to {imports['highest']:.3f})"
    )
    result = {"torch": torch.__version__, "device": where, "options": vars(options), "import": imports, "rows": []}
    for name in options.model:
        how = (options.batch, options.size, options.rounds, options.amp, options.compile, device)
        rows = measure(name, options.variant, *how)
        result["rows"] += rows
        for row in rows:
            memory = f"  memory {row['memory_ratio']:.3f}" if "memory_ratio" in row else ""
            spread = f"{row['lowest']:.3f} to {row['highest']:.3f}"
            print(f"{name:>14}  {row['variant']:>6}  {row['ratio']:.3f} of dense ({spread}){memory}", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
