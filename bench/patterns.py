"""Compare patterns of zeros at equal sparsities: what they cost in accuracy and what they save in time on the engine.

    python bench/patterns.py train [--seeds 0 1 2]      train the networks; about two minutes each on one processor
    python bench/patterns.py time                       measure them on an idle machine
    python bench/results.py table                       build the table of docs/engine.md
    python bench/results.py figures                     draw accuracy against milliseconds

The network is the resnet8 of recipes/fashion-mnist/frontier.yaml with its training. STR learns the sparsity of each
layer, of single weights, of blocks of 4 and 8 weights and of whole filters. 2:4 has no threshold to learn, so it is
trained with GMP. Two layers stay dense in all runs: the first convolution, whose one input channel 2:4 cannot divide,
and the classifier, whose ten outputs blocks cannot.

`train` writes results/patterns/<pattern>-<percent>-seed<n>.json, and the networks to runs/patterns/. `time` measures
the network of seed 0: batch 64, one thread, all backends in the same rounds. Finished results are not repeated.
"""

import argparse
import json
from functools import partial

import torch
from safetensors.torch import load_file, save_file

import sparing
from ledger import ROOT
from small_runs import Job, Tensors, network, save_tensors, train_network, versions
from sparing import latency
from sparing.files import write_text

PATTERNS = {
    "dense": (None, (0,)),
    "single": (lambda sparsity: sparing.STR(sparsity=sparsity), (80, 90, 95)),
    "block4": (lambda sparsity: sparing.STR(sparsity=sparsity, pattern=sparing.Block(4)), (80, 90, 95)),
    "block8": (lambda sparsity: sparing.STR(sparsity=sparsity, pattern=sparing.Block(8)), (80, 90, 95)),
    "filters": (lambda sparsity: sparing.STR(sparsity=sparsity, pattern=sparing.Filters()), (50, 80, 90)),
    "two_of_four": (lambda _: sparing.GMP(pattern=sparing.NM(2, 4)), (50,)),
}
"""Name → function from the sparsity to the method, and the sparsities in percent."""
OUT, MODELS = ROOT / "results" / "patterns", ROOT / "runs" / "patterns"
SELECT = sparing.select.excluding("conv1", "fc")


def names():
    """Return the name of each network without its seed."""
    return [f"{pattern}-{percent}" for pattern, (_, percents) in PATTERNS.items() for percent in percents]


def train(chosen, seeds, device):
    """Train the networks that have no result yet."""
    MODELS.mkdir(parents=True, exist_ok=True)
    file = MODELS / "fashion_mnist.pt"
    if not file.is_file():
        save_tensors("fashion_mnist", None, file)
    data = Tensors.load(file, device)
    for seed in seeds:
        for name in chosen:
            entry = OUT / f"{name}-seed{seed}.json"
            if entry.is_file():
                continue
            pattern, percent = name.rsplit("-", 1)
            job = Job("fashion_mnist", pattern, int(percent) / 100, seed, 10, 128)
            model, result = train_network(job, data, device, partial(PATTERNS[pattern][0], job.sparsity), None, SELECT)
            state = {key: value.contiguous() for key, value in sparing.densify_(model).state_dict().items()}
            save_file(state, MODELS / f"{name}-seed{seed}.safetensors")
            OUT.mkdir(parents=True, exist_ok=True)
            write_text(entry, json.dumps(result | versions() | {"recipe": "bench/patterns.py"}, indent=2) + "\n")
            print(
                f"{name}-seed{seed}: {100 * result['accuracy']:.2f} % at {100 * result['sparsity']:.2f} %", flush=True
            )


def measure(rounds):
    """Measure the network of seed 0 of each pattern."""
    for name in names():
        entry = OUT / "time" / f"{name}.json"
        file = MODELS / f"{name}-seed0.safetensors"
        if entry.is_file() or not file.is_file():
            continue
        model = network("fashion_mnist", torch.empty(1, 1, 28, 28))
        model.load_state_dict(load_file(file))
        timed = latency.measure(
            model.eval(), (1, 1, 28, 28), batches=(64,), threads=(1,), sweep=(), rounds=rounds, turn=0.1
        )
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_text(entry, json.dumps(json.loads(timed.to_json()) | versions(), indent=2) + "\n")
        print(f"{name}\n{timed}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "time"])
    parser.add_argument("--names", nargs="+", default=names(), choices=names(), metavar="PATTERN-PERCENT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if options.what == "train":
        train(options.names, options.seeds, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    else:
        measure(options.rounds)


if __name__ == "__main__":
    main()
