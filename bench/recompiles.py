"""Count what torch.compile compiles while a model is trained by each method: once, whatever the schedule does.

    python bench/recompiles.py

A small network takes 12 optimizer steps, with updates of masks and thresholds at every second one, then loads its own
state dict and takes two more. Its forward and backward passes are compiled with fullgraph=True by the backend
"aot_eager", which traces as the default backend does and generates no code. Then it is run in evaluation mode without
gradients, which is the second graph of any model. The outputs of compiled and eager training are compared.
"""

import copy
import dataclasses
import warnings

import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import sparing

STEPS, MORE = 12, 2
ARGUMENTS = {"sparsity": 0.75, "every": 2, "end": 8, "alpha": 0.005, "weight": 3e-4, "kl_weight": 0.003, "phase": 2}
"""For those methods that have them."""
OTHERS = {
    "str, target": ("str", {"sparsity": 0.75, "every": 2}),
    "str, blocks": ("str", {"sparsity": 0.75, "every": 2, "pattern": sparing.Block(4)}),
    "gmp, global": ("gmp", {"sparsity": 0.75, "every": 2, "budget": "global"}),
    "gmp, 2:4": ("gmp", {"every": 2, "pattern": sparing.NM(2, 4)}),
}


def variants():
    """Yield the name and the method of each variant."""
    for name, method in sparing.METHODS.items():
        fields = {field.name for field in dataclasses.fields(method)}
        taken = {} if name == "str" else {key: value for key, value in ARGUMENTS.items() if key in fields}
        if name == "dsr":
            taken |= {"fraction": 0.1}
        yield name, method(**taken)
    for name, (method, arguments) in OTHERS.items():
        yield name, sparing.METHODS[method](**arguments)


def train(method, compiler):
    """Train a network through a compiler, and return it with its losses."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    sparsifier = sparing.sparsify_(model, method, steps=STEPS + MORE)
    optimizer = torch.optim.SGD(sparing.param_groups(model, weight_decay=1e-2), lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer)
    run, losses = compiler(model), []
    for step in range(STEPS + MORE):
        if step == STEPS:
            model.load_state_dict(copy.deepcopy(model.state_dict()))
        x, y = torch.randn(16, 16), torch.randint(0, 8, (16,))
        optimizer.zero_grad()
        loss = F.cross_entropy(run(x), y)
        (loss + sparsifier.penalty()).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return run.eval(), losses


def count(method):
    """Return the graphs of training and of evaluation, and the largest difference of a loss to eager training."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run, losses = train(method, lambda model: torch.compile(model, fullgraph=True, backend=counter))
    training = counter.frame_count
    with torch.no_grad():
        for _ in range(2):
            run(torch.zeros(16, 16))
    _, eager = train(method, lambda model: model)
    difference = max(abs(a - b) for a, b in zip(losses, eager, strict=True))
    return training, counter.frame_count - training, difference


def main():
    warnings.simplefilter("ignore")
    print("method                     graphs: training, evaluation    difference of the loss to eager")
    for name, method in variants():
        training, evaluation, difference = count(method)
        print(f"{name:27}{training:17}{evaluation:12}{difference:35.1e}", flush=True)


if __name__ == "__main__":
    main()
