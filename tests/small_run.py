"""A training run of a second, and processes that can be disturbed, for tests and bench/faults.py."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

from sparing.data import Images
from sparing.data.image import ImageData
from sparing.errors import InputError
from sparing.run import distributed, loop, training, watch
from sparing.run.interrupt import Interrupted
from sparing.run.log import read_history
from sparing.run.recipe import Recipe
from sparing.run.resolve import resolve

RIGL = {"name": "rigl", "sparsity": 0.5}
RUNS = {
    "str, sgd": {},
    "adamw, per epoch, clipped, ema": {
        "optimizer": {"name": "adamw", "lr": 0.003, "weight_decay": 0.1},
        "schedule": {"epochs": 2, "update": "epoch"},
        "clip_grad_norm": 1.0,
        "ema": 0.9,
    },
    "bf16, channels_last, accumulated": {
        "amp": "bf16", "channels_last": True, "data": {"name": "small_run:noise", "batch_size": 4, "accumulate": 2}
    },
    "fp16": {"amp": "fp16", "method": {"name": "str", "sparsity": 0.75, "end": 1.0, "every": 3}},
    "gmp": {"method": {"name": "gmp", "sparsity": 0.75, "every": 3, "end": 0.9, "budget": "global"}, "ema": 0.9},
    "dsr": {"method": {"name": "dsr", "sparsity": 0.5, "every": 3}},
    "snfs": {"method": {"name": "snfs", "sparsity": 0.5, "every": 3}},
    "acdc": {"method": {"name": "acdc", "sparsity": 0.5, "begin": 2, "end": 17, "phase": 3}},
    "spartan": {"method": {"name": "spartan", "sparsity": 0.9, "every": 3}},
    "dst": {"method": {"name": "dst", "alpha": 1e-3}},
    "continuous": {"method": {"name": "continuous_sparsification", "weight": 1e-4}},
    "variational_dropout": {"method": {"name": "variational_dropout", "kl_weight": 1e-3, "init": -5.0}},
}  # fmt: skip
"""Name → what it changes in the recipe of `recipe`."""


def noise(count: int = 40) -> ImageData:
    """Return noisy images of 8x8 pixels: 10 batches of 4 per epoch. Recipes name it small_run:noise."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    images = Images(pixels, torch.arange(count) % 10)
    return ImageData(images, images, images, mean=(0.5,), std=(0.25,), num_classes=10, shift=1, flip=True)


def recipe(ranks=1, **changes):
    """Return a resolved recipe on `noise`."""
    base = {
        "model": {"name": "resnet8", "width": 1},
        "data": {"name": "small_run:noise", "batch_size": 4},
        "method": {"name": "str", "init": -4.0},
        "optimizer": {"lr": 0.05, "threshold_weight_decay": 0.05},
        "schedule": {"epochs": 2},
        "tensorboard": False,
        "device": "cpu",
    }
    return resolve(Recipe.model_validate(base | changes), ranks=ranks)


def assert_same(first, second, where=""):
    """Compare everything in two checkpoints to the last bit, except for durations."""
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first.keys() - {"seconds", "epoch_seconds"}:
            assert_same(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    else:
        assert first == second, where


def history(out):
    """Return the history of a run without its durations."""
    durations = ("seconds", "examples_per_second", "waited_seconds")
    return [{key: value for key, value in line.items() if key not in durations} for line in read_history(out)]


def start(function, log=None):
    """Run a function in a forked process, and return its id.

    Args:
        function: called without arguments. The process ends with the status of its SystemExit, or 70 and a traceback.
        log: file to append what it prints to; None prints as usual.
    """
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        if log is not None:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
        function()
        status = 0
    except SystemExit as leaving:
        status = leaving.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def in_child(function):
    """Run a function in a forked process, and return its exit status; minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(start(function), 0)[1])


def on_ranks(count, folder, function, *arguments, leave=None, disturb=None):
    """Run a function on forked ranks, and return the text that each wrote to its standard error, and its status.

    Args:
        count: number of ranks.
        folder: for the files of the ranks.
        function: called with the rank and the arguments. An `InputError` ends a rank with status 2, as it ends the
            command line.
        leave: a rank that is not waited for, but killed after the others ended.
        disturb: called with the processes after they have started.
    """
    recipe(method=RIGL)  # imports, once and not on each rank, much of torch

    context = multiprocessing.get_context("fork")
    meeting = folder / f"meeting-{random.random()}"

    def run(rank):
        with open(folder / f"stderr.{rank}", "w") as file:
            os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        environment = {"TORCHELASTIC_RUN_ID": "x", "RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ.update(environment | {"LOCAL_RANK": str(rank)})
        init = torch.distributed.init_process_group
        distributed.dist.init_process_group = lambda backend, timeout: init(
            backend, f"file://{meeting}", rank=rank, world_size=count, timeout=timeout
        )
        status = 0
        try:
            function(rank, *arguments)
        except (InputError, Interrupted) as error:
            os.write(2, str(error).encode())
            status = 2
        except Exception:
            os.write(2, traceback.format_exc().encode())
            status = 70
        os._exit(status)

    processes = [context.Process(target=run, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    if disturb is not None:
        disturb(processes)
    deadline = time.monotonic() + 60
    for rank, process in enumerate(processes):
        process.join(max(0, deadline - time.monotonic()) if rank != leave else 0)
    for process in processes:
        process.kill()
        process.join()
    return [((folder / f"stderr.{rank}").read_text(), processes[rank].exitcode) for rank in range(count)]


def train_ranks(rank, wanted, out, differs="", stop=0, **options):
    """Train a recipe on this rank, and let rank 1 differ or receive a signal.

    Args:
        rank: given by `on_ranks`.
        wanted: recipe for two ranks.
        out: run directory, which is continued if it exists.
        differs: what rank 1 has of its own: a "learning rate", "data", a "directory", "masks", or "masks later".
        stop: step in which rank 1 receives SIGTERM; 0 for none, -1 for an evaluation.
        options: of `train_run`.
    """
    watch.INTERVAL = 1.0
    build_data, build_sparsifier = training.build_data, loop.build_sparsifier
    backward, evaluate, taken = loop.backward, loop.evaluate, []

    def change_mask(sparsifier):
        mask = sparsifier.layers["conv1"].parametrization.mask
        mask[0] = ~mask[0]
        return sparsifier

    def other_data(section):
        data = build_data(section)
        data.train.pixels[7, 0, 3, 3] += 1
        return data

    def step(*arguments):
        taken.append(1)
        if len(taken) == stop:
            signal.raise_signal(signal.SIGTERM)
        if len(taken) == 5 and differs == "masks later":
            change_mask(arguments[-1])
        return backward(*arguments)

    def evaluation(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments)

    if rank == 1:
        loop.backward = step
        if stop == -1:
            loop.evaluate = evaluation
        if differs == "learning rate":
            wanted = wanted.model_copy(update={"optimizer": wanted.optimizer.model_copy(update={"lr": 0.051})})
        if differs == "directory":
            out = out.with_name("elsewhere")
        if differs == "data":
            training.build_data = other_data
        if differs == "masks":
            loop.build_sparsifier = lambda *arguments: change_mask(build_sparsifier(*arguments))
    training.train_run(wanted, out, resume=True, **options)


def torchrun(ranks, *arguments, restarts=0):
    """Start `sparing train` under torchrun, with one thread per rank, on a free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    command += ["--max-restarts", str(restarts), "--monitor-interval", "0.2", "--no-python", sys.executable, "-c"]
    command += ["from sparing.cli import main; main()", "train", *map(str, arguments)]
    # With a store shared over restarts, the new ranks would connect to the addresses of the killed ones.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), environment.get("PYTHONPATH", "")])
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def descendants(process):
    """Return the ids of the processes that a process started, and of those that they started."""
    children = Path(f"/proc/{process}/task/{process}/children")
    try:
        own = [int(child) for child in children.read_text().split()]
    except OSError:  # it has ended
        return []
    return [each for child in own for each in (child, *descendants(child))]
