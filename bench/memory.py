"""Measure the peak memory of sparsify_ and three steps with updates due, in multiples of the weights.

    python bench/memory.py [--methods dense str] [--out results/cost/memory.json]

The model has 50 M weights in 12 Linear layers, trained by SGD with momentum. Each method runs in a fresh process whose
allocator returns freed memory at once, so that the peak is that of live memory. The peak counts from after the model
was built: gradients and momentum alone are 2. Target: at most 3.5 for STR and mask methods, 4.5 for every method.
Variational dropout and continuous sparsification train a second number per weight: the least they can have is 5.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from torch import nn

import sparing

RAMP = {"sparsity": 0.9, "begin": 0, "every": 1}
SETTINGS = {
    "dense": (None, {}), "str": ("STR", {}), "str_sparsity": ("STR", RAMP), "str_feather": ("STRFeather", RAMP),
    "gmp": ("GMP", {**RAMP, "end": 2}), "gmp_global": ("GMP", {**RAMP, "end": 2, "budget": "global"}),
    "gmp_block": ("GMP", {**RAMP, "end": 2, "pattern": sparing.Block(4)}),
    "rigl": ("RigL", {"sparsity": 0.9, "every": 1, "end": 1.0}), "set": ("SET", {"sparsity": 0.9, "every": 1}),
    "snfs": ("SNFS", {"sparsity": 0.9, "every": 1}), "dsr": ("DSR", {"sparsity": 0.9, "every": 1, "end": 1.0}),
    "dnw": ("DNW", {"sparsity": 0.9}), "static_random": ("StaticRandom", {"sparsity": 0.9}),
    "snip": ("SNIP", {"sparsity": 0.9}), "grasp": ("GraSP", {"sparsity": 0.9}), "st3": ("ST3", {**RAMP, "end": 2}),
    "st3_sigma": ("ST3Sigma", {**RAMP, "end": 2}), "feather": ("Feather", {**RAMP, "end": 2}),
    "acdc": ("ACDC", {"sparsity": 0.9, "begin": 1, "end": 3, "phase": 1}),
    "spartan": ("Spartan", {**RAMP, "begin": 2, "end": 3}), "dst": ("DST", {"alpha": 1e-4}),
    "variational_dropout": ("VariationalDropout", {"kl_weight": 1e-4}),
    "continuous_sparsification": ("ContinuousSparsification", {"weight": 1e-8}),
}  # fmt: skip


def peak(name):
    """Run one method in this process and return its peak over the start, in multiples of the weights."""
    warnings.simplefilter("ignore", sparing.SparsityWarning)
    torch.set_num_threads(1)
    method, arguments = SETTINGS[name]
    model = nn.Sequential(*(part for _ in range(12) for part in (nn.Linear(2048, 2048), nn.ReLU())))
    weights = sum(parameter.numel() for parameter in model.parameters()) * 4 / 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sparsifier = method and sparing.sparsify_(model, getattr(sparing, method)(**arguments), steps=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    if sparsifier:
        sparsifier.attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 2048)).square().mean()
        (loss + sparsifier.penalty() if sparsifier else loss).backward()
        optimizer.step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / weights


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--here", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(peak(options.here))
        return
    rows = {}
    for name in options.methods:
        command = [sys.executable, __file__, "--here", name]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        rows[name] = float(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
        print(f"{name:26} {rows[name]:5.2f} times the weights", flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"torch": torch.__version__, "peak": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
