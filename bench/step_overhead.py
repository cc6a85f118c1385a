"""The cost of a training step: dense against every method, and against STR's formula written out.

    python bench/step_overhead.py [--model resnet50] [--variant str gmp] [--batch 32] [--rounds 7] [--compile]
    python bench/step_overhead.py --against str --variant str_sparsity str_macs

Copies of one model take turns, step by step, in one process: the machine's drift hits all of
them alike, and the median of the ratios of neighbouring steps is what is printed. A second part
compares `import sparing` with `import torch`, in fresh interpreters, in turn.

A method that renews its masks every so many steps is timed on a plain step, and on two steps with one
update between them; what is printed is the mean over its default interval. Where methods differ by less than the
noise of a step, what they do after a step is timed by itself as well, as a share of the step.

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
from sparing.schedules import to_step

STEPS = 1000
"""Optimizer steps of the run that is pretended."""
PLAIN, UPDATE = 450, 400
"""Steps at which a mask is left alone, and from which on the next renewal is timed."""


class Naive(nn.Module):
    """The formula, and nothing done about it."""

    def __init__(self):
        super().__init__()
        self.s = nn.Parameter(torch.full((1,), -5.0))

    def forward(self, weight):
        return torch.sign(weight) * torch.relu(weight.abs() - torch.sigmoid(self.s))


def dense_(model):
    """Leave the model as it is: the side the others are compared with."""


def naive_(model):
    """Put the formula on every layer that STR would sparsify."""
    for layer in sparing.layers.find_layers(model).values():
        parametrize.register_parametrization(layer.module, "weight", Naive())


def sparse_(name):
    """Sparsify with a method, at 90 % where it has to be asked for, over a run of 1000 steps."""
    fields = sparing.METHODS[name].__dataclass_fields__
    wanted = {"sparsity": 0.9, "alpha": 1e-4, "weight": 1e-5, "kl_weight": 1e-4}
    if name == "str":  # learns its sparsity unless asked
        wanted = {}
    return lambda model: sparing.sparsify_(
        model, sparing.METHODS[name](**{key: value for key, value in wanted.items() if key in fields}), steps=STEPS
    )


def asked(**target):
    """STR that is asked for a total, over a run of 1000 steps."""
    return lambda model: sparing.sparsify_(model, sparing.STR(**target), steps=STEPS)


VARIANTS = {"dense": dense_, "naive": naive_} | {name: sparse_(name) for name in sparing.METHODS}
VARIANTS |= {"str_sparsity": asked(sparsity=0.9), "str_macs": asked(macs=0.1, input_size=(1, 3, 224, 224))}


class Side:
    """One variant of the model, with its optimizer: something that takes training steps."""

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
        begin = to_step(getattr(method, "begin", 0), STEPS)
        self.update = begin + -(-(UPDATE - begin) // self.every) * self.every

    def at(self, number):
        """Pretend that so many steps have been taken."""
        if self.sparsifier is not None:
            self.sparsifier.clock.step = number

    def step(self):
        """One training step."""
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

    def seconds(self):
        """The mean seconds of a step over the method's interval."""
        self.at(PLAIN)
        start = self.clock()
        self.step()
        plain = self.clock() - start
        if self.every == 1:
            return plain
        # Methods act before or after the step they count, so one of these two is the update.
        self.at(self.update - 1)
        start = self.clock()
        self.step()
        self.step()
        return (self.clock() - start + (self.every - 2) * plain) / self.every

    def update_seconds(self):
        """The mean seconds over its interval of what the method does after a step."""
        if self.sparsifier is None:
            return 0.0
        self.at(self.update)
        start = self.clock()
        self.sparsifier.method.after_step(self.sparsifier, self.sparsifier.optimizers)
        if self.images.device.type == "cuda":
            torch.cuda.synchronize()
        return (self.clock() - start) / self.every


def measure(name, against, wanted, batch, size, rounds, amp, compiled, clock, device):
    """Ratio of every variant to the one it is held against, and its peak memory on a GPU."""
    images = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch,), device=device)
    model = sparing.models.MODELS[name]()
    kinds = dict.fromkeys([against, *wanted])
    sides = {kind: Side(kind, copy.deepcopy(model), images, labels, amp, compiled, clock) for kind in kinds}
    peaks = {}
    for kind, side in sides.items():
        side.step()  # allocations, autotuning and compilation are not the question
        side.at(PLAIN)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            side.step()
            peaks[kind] = torch.cuda.max_memory_allocated() - before
    seconds, updates = {kind: [] for kind in sides}, {kind: [] for kind in sides}
    order = list(sides)
    for turn in range(rounds):
        for kind in order if turn % 2 == 0 else reversed(order):
            seconds[kind].append(sides[kind].seconds())
            updates[kind].append(sides[kind].update_seconds())
    rows = []
    for kind, times in seconds.items():
        ratios = [mine / other for mine, other in zip(times, seconds[against], strict=True)]
        row = {"model": name, "batch": batch, "size": size, "variant": kind, "ratio": statistics.median(ratios)}
        row |= {"lowest": min(ratios), "highest": max(ratios), "seconds": statistics.median(times)}
        row["update_share"] = statistics.median(updates[kind]) / statistics.median(seconds[against])
        if peaks:
            row["memory_ratio"] = peaks[kind] / peaks[against]
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
    parser.add_argument("--variant", nargs="+", default=["str", "naive"], choices=list(VARIANTS))
    parser.add_argument("--against", default="dense", choices=list(VARIANTS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--amp", action="store_true", help="bf16 autocast")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--cpu-time", action="store_true", help="seconds of the processor, for one thread on a machine others use"
    )
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    print(f"torch {torch.__version__}, {where}, {torch.get_num_threads()} threads, {options.rounds} rounds")
    imports = import_ratio(options.rounds)
    print(
        f"import sparing / import torch: {imports['ratio']:.3f} ({imports['lowest']:.3f} to {imports['highest']:.3f})"
    )
    chosen = {key: value for key, value in vars(options).items() if key != "json"}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    result = {"commit": commit.stdout.strip() or None, "torch": torch.__version__, "device": where}
    result |= {"options": chosen, "import": imports, "rows": []}
    clock = time.process_time if options.cpu_time else time.perf_counter
    for name in options.model:
        how = (options.batch, options.size, options.rounds, options.amp, options.compile, clock, device)
        rows = measure(name, options.against, options.variant, *how)
        result["rows"] += rows
        for row in rows:
            memory = f"  memory {row['memory_ratio']:.3f}" if "memory_ratio" in row else ""
            spread = f"{row['lowest']:.3f} to {row['highest']:.3f}"
            share = f"  after the step {row['update_share']:.4f}"
            print(
                f"{name:>14}  {row['variant']:>6}  {row['ratio']:.3f} of {options.against} ({spread}){share}{memory}",
                flush=True,
            )
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
