"""Measure the peak memory of sparsify_ and three training steps with updates, in multiples of the weights.

    python bench/memory.py [--methods dense str] [--json results/cost/memory.json]

The model has 50 M weights in 12 Linear layers of 2048×2048 and is trained with SGD and momentum. Each variant runs in a
fresh process whose allocator returns freed memory to the system at once, so the peak (ru_maxrss) contains only memory
in use. Peak and current memory exclude the memory in use before sparsify_, so gradients and momentum alone are 2.
"Current" is the resident memory after the last step, with gradients and momentum.

The targets are 3.5 for STR and for methods with masks, and 4.5 for every method. Variational dropout and continuous
sparsification train a second number per weight: with its gradient and momentum, and those of the weights, they need
at least 5. SNFS stores an average of the dense gradient and Spartan a soft mask, each one number per weight.
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
from ledger import commit, write_entry
from sparing import latency

WIDTH, LAYERS, STEPS = 2048, 12, 3
RAMP = {"sparsity": 0.9, "begin": 0, "every": 1}
TO_TWO = {**RAMP, "end": 2}
OFTEN = {"sparsity": 0.9, "every": 1, "end": 1.0}
VARIANTS = {
    "dense": (None, {}),
    "str": ("str", {}),
    "str_sparsity": ("str", RAMP),
    "str_feather": ("str_feather", RAMP),
    "gmp": ("gmp", TO_TWO),
    "gmp_global": ("gmp", {**TO_TWO, "budget": "global"}),
    "gmp_block": ("gmp", {**TO_TWO, "pattern": sparing.Block(4)}),
    "gmp_2_4": ("gmp", {"begin": 0, "end": 2, "every": 1, "pattern": sparing.NM(2, 4)}),
    "rigl": ("rigl", OFTEN),
    "dnw": ("dnw", {"sparsity": 0.9}),
    "dsr": ("dsr", OFTEN),
    "set": ("set", OFTEN),
    "snfs": ("snfs", OFTEN),
    "variational_dropout": ("variational_dropout", {"kl_weight": 1e-4}),
    "dst": ("dst", {"alpha": 1e-4}),
    "continuous_sparsification": ("continuous_sparsification", {"weight": 1e-8}),
    "static_random": ("static_random", {"sparsity": 0.9}),
    "snip": ("snip", {"sparsity": 0.9}),
    "grasp": ("grasp", {"sparsity": 0.9}),
    "st3": ("st3", TO_TWO),
    "st3_sigma": ("st3_sigma", TO_TWO),
    "feather": ("feather", TO_TWO),
    "acdc": ("acdc", {"sparsity": 0.9, "begin": 1, "end": 3, "phase": 1}),
    "spartan": ("spartan", {"sparsity": 0.9, "every": 1, "begin": 2, "end": 3}),
    "fixed_mask": ("fixed_mask", {}),
}
"""Name → method, and arguments with which an update is due in each of the three steps, or in as many as possible."""
LOW = ("dense", "str", "str_sparsity", "gmp", "gmp_global", "gmp_block", "gmp_2_4", "rigl", "dnw", "dsr", "set",
       "static_random", "snip", "acdc")  # fmt: skip
"""Variants whose target is 3.5."""
FLOORS = {"variational_dropout": 5.0, "continuous_sparsification": 5.0}
"""Variants that train a second number per weight, and the least memory that they need."""
assert {method for method, _ in VARIANTS.values()} - {None} == set(sparing.METHODS)


def measure(variant):
    """Run a variant in this process, and return its peak and current memory in multiples of the weights."""
    warnings.simplefilter("ignore", sparing.SparsityWarning)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    method, arguments = VARIANTS[variant]
    model = nn.Sequential(*(part for _ in range(LAYERS) for part in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    peak, current = peak_bytes(), current_bytes()
    sparsifier = None
    if method is not None:
        sparsifier = sparing.sparsify_(model, sparing.METHODS[method](**arguments), steps=STEPS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    if sparsifier is not None:
        sparsifier.attach(optimizer)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(torch.randn(4, WIDTH)).square().mean()
        if sparsifier is not None:
            loss = loss + sparsifier.penalty()
        loss.backward()
        optimizer.step()
    return {"peak": (peak_bytes() - peak) / weights, "current": (current_bytes() - current) / weights}


def peak_bytes():
    """Return the highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def current_bytes():
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to a file")
    parser.add_argument("--in-this-process", metavar="METHOD", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_this_process:
        print(json.dumps(measure(options.in_this_process)))
        return
    print(f"{'':26}{'peak':>6}{'current':>9}{'target':>8}{'floor':>7}   multiples of the weights")
    rows = []
    for variant in options.methods:
        command = [sys.executable, __file__, "--in-this-process", variant]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
        row = {"variant": variant, **json.loads(done.stdout), "target": 3.5 if variant in LOW else 4.5}
        row["floor"] = FLOORS.get(variant)
        rows.append(row)
        floor = "" if row["floor"] is None else f"{row['floor']:.1f}"
        note = "" if row["peak"] <= row["target"] else "above the target"
        print(f"{variant:26}{row['peak']:6.2f}{row['current']:9.2f}{row['target']:8.1f}{floor:>7}   {note}", flush=True)
    machine = latency.machine()
    result = {"recipe": "bench/memory.py", "commit": commit(), "torch": str(torch.__version__)}
    result |= {"processor": machine["processor"], "processors": machine["processors"], "threads": 1}
    result |= {"weights": LAYERS * WIDTH * (WIDTH + 1), "steps": STEPS, "rows": rows}
    if options.json:
        write_entry(options.json, result)


if __name__ == "__main__":
    main()
