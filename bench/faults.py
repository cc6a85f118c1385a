"""Disturb runs in every way that machines and files do, and count what was lost. Results: results/faults/.

    python bench/faults.py [--case NAME ...] [--count N] [--again] [--list]

Each experiment writes one JSON file. An experiment that has its file is left out unless --again is given, so the
script can be stopped and started again. The runs are those of tests/small_run.py: a network of eight layers on noise,
20 steps, with 12 methods, precisions and optimizers. "Lost" counts the tries that ended otherwise than they should: a
run that did not end, to the last bit, as one that was not disturbed; a traceback; a process that hangs; an error
without a message of one line; a wrong result without an error. The experiments with disks need root, to mount a tmpfs.
"""

import argparse
import functools
import gc
import itertools
import json
import math
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import tensorboard.compat.proto.event_pb2  # noqa: F401  what runs import late is imported once, before processes are forked
import torch
from matplotlib.backends import backend_agg  # noqa: F401

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import fuzz  # noqa: E402
import small_run  # noqa: E402
from sparing import cli  # noqa: E402
from sparing.files import write_text  # noqa: E402
from sparing.run import loop, training  # noqa: E402
from sparing.run.checkpoint import load_checkpoint  # noqa: E402
from sparing.run.recipe import load_recipe  # noqa: E402
from sparing.run.run import Run  # noqa: E402

OUT = ROOT / "results" / "faults"
HANGS = 60.0
"""Seconds after which a process counts as hanging."""
EXPERIMENTS = {}
"""Name → generator of one pair (how a try ended, what was lost or "") per try, and its default number of tries."""
numbers, durations = itertools.count(), {}


def experiment(count):
    """Register a function of a folder, a number of tries, a random generator and a dict for further figures."""
    return lambda function: EXPERIMENTS.setdefault(function.__name__, (function, count))[0]


def command(*arguments):
    """Return a function that runs the command line."""

    def run():
        sys.argv = ["sparing", *map(str, arguments)]
        cli.main()

    return run


def train(recipe, out):
    return command("train", recipe, "--out", out, "--resume", "auto", "--json")


def ended(child, seconds=HANGS):
    """Wait for a process. Return its status, minus the signal that killed it; None if it hangs, and is killed."""
    deadline = time.monotonic() + seconds
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(found[1])


def verdict(status, text):
    """Return how a command ended: "success", "sentence", "saved" after a signal, or what is wrong."""
    if status is None:
        return "hang"
    if "Traceback" in text or status == 70:
        return "traceback"
    sentences = [line for line in text.splitlines() if line.startswith("sparing: ") and "warning:" not in line]
    if status == 2:
        return "sentence" if len(sentences) == 1 else "no sentence"
    return {0: "success", 75: "saved", 130: "interrupted"}.get(status, f"status {status}")


def difference(first, second):
    """Return the first difference between two finished runs, apart from durations; "" if there is none."""
    for name in ("checkpoint.pt", "best.pt"):
        try:
            small_run.assert_same(load_checkpoint(first / name), load_checkpoint(second / name), name)
        except AssertionError as error:
            return str(error)
    for name in ("model.safetensors", "compressed.safetensors", "report.json"):
        if (first / name).read_bytes() != (second / name).read_bytes():
            return name
    # Somebody may commit meanwhile.
    metrics = [{**Run.open(run).metrics, "seconds": 0, "commit": ""} for run in (first, second)]
    same = metrics[0] == metrics[1] and small_run.history(first) == small_run.history(second)
    return "" if same else "metrics.json or history.jsonl"


class Case:
    """A run that is disturbed, and the one that was not, with which it is compared.

    Args:
        folder: of the experiment.
        draw: chooses one of `small_run.RUNS`.
        place: folder of the run directory.
        changes: of the recipe.
    """

    def __init__(self, folder, draw, place=None, **changes):
        self.name = draw.choice(list(small_run.RUNS))
        self.straight = folder / f"straight-{list(small_run.RUNS).index(self.name)}"
        self.out = (place or folder) / f"run-{next(numbers)}"
        self.recipe, self.log = folder / f"{self.out.name}.yaml", folder / f"{self.out.name}.log"
        changes = small_run.RUNS[self.name] | {"checkpoint": {"steps": 2}} | changes
        self.recipe.write_text(small_run.recipe(**changes).to_yaml())
        if not self.straight.exists():
            began = time.perf_counter()
            assert ended(small_run.start(train(self.recipe, self.straight), self.log)) == 0, self.name
            durations[self.straight] = time.perf_counter() - began
        self.seconds = durations[self.straight]

    def start(self, before=lambda: None):
        """Train or continue in another process, and return its id."""
        self.log.unlink(missing_ok=True)
        return small_run.start(lambda: (before(), train(self.recipe, self.out)()), self.log)

    def ended(self, child, place=""):
        """Return how the process ended, and what is wrong with that; an error must name a path in `place`."""
        outcome = verdict(ended(child), text := self.log.read_text(errors="replace") if self.log.exists() else "")
        wrong = outcome not in ("sentence", "success") or (outcome == "sentence" and str(place) not in text)
        return outcome, f"{self.name}: {outcome}: {text[-400:]}" if wrong else ""

    def lost(self):
        """Continue without a disturbance. Return how the result differs from that of the other run, or ""."""
        outcome, wrong = self.ended(self.start())
        wrong = wrong or (outcome != "success" and f"continuing ended with {outcome}: {self.log.read_text()[-400:]}")
        wrong = wrong or difference(self.straight, self.out)
        wrong = wrong or ", ".join(f"left {path.name}" for path in self.out.rglob(".*"))
        shutil.rmtree(self.out, ignore_errors=True)
        return f"{self.name}: {wrong}" if wrong else ""


# One process


def signalled(folder, count, draw, figures, signals):
    """Send signals at random instants until the run is finished, compare it, and begin another."""
    sent, figures["runs"] = 0, 0
    while sent < count:
        case, finished, figures["runs"] = Case(folder, draw), False, figures["runs"] + 1
        while sent < count and not finished:
            child, number = case.start(), draw.choice(signals)
            time.sleep(draw.uniform(0, 1.2 * case.seconds))
            os.kill(child, number)  # a zombie if it has ended
            outcome, wrong = case.ended(child)
            if outcome == "success":
                finished = True
                continue
            sent += 1
            if outcome == f"status {-number}":
                begun = (case.out / "checkpoint.pt").exists()
                outcome = f"killed {'after' if begun else 'before'} the first checkpoint"
                writing = begun and any(path.name != ".lock" for path in case.out.glob(".*"))
                figures["while a file was written"] = figures.get("while a file was written", 0) + writing
            yield outcome, "" if outcome.startswith(("saved", "interrupted", "killed")) else wrong
        if wrong := case.lost():
            yield "resumed", wrong


@experiment(200)
def kill(folder, count, draw, figures):
    """SIGKILL at random instants, one process; resumed runs compared bit for bit"""
    yield from signalled(folder, count, draw, figures, [signal.SIGKILL])


@experiment(60)
def signals(folder, count, draw, figures):
    """SIGTERM, SIGUSR1, SIGINT at random instants; resumed runs compared bit for bit"""
    yield from signalled(folder, count, draw, figures, [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])


def tmpfs(folder, options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)


@contextmanager
def disk(folder):
    """Yield a folder that is a file system of its own, in memory."""
    folder = folder / f"disk-{next(numbers)}"
    folder.mkdir()
    tmpfs(folder, "size=16m")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@experiment(24)
def full(folder, count, draw, figures):
    """full disk (a tmpfs of random size, every second try) or a limit on the size of files (RLIMIT_FSIZE)"""
    for index in range(count):
        with disk(folder) as place:
            case = Case(folder, draw, place, tensorboard=index % 4 < 2)
            written = sum(path.stat().st_size for path in case.straight.rglob("*"))
            size = draw.randrange(written // 2)
            limit = (lambda size=size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))) if index % 2 else None
            if limit is None:
                tmpfs(place, f"remount,size={4096 * draw.randrange(1, written // 4096 + 8)}")
            outcome, wrong = case.ended(case.start(limit or (lambda: None)), place)
            tmpfs(place, "remount,size=16m")
            yield f"{'limit' if limit else 'disk'}: {outcome}", wrong or case.lost()


def disturb_directory(case, change):
    if change == "removed":
        for _ in range(50):
            shutil.rmtree(case.out, ignore_errors=True)
    elif change == "read-only":
        case.out.chmod(0o555)
    else:
        before, case.out = case.out, case.out.with_name("elsewhere")
        before.rename(case.out)
        if change == "replaced by a file":
            before.touch()


@experiment(24)
def directories(folder, count, draw, figures):
    """run directory removed, renamed, replaced by a file or made read-only at a random instant"""
    for index in range(count):
        change = ("removed", "renamed", "replaced by a file", "read-only")[index % 4]
        with disk(folder) as place:
            case = Case(folder, draw, place)
            for each in (folder, place):
                each.chmod(0o777)
            child = case.start(lambda: os.setuid(65534))  # root may write into read-only directories
            while not case.out.exists():
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.7 * case.seconds))
            disturb_directory(case, change)
            outcome, wrong = case.ended(child, place)
            yield f"{change}: {outcome}", wrong or case.lost()


def poison(what, value, at):
    """Put a value into the inputs, the loss or a gradient of a step of this process."""
    backward, taken = loop.backward, itertools.count(1)

    def poisoned(model, batch, *others):
        if next(taken) != at:
            return backward(model, batch, *others)
        if what == "inputs":
            batch[0][0, 0, 0, 0] = value
        total = backward(model, batch, *others)
        if what == "gradients":
            gradients = [each.grad for each in model.parameters() if each.grad is not None]
            gradients[at % len(gradients)].view(-1)[0] = value
        return total * value if what == "loss" else total

    loop.backward = poisoned


@experiment(45)
def bad_numbers(folder, count, draw, figures):
    """NaN, inf and -inf in the inputs, the loss or the gradients of a random step"""
    values = list(itertools.product(("inputs", "loss", "gradients"), (math.nan, math.inf, -math.inf)))
    for index in range(count):
        case, (what, value), at = Case(folder, draw), values[index % len(values)], draw.randint(1, 20)
        outcome, wrong = case.ended(case.start(lambda what=what, value=value, at=at: poison(what, value, at)))
        if outcome == "success":  # the scaler of fp16 leaves such steps out, and the clip of gradients some
            state = load_checkpoint(case.out / "checkpoint.pt")["model"].values()
            finite = all(bool(each.isfinite().all()) for each in state if torch.is_tensor(each))
            if not finite or not all(math.isfinite(line["train_loss"]) for line in small_run.history(case.out)):
                wrong = f"{case.name}: {value} in {what} of step {at} was not noticed"
        yield f"{what}: {outcome}", wrong or (case.lost() if outcome == "sentence" else "")


@experiment(20_000)
def growth(folder, count, draw, figures):
    """steps of STR and of RigL in one run: memory and time of a step, second eighth against last eighth"""
    for name, method in {"str": {"name": "str", "init": -4.0}, "rigl": small_run.RIGL}.items():
        rows = torch.zeros(count, 4, dtype=torch.float64).share_memory_()  # all at once: a list would grow
        child = small_run.start(functools.partial(long_run, method, rows, folder / name))
        assert (status := ended(child, 3600)) == 0, f"status {status}"
        parts = rows[count // 8 : count // 4], rows[-count // 8 :]
        # Other processes slow a fixed computation as much as a step.
        times = [float((part[:, 0] / part[:, 1]).median()) for part in parts]
        milliseconds = [1000 * float(part[:, 0].median()) for part in parts]
        sizes, counts = ([float(part[:, column].max()) for part in parts] for column in (2, 3))
        figures[name] = {"steps": count, "milliseconds": milliseconds, "relative time": times}
        figures[name] |= {"megabytes": sizes, "objects": counts}
        grown = times[1] > 1.1 * times[0] or sizes[1] > sizes[0] + 2 or counts[1] > 1.02 * counts[0]
        yield name, f"{name}: {figures[name]}" if grown else ""


def long_run(method, rows, folder):
    """Train, 500 steps per epoch, and fill in of each step: its seconds, those of a fixed computation beside it, the
    megabytes and the objects of Python.
    """
    backward, taken, counted, before = loop.backward, itertools.count(), 0, time.perf_counter()
    image, kernel = torch.ones(4, 8, 16, 16), torch.ones(8, 8, 3, 3)

    def timed(*arguments):
        nonlocal before, counted
        step, pages = next(taken), int(Path("/proc/self/statm").read_text().split()[1])
        counted = len(gc.get_objects()) if step % 500 == 250 else counted
        middle = time.perf_counter()
        for _ in range(10):
            torch.conv2d(image, kernel)
        times = middle - before, time.perf_counter() - middle
        rows[step] = torch.tensor((*times, pages * resource.getpagesize() / 2**20, counted))
        before = time.perf_counter()
        return backward(*arguments)

    loop.backward = timed
    data = {"name": "small_run:noise", "batch_size": 4, "count": 2000}
    recipe = small_run.recipe(method=method, data=data, schedule={"epochs": max(1, len(rows) // 500)})
    training.train_run(recipe, folder)


@experiment(1)
def threads(folder, count, draw, figures):
    """the same run with 1 and with 2 threads: whether the results are equal to the last bit (not a fault)"""
    figures |= {"largest difference of a weight": 0.0, "largest difference in accuracy": 0.0}
    for recipe in list(small_run.RUNS.values())[:count]:
        runs = [folder / f"{next(numbers)}-{number}" for number in (1, 2)]
        data = recipe.get("data", {}) | {"name": "mnist5k", "batch_size": 100}
        changes = recipe | {"data": data, "model": {"name": "resnet8", "width": 16}, "schedule": {"epochs": 1}}
        (folder / "recipe.yaml").write_text(small_run.recipe(**changes).to_yaml())
        for number, run in enumerate(runs, start=1):
            arguments = [sys.executable, "-m", "sparing.cli", "train", folder / "recipe.yaml", "--out", run, "--json"]
            environment = os.environ | {"OMP_NUM_THREADS": str(number)}
            subprocess.run(arguments, env=environment, check=True, stdout=subprocess.DEVNULL)
        states = [torch.load(run / "checkpoint.pt", weights_only=True)["model"] for run in runs]
        pairs = [(one, states[1][key]) for key, one in states[0].items() if torch.is_tensor(one)]
        apart = max(float((one.float() - two.float()).abs().max()) for one, two in pairs)
        accuracy = abs(Run.open(runs[0]).metrics["accuracy"] - Run.open(runs[1]).metrics["accuracy"])
        for key, value in zip(list(figures), (apart, accuracy), strict=True):
            figures[key] = max(figures[key], value)
        yield "equal" if apart == 0 else "different", ""


@experiment(10_000)
def fuzzing(folder, count, draw, figures):
    """random changes of recipes, budgets, checkpoints, compressed files, run directories; random layers and dtypes"""
    for name, (_, share) in fuzz.KINDS.items():
        for outcome, wrong in fuzz.run(name, round(count * share), folder):
            yield f"{name}: {outcome}", wrong


# Several ranks


def of_two_ranks(folder, changes):
    """Return a recipe file, and a run of it on two ranks that was not disturbed."""
    (folder / "two.yaml").write_text(small_run.recipe(2, **{"checkpoint": {"steps": 2}, **changes}).to_yaml())
    began = time.perf_counter()
    output, _ = (process := small_run.torchrun(2, folder / "two.yaml", "--out", folder / "two")).communicate()
    assert process.returncode == 0, output
    return folder / "two.yaml", folder / "two", time.perf_counter() - began


@experiment(8)
def kill_ranks(folder, count, draw, figures):
    """SIGKILL under torchrun with 2 ranks (gloo), of all processes or of one rank, at random instants"""
    recipe, straight, seconds = of_two_ranks(folder, {"schedule": {"epochs": 10}})
    tries = figures["runs"] = 0
    while tries < count:
        out, finished, figures["runs"] = folder / f"run-{next(numbers)}", False, figures["runs"] + 1
        while not finished:
            process = small_run.torchrun(2, recipe, "--out", out, "--resume", "auto")
            time.sleep(draw.uniform(0.3, 1) * seconds if tries < count else 0)
            found = small_run.descendants(process.pid)
            if tries < count and process.poll() is None and len(found) > 1:
                tries += 1
                everything = draw.random() < 0.5
                for each in [process.pid, *found] if everything else [draw.choice(found[-2:])]:
                    os.kill(each, signal.SIGKILL)
                process.communicate(timeout=HANGS)
                yield "all processes" if everything else "one rank", ""
            else:
                output, _ = process.communicate(timeout=HANGS)
                finished = process.returncode == 0
                if not finished:
                    yield "resumed", output[-500:]
                    break
        if finished and (wrong := difference(straight, out)):
            yield "resumed", wrong


@experiment(24)
def ranks(folder, count, draw, figures):
    """one of 2 ranks dies (SIGKILL), hangs (SIGSTOP) or differs; the others must end with one sentence, then resume"""
    recipe, straight, _ = of_two_ranks(folder, {"method": small_run.RIGL, "rank_timeout": 2.0, "device": "cpu"})
    for index in range(count):
        change = ("dies", "hangs", "learning rate", "data", "masks", "masks later")[index % 6]
        rank, instant, out = draw.randint(0, 1), draw.uniform(0, 2), folder / f"run-{next(numbers)}"
        sent = {"dies": signal.SIGKILL, "hangs": signal.SIGSTOP}.get(change)

        run = (2, folder, small_run.train_ranks, load_recipe(recipe), out)

        def disturb(processes, rank=rank, instant=instant, sent=sent):
            if sent is not None:
                time.sleep(instant)
                os.kill(processes[rank].pid, sent)

        leave = rank if sent is not None else None
        results = small_run.on_ranks(*run, change, leave=leave, disturb=disturb)
        results = [result for each, result in enumerate(results) if each != leave]
        wrong = [f"{change}: {status}: {text[-400:]}" for text, status in results if "\n" in text.strip() or not text]
        succeeded = all(status == 0 for _, status in results)
        wrong = [] if succeeded and sent is not None else wrong
        small_run.on_ranks(*run)
        different = difference(straight, out) if not wrong else ""
        yield f"{change}: {'finished before' if succeeded else 'stopped'}", "; ".join(wrong) or different


@experiment(1)
def moved(folder, count, draw, figures):
    """trained under torchrun on 2 ranks, killed, moved to another folder, resumed on 1 rank, exported and evaluated"""
    changes = {"data": {"name": "mnist5k", "batch_size": 100, "shift": 1}, "model": {"name": "resnet8", "width": 8}}
    changes |= {"method": {"name": "str", "sparsity": 0.9}, "schedule": {"epochs": 6}}
    recipe, straight, _ = of_two_ranks(folder, changes)
    here, there = folder / "here", folder / "there" / "moved"
    process = small_run.torchrun(2, recipe, "--out", here)
    while len(small_run.history(here)) < 3:
        time.sleep(0.05)
    for each in [process.pid, *small_run.descendants(process.pid)]:
        os.kill(each, signal.SIGKILL)
    process.communicate()
    there.parent.mkdir()
    here.rename(there)
    progress = load_checkpoint(there / "checkpoint.pt")["progress"]
    steps = [train(there / "recipe.yaml", there), command("export", there, "--to", "onnx", "--json")]
    log = folder / "moved.log"
    for step in [*steps, command("eval", there, "--json"), command("eval", there, "--weights", "dense", "--json")]:
        assert ended(small_run.start(step, log), 10 * HANGS) == 0, log.read_text()
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    metrics, exported, last, dense = lines
    figures |= {
        "killed in": f"epoch {progress['epoch'] + 1}, step {progress['step']}",
        "accuracy": metrics["accuracy"],
        "accuracy of 2 ranks, not stopped": Run.open(straight).metrics["accuracy"],
        "sparsity": metrics["sparsity"],
        "ONNX, maximum relative error": exported["error"],
    }
    right = metrics["ranks"] == 1 and last["accuracy"] == dense["accuracy"] == metrics["accuracy"]
    right = right and len(small_run.history(there)) == 6 and abs(metrics["sparsity"] - 0.9) < 1e-3
    yield "right" if right else "wrong", "" if right else str(figures)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), metavar="NAME")
    parser.add_argument("--count", type=int, help="number of tries, in place of that of the experiment")
    parser.add_argument("--again", action="store_true", help="repeat experiments that have a result")
    parser.add_argument("--list", action="store_true", help="print the experiments")
    options = parser.parse_args()
    if options.list:
        for name, (function, count) in EXPERIMENTS.items():
            print(f"{name:<12} {count:>6}  {function.__doc__}")
        return
    torch.set_num_threads(1)  # processes are forked, and the threads of OpenMP do not survive that
    for name in options.case:
        path = OUT / f"{name}.json"
        if path.exists() and not options.again:
            continue
        (function, count), began, figures = EXPERIMENTS[name], time.perf_counter(), {}
        with tempfile.TemporaryDirectory() as folder:
            ends = list(function(Path(folder), options.count or count, random.Random(name), figures))
        lost = [wrong for _, wrong in ends if wrong]
        result = {"name": name, "experiment": function.__doc__, "tried": len(ends), "lost": len(lost)}
        result |= {"outcomes": dict(sorted(Counter(outcome for outcome, _ in ends).items())), "figures": figures}
        result |= {"commit": training._commit(), "device": f"{platform.machine()} CPU, {os.cpu_count()} cores"}
        result |= {"torch": torch.__version__, "seconds": round(time.perf_counter() - began)}
        result["what"] = lost[:100]
        OUT.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(result, indent=1) + "\n")
        print(f"{name}: {len(ends)} tried, {len(lost)} lost", flush=True)


if __name__ == "__main__":
    main()
