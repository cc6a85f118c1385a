"""Measure everything that needs a GPU, with one command and within a time limit.

    python bench/gpu.py --seconds 480 --cifar data/cifar10-jpeg.tar.xz --text vaderSentiment-3.3.2.tar.gz
    python bench/gpu.py --smoke                    the same code on the CPU in about a minute, with nothing written
    python bench/gpu.py --only step frontier

The parts, in this order; each has its share of the time, and the studies get what is left:

    tests       the tests that take a device: mixed precision, CUDA graphs, compilation, recurrent layers
    step        ResNet-50, 224², batch 256, channels last, bf16: the time of a step and its peak memory, relative to
                dense training, and how often the host waits for the GPU; eager and compiled
    pictures    ResNet-50 trained from JPEG files: images per second, and the share of time that waits for images
    finetune    MiniLM fine-tuned at 80 and 90 %: accuracy (bench/finetune.py)
    lenet       LeNet-300-100 on MNIST against published results (bench/lenet.py)
    frontier    accuracy against sparsity and MACs on Fashion-MNIST and CIFAR-10 (bench/small_runs.py)

Results are written into results/gpu/ as they come, and what has a result is not repeated. A part whose data is missing
is left out with a message. Set SPARING_COMMIT where there is no git.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from functools import cache, partial
from pathlib import Path

import torch
from torch.nn import functional as F

import finetune
import images
import lenet
import small_runs
import sparing
import step_overhead
from ledger import ROOT, write_entry
from sparing.data import DATASETS

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
TESTS = ("tests/methods/test_devices.py", "tests/test_threshold.py", "tests/test_rnn.py", "tests/test_sparsify.py",
         "tests/test_imagenet.py")  # fmt: skip
MASKS = ("gmp", "gmp_global", "rigl", "set", "static_random", "feather", "st3", "acdc", "str_feather")


def write(options, name, content):
    """Write one result, unless this is a trial."""
    facts = small_runs.versions() | {"device": torch.cuda.get_device_name() if CUDA else f"{os.uname().machine} CPU"}
    if not options.smoke:
        write_entry(ROOT / "results" / "gpu" / f"{name}.json", content | facts)
    return content


def missing(options, name):
    """Return whether a result does not exist yet."""
    return options.smoke or not (ROOT / "results" / "gpu" / f"{name}.json").is_file()


def run_tests(options, deadline):
    """Run the tests of devices."""
    if not missing(options, "tests"):
        return
    chosen = TESTS[:1] if options.smoke else TESTS
    command = [sys.executable, "-m", "pytest", "-q", "-n", "4" if CUDA else "0", "-p", "no:cacheprovider", *chosen]
    command += [
        "-k",
        "fp16 and str" if options.smoke else "cuda or gpu",
        "-o",
        "filterwarnings=default",
        "-o",
        "addopts=",
    ]
    try:
        ran = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(deadline - time.monotonic(), 1), check=False
        )
        lines = ran.stdout.strip().splitlines()
    except subprocess.TimeoutExpired as error:
        lines = [*(error.stdout or b"").decode().splitlines()[-20:], "stopped: out of time"]
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    print("\n".join([*failures, lines[-1]]) if lines else ran.stderr[-2000:], flush=True)
    write(options, "tests", {"command": " ".join(command[1:]), "failures": failures, "summary": lines[-1:]})


def measure_steps(options, deadline):
    """Measure the time and the peak memory of a training step."""
    plans = [("eager", ["str", "naive", "str_sparsity", *MASKS]), ("compiled", ["str", "naive", "static_random"])]
    for mode, variants in plans:
        name = f"step-{mode}"
        if not missing(options, name) or (mode == "compiled" and time.monotonic() > deadline - 60):
            continue
        torch.backends.cudnn.benchmark = True
        model, batch, size, rounds = ("resnet18", 2, 32, 1) if options.smoke else ("resnet50", 256, 224, 5)
        rows = step_overhead.measure(
            model, "dense", variants[:2] if options.smoke else variants, batch, size, rounds, 1, True,
            mode == "compiled" and not options.smoke, time.perf_counter, DEVICE,
        )  # fmt: skip
        write(options, name, {"rows": rows, "batch": batch, "size": size, "rounds": rounds, "amp": "bf16"})
        for row in rows:
            extra = f"memory {row['memory_ratio']:.3f}, waits {row['waits']}" if CUDA else ""
            print(
                f"{mode} {row['variant']:>14}  {row['ratio']:.3f} (fastest {row['fastest']:.3f})  {extra}", flush=True
            )
        torch.cuda.empty_cache()


def read_pictures(options, deadline):
    """Train ResNet-50 from JPEG files, and measure the images per second and the time that waits for images."""
    if not missing(options, "pictures"):
        return
    batch, count, size = (4, 8, 32) if options.smoke else (128, 1280, 224)
    workers = 0 if options.smoke else max(os.cpu_count() - 1, 1)
    model = sparing.models.resnet18() if options.smoke else sparing.models.resnet50()
    model = model.to(DEVICE, memory_format=torch.channels_last)
    sparsifier = sparing.sparsify_(model, sparing.STR(sparsity=0.9), steps=1000)
    optimizer = torch.optim.SGD(sparing.param_groups(model, weight_decay=1e-4), lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer)
    with tempfile.TemporaryDirectory() as folder:
        images.write_images(Path(folder), count)
        data = DATASETS["imagenet"](folder, validation_per_class=0, size=size, workers=workers)
        loader = data.training(batch, 0)
        seen, waited, began = 0, 0.0, time.perf_counter()
        for epoch in range(1 if options.smoke else 7):
            loader.epoch = epoch
            ready = time.perf_counter()
            for pixels, labels in loader:
                pixels, labels = pixels.to(DEVICE, non_blocking=True), labels.to(DEVICE, non_blocking=True)
                waited += time.perf_counter() - ready if epoch or options.smoke else 0.0
                with torch.autocast(DEVICE.type, torch.bfloat16):
                    loss = F.cross_entropy(model(pixels.contiguous(memory_format=torch.channels_last)), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss.item()
                seen += len(labels) if epoch or options.smoke else 0
                ready = time.perf_counter()
            if epoch == 0 and not options.smoke:  # the first starts the worker processes
                began = time.perf_counter()
        seconds = time.perf_counter() - began
    result = {"images_per_second": seen / seconds, "waiting": waited / seconds, "workers": workers, "batch": batch}
    write(options, "pictures", result)
    print(result, flush=True)


def _finetune(text, device, job):
    """Fine-tune MiniLM in a process of its own."""
    return finetune.run(_task(text, device), job)


@cache
def _task(text, device):
    return finetune.Task(text, device)


def study(options, name, function, jobs, deadline, shown):
    """Run the jobs of a study that have no result yet, several at a time."""
    folder = ROOT / "results" / "gpu" / name
    left = [job for job in jobs if not (folder / f"{job.name}.json").is_file()]
    for job, result in small_runs.side_by_side(function, left, options.processes, deadline) if left else ():
        if isinstance(result, str):
            print(f"{job.name}: {result}", flush=True)
        else:
            write(options, f"{name}/{job.name}", result)
            print(f"{job.name}: {shown} {100 * result[shown]:.2f} %", flush=True)


def fine_tune(options, deadline):
    """Fine-tune MiniLM with each method."""
    if options.text is None:
        print("fine-tuning is left out: give --text")
        return
    if options.smoke:
        print(finetune.run(finetune.Task(options.text), finetune.Job("str_feather", 80, 0), steps=2)["accuracy"])
        return
    study(options, "finetune", partial(_finetune, options.text, DEVICE.type), finetune.jobs(), deadline, "accuracy")


def train_lenet(options, deadline):
    """Train LeNet-300-100 on MNIST."""
    if not (ROOT / "data" / "mnist").is_dir():
        print("LeNet is left out: data/mnist does not exist")
        return
    if options.smoke:
        print(lenet.train(lenet.Job("str", 5, 0), "cpu", epochs=1)["error"])
        return
    study(options, "lenet", partial(lenet.train, device=DEVICE.type), lenet.jobs(), deadline, "error")


def frontier(options, deadline):
    """Train small networks at several sparsities."""
    plans = {"mnist5k": (1, 128)} if options.smoke else {"fashion_mnist": (10, 128), "cifar10_jpeg": (40, 128)}
    roots = {"cifar10_jpeg": options.cifar, "fashion_mnist": options.fashion}
    steps, variants = (3, ["str_sparsity"]) if options.smoke else (None, list(small_runs.VARIANTS))
    sparsities, seeds = ([0.9], [0]) if options.smoke else ([0.95, 0.98, 0.9, 0.99], [0, 1, 2])
    for data, (epochs, batch) in plans.items():
        if data == "cifar10_jpeg" and options.cifar is None:
            print("CIFAR-10 is left out: give --cifar")
            continue
        jobs = small_runs.chosen_jobs(data, variants, sparsities, seeds, epochs, batch, steps)
        with tempfile.TemporaryDirectory() as trial:
            out = Path(trial) if options.smoke else ROOT / "results" / "gpu"
            small_runs.run_all(jobs, roots, out, options.processes, deadline, DEVICE.type)


PARTS = {
    "tests": (run_tests, 100),
    "step": (measure_steps, 150),
    "pictures": (read_pictures, 40),
    "finetune": (fine_tune, 90),
    "lenet": (train_lenet, 120),
    "frontier": (frontier, 1e6),
}
"""Name → function, and the most seconds that it gets."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--smoke", action="store_true", help="try out all parts on the CPU")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--cifar", help="archive of CIFAR-10 as JPEG files")
    parser.add_argument("--fashion", help="folder of Fashion-MNIST")
    parser.add_argument("--text", help="source distribution of vaderSentiment, for fine-tuning")
    parser.add_argument("--processes", type=int, default=max(os.cpu_count() - 2, 1))
    options = parser.parse_args()
    warnings.simplefilter("ignore", sparing.SparsityWarning)
    end = time.monotonic() + options.seconds
    for name in options.only:
        run, share = PARTS[name]
        begin = time.monotonic()
        if begin > end - 5:
            print(f"{name}: out of time")
            continue
        try:
            run(options, min(end, begin + share))
        except Exception as error:  # the other parts still get their time
            if options.smoke:
                raise
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
        print(f"== {name}: {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
