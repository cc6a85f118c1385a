"""Train many small networks on one GPU at the same time, to compare methods at equal sparsities.

    python bench/small_runs.py --data cifar10_jpeg --data-root data/cifar10-jpeg.tar.xz
    python bench/small_runs.py --data fashion_mnist --variants feather str_sparsity --sparsities 0.95 --seeds 0 1 2

A small network uses a small part of a GPU, so several processes train one network each. The images and their
augmentation are on the GPU, and the forward and the backward pass of a step are one CUDA graph. The graph needs no
update while training: methods change masks and thresholds in place.

Networks, learning rate and weight decay are those of recipes/fashion-mnist/frontier.yaml; CIFAR-10 has a ResNet-20.
Each run writes results/gpu/<data>/<variant>-<percent>-seed<n>.json, and is not repeated. On a CPU, networks train in
float32, compiled, and results go to results/cpu/.
"""

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import multiprocessing
from torch.nn import functional as F

import sparing
from ledger import ROOT, commit, write_entry
from sparing.data import DATASETS

CLIP = 3.0
"""Norm at which gradients are clipped, as in the authors' code of ST-3 and Feather."""


def network(data, images):
    """Build the network of a data set for its images, (N, C, H, W)."""
    if data == "cifar10_jpeg":
        return sparing.models.resnet20(in_channels=images.shape[1])
    return sparing.models.resnet8(in_channels=images.shape[1], stem_stride=2)


VARIANTS = {
    "dense": (None, None),
    "str_sparsity": (sparing.STR, None),
    "str_feather": (sparing.STRFeather, CLIP),
    "feather": (sparing.Feather, CLIP),
    "st3": (sparing.ST3, CLIP),
    "rigl": (sparing.RigL, None),
    "gmp": (sparing.GMP, None),
    "global_magnitude": (partial(sparing.GMP, budget="global"), None),
    "str_macs": (sparing.STR, None),
    "str_feather_macs": (sparing.STRFeather, CLIP),
    "feather_macs": (sparing.Feather, CLIP),
    "st3_macs": (sparing.ST3, CLIP),
}
"""Name → method, and the norm at which gradients are clipped. The target of `_macs` is in `MACS`."""

MACS = {0.9: 0.17, 0.95: 0.1, 0.98: 0.04, 0.99: 0.02}
"""Sparsity → share of the MACs, about that of Feather with this sparsity on Fashion-MNIST."""


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        data: name of the data set.
        variant: key of `VARIANTS`.
        sparsity: target, a fraction; or a key of `MACS`.
        seed: of the initialization and the batches.
        epochs: length of the run.
        batch: images per step; the learning rate is 0.1 for each 128 of them.
        steps: stop after so many steps, to try out the program; None for all.
    """

    data: str
    variant: str
    sparsity: float
    seed: int
    epochs: int
    batch: int
    steps: int | None = None

    @property
    def name(self):
        return f"{self.variant}-seed{self.seed}" if self.sparsity == 0 else (
            f"{self.variant}-{100 * self.sparsity:g}-seed{self.seed}"
        )  # fmt: skip


@dataclass(frozen=True)
class Tensors:
    """A data set on a device: uint8 images (N, C, H, W), labels, and how to normalize and augment the images."""

    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    shift: int

    @classmethod
    def load(cls, file, device):
        return cls(**{k: v.to(device) if torch.is_tensor(v) else v for k, v in torch.load(file).items()})

    def normalized(self, images):
        return ((images.float() / 255 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def epoch(self, generator):
        """Return all training images in a new order, each shifted and half of them flipped, and their labels."""
        count, channels, height, width = self.train.shape
        random = {"generator": generator, "device": self.train.device}
        order = torch.randperm(count, **random)
        padded = F.pad(self.train, (self.shift,) * 4)[order]
        rows, columns = torch.randint(0, 2 * self.shift + 1, (2, count, 1), **random)
        rows = rows + torch.arange(height, device=rows.device)
        columns = columns + torch.arange(width, device=rows.device)
        flipped = torch.rand(count, 1, **random) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
        padded = padded.gather(2, rows[:, None, :, None].expand(-1, channels, -1, padded.shape[3]))
        return padded.gather(3, columns[:, None, None, :].expand(-1, channels, height, -1)), self.train_labels[order]


def save_tensors(name, root, file):
    """Load a data set and write its tensors into a file."""
    arguments = {"root": root} if root else {}
    arguments |= {"shift": 2} if name == "mnist5k" else {}
    arguments |= {"shift": 2, "flip": True} if name == "fashion_mnist" else {}
    data = DATASETS[name](**arguments)
    content = {key: torch.tensor(getattr(data, key)).reshape(-1, 1, 1) for key in ("mean", "std")}
    content |= {"train": data.train.pixels, "train_labels": data.train.labels, "shift": data.shift}
    torch.save(content | {"test": data.test.pixels, "test_labels": data.test.labels}, file)


class Step:
    """The forward and the backward pass on one batch: eager on a CPU, one CUDA graph on a GPU; in bf16 with `amp`."""

    def __init__(self, model, images, labels, clip, amp):
        self.model, self.images, self.labels = model, images.clone(), labels.clone()
        self.clip, self.amp = clip, amp
        self.graph = None
        if images.device.type == "cuda":
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(3):  # what is set up at the first calls must not be part of the graph
                    self._run()
            torch.cuda.synchronize()
            for parameter in model.parameters():
                parameter.grad = None
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._run()
            self.gradients = [parameter.grad for parameter in model.parameters()]

    def __call__(self, images, labels):
        self.images.copy_(images)
        self.labels.copy_(labels)
        if self.graph is not None:
            self.graph.replay()
            # A method that skips a step, such as RigL, sets the gradients to None; the graph writes into these.
            for parameter, gradient in zip(self.model.parameters(), self.gradients, strict=True):
                parameter.grad = gradient
        else:
            for parameter in self.model.parameters():
                parameter.grad = None
            self._run()

    def _run(self):
        with torch.autocast(self.images.device.type, torch.bfloat16, self.amp, cache_enabled=False):
            loss = F.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)


def train(job, data, device):
    """Train one network, and return its test accuracy and counts."""
    method, clip = VARIANTS[job.variant]
    target = {"sparsity": job.sparsity}
    if job.variant.endswith("_macs"):
        target = {"macs": MACS[job.sparsity], "input_size": (1, *data.train.shape[1:])}
    return train_network(job, data, device, method and partial(method, **target), clip)[1]


def train_network(job, data, device, factory, clip, select=sparing.select.default):
    """Train one network, and return it and its test accuracy and counts.

    Args:
        job: the run.
        data: `Tensors` on the device.
        device: of the network.
        factory: function that returns the method; None for dense training.
        clip: norm at which gradients are clipped; None for no clipping.
        select: layers to sparsify, as `sparing.sparsify_` takes them.
    """
    amp = device.type == "cuda"  # most CPUs have no bf16
    torch.manual_seed(job.seed)
    generator = torch.Generator(device).manual_seed(job.seed)
    per_epoch = len(data.train) // job.batch
    steps = job.epochs * per_epoch
    steps, warmup = (steps, per_epoch) if job.steps is None else (job.steps, 1)
    model = network(job.data, data.train).to(device, memory_format=torch.channels_last)
    sparsifier = None
    if factory is not None:
        sparsifier = sparing.sparsify_(model, factory(), select=select, steps=steps)
    groups = sparing.param_groups(model, weight_decay=5e-4)
    optimizer = torch.optim.SGD(groups, lr=0.1 * job.batch / 128, momentum=0.9, fused=device.type == "cuda")
    if sparsifier is not None:
        sparsifier.attach(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: sparing.schedules.warmup_cosine(step, steps, warmup)
    )
    # On a CPU a compiled step takes two thirds of the time; a trial of few steps is too short for it. A process may
    # compile eight networks of one class; reset() forgets the last one.
    torch.compiler.reset()
    forward = torch.compile(model) if device.type == "cpu" and job.steps is None else model
    run, start = None, time.perf_counter()
    for step in range(steps):
        place = step % per_epoch * job.batch
        if place == 0:
            pixels, labels = data.epoch(generator)
            images = data.normalized(pixels)
        batch = images[place : place + job.batch], labels[place : place + job.batch]
        run = run or Step(forward, *batch, clip, amp)
        run(*batch)
        optimizer.step()
        schedule.step()
    model.eval()
    right = torch.zeros((), dtype=torch.long, device=device)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, amp):
        for images, labels in zip(data.test.split(1000), data.test_labels.split(1000), strict=True):
            right += (model(data.normalized(images)).argmax(1) == labels).sum()
    seconds, accuracy = time.perf_counter() - start, int(right) / len(data.test)
    report = sparing.report(model, input_size=(1, *data.train.shape[1:]))
    return model, {
        **asdict(job), "asked": job.sparsity, "accuracy": accuracy, "sparsity": report.total.sparsity,
        "weights": report.total.weights, "nonzero": report.total.nonzero, "macs": report.total.macs,
        "dense_macs": report.total.dense_macs, "seconds": seconds,
        "budget": {row.name: row.sparsity for row in report.layers},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{os.uname().machine} CPU",
    }  # fmt: skip


_DATA = {}
"""Of a worker process: the file and the device of each data set, and its tensors once they are loaded."""


def _start(files, device):
    _DATA.update({name: (file, torch.device(device)) for name, file in files.items()})


def _work(job):
    found = _DATA[job.data]
    if isinstance(found, tuple):
        _DATA[job.data] = found = Tensors.load(*found)
    return train(job, found, found.train.device)


def _attempt(function, job):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", sparing.SparsityWarning)
    try:
        return job, function(job)
    except Exception as error:  # one method that fails must not end the others
        return job, f"{type(error).__name__}: {error}"


def side_by_side(function, jobs, processes, deadline, start=None, arguments=()):
    """Yield (job, result) of a function as the results come, until a deadline; a string is the message of an error.

    Args:
        function: of one job; a function of a module, which worker processes import.
        jobs: what to run, in order.
        processes: jobs that run at the same time.
        deadline: in seconds of `time.monotonic()`; runs that it cuts off are lost.
        start: function that each process calls first.
        arguments: of `start`.
    """
    processes = min(processes, len(jobs))
    # Worker processes end with the pool.
    with shared_gpu(), multiprocessing.get_context("spawn").Pool(processes, start, arguments) as pool:
        results = pool.imap_unordered(partial(_attempt, function), jobs)
        for number in range(len(jobs)):
            try:
                yield results.next(timeout=max(deadline - time.monotonic(), 0.1))
            except multiprocessing.TimeoutError:
                print(f"{len(jobs) - number} of {len(jobs)} runs are left", flush=True)
                return


@contextmanager
def shared_gpu():
    """Let the kernels of several processes run at the same time, with NVIDIA's multi-process service if it is there."""
    program = shutil.which("nvidia-cuda-mps-control") if torch.cuda.is_available() else None
    if program is None:
        yield
        return
    folder = tempfile.mkdtemp()
    names = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
    started = subprocess.run([program, "-d"], env=os.environ | names, check=False).returncode == 0
    try:  # the service may start and serve no one
        probe = [sys.executable, "-c", "import torch; torch.ones(1, device='cuda').sum().item()"]
        works = started and subprocess.run(probe, env=os.environ | names, timeout=60, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        works = False
    if works:
        os.environ.update(names)
    try:
        print("several processes share the GPU" if works else "processes take turns on the GPU", flush=True)
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        if started:
            subprocess.run([program], input="quit -t 5\n", text=True, env=os.environ | names, check=False)
        shutil.rmtree(folder, ignore_errors=True)


def run_all(jobs, roots, out, processes, deadline, device):
    """Run the jobs that have no result yet, in order, until a deadline; write each result as it comes.

    Args:
        jobs: a list of `Job`.
        roots: name of each data set → its folder or archive, or None.
        out: folder of the results; each data set has a folder in it.
        processes: networks trained at the same time.
        deadline: in seconds of `time.monotonic()`.
        device: "cuda" or "cpu".
    """
    entries = {job: out / job.data / f"{job.name}.json" for job in jobs}
    left = [job for job, entry in entries.items() if not entry.is_file()]
    if not left:
        return
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, f"{name}.pt") for name in {job.data for job in left}}
        for name, file in files.items():
            save_tensors(name, roots.get(name), file)
        for job, result in side_by_side(_work, left, processes, deadline, _start, (files, device)):
            if isinstance(result, str):
                print(f"{job.data} {job.name}: {result}", flush=True)
                continue
            write_entry(entries[job], result | versions())
            print(
                f"{time.monotonic() - begin:5.0f} s  {job.data} {job.name}: {100 * result['accuracy']:.2f} %, "
                f"sparsity {100 * result['sparsity']:.2f} %, {result['macs'] / 1e6:.3f} M MACs, "
                f"{result['seconds']:.0f} s",
                flush=True,
            )


def versions():
    """Return commit and versions. CUDA is left alone: the multi-process service must be the first to start."""
    return {"commit": commit(), "torch": torch.__version__, "threads": 1}


def chosen_jobs(data, variants, sparsities, seeds, epochs, batch, steps=None):
    """Return the jobs of a study, seed by seed, so that a study that is cut off has whole seeds."""
    return [
        Job(data, variant, 0.0 if variant == "dense" else sparsity, seed, epochs, batch, steps)
        for seed in seeds
        for sparsity in sparsities
        for variant in variants
        if variant != "dense" or sparsity == sparsities[0]
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion_mnist", choices=["fashion_mnist", "cifar10_jpeg"])
    parser.add_argument("--data-root", help="folder or archive of the data set")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.95, 0.98, 0.9, 0.99])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="10 for Fashion-MNIST, 40 for CIFAR-10")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, help="stop each run after so many steps, to try out the program")
    parser.add_argument("--processes", type=int, default=max(os.cpu_count() - 2, 1))
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--out", type=Path, help="folder of the results")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = options.out or ROOT / "results" / ("gpu" if device == "cuda" else "cpu")
    epochs = options.epochs or (10 if options.data == "fashion_mnist" else 40)
    jobs = chosen_jobs(
        options.data, options.variants, options.sparsities, options.seeds, epochs, options.batch, options.steps
    )
    deadline = time.monotonic() + min(options.seconds, 1e6)
    run_all(jobs, {options.data: options.data_root}, out, options.processes, deadline, device)


if __name__ == "__main__":
    main()
