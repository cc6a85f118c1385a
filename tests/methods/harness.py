"""Models, data and a training loop for the conformance suite and for the laws of each method."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

import sparing
from sparing import METHODS

STEPS = 20
SPARSITY = 0.75

# How the suite asks each method for its run of 20 steps. A method that learns its sparsity, or that
# needs other settings to do anything in so few steps, says so here.
SETTINGS = {
    "str": {"init": -3.0},
    "str_sparsity": {"sparsity": SPARSITY, "every": 3},
    "str_feather": {"sparsity": SPARSITY, "every": 3},
    "gmp": {"sparsity": SPARSITY, "begin": 2, "end": 16, "every": 2},
    "rigl": {"sparsity": SPARSITY, "end": 16, "every": 4},
    "gmp_one_shot": {"sparsity": SPARSITY, "begin": 6, "end": 6},
    "gmp_global": {"sparsity": SPARSITY, "begin": 2, "end": 16, "every": 2, "budget": "global"},
    "dnw": {"sparsity": SPARSITY},
    "set": {"sparsity": SPARSITY, "end": 16, "every": 4},
    "snfs": {"sparsity": SPARSITY, "end": 16, "every": 4},
    "dsr": {"sparsity": SPARSITY, "end": 16, "every": 4, "fraction": 0.1, "threshold": 0.02},
    "variational_dropout": {"kl_weight": 0.003, "init": -5.0},
    "dst": {"alpha": 0.005},
    "continuous_sparsification": {"weight": 3e-4, "init": 0.03},
    "static_random": {"sparsity": SPARSITY},
    "snip": {"sparsity": SPARSITY},
    "grasp": {"sparsity": SPARSITY},
    "st3": {"sparsity": SPARSITY, "begin": 2, "end": 10, "every": 3},
    "st3_sigma": {"sparsity": SPARSITY, "begin": 2, "end": 10, "every": 3},
    "feather": {"sparsity": SPARSITY, "every": 3, "theta": 0.5},
    "acdc": {"sparsity": SPARSITY, "begin": 2, "end": 15, "phase": 3},
    "spartan": {"sparsity": SPARSITY, "every": 3},
}

# Entries that are a second way to use a method.
VARIANTS = {"str_sparsity": "str", "gmp_one_shot": "gmp", "gmp_global": "gmp"}

# Methods that end with exactly the number of weights asked for, in every layer.
EXACT_LAYERS = {"dnw", "set", "gmp", "gmp_one_shot", "rigl", "static_random"}
# Methods that end with exactly the number asked for, over all layers.
EXACT_TOTAL = EXACT_LAYERS | {
    "str_sparsity",
    "str_feather",
    "spartan",
    "st3",
    "st3_sigma",
    "feather",
    "acdc",
    "snfs",
    "dsr",
    "gmp_global",
    "snip",
    "grasp",
}


def method_class(name):
    """The class that an entry of `SETTINGS` is of."""
    return METHODS[VARIANTS.get(name, name)]


def make(name):
    """The method of that name, as the suite uses it."""
    return method_class(name)(**SETTINGS[name])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(8, 12, batch_first=True)
        self.fc = nn.Linear(12, 4)

    def forward(self, x):
        return self.fc(self.rnn(x)[0][:, -1])


MODELS = {
    "linear": lambda: (nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4)), (16,)),
    "conv2d": lambda: (
        nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)),
        (4, 5, 5),
    ),
    "grouped": lambda: (nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(72, 4)), (4, 5, 5)),
    "depthwise": lambda: (nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(72, 4)), (8, 5, 5)),
    "channels_last": lambda: (
        nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(72, 4)).to(memory_format=torch.channels_last),
        (4, 5, 5),
    ),
    "lstm": lambda: (Recurrent(), (5, 8)),
}


def build(model_name, seed=0):
    """A fresh model and the shape of one input."""
    torch.manual_seed(seed)
    return MODELS[model_name]()


def batch(shape, step):
    """The inputs and labels of one step, the same for everybody."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, *shape, generator=generator), torch.randint(0, 4, (16,), generator=generator)


class Run:
    """A model, a method and an optimizer, taken step by step."""

    def __init__(self, model_name, method, optimizer="sgd", seed=0, steps=STEPS, **options):
        self.model, self.shape = build(model_name, seed)
        self.sparsifier = sparing.sparsify_(self.model, method, steps=steps)
        groups = sparing.param_groups(self.model, weight_decay=1e-2)
        if optimizer == "sgd":
            self.optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, **options)
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=0.01, **options)
        self.sparsifier.attach(self.optimizer)
        self.step = 0

    def train(self, steps):
        for _ in range(steps):
            x, y = batch(self.shape, self.step)
            self.optimizer.zero_grad()
            (F.cross_entropy(self.model(x), y) + self.sparsifier.penalty()).backward()
            self.optimizer.step()
            self.step += 1
        return self

    def state(self):
        """What a checkpoint holds, apart from the run."""
        parts = {"model": self.model, "optimizer": self.optimizer}
        state = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
        return state | {"step": self.step, "random": torch.get_rng_state()}

    def load(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        torch.set_rng_state(state["random"])
        return self


class Rows:
    """Layers of one row each whose weights, masks and gradients are given by hand; they are never run."""

    def __init__(self, method, weights, masks=None, optimizer="sgd", lr=0.1, steps=100):
        model = nn.Sequential(*(nn.Linear(len(row), 1, bias=False) for row in weights))
        for module, row in zip(model, weights, strict=True):
            module.weight.data = torch.tensor([row], dtype=torch.float32)
        self.sparsifier = sparing.sparsify_(model, method, steps=steps)
        self.layers = list(self.sparsifier.layers.values())
        self.parts = [layer.parametrization for layer in self.layers]
        for part, row in zip(self.parts, masks or [], strict=masks is not None):
            assert sum(row) == int(part.mask.sum())
            part.mask.copy_(torch.tensor([row]))
        if optimizer == "sgd":
            self.optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        else:
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
        self.sparsifier.attach(self.optimizer)

    def step(self, *gradients):
        """One optimizer step with these gradients of the effective weights, a row a layer."""
        for layer, row in zip(self.layers, gradients, strict=True):
            if layer.weight.requires_grad:
                layer.effective_weight.backward(torch.tensor([row], dtype=torch.float32))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self

    @property
    def masks(self):
        return [part.mask[0].int().tolist() for part in self.parts]

    @property
    def weights(self):
        return [layer.weight[0].tolist() for layer in self.layers]

    def fill_state(self, value):
        """Make the optimizer remember this value for every weight; to be called after a step."""
        for state in self.optimizer.state.values():
            for tensor in state.values():
                if isinstance(tensor, torch.Tensor) and tensor.dim() > 0:
                    tensor.fill_(value)

    def state(self, layer=0):
        """What the optimizer remembers of a layer, a row for each of its buffers."""
        state = self.optimizer.state[self.layers[layer].weight]
        return [t[0].tolist() for t in state.values() if isinstance(t, torch.Tensor) and t.dim() > 0]
