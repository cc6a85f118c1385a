"""Models, data, a training loop and a brute-force reading of patterns, for the conformance suite and its neighbours."""

import copy
from functools import lru_cache

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import type_before_parametrizations

import sparing
from sparing import GMP, METHODS, NM, Block, Filters, FixedMask

STEPS = 20
SPARSITY = 0.75

# The arguments of each method for a run of 20 steps.
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
    "fixed_mask": {},
}

# Entries that are a second way to use a method.
VARIANTS = {"str_sparsity": "str", "gmp_one_shot": "gmp", "gmp_global": "gmp"}


def method_class(name):
    """Return the class of an entry of `SETTINGS`."""
    return METHODS[VARIANTS.get(name, name)]


def make(name, **changes):
    """Return the method of an entry of `SETTINGS`, with some arguments changed."""
    return method_class(name)(**{**SETTINGS[name], **changes})


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(8, 12, batch_first=True)
        self.fc = nn.Linear(12, 4)

    def forward(self, x):
        return self.fc(self.rnn(x)[0][:, -1])


def _mixed():
    """Return a model of every kind of convolution, with sizes that all patterns divide."""
    return nn.Sequential(
        nn.Conv2d(4, 8, 2), nn.ReLU(), nn.Conv2d(8, 8, 2, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(8, 16, 2, groups=2), nn.ReLU(), nn.ConvTranspose2d(16, 4, 2), nn.Flatten(), nn.Linear(64, 4),
    )  # fmt: skip


def _classifier(features, size, *shape):
    return nn.Sequential(features, nn.Flatten(), nn.Linear(size, 4)), shape


MODELS = {
    "linear": lambda: (nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4)), (16,)),
    "conv2d": lambda: (
        nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)),
        (4, 5, 5),
    ),
    "conv3d": lambda: _classifier(nn.Conv3d(4, 8, 2), 64, 4, 3, 3, 3),
    "grouped": lambda: _classifier(nn.Conv2d(4, 8, 3, groups=2), 72, 4, 5, 5),
    "depthwise": lambda: _classifier(nn.Conv2d(8, 8, 3, groups=8), 72, 8, 5, 5),
    "transposed": lambda: _classifier(nn.ConvTranspose2d(4, 8, 2), 128, 4, 3, 3),
    "grouped_transposed": lambda: _classifier(nn.ConvTranspose2d(4, 8, 2, groups=2), 128, 4, 3, 3),
    "channels_last": lambda: (
        nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(72, 4)).to(memory_format=torch.channels_last),
        (4, 5, 5),
    ),
    "lstm": lambda: (Recurrent(), (5, 8)),
    "mixed": lambda: (_mixed(), (4, 4, 4)),
}


def build(model_name, seed=0):
    """Return a fresh model and the shape of one input."""
    torch.manual_seed(seed)
    return MODELS[model_name]()


def ready_for(method, model):
    """Return the model, with half of its weights pruned for a method that keeps zeros."""
    if isinstance(method, FixedMask):
        sparing.sparsify_(model, GMP(sparsity=0.5, begin=0, end=0))
        sparing.densify_(model)
    return model


def batch(shape, step):
    """Return the inputs and labels of one step, the same in every run."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, *shape, generator=generator), torch.randint(0, 4, (16,), generator=generator)


def wiring(module, weight):
    """Return the output channel, the input channel within its channel group, and the rest, of each weight.

    For convolutions it is measured: the module is run with one weight at a time, and the output and the gradient of
    the input show which channels this weight connects. The other layers multiply by a matrix (outputs, inputs).

    Returns:
        An int64 tensor of shape (number of weights, 3).
    """
    if hasattr(module, "kernel_size"):
        kind = type_before_parametrizations(module)
        return _measured_wiring(kind, module.in_channels, module.out_channels, module.kernel_size, module.groups)
    rows, columns = weight.shape
    position = torch.arange(rows * columns)
    return torch.stack([position // columns, position % columns, torch.zeros_like(position)], dim=1)


@lru_cache
def _measured_wiring(kind, inputs, outputs, kernel, groups):
    with torch.random.fork_rng():
        module = kind(inputs, outputs, kernel, groups=groups, bias=False)
    transposed = isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    x = torch.ones(1, inputs, *((1,) * len(kernel) if transposed else kernel), requires_grad=True)
    found = []
    for position in range(module.weight.numel()):
        with torch.no_grad():
            module.weight.zero_().view(-1)[position] = 1.0
        y = module(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        (out,), (inp,) = y.detach()[0].nonzero().tolist(), gradient[0].nonzero().tolist()
        place = out[1:] if transposed else inp[1:]
        rest = 0
        for index, size in zip(place, kernel, strict=True):
            rest = rest * size + index
        found.append([out[0], inp[0] % (inputs // groups), rest])
    return torch.tensor(found)


def groups_of(layer, pattern):
    """Return the number of the group that each weight of a layer belongs to, in the shape of the weight.

    It is derived from `wiring`, not from the pattern's own code: for NM the groups are those of m weights, without a
    pattern every weight is a group.
    """
    out, inp, rest = wiring(layer.module, layer.weight).unbind(1)
    zero = torch.zeros_like(out)
    key = {
        Block: lambda: (out // pattern.n, inp, rest),
        NM: lambda: (out, inp // pattern.m, rest),
        Filters: lambda: (out, zero, zero),
    }.get(type(pattern), lambda: (out, inp, rest))()
    return torch.stack(key, dim=1).unique(dim=0, return_inverse=True)[1].reshape(layer.weight.shape)


class Run:
    """A model, a method and an optimizer, trained step by step."""

    def __init__(self, model_name, method, optimizer="sgd", seed=0, steps=STEPS, **options):
        self.model, self.shape = build(model_name, seed)
        self.sparsifier = sparing.sparsify_(ready_for(method, self.model), method, steps=steps)
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
        """Return the state dicts, the number of the next batch, and the state of the random numbers."""
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
    """Layers of one row each, with weights, masks and gradients given by hand; the model is never run."""

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
        """Take one optimizer step with these gradients of the effective weights, one row per layer."""
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
        """Set the optimizer state of every weight to this value; to be called after a step."""
        for state in self.optimizer.state.values():
            for tensor in state.values():
                if isinstance(tensor, torch.Tensor) and tensor.dim() > 0:
                    tensor.fill_(value)

    def state(self, layer=0):
        """Return the optimizer state of a layer, one row for each of its buffers."""
        state = self.optimizer.state[self.layers[layer].weight]
        return [t[0].tolist() for t in state.values() if isinstance(t, torch.Tensor) and t.dim() > 0]
