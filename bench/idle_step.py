"""Measure the Python cost of the sparsifier in an optimizer step on which nothing is due.

    python bench/idle_step.py [--calls 400] [--out results/cost/idle_step.json]

The model is a transformer of 48 layers with 192 sparsified weights; it has no gradients, so `optimizer.step()` itself
does almost nothing, and what the two hooks add is the difference to the same optimizer without a sparsifier. Both are
measured in turns in one process. Target: at most 50 microseconds. Four methods work at every step by design: DST,
continuous sparsification, Spartan and SNFS, as does DNW with `every=1`.
"""

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path

import torch
from torch import nn

import sparing

STEPS, NOW = 1_000_000, 1_001
FAR = {"begin": 100_000, "end": 200_000}
SETTINGS = {
    "str": ("STR", {}), "str_sparsity": ("STR", {"sparsity": 0.9, "begin": 100_000}),
    "str_feather": ("STRFeather", {"sparsity": 0.9, "begin": 100_000}), "gmp": ("GMP", {"sparsity": 0.9, **FAR}),
    "gmp_global": ("GMP", {"sparsity": 0.9, "budget": "global", **FAR}),
    "rigl": ("RigL", {"sparsity": 0.9, "every": 100_000}), "set": ("SET", {"sparsity": 0.9, "every": 100_000}),
    "dsr": ("DSR", {"sparsity": 0.9, "every": 100_000}), "static_random": ("StaticRandom", {"sparsity": 0.9}),
    "st3": ("ST3", {"sparsity": 0.9, **FAR}), "feather": ("Feather", {"sparsity": 0.9, **FAR}),
    "acdc": ("ACDC", {"sparsity": 0.9}), "snip": ("SNIP", {"sparsity": 0.9}), "grasp": ("GraSP", {"sparsity": 0.9}),
    "variational_dropout": ("VariationalDropout", {"kl_weight": 1e-4}), "dnw": ("DNW", {"sparsity": 0.9, "every": 9}),
    "dst": ("DST", {"alpha": 1e-4}), "spartan": ("Spartan", {"sparsity": 0.9}),
    "snfs": ("SNFS", {"sparsity": 0.9, "every": 100_000}),
    "continuous_sparsification": ("ContinuousSparsification", {"weight": 1e-8}),
}  # fmt: skip


def optimizer_of(settings=None):
    """Build the model and its optimizer, sparsified and attached unless `settings` is None."""
    model = nn.Sequential(*(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(48)))
    sparsifier = None
    if settings is not None:
        name, arguments = settings
        sparsifier = sparing.sparsify_(model, getattr(sparing, name)(**arguments), steps=STEPS)
        sparsifier.WATCH_EVERY = STEPS
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if sparsifier is not None:
        sparsifier.attach(optimizer)
        sparsifier.clock.step = NOW
    return optimizer


def microseconds(step):
    """Time one call."""
    start = time.perf_counter_ns()
    step()
    return (time.perf_counter_ns() - start) / 1000


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=400)
    parser.add_argument("--methods", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore", sparing.SparsityWarning)
    torch.set_num_threads(1)
    plain, rows = optimizer_of(), {}
    print(f"{'method':26} {'median':>9} {'minimum':>9} {'ratio':>7}   microseconds beyond, and ratio to, a plain step")
    for name in options.methods:
        sparse = optimizer_of(SETTINGS[name])
        calls = options.calls if name not in ("dst", "snfs", "spartan", "continuous_sparsification") else 20
        pairs = [(microseconds(sparse.step), microseconds(plain.step)) for _ in range(calls)]
        extra = [with_hooks - without for with_hooks, without in pairs]
        ratio = statistics.median(with_hooks / without for with_hooks, without in pairs)
        least = min(with_hooks for with_hooks, _ in pairs) - min(without for _, without in pairs)
        rows[name] = {"median_us": statistics.median(extra), "minimum_us": least, "ratio": ratio}
        print(f"{name:26} {rows[name]['median_us']:9.1f} {least:9.1f} {ratio:7.2f}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
