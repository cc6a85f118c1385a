"""Random cases for bench/faults.py: odd recipes, files and models. Each must succeed or raise a one-line InputError.

    python bench/fuzz.py KIND NUMBER    repeat one case here, with its traceback

A case depends only on its kind and number. Cases run in processes with limits on time and memory, so that one that
hangs or crashes is found as well.
"""

import copy
import dataclasses
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import torch
import yaml
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import small_run
import sparing
from sparing import Budget, InputError
from sparing.export import compressed
from sparing.models import MODELS
from sparing.run.checkpoint import load_checkpoint, save_checkpoint
from sparing.run.recipe import load_recipe
from sparing.run.resolve import resolve
from sparing.run.run import Run
from sparing.run.training import train_run

SECONDS, MEMORY = 60, 6 * 2**30
"""Limits of one case."""
ODD = [
    None, True, False, 0, 1, -1, 2, 3.5, 0.5, -0.0, 1e-300, 1e300, math.nan, math.inf, -math.inf, 2**31, 2**63, 10**30,
    "", "x", "str", "0.5", "1e-3", "ä\x00", "\ud800", "a" * 5000, [], {}, [1, 2], [[]], ["conv1"], {"name": 1},
    {"name": "str"}, {"": None}, "none", "auto", "cuda:99", "os:system", "/dev/zero", "../x",
]  # fmt: skip
REQUIRED = {"alpha": 1e-3, "weight": 1e-4, "kl_weight": 1e-3, "sparsity": 0.5}


class WrongError(Exception):
    """A result that is wrong, without an error."""


def mutate(draw, value, depth=0):
    """Return a copy of nested mappings and lists in which one place is changed, removed or added."""
    value = copy.deepcopy(value)
    places = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not places or (depth and draw.random() < 0.3):
        return draw.choice(ODD)
    place, how = draw.choice(places), draw.random()
    if how < 0.1:
        del value[place]
    elif how < 0.2 and isinstance(value, dict):
        value[draw.choice(["x", "name", "sparsity", "every", 5, f"{place}s"])] = draw.choice(ODD)
    else:
        value[place] = mutate(draw, value[place], depth + 1)
    return value


def damage(draw, content):
    """Return other bytes: a bit flipped, a part removed, doubled or overwritten."""
    content = bytearray(content)
    start, end = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    how = draw.randrange(5)
    if how == 0:
        content[min(start, len(content) - 1)] ^= 1 << draw.randrange(8)
    elif how == 1:
        del content[start:]
    elif how == 2:
        del content[start : min(end, start + 50)]
    elif how == 3:
        content[start:start] = content[start : min(end, start + 50)] or b"\0"
    else:
        content[start : start + 4] = draw.randbytes(4)
    return bytes(content)


def recipes(draw, folder):
    content = small_run.recipe(**small_run.RUNS[draw.choice(list(small_run.RUNS))]).model_dump(mode="json")
    if draw.random() < 0.5:
        del content["resolved"]
    for _ in range(draw.randint(1, 3)):
        content = mutate(draw, content)
    text = yaml.safe_dump(content).encode("utf-8", "replace")
    (folder / "recipe.yaml").write_bytes(damage(draw, text) if draw.random() < 0.3 else text)
    recipe = resolve(load_recipe(folder / "recipe.yaml"))
    if recipe.resolved.steps <= 40 and not recipe.compile and draw.random() < 0.2:
        metrics = train_run(recipe, folder / "run")
        if Run.open(folder / "run").evaluate().accuracy != metrics["accuracy"]:
            raise WrongError(f"accuracy {metrics['accuracy']}")


def budgets(draw, folder):
    layers = {name: draw.choice([0, 0.5, 1, 1.0, 0.9]) for name in ("conv1", "layer1.0.conv1", "layer2.0.conv2", "fc")}
    path = folder / draw.choice(["b.json", "b.csv"])
    if path.suffix == ".json":
        path.write_text(json.dumps(mutate(draw, layers)), encoding="utf-8", errors="surrogatepass")
    else:
        Budget({str(name): value for name, value in layers.items()}).save(path)
        path.write_bytes(damage(draw, path.read_bytes()))
    budget = Budget.load(path)
    if not all(0 <= value <= 1 for value in budget.values()):
        raise WrongError(str(budget))
    budget.save(folder / "again.json")
    if Budget.load(folder / "again.json") != budget:
        raise WrongError("another budget after saving")
    model = MODELS["resnet8"](num_classes=10, in_channels=1, width=2)
    sparing.sparsify_(model, sparing.GMP(budget=budget, begin=0, end=0), list(budget), 5)


def begun(folder, **changes):
    """Return a run directory with a checkpoint in mid-epoch, made once for all cases."""
    if not folder.exists():
        wanted = small_run.recipe(ema=0.9, amp="fp16", **changes)
        train_run(wanted, folder, stop_after=1)
    return folder


def checkpoints(draw, folder):
    run = shutil.copytree(begun(folder.parent / "begun"), folder / "run")
    path, recipe = run / "checkpoint.pt", load_recipe(run / "recipe.yaml")
    if damaged := draw.random() < 0.5:
        path.write_bytes(damage(draw, path.read_bytes()))
    else:
        content = load_checkpoint(path)
        section = draw.choice([key for key in content if key != "format"])
        odd = [torch.zeros(2), torch.zeros(0), torch.tensor(math.nan), torch.zeros((), dtype=torch.int64)]
        ODD.extend(odd)
        content[section] = mutate(draw, content[section])
        del ODD[-len(odd) :]
        save_checkpoint(path, content)
    before = path.read_bytes()
    metrics = train_run(recipe, run, resume=True)
    if damaged and before != (folder.parent / "begun" / "checkpoint.pt").read_bytes():
        raise WrongError("a damaged checkpoint was accepted")
    if not all(math.isfinite(line["train_loss"]) for line in small_run.history(run)) or metrics["epochs"] != 2:
        raise WrongError("a run that is not finite")


def compressed_files(draw, folder):
    path, generator = folder / "c.safetensors", torch.Generator().manual_seed(draw.randrange(2**31))
    state = {}
    for number in range(draw.randint(1, 4)):
        shape = [draw.choice([0, 1, 2, 7, 60]) for _ in range(draw.randint(0, 3))]
        values = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < draw.random())
        state[f"w{number}"] = values.to(draw.choice([torch.float32, torch.float16, torch.int8, torch.bool]))
    compressed.save(state, path)
    whole = path.read_bytes()
    path.write_bytes(damage(draw, whole))
    loaded = compressed.load(path)
    same = loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key]) for key in state)
    if not same:
        raise WrongError("another content")


def run_directories(draw, folder):
    run = folder / "run"
    shutil.copytree(begun(folder.parent / "begun"), run)
    if draw.random() < 0.5:
        train_run(load_recipe(run / "recipe.yaml"), run, resume=True)
    path = draw.choice([path for path in sorted(run.iterdir()) if path.is_file()])
    how = draw.random()
    if how < 0.2:
        path.unlink()
    elif how < 0.3:
        path.unlink()
        path.mkdir()
    elif how < 0.6:
        path.write_text(draw.choice(["", "5\n", "[1]\n", "{}\n", "null\n", "[" * 10**5, '{"epoch": "x"}\n', "\0" * 99]))
    else:
        path.write_bytes(damage(draw, path.read_bytes()))
    failure = None
    for use in (
        lambda opened: opened.metrics,
        lambda opened: opened.history,
        lambda opened: opened.report().to_json(),
        lambda opened: opened.evaluate(weights="best"),
        lambda opened: opened.export("compressed"),
        lambda opened: train_run(opened.recipe, run, resume=True),
    ):
        try:
            use(Run.open(run))
        except InputError as error:
            one_line(failure := error)
    if failure is not None:
        raise failure


def layer(draw, size):
    """Return a random layer, and the shape of its input without the batch."""
    out = draw.choice([1, 2, 3, 8])
    kind = draw.choice(["Linear", "Conv1d", "Conv2d", "ConvTranspose2d", "GRU", "LSTM", "Attention", "Bilinear"])
    if kind == "Linear":
        return nn.Linear(6, out, bias=draw.random() < 0.5), (size, 6)
    if kind.startswith("Conv"):
        groups = size if draw.random() < 0.3 and not out % size else 1
        kernel = draw.choice([1, 2, 3])
        return getattr(nn, kind)(size, out, kernel, groups=groups), (size, *[6] * int(kind[-2]))
    if kind == "Attention":
        return Call(nn.MultiheadAttention(6, 2), 3), (size, 6)
    module = getattr(nn, kind)
    return Call(module(6, 6, out), 2) if kind == "Bilinear" else Call(module(6, out), 1), (size, 6)


class Call(nn.Module):
    """Calls a module with its input, so many times, and returns a tensor."""

    def __init__(self, module, times):
        super().__init__()
        self.module, self.times = module, times

    def forward(self, x):
        found = self.module(*[x] * self.times)
        return found[0] if isinstance(found, tuple) else found


def models(draw, folder):
    torch.manual_seed(draw.randrange(2**31))
    first, shape = layer(draw, draw.choice([1, 2, 4]))
    model = nn.Sequential(first, nn.ReLU(), nn.Flatten(), nn.LazyLinear(draw.choice([1, 3, 5])))
    inputs = torch.randn(2, *shape)
    model(inputs)
    dtype = draw.choice([torch.float32] * 4 + [torch.float64, torch.bfloat16, torch.float16])
    model, inputs = model.to(dtype), inputs.to(dtype)
    cls = sparing.METHODS[draw.choice(list(sparing.METHODS))]
    fields = [field.name for field in dataclasses.fields(cls) if field.init]
    arguments = {name: value for name, value in REQUIRED.items() if name in fields}
    for name in draw.sample(fields, min(len(fields), draw.choice([0, 0, 1, 2]))):
        arguments[name] = draw.choice([*ODD, 0.3, 0.9, 0.99, 5, 2, "erk", "uniform", "global"])
    if "pattern" in fields and draw.random() < 0.5:
        arguments["pattern"] = draw.choice([sparing.Block(2), sparing.NM(2, 4), sparing.Filters(), sparing.Block(4)])
    steps = draw.choice([1, 5, 20])
    try:
        sparsifier = sparing.sparsify_(model, cls(**arguments), steps=steps)
    except TypeError as error:
        if "missing" in str(error):
            return
        raise
    optimizer_class = draw.choice([torch.optim.SGD, torch.optim.AdamW])
    optimizer = optimizer_class(sparing.param_groups(model, weight_decay=1e-3), lr=0.01)
    sparsifier.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(inputs).float().square().mean() + sparsifier.penalty()).backward()
        optimizer.step()
    sparsifier.finish()
    model.eval()
    with torch.no_grad():
        before = model(inputs)
        report = sparing.report(model, tuple(inputs.shape))
        nonzero = sum(int(torch.count_nonzero(each.effective_weight)) for each in sparing.sparse_layers(model).values())
        plain = sparing.dense_state_dict(model)
        sparing.densify_(model)
        if not torch.equal(model(inputs), before) and bool(before.isfinite().all()):
            raise WrongError(f"{cls.name} {arguments}: densify_ changes the outputs")
    if report.total.nonzero < nonzero or not 0 <= report.total.sparsity <= 1:
        raise WrongError(f"{cls.name} {arguments}: {report.total}")
    compressed.save(plain, folder / "c.safetensors")
    loaded = compressed.load(folder / "c.safetensors")
    if any(not torch.allclose(each, plain[key], rtol=0, atol=0, equal_nan=True) for key, each in loaded.items()):
        raise WrongError(f"{cls.name} {arguments}: compressed.load gives another content")


KINDS = {
    "recipes": (recipes, 0.2),
    "budgets": (budgets, 0.3),
    "checkpoints": (checkpoints, 0.025),
    "compressed files": (compressed_files, 0.4),
    "run directories": (run_directories, 0.005),
    "models and dtypes": (models, 0.07),
}
"""Name → function of one case, and its share of all cases."""


def one_line(error):
    if "\n" in str(error) or not str(error):
        raise WrongError(f"the message has several lines: {error}")


def case(kind, number, folder):
    """Run one case, and return how it ended and what is wrong, or ""."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            KINDS[kind][0](random.Random(f"{kind} {number}"), folder)
        return "success", ""
    except InputError as error:
        return "sentence", "" if str(error) and "\n" not in str(error) else f"several lines: {error}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "traceback", f"{type(error).__name__}: {str(error)[:200]} ({Path(where.filename).name}:{where.lineno})"
    finally:
        shutil.rmtree(folder)


def run(kind, count, folder):
    """Yield how each of so many cases ended, and what is wrong. They run in processes of 50 cases."""
    begun(folder / "begun")
    done = 0
    while done < count:
        reader, writer = os.pipe()
        child = small_run.start(lambda start=done, writer=writer: work(kind, start, count, folder, writer))
        os.close(writer)
        with open(reader, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for number, (outcome, wrong) in enumerate(lines, start=done):
            yield outcome, wrong and f"{kind} {number}: {wrong}"
        done += len(lines)
        if status and done < count:
            hung = status == -signal.SIGALRM
            yield "hang" if hung else "crash", f"{kind} {done}: {'hangs' if hung else f'status {status}'}"
            done += 1


def work(kind, start, count, folder, writer):
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    with open(writer, "w", encoding="utf-8") as file:
        for number in range(start, min(count, start + 50)):
            signal.alarm(SECONDS)
            print(json.dumps(case(kind, number, folder)), file=file, flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        begun(Path(temporary) / "begun")
        (where := Path(temporary) / "case").mkdir()
        KINDS[sys.argv[1]][0](random.Random(f"{sys.argv[1]} {sys.argv[2]}"), where)
