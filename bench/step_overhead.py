"""Measure the time of a training step: every method, and the formula of STR with autograd, relative to dense.

    python bench/step_overhead.py [--model resnet50] [--variant str gmp] [--batch 32] [--rounds 7]
    python bench/step_overhead.py --model mlp --batch 128 --mode eager compiled
    python bench/step_overhead.py --against str --variant str_sparsity str_macs

The steps of copies of one model alternate in one process, so that changes in the speed of the machine affect all of
them equally. The result is the median of the ratios of neighbouring steps, and the ratio of the fastest steps, which
others on the machine affect least. With --imports, `import sparing` is compared with `import torch`, alternating, in
fresh interpreters.

A method with periodic updates is timed in a step without an update, and in two steps with one update between them; the
result is the mean over its default interval. The methods may differ by less than the noise of a step, so their work
after a step is also timed separately, as a share of the step.

The naive formula is that of the 2020 release, sign(w) · relu(|w| − sigmoid(s)), with gradients by autograd.
"""

import argparse
import copy
import itertools
import platform
import statistics
import subprocess
import sys
import time
import warnings

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import sparing
from ledger import commit, write_entry
from sparing.schedules import to_step

STEPS = 1000
"""Length of the simulated run in optimizer steps."""
PLAIN, UPDATE = 450, 400
"""A step without an update, and the step from which on the next update is timed."""


class Naive(nn.Module):
    """The formula of STR, with gradients by autograd."""

    def __init__(self):
        super().__init__()
        self.s = nn.Parameter(torch.full((1,), -5.0))

    def forward(self, weight):
        return torch.sign(weight) * torch.relu(weight.abs() - torch.sigmoid(self.s))


def dense_(model):
    """Leave the model dense: the baseline."""


def naive_(model):
    """Register the naive formula on every layer that STR would sparsify."""
    for layer in sparing.layers.find_layers(model).values():
        parametrize.register_parametrization(layer.module, "weight", Naive())


def sparse_(name, **arguments):
    """Return a function that sparsifies a model with a method."""
    return lambda model: sparing.sparsify_(model, sparing.METHODS[name](**arguments), steps=STEPS)


ARGUMENTS = {
    "str": {},
    "dst": {"alpha": 1e-4},
    "continuous_sparsification": {"weight": 1e-5},
    "variational_dropout": {"kl_weight": 1e-4},
    "fixed_mask": {},
}
"""Arguments of methods without a target sparsity; the others run at 90 %."""
VARIANTS = {"dense": dense_, "naive": naive_}
VARIANTS |= {name: sparse_(name, **ARGUMENTS.get(name, {"sparsity": 0.9})) for name in sparing.METHODS}
VARIANTS |= {
    "gmp_global": sparse_("gmp", sparsity=0.9, budget="global"),
    "str_sparsity": sparse_("str", sparsity=0.9),
    "str_macs": sparse_("str", macs=0.1, input_size=(1, 3, 224, 224)),
}


def mlp():
    """Build a network of three linear layers with 1.86 million weights, of which each is used once per example."""
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


MODELS = {**sparing.models.MODELS, "mlp": mlp}


class Side:
    """A variant of the model with its optimizer."""

    def __init__(self, kind, model, images, labels, amp, compiled, clock):
        self.images, self.labels, self.amp, self.clock = images, labels, amp, clock
        model.to(images.device)
        self.sparsifier = VARIANTS[kind](model)
        model.to(memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.SGD(sparing.param_groups(model, weight_decay=1e-5), lr=1e-3, momentum=0.9)
        if self.sparsifier is not None:
            self.sparsifier.attach(self.optimizer)
        self.run = torch.compile(model) if compiled else model
        method = getattr(self.sparsifier, "method", None)
        self.every = getattr(method, "every", 1)
        if hasattr(method, "phase"):
            self.every = to_step(method.phase, STEPS)
        begin = to_step(getattr(method, "begin", 0), STEPS)
        self.update = begin + -(-(UPDATE - begin) // self.every) * self.every

    def at(self, number):
        """Set the number of steps taken."""
        if self.sparsifier is not None:
            self.sparsifier.clock.step = number

    def step(self):
        """Take one training step."""
        device = self.images.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.amp):
            loss = F.cross_entropy(self.run(self.images), self.labels)
        if self.sparsifier is not None:
            loss = loss + self.sparsifier.penalty()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    def waits(self):
        """Return how often the host waits for the GPU in a step without an update."""
        self.at(PLAIN)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(each.message) for each in caught)

    def seconds(self):
        """Return the seconds of a step, the mean over the update interval of the method."""
        self.at(PLAIN)
        start = self.clock()
        self.step()
        plain = self.clock() - start
        if self.every == 1:
            return plain
        # Methods act before or after a step, so one of these two steps has the update.
        self.at(self.update - 1)
        start = self.clock()
        self.step()
        self.step()
        return (self.clock() - start + (self.every - 2) * plain) / self.every

    def update_seconds(self):
        """Return the seconds of the method's work after a step, the mean over its update interval."""
        if self.sparsifier is None:
            return 0.0
        self.at(self.update)
        start = self.clock()
        self.sparsifier.method.after_step(self.sparsifier, self.sparsifier.optimizers)
        if self.images.device.type == "cuda":
            torch.cuda.synchronize()
        return (self.clock() - start) / self.every


def measure(name, against, wanted, batch, size, rounds, repeat, amp, compiled, clock, device):
    """Return the time of every variant relative to the baseline, and its peak memory on a GPU."""
    images = torch.randn(batch, 784, device=device)
    if name != "mlp":
        images = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    model = MODELS[name]()
    labels = torch.randint(0, list(model.parameters())[-1].shape[0], (batch,), device=device)
    kinds = dict.fromkeys([against, *wanted])
    sides = {kind: Side(kind, copy.deepcopy(model), images, labels, amp, compiled, clock) for kind in kinds}
    peaks, waits = {}, {}
    for kind, side in sides.items():
        side.step()  # the first step has allocations, autotuning and compilation, so it is not measured
        side.at(PLAIN)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            side.step()
            peaks[kind] = torch.cuda.max_memory_allocated() - before
            waits[kind] = side.waits()
    seconds, updates = {kind: [] for kind in sides}, {kind: [] for kind in sides}
    order = list(sides)
    for turn in range(rounds):
        for kind in order if turn % 2 == 0 else reversed(order):
            seconds[kind].append(min(sides[kind].seconds() for _ in range(repeat)))
            updates[kind].append(sides[kind].update_seconds())
    rows = []
    for kind, times in seconds.items():
        ratios = [mine / other for mine, other in zip(times, seconds[against], strict=True)]
        row = {"model": name, "batch": batch, "size": size if name != "mlp" else None}
        row |= {"mode": "compiled" if compiled else "eager", "variant": kind, "ratio": statistics.median(ratios)}
        row |= {"lowest": min(ratios), "highest": max(ratios), "fastest": min(times) / min(seconds[against])}
        row |= {"seconds": statistics.median(times), "fastest_seconds": min(times)}
        row["update_share"] = statistics.median(updates[kind]) / statistics.median(seconds[against])
        if peaks:
            row |= {"memory_ratio": peaks[kind] / peaks[against], "peak_bytes": peaks[kind], "waits": waits[kind]}
        rows.append(row)
    return rows


def import_ratio(rounds):
    """Return the time of `import sparing` relative to `import torch`."""

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
    parser.add_argument("--model", nargs="+", default=["resnet50", "mobilenet_v1"], choices=list(MODELS))
    parser.add_argument("--variant", nargs="+", default=["str", "naive"], choices=list(VARIANTS))
    parser.add_argument("--against", default="dense", choices=list(VARIANTS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeat", type=int, default=1, help="steps of a variant in a row; the fastest counts")
    parser.add_argument("--imports", type=int, default=0, metavar="ROUNDS", help="rounds of imports")
    parser.add_argument("--amp", action="store_true", help="bf16 autocast")
    parser.add_argument("--mode", nargs="+", default=["eager"], choices=["eager", "compiled"])
    parser.add_argument("--cpu-time", action="store_true", help="measure CPU time, for one thread on a shared machine")
    parser.add_argument("--json", metavar="FILE", help="also write the rows to a file")
    options = parser.parse_args()
    # Masks and thresholds are those of a simulated step, so layers may lose all weights.
    warnings.simplefilter("ignore", sparing.SparsityWarning)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    print(f"torch {torch.__version__}, {where}, {torch.get_num_threads()} threads, {options.rounds} rounds")
    imports = import_ratio(options.imports) if options.imports else None
    if imports:
        spread = f"{imports['lowest']:.3f} to {imports['highest']:.3f}"
        print(f"import sparing / import torch: {imports['ratio']:.3f} ({spread})")
    chosen = {key: value for key, value in vars(options).items() if key != "json"}
    result = {"commit": commit(), "torch": torch.__version__, "device": where}
    result |= {"threads": torch.get_num_threads(), "options": chosen, "import": imports, "rows": []}
    clock = time.process_time if options.cpu_time else time.perf_counter
    for name, mode in itertools.product(options.model, options.mode):
        how = (options.batch, options.size, options.rounds, options.repeat, options.amp, mode == "compiled", clock)
        rows = measure(name, options.against, options.variant, *how, device)
        result["rows"] += rows
        for row in rows:
            memory = f"  memory {row['memory_ratio']:.3f}, waits {row['waits']}" if "memory_ratio" in row else ""
            spread = f"{row['lowest']:.3f} to {row['highest']:.3f}, fastest {row['fastest']:.3f}"
            share = f"  after the step {row['update_share']:.4f}"
            print(
                f"{name:>12} {mode:>8}  {row['variant']:>13}  {row['ratio']:.3f} of {options.against} ({spread})"
                f"{share}{memory}",
                flush=True,
            )
    if options.json:
        write_entry(options.json, result)


if __name__ == "__main__":
    main()
