"""Measure the Python time that a sparsifier adds to an optimizer step in which no update is due.

    python bench/idle_step.py [--methods str gmp] [--calls 1000] [--json results/cost/idle_step.json]

The model is a transformer encoder of 48 layers with 192 sparsified weights. Only one bias has a gradient, so
`optimizer.step()` itself does almost nothing, and the difference to the same optimizer without a sparsifier is the time
of the two hooks. The steps of both optimizers alternate in one process. The target is at most 50 microseconds per step.

Some methods work at every step by design: DNW makes its masks (unless `every` is larger), DST checks for empty
layers, SNFS averages gradients, Spartan computes its own gradients, and continuous sparsification raises its
temperature. Without gradients of the weights, only the loops of SNFS and Spartan are timed. Every 100 steps
(`WATCH_EVERY`) the sparsifier checks for layers that have lost all weights; the last column is the time of that check
divided by 100.
"""

import argparse
import statistics
import time
import warnings
from pathlib import Path

import torch
from torch import nn

import sparing
from ledger import commit, write_entry
from sparing import latency

TARGET = 50.0
"""Microseconds per step."""
STEPS, STEP = 1_000_000, 1_001
"""Length of the run, and a step in which no update is due."""
LATER = {"sparsity": 0.9, "begin": 100_000, "end": 200_000}
RARELY = {"sparsity": 0.9, "every": 100_000}
VARIANTS = {
    "str": ("str", {}),
    "str_sparsity": ("str", {"sparsity": 0.9, "begin": 100_000}),
    "str_feather": ("str_feather", {"sparsity": 0.9, "begin": 100_000}),
    "gmp": ("gmp", LATER),
    "gmp_global": ("gmp", {**LATER, "budget": "global"}),
    "rigl": ("rigl", RARELY),
    "dnw": ("dnw", {"sparsity": 0.9}),
    "dnw_every_100": ("dnw", {"sparsity": 0.9, "every": 100}),
    "dsr": ("dsr", RARELY),
    "set": ("set", RARELY),
    "snfs": ("snfs", RARELY),
    "variational_dropout": ("variational_dropout", {"kl_weight": 1e-4}),
    "dst": ("dst", {"alpha": 1e-4}),
    "continuous_sparsification": ("continuous_sparsification", {"weight": 1e-8}),
    "static_random": ("static_random", {"sparsity": 0.9}),
    "snip": ("snip", {"sparsity": 0.9}),
    "grasp": ("grasp", {"sparsity": 0.9}),
    "st3": ("st3", LATER),
    "st3_sigma": ("st3_sigma", LATER),
    "feather": ("feather", LATER),
    "acdc": ("acdc", {"sparsity": 0.9}),
    "spartan": ("spartan", RARELY),
    "fixed_mask": ("fixed_mask", {}),
}
"""Name → method, and arguments with which no update is due at `STEP`."""
EVERY_STEP = ("dnw", "dst", "snfs", "spartan", "continuous_sparsification")
"""Variants that work at every step by design."""
assert {method for method, _ in VARIANTS.values()} == set(sparing.METHODS)


def optimizer_of(variant=None):
    """Return an optimizer with one gradient, and the sparsifier attached to it; None without a variant."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(48)))
    sparsifier = None
    if variant is not None:
        method, arguments = VARIANTS[variant]
        sparsifier = sparing.sparsify_(model, sparing.METHODS[method](**arguments), steps=STEPS)
        sparsifier.WATCH_EVERY = 10 * STEPS
    bias = model[0].norm1.bias
    bias.grad = torch.zeros_like(bias)  # a step without any gradient is none
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if sparsifier is not None:
        sparsifier.attach(optimizer)
        sparsifier.clock.step = STEP
    return optimizer, sparsifier


def microseconds(function):
    """Return the microseconds of one call."""
    start = time.perf_counter_ns()
    function()
    return (time.perf_counter_ns() - start) / 1000


def measure(variant, calls):
    """Return the row of a variant."""
    (plain, _), (sparse, sparsifier) = optimizer_of(), optimizer_of(variant)
    pairs = []
    for _ in range(calls):
        # The same step in every call: otherwise an update would become due.
        sparsifier.clock.step = STEP
        pairs.append((microseconds(sparse.step), microseconds(plain.step)))
    hooked, unhooked = zip(*pairs, strict=True)
    return {
        "variant": variant,
        "every_step": variant in EVERY_STEP,
        "calls": calls,
        "median": statistics.median(h - u for h, u in pairs),
        "minimum": min(hooked) - min(unhooked),
        "ratio": statistics.median(h / u for h, u in pairs),
        "plain_step": statistics.median(unhooked),
        "watch": min(microseconds(sparsifier.collapsed) for _ in range(3)) / sparing.Sparsifier.WATCH_EVERY,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to a file")
    options = parser.parse_args()
    warnings.simplefilter("ignore", sparing.SparsityWarning)
    torch.set_num_threads(1)
    print(f"{'':26}{'median':>9}{'minimum':>9}{'ratio':>8}{'watch':>8}   microseconds per step; ratio to a plain step")
    rows = []
    for variant in options.methods:
        row = measure(variant, options.calls if variant not in EVERY_STEP else max(options.calls // 20, 10))
        rows.append(row)
        note = "works at every step" if row["every_step"] else "" if row["median"] <= TARGET else "above the target"
        print(
            f"{variant:26}{row['median']:9.1f}{row['minimum']:9.1f}{row['ratio']:8.2f}{row['watch']:8.1f}   {note}",
            flush=True,
        )
    machine = latency.machine()
    result = {"recipe": "bench/idle_step.py", "commit": commit(), "torch": str(torch.__version__)}
    result |= {"processor": machine["processor"], "processors": machine["processors"], "threads": 1}
    result |= {"unit": "microseconds", "target": TARGET, "rows": rows}
    if options.json:
        write_entry(options.json, result)


if __name__ == "__main__":
    main()
