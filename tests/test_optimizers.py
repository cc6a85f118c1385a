"""Optimizers of all kinds: each works, or is refused in a sentence; nothing goes wrong in silence."""

import copy
import logging
import warnings

import pytest
import torch
import torch.distributed as dist
from harness import SETTINGS, make
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import sparing
from sparing import ACDC, DSR, GMP, SET, SNFS, SNIP, STR, InputError, RigL, SparsityWarning
from sparing.optimizers import reset_state
from sparing.parametrizations import SoftThreshold, learned_number

quiet = pytest.mark.filterwarnings("ignore")
REGROWING = {
    "rigl": RigL(sparsity=0.8, budget="uniform", every=2, end=9),
    "set": SET(sparsity=0.8, budget="uniform", every=2, end=9),
    "snfs": SNFS(sparsity=0.8, every=2, end=9),
    "dsr": DSR(sparsity=0.8, every=2, end=9, threshold=0.05),
    "acdc": ACDC(sparsity=0.8, begin=2, end=8, phase=2),
}
GRADUAL = GMP(sparsity=0.8, begin=1, end=8, every=1)


def build(method, steps=10, sizes=(16, 32, 4)):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*sizes[:2]), nn.Tanh(), nn.Linear(*sizes[1:]))
    return model, sparing.sparsify_(model, method, steps=steps)


def loss(model, number=0):
    return model(torch.randn(8, model[0].in_features, generator=torch.Generator().manual_seed(number))).square().mean()


def train(model, optimizer, numbers):
    for number in numbers:
        optimizer.zero_grad()
        loss(model, number).backward()
        optimizer.step()


def masks(sparsifier):
    return {name: layer.parametrization.mask.clone() for name, layer in sparsifier.layers.items()}


# Weight decay of thresholds


class Plain(torch.optim.Optimizer):
    """Gradient descent that knows no weight decay."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, self.state[p], group["lr"])

    def update(self, p, state, lr):
        p.sub_(lr * p.grad)


def usual_groups(model):
    """Return groups in which parameters of one dimension do not decay, as timm and nanoGPT make them."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 1e-3},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


class Learned(sparing.Method):
    """Another method of learned thresholds without a target."""

    name = "learned"

    def parametrizations(self, layers, plan):
        return {n: SoftThreshold(learned_number((1,), -5.0, each.weight), torch.sigmoid) for n, each in layers.items()}


@pytest.mark.parametrize("method", [STR(), STR(granularity="global"), Learned()])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda model: torch.optim.AdamW(usual_groups(model)),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        lambda model: torch.optim.AdamW(sparing.param_groups(model, 1e-4, threshold_weight_decay=0.0)),
        lambda model: Plain(model.parameters()),
    ],
)
def test_thresholds_that_nothing_raises_are_warned_of(method, optimizer):
    model, sparsifier = build(method)
    expected = rf"{method.name}: nothing raises the thresholds of 2 of 2 layers \(0, 2\).*sparing.param_groups"
    with pytest.warns(SparsityWarning, match=expected) as caught:
        sparsifier.attach(optimizer(model))
    assert caught[0].filename == __file__


def test_one_layer_whose_threshold_does_not_decay_is_named():
    model, sparsifier = build(STR())
    groups = sparing.param_groups(model, 1e-3)
    fixed = sparsifier.layers["2"].parametrization.s
    for group in groups:
        group["params"] = [p for p in group["params"] if p is not fixed]
    with pytest.warns(SparsityWarning, match=r"1 of 2 layers \(2\)"):
        sparsifier.attach(torch.optim.SGD([*groups, {"params": [fixed]}], lr=0.1))


def test_thresholds_that_something_raises_or_that_are_frozen_are_not_warned_of():
    """A warning is an error in these tests."""
    for method in (STR(sparsity=0.5), sparing.STRFeather(sparsity=0.5), sparing.DST(alpha=1e-4), GRADUAL):
        model, sparsifier = build(method)
        sparsifier.attach(torch.optim.SGD(usual_groups(model), lr=0.1))
    for groups in (usual_groups, lambda model: sparing.param_groups(model, 1e-3)):
        model, sparsifier = build(STR(granularity="filter"))
        sparsifier.attach(torch.optim.SGD(groups(model), lr=0.1))
    model, sparsifier = build(STR())
    for layer in sparsifier.layers.values():
        layer.parametrization.s.requires_grad_(False)
    sparsifier.attach(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))


# Optimizer state


class Flat(Plain):
    """Momentum in one dimension."""

    def update(self, p, state, lr):
        stored = state.setdefault("momentum", self.first(p))
        momentum = self.read(stored).reshape(p.shape).mul_(0.9).add_(p.grad)
        self.write(state, momentum)
        p.sub_(lr * momentum)

    def first(self, p):
        return torch.zeros(p.numel())

    def read(self, stored):
        return stored.clone()

    def write(self, state, momentum):
        state["momentum"].copy_(momentum.flatten())


class Stacked(Flat):
    """Two momenta in one tensor, as bitsandbytes stores those of AdEMAMix."""

    def first(self, p):
        return torch.zeros(2, *p.shape)

    def read(self, stored):
        return stored[0].clone()

    def write(self, state, momentum):
        state["momentum"].copy_(momentum)


class Codes(Flat):
    """Momentum in eight bits. Zero is 128, as in the signed codes of bitsandbytes."""

    def first(self, p):
        return torch.full(p.shape, 128, dtype=torch.uint8)

    def read(self, stored):
        return (stored.float() - 128) / 64

    def write(self, state, momentum):
        state["momentum"].copy_((momentum * 64 + 128).round().clamp(0, 255))


class PackedCodes(Codes):
    """Two codes in a byte."""

    def first(self, p):
        return torch.zeros((p.numel() + 1) // 2, dtype=torch.uint8)

    def read(self, stored):
        return torch.stack([stored >> 4, stored & 15], 1).float()

    def write(self, state, momentum):
        pass

    def update(self, p, state, lr):
        state.setdefault("momentum", self.first(p))


class Transposed(Flat):
    def first(self, p):
        return torch.zeros_like(p.t()) if p.dim() == 2 else torch.zeros_like(p)

    def read(self, stored):
        return stored.t().clone() if stored.dim() == 2 else stored.clone()

    def write(self, state, momentum):
        state["momentum"].copy_(momentum.t() if momentum.dim() == 2 else momentum)


class Several(Flat):
    """Momenta in a dict, as those of AggMo."""

    def first(self, p):
        return {0.9: torch.zeros_like(p)}

    def read(self, stored):
        return stored[0.9].clone()

    def write(self, state, momentum):
        state["momentum"][0.9].copy_(momentum)


@pytest.mark.parametrize("name", ["rigl", "set", "snfs", "dsr"])
@pytest.mark.parametrize("kind", [Flat, Stacked])
def test_regrown_weights_start_without_momentum_whatever_the_shape_of_the_state(name, kind):
    model, sparsifier = build(REGROWING[name])
    optimizer = kind(model.parameters())
    sparsifier.attach(optimizer)
    train(model, optimizer, [0])
    before = masks(sparsifier)
    for layer in sparsifier.layers.values():
        optimizer.state[layer.weight]["momentum"].fill_(1.0)
    train(model, optimizer, [1, 2] if name == "rigl" else [1])
    regrown = {key: mask & ~before[key] for key, mask in masks(sparsifier).items()}
    assert any(each.any() for each in regrown.values())
    for key, layer in sparsifier.layers.items():
        momentum = optimizer.state[layer.weight]["momentum"].reshape(-1, *layer.weight.shape)
        assert ((momentum == 0).all(dim=0) == regrown[key]).all()


@pytest.mark.parametrize("name", REGROWING)
@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        (Codes, "Tensor of torch.uint8, .*the code 0 may stand for another number"),
        (PackedCodes, "Tensor of torch.uint8, .*the code 0 may stand for another number"),
        (Transposed, r"Tensor of torch.float32, .*its shape is \(16, 32\)"),
        (Several, "dict, .*it is a container"),
    ],
)
def test_state_that_cannot_be_reset_is_refused_after_the_first_step_or_by_attach(name, kind, stored):
    model, sparsifier = build(REGROWING[name])
    optimizer = kind(model.parameters())
    sparsifier.attach(optimizer)
    expected = f"{kind.__name__}: the state 'momentum' of a weight of shape .* is a {stored}.*torch.optim.AdamW"
    for _ in range(2):  # a loop that swallows the error hears it again
        with pytest.raises(InputError, match=expected):
            train(model, optimizer, [0])
    with pytest.raises(InputError, match=expected):
        sparsifier.attach(optimizer)


@pytest.mark.parametrize("kind", [Codes, PackedCodes, Transposed, Several])
def test_methods_that_regrow_nothing_take_any_state(kind):
    model, sparsifier = build(GRADUAL)
    optimizer = kind(model.parameters())
    sparsifier.attach(optimizer)
    train(model, optimizer, range(10))
    assert sparing.report(model).total.sparsity == pytest.approx(0.8, abs=0.01)


def test_state_of_fewer_numbers_than_the_weight_stays_as_it_is():
    model, _ = build(GRADUAL)
    optimizer = torch.optim.Adafactor(model.parameters())
    train(model, optimizer, [0])
    before = copy.deepcopy(optimizer.state_dict()["state"])
    for p in optimizer.param_groups[0]["params"]:
        reset_state([optimizer], p)
    factors = 0
    for old, new in zip(before.values(), optimizer.state.values(), strict=True):
        for key in old:
            stays = key in ("row_var", "col_var", "step")
            torch.testing.assert_close(new[key], old[key] if stays else torch.zeros_like(old[key]), rtol=0, atol=0)
            factors += key == "row_var"
    assert factors == 2


@pytest.mark.parametrize("key", ["precond_0", "inv_precond_1", "pre_conditioners"])
def test_the_preconditioner_of_a_square_weight_stays_as_it_is(key):
    weight = nn.Parameter(torch.randn(4, 4))
    optimizer = torch.optim.SGD([weight])
    preconditioner = torch.eye(4) + 1
    kept = preconditioner.clone()
    optimizer.state[weight] = {key: [preconditioner] if key.endswith("s") else preconditioner, "momentum": kept.clone()}
    reset_state([optimizer], weight, torch.eye(4).bool())
    assert torch.equal(preconditioner, kept)
    assert optimizer.state[weight]["momentum"].diag().eq(0).all()


@quiet
@pytest.mark.parametrize("name", REGROWING)
@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_quantized_states_of_torchao_are_reset(name, kind):
    optimizers = pytest.importorskip("torchao.optim", reason="torchao is not installed")
    model, sparsifier = build(REGROWING[name], sizes=(128, 64, 64))
    optimizer = getattr(optimizers, kind)(model.parameters(), lr=1e-3)
    weight = sparsifier.layers["0"].weight
    with torch.compiler.set_stance("force_eager"):
        train(model, optimizer, [0])
        before = optimizer.state[weight]["exp_avg"].dequantize()
        sparsifier.attach(optimizer)  # the check changes nothing
        assert torch.equal(optimizer.state[weight]["exp_avg"].dequantize(), before)
        found = 0
        for number in range(1, 11):
            old = masks(sparsifier)["0"]
            optimizer.state[weight]["exp_avg"].copy_(torch.ones_like(weight))
            train(model, optimizer, [number])
            momentum = optimizer.state[weight]["exp_avg"].dequantize()
            regrown = masks(sparsifier)["0"] & ~old
            reset = regrown.any() if name == "acdc" else regrown  # AC/DC resets all weights
            assert ((momentum == 0) == reset).all()
            found += int(regrown.sum())
    assert sparsifier.step == 10
    assert found > 0


@pytest.mark.parametrize("name", ["set", "dsr", "acdc"])
def test_lbfgs_is_refused_by_methods_that_reset_state(name):
    model, sparsifier = build(REGROWING[name])
    with pytest.raises(InputError, match=f"{name} resets the state of single weights and does not support LBFGS"):
        sparsifier.attach(torch.optim.LBFGS(model.parameters()))


# Steps within the backward pass

NOTHING_ACTS = ("str", "static_random", "variational_dropout")


def step_in_backward(model, sparsifier):
    """Give each parameter an optimizer of its own, which steps as soon as the gradient is there."""
    groups = [(p, g["weight_decay"]) for g in sparing.param_groups(model, 1e-2) for p in g["params"]]
    optimizers = {p: torch.optim.SGD([p], lr=0.1, momentum=0.9, weight_decay=decay) for p, decay in groups}
    sparsifier.attach(*optimizers.values())

    def step(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(step)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in NOTHING_ACTS])
def test_steps_within_the_backward_pass_are_refused_by_methods_that_act(name):
    model, sparsifier = build(make(name, **({"budget": "uniform"} if name in REGROWING else {})), steps=20)
    step_in_backward(model, sparsifier)
    before = [p.detach().clone() for p in model.parameters()]
    expected = (
        rf"{sparsifier.method.name} acts around a step.*SGD.step\(\) was called by a gradient hook.*after backward"
    )
    with pytest.raises(InputError, match=expected):
        (loss(model) + sparsifier.penalty()).backward()
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    assert sparsifier.step == 0


@pytest.mark.parametrize("name", NOTHING_ACTS)
def test_steps_within_the_backward_pass_train_as_others_where_nothing_acts(name):
    results = []
    for within in (True, False):
        model, sparsifier = build(make(name), steps=20)
        if within:
            step_in_backward(model, sparsifier)
        else:
            optimizer = torch.optim.SGD(sparing.param_groups(model, 1e-2), lr=0.1, momentum=0.9)
            sparsifier.attach(optimizer)
        for number in range(8):
            torch.manual_seed(number)
            (loss(model, number) + sparsifier.penalty()).backward()
            if not within:
                optimizer.step()
                optimizer.zero_grad()
        assert sparsifier.step == 8
        results.append(model.state_dict())
    torch.testing.assert_close(*results)


# Wrappers


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimization, as its best known code has it."""

    def __init__(self, params, base, **arguments):
        super().__init__(params, arguments)
        self.base_optimizer = base(self.param_groups, **arguments)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for p in self.param_groups[0]["params"]:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad, alpha=0.05)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p in self.param_groups[0]["params"]:
            p.data = self.state[p]["old"]
        self.base_optimizer.step()
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure):
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


ALTERNATING = ACDC(sparsity=0.8, budget="uniform", begin=2, end=8, phase=2)


@pytest.mark.parametrize("method", [GRADUAL, ALTERNATING, STR(sparsity=0.8), sparing.STRFeather(sparsity=0.8)])
@pytest.mark.parametrize("closure", [True, False])
def test_both_steps_of_sharpness_aware_minimization_are_one(closure, method):
    """Its state has the weights themselves, which AC/DC would set to zero with the momentum."""
    model, sparsifier = build(method)
    optimizer = Sam(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer)
    for number in range(10):
        loss(model, number).backward()
        if closure:
            optimizer.step(lambda number=number: loss(model, number).backward())
        else:
            optimizer.first_step()
            loss(model, number).backward()
            optimizer.second_step()
        assert sparsifier.step == number + 1
        assert bool(model[0].weight.any())
    assert sparing.report(model).missed == ()


class Lookahead(torch.optim.Optimizer):
    """Lookahead that keeps the slow weights itself, and does not call the constructor of its base class."""

    def __init__(self, optimizer, k):
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}
        self.optimizer, self.k, self.count = optimizer, k, 0
        self.param_groups, self.defaults = optimizer.param_groups, optimizer.defaults
        self.state = {p: {"slow": p.detach().clone()} for p in optimizer.param_groups[0]["params"]}

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step()
        self.count += 1
        if self.count % self.k == 0:
            for p, state in self.state.items():
                state["slow"].lerp_(p, 0.5)
                p.copy_(state["slow"])


def test_the_slow_weights_of_lookahead_are_reset_where_weights_are_regrown():
    model, sparsifier = build(REGROWING["set"])
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), lr=0.1), k=3)
    sparsifier.attach(optimizer)
    before = masks(sparsifier)
    train(model, optimizer, range(2))
    for key, layer in sparsifier.layers.items():
        regrown = layer.parametrization.mask & ~before[key]
        assert regrown.any()
        assert (optimizer.state[layer.weight]["slow"][regrown] == 0).all()
    train(model, optimizer, range(2, 10))
    assert sparsifier.step == 10


@quiet
@pytest.mark.parametrize("method", [GRADUAL, REGROWING["rigl"], SNIP(sparsity=0.8)], ids=lambda method: method.name)
def test_lookahead_of_timm_counts_its_steps(method, vision_operators):
    timm = pytest.importorskip("timm.optim", reason="timm is not installed")
    model, sparsifier = build(method)
    optimizer = timm.Lookahead(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), k=2)
    sparsifier.attach(optimizer)
    train(model, optimizer, range(10))
    assert sparsifier.step == 10
    assert sparing.report(model).total.sparsity == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("method", [REGROWING["acdc"], STR(sparsity=0.8), sparing.STRFeather(sparsity=0.8)])
def test_a_copy_of_weights_in_the_optimizer_is_refused_by_methods_that_set_them(method):
    """The averages of schedule-free optimizers would undo the rescaling of thresholds."""
    model, sparsifier = build(method)
    schedule_free = type("SGDScheduleFree", (torch.optim.SGD,), {})
    swapping = type("Averaging", (torch.optim.SGD,), {"eval": lambda self: None})
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    for optimizer in (*(kind(model.parameters(), lr=0.1) for kind in (schedule_free, swapping)), Lookahead(inner, k=2)):
        expected = f"{method.name} sets weights or thresholds, and {type(optimizer).__name__} keeps a copy"
        with pytest.raises(InputError, match=expected):
            sparsifier.attach(optimizer)
    model, sparsifier = build(STR())
    sparsifier.attach(schedule_free(sparing.param_groups(model, 1e-3), lr=0.1))


class Master(torch.optim.Optimizer):
    """Steps of a float32 copy of the weights, from which the weights are set."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    master = state.setdefault("master", p.float().flatten())
                    p.copy_(master.sub_(p.grad.float().flatten(), alpha=group["lr"]).view(p.shape))


class DualAveraging(Master):
    """Steps toward the first weights minus the sum of the gradients, as those of MADGRAD."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                first = state.setdefault("x0", p.clone())
                state["s"] = state.get("s", 0) + group["lr"] * p.grad
                p.lerp_(first - state["s"], 0.1)


@pytest.mark.parametrize("kind", [Master, DualAveraging])
@pytest.mark.parametrize("method", [REGROWING["acdc"], STR(sparsity=0.8), sparing.STRFeather(sparsity=0.8)])
def test_a_copy_of_weights_in_the_state_is_refused_by_methods_that_set_them(kind, method):
    """It would undo the rescaling of thresholds, and AC/DC would set it to zero."""
    model, sparsifier = build(method)
    optimizer = kind(model.parameters())
    sparsifier.attach(optimizer)
    expected = f"{method.name} sets weights or thresholds, and the state '(master|x0)' of {kind.__name__} keeps a copy"
    for _ in range(2):  # a loop that swallows the error hears it again
        with pytest.raises(InputError, match=expected):
            train(model, optimizer, [0])
    with pytest.raises(InputError, match=expected):
        sparsifier.attach(optimizer)


@quiet
@pytest.mark.parametrize("method", [GRADUAL, REGROWING["rigl"], sparing.Feather(sparsity=0.8)], ids=lambda m: m.name)
def test_a_copy_of_weights_in_the_state_is_taken_where_nothing_else_sets_them(method):
    """Regrown weights start at zero in the copy as well."""
    result = []
    for kind in (Master, torch.optim.SGD):
        model, sparsifier = build(method)
        optimizer = kind(model.parameters(), lr=0.1)
        sparsifier.attach(optimizer)
        train(model, optimizer, range(10))
        result.append(sparing.densify_(model).state_dict())
    torch.testing.assert_close(*result)


@quiet
def test_first_weights_that_only_measure_a_distance_are_taken():
    class Prodigy(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p].setdefault("p0", p.detach().flatten().clone())
            return super().step(closure)

    model, sparsifier = build(STR(sparsity=0.8))
    optimizer = Prodigy(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    train(model, optimizer, range(10))
    assert sparsifier.sparsity() == pytest.approx(0.8, abs=0.01)


def test_a_wrapper_and_its_optimizer_are_one():
    model, sparsifier = build(GRADUAL)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(Lookahead(inner, k=3), inner)
    train(model, inner, range(10))
    assert sparsifier.step == 10
    assert sparing.report(model).missed == ()


class Container(torch.optim.Optimizer):
    """As that of torchtitan: it steps the optimizers of a list, and its own groups have no learning rate."""

    def __init__(self, *optimizers):
        super().__init__([p for each in optimizers for group in each.param_groups for p in group["params"]], {})
        self.optimizers = list(optimizers)

    def step(self, closure=None):
        for each in self.optimizers:
            each.step()


class Hookless:
    """A container that is no optimizer itself."""

    def __init__(self, *optimizers):
        self.chained = optimizers
        self.optimizers = dict(enumerate(optimizers))

    def step(self):
        for each in self.chained:
            each.step()


class Prepared:
    """A wrapper around one, as that of accelerate."""

    def __init__(self, *optimizers):
        self.optimizer = Container(*optimizers)
        self.step = self.optimizer.step


@pytest.mark.parametrize("kind", [Container, Hookless, Prepared])
def test_a_container_of_optimizers_stands_for_those_in_it(kind):
    ends = []
    for give in (lambda *each: each, lambda *each: (kind(*each),)):
        model, sparsifier = build(RigL(sparsity=0.8, every=2))
        parameters = list(model.parameters())
        each = [torch.optim.SGD(p, lr=0.1, momentum=0.9) for p in (parameters[:2], parameters[2:])]
        given = give(*each)
        sparsifier.attach(*given)
        for number in range(10):
            model.zero_grad()
            loss(model, number).backward()
            for optimizer in given:
                optimizer.step()
        assert (sparsifier.step, sparsifier.optimizers) == (10, tuple(each))
        ends.append([*model.state_dict().values(), *(e.state[p]["momentum_buffer"] for e in each for p in e.state)])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


class Rateless(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p -= 0.1 * p.grad


def test_an_optimizer_whose_groups_have_no_learning_rate_counts_its_steps():
    model, sparsifier = build(GMP(sparsity=0.8, every=2))
    optimizer = Rateless(model.parameters(), {})
    sparsifier.attach(optimizer)
    train(model, optimizer, range(10))
    assert sparsifier.step == 10


def test_an_optimizer_on_which_torch_runs_no_hooks_is_refused():
    class Unhooked(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self._inside, self.param_groups = optimizer, optimizer.param_groups
            self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}

        def step(self, closure=None):
            self._inside.step()

    model, sparsifier = build(GRADUAL)
    with pytest.raises(InputError, match=r"torch runs no hooks around the step\(\) of Unhooked"):
        sparsifier.attach(Unhooked(torch.optim.SGD(model.parameters(), lr=0.1)))


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@quiet
def test_a_model_that_is_wrapped_already_is_refused(one_process):
    model = nn.Linear(4, 2)
    with pytest.raises(InputError, match="is wrapped in DistributedDataParallel, .* wrap it after sparsify_"):
        sparing.sparsify_(nn.parallel.DistributedDataParallel(model), sparing.STR())
    parallel = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 2, bias=False)))
    for inner in (parallel.module, parallel.module[0]):
        with pytest.raises(InputError, match="is wrapped in DistributedDataParallel"):
            sparing.sparsify_(inner, sparing.STR())
    inner = parallel.module
    del parallel
    sparing.sparsify_(inner, sparing.STR())
    sparing.sparsify_(model, sparing.STR())
    model = nn.Linear(4, 2)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(InputError, match=r"is sharded already, .* call sparsify_\(\) before fully_shard\(\)"):
        sparing.sparsify_(model, sparing.STR())


@quiet
def test_a_sharded_model_is_not_densified(one_process):
    model = nn.Sequential(nn.Linear(4, 2))
    sparing.sparsify_(model, sparing.STR())
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    for _ in range(2):
        with pytest.raises(InputError, match="densify_.*: the model is sharded by fully_shard.*its full state dict"):
            sparing.densify_(model)
        model(torch.randn(3, 4))  # which leaves the parameters of the whole model gathered


@quiet
def test_the_sharded_state_of_zero_is_reset(one_process):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # its import warns

    model, sparsifier = build(REGROWING["set"])
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    sparsifier.attach(optimizer)
    before = masks(sparsifier)
    train(model, optimizer, [0])
    for layer in sparsifier.layers.values():
        optimizer.optim.state[layer.weight]["momentum_buffer"].fill_(1.0)
    train(model, optimizer, [1])
    for key, layer in sparsifier.layers.items():
        regrown = layer.parametrization.mask & ~before[key]
        assert regrown.any()
        assert ((optimizer.optim.state[layer.weight]["momentum_buffer"] == 0) == regrown).all()
    assert sparsifier.step == 2
    overlapped = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, overlap_with_ddp=True)
    with pytest.raises(InputError, match="build it with overlap_with_ddp=False"):
        sparsifier.attach(overlapped)


@quiet
def test_steps_of_accelerate_that_only_accumulate_do_not_count():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model, sparsifier = build(GRADUAL)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    sparsifier.attach(optimizer)
    for number in range(20):
        with accelerator.accumulate(prepared):
            accelerator.backward(loss(model, number))
            optimizer.step()
            optimizer.zero_grad()
    assert sparsifier.step == 10
    assert sparing.report(model).missed == ()


@quiet
def test_steps_of_opacus_that_only_accumulate_do_not_count():
    opacus = pytest.importorskip("opacus.optimizers", reason="opacus is not installed")
    model, sparsifier = build(GRADUAL)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = opacus.DPOptimizer(inner, noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=4)
    sparsifier.attach(optimizer)
    for number in range(20):
        optimizer.signal_skip_step(number % 2 == 0)
        for p in model.parameters():
            p.grad_sample = torch.randn(4, *p.shape)
        optimizer.step()
        optimizer.zero_grad()
    assert sparsifier.step == 10
    assert sparing.report(model).missed == ()


@quiet
@pytest.mark.parametrize("automatic", [True, False])
def test_loops_of_lightning_count_optimizer_steps(automatic, tmp_path):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.sparsifier = build(GRADUAL)
            self.automatic_optimization = automatic

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def on_train_start(self):
            self.sparsifier.attach(self.optimizers())  # a LightningOptimizer

        def training_step(self, batch, index):
            value = F.cross_entropy(self.model(batch[0]), batch[1])
            if automatic:
                return value
            self.manual_backward(value / 2)
            if index % 2:
                self.optimizers().step()
                self.optimizers().zero_grad()
            return None

    data = torch.utils.data.TensorDataset(torch.randn(160, 16), torch.randint(0, 4, (160,)))
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, accumulate_grad_batches=2 if automatic else 1,
    )  # fmt: skip
    module = Module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8))
    assert module.sparsifier.step == 10
    assert sparing.report(module.model).missed == ()


def test_the_state_of_a_dense_run_goes_on_in_an_optimizer_that_was_built_before_sparsify():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()

    train(3)
    sparsifier = sparing.sparsify_(model, STR(sparsity=0.5), steps=6)
    optimizer.add_param_group({"params": [layer.parametrization.s for layer in sparsifier.layers.values()]})
    sparsifier.attach(optimizer)
    train(6)
    assert [int(optimizer.state[layer.weight]["step"]) for layer in sparsifier.layers.values()] == [9, 9]
    assert sparsifier.sparsity() == 0.5


@quiet  # the compiler calls what torch has deprecated
@pytest.mark.slow
def test_a_compiled_step_is_one_graph_without_the_method():
    model, sparsifier = build(GRADUAL)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    graphs = []
    step = torch.compile(optimizer.step, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for number in range(10):
        optimizer.zero_grad()
        loss(model, number).backward()
        step()
    assert sparsifier.step == 10
    assert len(graphs) == 1
    assert sum(layer.nonzero() for layer in sparsifier.layers.values()) == round(0.2 * (16 * 32 + 32 * 4))
