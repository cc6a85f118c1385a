"""Measure the speed of FastGRNN: against torch's GRU, against its cell in a loop, and at lower ranks.

    python bench/rnn.py [--rounds 15] [--json results/rnn_speed/cpu.json]

The networks of a comparison run alternately in one process, and their order is reversed every round, so that other
processes affect all of them equally. The script prints the median and the quartiles of the ratios within each round. A
GRU has three matrices where a FastGRNN of the same width has one.

Ranks are compared at batch 1: compacted networks of learned rank against full rank, in torch, and at the sizes and
ranks of the paper in MNN, exported with `sparing.export.mnn.save`. The exports take most of the time of this script.
"""

import argparse
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from ledger import commit, write_entry
from sparing.export import mnn, runtimes
from sparing.models import fastgrnn
from sparing.rnn import FastGRNN, compact_, is_diagonal


class StepByStep(nn.Module):
    """The same network as a loop over `FastGRNNCell`."""

    def __init__(self, rnn):
        super().__init__()
        self.cell = rnn.cell

    def forward(self, x):
        h, states = None, []
        for step in x.unbind(1):
            h = self.cell(step, h)
            states.append(h)
        return torch.stack(states, 1), h


def compacted(model, **ranks):
    """Set the ranks of `hidden` and `input` in a model with learned ranks (None: full rank), and compact it."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if is_diagonal(name, module):
                module.weight[:, ranks.get(name.split(".")[-2], module.weight.numel()) :] = 0
    return compact_(model)


class InMNN:
    """A classifier in MNN, with one thread, that runs on a fixed batch."""

    def __init__(self, model, example):
        with tempfile.TemporaryDirectory() as folder:
            path = mnn.save(model, Path(folder, "network.mnn"), tuple(example.shape)).path
            self.run = runtimes.mnn(str(path), threads=1)([example.numpy()])

    def __call__(self, x):
        return self.run()


def train_step(module, x):
    """Forward and backward."""
    module.zero_grad()
    module(x)[0].square().mean().backward()


@torch.no_grad()
def infer(module, x):
    """Forward."""
    module(x)


def seconds(run, module, x, repeat):
    """Return the seconds of one call, the mean over `repeat` calls."""
    start = time.perf_counter()
    for _ in range(repeat):
        run(module, x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeat


def compare(sides, run, x, rounds, repeat):
    """Return the time of every network relative to the first (median and quartiles), and median milliseconds."""
    for module in sides.values():
        run(module, x)
    times = {name: [] for name in sides}
    for turn in range(rounds):
        for name in sides if turn % 2 == 0 else reversed(sides):
            times[name].append(seconds(run, sides[name], x, repeat))
    base = times[next(iter(sides))]
    rows = []
    for name, mine in times.items():
        ratios = [a / b for a, b in zip(mine, base, strict=True)]
        lower, middle, upper = statistics.quantiles(ratios, n=4, method="inclusive")
        row = {"side": name, "ratio": middle, "lower": lower, "upper": upper}
        rows.append(row | {"milliseconds": 1e3 * statistics.median(mine)})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", metavar="FILE", help="also write the rows to a file")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    print(f"torch {torch.__version__}, {where}, {torch.get_num_threads()} threads, {options.rounds} rounds")
    result = {"torch": torch.__version__, "device": where, "threads": torch.get_num_threads()}
    result |= {"commit": commit(), "rows": []}

    def show(what, sides, run, x, repeat, rounds):
        for row in compare(sides, run, x, rounds, repeat):
            shape = {"batch": len(x), "steps": x.shape[1], "features": x.shape[2]}
            result["rows"].append({"what": what, **shape, "rounds": rounds, **row})
            spread = f"{row['lower']:.2f} to {row['upper']:.2f}"
            print(f"{what:>32}  batch {len(x):>3}  {row['side']:>13}  {row['ratio']:.2f} ({spread})", flush=True)

    for hidden, features, steps in ((100, 32, 99), (80, 9, 128)):
        rnn, gru = FastGRNN(features, hidden).to(device), nn.GRU(features, hidden, batch_first=True).to(device)
        sides = {"GRU": gru, "FastGRNN": rnn, "cell by cell": StepByStep(rnn)}
        for batch, repeat in ((1, 5), (100, 1)):
            x = torch.randn(batch, steps, features, device=device)
            show(f"training, {hidden} units", sides, train_step, x, repeat, options.rounds)
            show(f"inference, {hidden} units", sides, infer, x, repeat, options.rounds)
    many = 100 * options.rounds  # rounds of single calls, which are short
    for hidden, ranks in ((100, (40, 24)), (256, (64, 32)), (512, (128, 64)), (1024, (256, 64))):
        sides = {"full rank": FastGRNN(32, hidden).to(device)}
        for rank in ranks:
            sides[f"rank {rank}"] = compacted(FastGRNN(32, hidden, learned_rank=True), hidden=rank).to(device)
        show(f"inference, {hidden} units", sides, infer, torch.randn(1, 99, 32, device=device), 1, many)
    if device.type == "cpu":
        for hidden, features, steps, ranks in ((100, 32, 99, ((12, 40), (9, 24))), (80, 9, 128, ((9, 8),))):
            x = torch.randn(1, steps, features)
            sides = {"full rank": InMNN(fastgrnn(12, features, hidden_size=hidden), x)}
            for w, u in ranks:
                low = fastgrnn(12, features, hidden_size=hidden, learned_rank=True)
                sides[f"ranks {w}, {u}"] = InMNN(compacted(low, input=w, hidden=u), x)
            show(f"inference in MNN, {hidden} units", sides, infer, x, 1, many)
    if options.json:
        write_entry(options.json, result)


if __name__ == "__main__":
    main()
