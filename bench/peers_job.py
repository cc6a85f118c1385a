"""Compare what survives in sparing and in other libraries: one job, from fine-tuning to a resumed run and a plain file.

    PYTHONPATH=src peers/bin/python bench/peers_job.py        the environment is that of bench/peers.py

The job: fine-tune a trained network to 90 % zeros with a ramp over the first 80 of 100 steps, average its weights along
the way, save everything at step 60, resume from that in new objects, and write the result for an unchanged network.

Each class below is what a user writes for a library, as its documentation says, around the ordinary loop; its lines are
counted. `Job` runs it and looks at what is left. The results are written into results/peers/job.json, and `python
bench/results.py table` builds the table of docs/libraries.md.
"""

import copy
import inspect
import io
import json
import os
import warnings
from importlib import metadata

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ledger import ROOT, write_entry

STEPS, RAMP, STOP, SPARSITY = 100, 80, 60, 0.9
LAYERS = ("fc1", "fc2")
WEIGHTS = 64 * 64 + 64 * 10


def sgd(parameters):
    """Return the optimizer of the job."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


class Sparing:
    package = None

    def start(self, model):
        import sparing

        self.model = model
        sparsifier = sparing.sparsify_(model, sparing.GMP(sparsity=SPARSITY, begin=0, end=RAMP, every=10), steps=STEPS)
        self.optimizer = sgd(model.parameters())
        sparsifier.attach(self.optimizer)

    def after_step(self, step):
        pass

    def save(self):
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def resume(self, model, saved):
        self.start(model)
        model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])

    def plain(self):
        import sparing

        return sparing.dense_state_dict(self.model)


class TorchPrune:
    package = "torch"

    def start(self, model):
        from torch.nn.utils import prune

        self.model = model
        self.weights = [(m, "weight") for m in model.modules() if isinstance(m, nn.Linear)]
        for layer, name in self.weights:
            prune.identity(layer, name)
        self.optimizer = sgd(model.parameters())

    def after_step(self, step):
        from torch.nn.utils import prune

        if step % 10 == 0 and step <= RAMP:
            target = SPARSITY * (1 - (1 - step / RAMP) ** 3)
            masks = [layer.weight_mask for layer, _ in self.weights]
            pruned = sum(int((mask == 0).sum()) for mask in masks)
            amount = round(target * sum(mask.numel() for mask in masks)) - pruned
            prune.global_unstructured(self.weights, pruning_method=prune.L1Unstructured, amount=amount)

    def save(self):
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def resume(self, model, saved):
        self.start(model)
        model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])

    def plain(self):
        from torch.nn.utils import prune

        for layer, name in self.weights:
            prune.remove(layer, name)
        return self.model.state_dict()


class Sparsimony:
    """RigL, which is sparse from the first step; the package on PyPI has no ramp."""

    package = "sparsimony"

    def start(self, model):
        from sparsimony.distributions.base import ERKDistribution
        from sparsimony.dst.rigl import RigL
        from sparsimony.schedulers.base import CosineDecayScheduler

        self.model = model
        self.optimizer = sgd(model.parameters())
        ramp = CosineDecayScheduler(pruning_ratio=0.3, t_end=RAMP, delta_t=10)
        self.sparsifier = RigL(ramp, ERKDistribution(), self.optimizer, sparsity=SPARSITY)
        layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        self.sparsifier.prepare(model, [{"tensor_fqn": f"{name}.weight"} for name in layers])

    def after_step(self, step):
        self.sparsifier.step()

    def save(self):
        optimizer, sparsifier = self.optimizer.state_dict(), self.sparsifier.state_dict()
        return {"model": self.model.state_dict(), "optimizer": optimizer, "sparsifier": sparsifier}

    def resume(self, model, saved):
        self.start(model)
        model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.sparsifier.load_state_dict(saved["sparsifier"])

    def plain(self):
        self.sparsifier.squash_mask()
        return self.model.state_dict()


class NNCF:
    package = "nncf"

    def start(self, model):
        import nncf

        mode = nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL
        self.schedule(nncf.prune(model, mode=mode, ratio=0.0, examples_inputs=torch.ones(1, 64)))

    def schedule(self, model):
        import nncf
        from nncf.torch.function_hook.pruning.magnitude.schedulers import ExponentialMagnitudePruningScheduler

        self.model = model
        mode = nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL
        self.ramp = ExponentialMagnitudePruningScheduler(
            model, mode=mode, initial_ratio=0.0, target_ratio=SPARSITY, target_epoch=RAMP // 10
        )
        self.optimizer = sgd(model.parameters())

    def after_step(self, step):
        if step % 10 == 0:
            self.ramp.step(step // 10)

    def save(self):
        import nncf.torch

        state = {"model": self.model.state_dict(), "config": nncf.torch.get_config(self.model)}
        return {**state, "optimizer": self.optimizer.state_dict()}

    def resume(self, model, saved):
        import nncf.torch

        self.schedule(nncf.torch.load_from_config(model, saved["config"]))
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])

    def plain(self):
        import nncf

        return nncf.strip(self.model, strip_format=nncf.StripFormat.IN_PLACE).state_dict()


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x):
        return self.fc2(self.fc1(x).relu())


def network():
    """Return the network, trained without pruning."""
    torch.manual_seed(0)
    model = Network()
    optimizer = sgd(model.parameters())
    for step in range(STEPS):
        learn(model, optimizer, step)
    return model


def learn(model, optimizer, step):
    """Take the forward and the backward pass of a step, and that of the optimizer."""
    inputs = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    F.cross_entropy(model(inputs), inputs[:, :10].argmax(1)).backward()
    optimizer.step()


def effective(model, package):
    """Return the weights that the layers multiply by. NNCF computes them in hooks, torch.nn.utils.prune in forward."""
    if package == "nncf":
        import nncf

        model = nncf.strip(copy.deepcopy(model), strip_format=nncf.StripFormat.IN_PLACE)
    with torch.no_grad():
        model.eval()(torch.ones(1, 64))
        return torch.cat([model.get_submodule(name).weight.detach().flatten() for name in LAYERS])


def zeros(weights):
    return int((weights == 0).sum())


class Job:
    """Run the job for a library, and collect what survives."""

    def __init__(self, user):
        self.user = user

    def train(self, user, begin, end, averages=()):
        for step in range(begin + 1, end + 1):
            learn(user.model.train(), user.optimizer, 1000 + step)
            user.after_step(step)
            for average in averages:
                average.update_parameters(user.model)

    def run(self):
        user = self.user()
        user.start(network())
        self.train(user, 0, STOP)
        file = io.BytesIO()
        torch.save(user.save(), file)
        self.train(user, STOP, STEPS)
        trained = effective(user.model, self.user.package)
        restored = Network()
        restored.load_state_dict({key: value.clone() for key, value in user.plain().items()})
        plain = effective(restored, None)
        return {
            "library": self.user.__name__, "package": self.user.package,
            "version": metadata.version(self.user.package) if self.user.package else None,
            "lines": self.lines(), "weights": WEIGHTS, "asked": SPARSITY, "zeros": zeros(trained),
            "plain_zeros": zeros(plain), "plain_equal": torch.equal(plain, trained),
            "resumed": self.attempt(self.resumed, file, trained, True),
            "resumed_unsafe": self.attempt(self.resumed, file, trained, False),
            "average": self.attempt(self.average, trained, False),
            "average_buffers": self.attempt(self.average, trained, True),
        }  # fmt: skip

    def resumed(self, file, trained, weights_only):
        """Return whether a resumed run ends with the weights of the one that was not interrupted, and its zeros."""
        file.seek(0)
        user = self.user()
        torch.manual_seed(1)
        user.resume(Network(), torch.load(file, weights_only=weights_only))
        start = effective(user.model, self.user.package)
        self.train(user, STOP, STEPS)
        end = effective(user.model, self.user.package)
        return {"zeros_at_start": zeros(start), "zeros": zeros(end), "equal": torch.equal(end, trained)}

    def average(self, trained, use_buffers):
        """Return the zeros of a moving average that starts with the run, and whether they are those of the network."""
        user = self.user()
        user.start(network())
        average = AveragedModel(user.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
        self.train(user, 0, STEPS, [average])
        found = effective(average.module, self.user.package)
        return {"zeros": zeros(found), "same_zeros": torch.equal(found == 0, trained == 0)}

    def attempt(self, function, *arguments):
        try:
            return function(*arguments)
        except Exception as error:  # what fails is a result
            return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"

    def lines(self):
        """Count the lines of code of the class, without docstrings, names of methods, blanks and comments."""
        rows = [row.strip() for row in inspect.getsource(self.user).splitlines()]
        other = ("class ", "def ", "#", '"""', "pass", "package = ")
        return sum(bool(row) and not row.startswith(other) for row in rows)


def main():
    results = []
    for user in (Sparing, TorchPrune, Sparsimony, NNCF):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = Job(user).run()
        results.append(result)
        print(json.dumps(result))
    entry = os.path.join(ROOT, "results", "peers", "job.json")
    write_entry(entry, {"torch": torch.__version__, "libraries": results})


if __name__ == "__main__":
    main()
