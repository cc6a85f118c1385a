"""The laws of the clock: steps taken are counted, skipped steps lose nothing, and the model carries it all."""

import copy
import json

import pytest
import torch
from harness import SETTINGS, make, method_class, ready_for
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn import functional as F

import sparing
from sparing import GMP, SNIP, STR, InputError, RigL, SparsityWarning
from sparing.growing import Growing
from sparing.parametrizations import Masked

every_method = pytest.mark.parametrize("name", SETTINGS)
quiet = pytest.mark.filterwarnings("ignore::sparing.SparsityWarning")

UNTARGETED = {"str", "variational_dropout", "dst", "continuous_sparsification", "fixed_mask"}
TARGETED = [name for name in SETTINGS if name not in UNTARGETED]
# Methods that update thresholds up to the last step, and at each of the last `every` steps.
TO_THE_END = ["str_sparsity", "str_feather", "st3", "st3_sigma", "feather"]
ONE_SHOT = {"snip": 1, "grasp": 2, "gmp_one_shot": 3}

# Methods that make their masks once, or whose schedule has no start but a dense network.
CANNOT_RETARGET = [
    "rigl",
    "set",
    "snfs",
    "dsr",
    "static_random",
    "snip",
    "grasp",
    "spartan",
    *sorted(UNTARGETED - {"str"}),
]

# 160 and 80 weights: at this sparsity, 40 and 20 are left whether layers are counted one by one or together.
SPARSITY, LAYERS, TOTAL = 0.75, {"0": 40, "2": 20}, 60


def any_length(name, **changes):
    """Return a method that fits a run of any length: positions are fractions of it, and the budget is not ERK."""
    fields, chosen = method_class(name).__dataclass_fields__, {}
    if name in UNTARGETED:
        return make(name, **changes)
    if "budget" in fields and fields["budget"].default == "erk":
        chosen["budget"] = "uniform"
    if name == "gmp_one_shot":
        chosen |= {"begin": 0.4, "end": 0.4}
    if name == "gmp_global":
        chosen["budget"] = "global"
    return method_class(name)(**{"sparsity": SPARSITY, **chosen, **changes})


class Loop:
    """A training loop of one small model, with an optimizer and, where asked for, a GradScaler."""

    def __init__(self, method, steps, optimizer="sgd", fused=False, scaled=False, attach=True, seed=0):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 5))
        self.sparsifier = sparing.sparsify_(ready_for(method, self.model), method, steps=steps)
        self.optimizer = self.build_optimizer(optimizer, fused)
        if attach:
            self.sparsifier.attach(self.optimizer)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, enabled=scaled)

    def build_optimizer(self, kind="sgd", fused=False):
        groups = sparing.param_groups(self.model, weight_decay=1e-2)
        if kind == "sgd":
            # Fused SGD of torch leaves its momentum uninitialized if the first step overflows.
            return torch.optim.SGD(groups, lr=0.1, momentum=0.0 if fused else 0.9, fused=fused)
        return torch.optim.AdamW(groups, lr=0.01, fused=fused)

    def loss(self, number):
        generator = torch.Generator().manual_seed(number)
        x, y = torch.randn(8, 10, generator=generator), torch.randint(0, 5, (8,), generator=generator)
        torch.manual_seed(number)  # of the noise of variational dropout
        return F.cross_entropy(self.model(x), y) + self.sparsifier.penalty()

    def step(self, number, overflow=False):
        """Take the optimizer step of a batch, or make its gradients overflow."""
        self.optimizer.zero_grad()
        loss = self.loss(number)
        self.scaler.scale(loss * torch.inf if overflow else loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def train(self, numbers):
        for number in numbers:
            self.step(number)
        return self

    @property
    def masks(self):
        return {name: layer.parametrization.mask.clone() for name, layer in self.sparsifier.layers.items()}

    def active(self):
        """Return how many weights are active in each layer."""
        parts = {name: layer.parametrization for name, layer in self.sparsifier.layers.items()}
        return {
            name: int(part.mask.sum()) if isinstance(part, Masked) else self.sparsifier.layers[name].nonzero()
            for name, part in parts.items()
        }

    def state(self):
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()["state"]))


def assert_same(first, second):
    """Assert that two values are equal to the last bit, through nested containers."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for pair in zip(first, second, strict=True):
            assert_same(*pair)
    else:
        assert first == second


def assert_exact(loop, name):
    active = loop.active()
    if name.startswith("str") or name in ("snfs", "dsr") or loop.sparsifier.method.budget == "global":
        assert sum(active.values()) == TOTAL
    else:
        assert active == LAYERS
    assert sparing.report(loop.model).missed == ()


# Skipped steps. SNIP acts at the first step that is taken and GraSP at the second: so many there must be.
skips = st.lists(st.booleans(), min_size=5, max_size=12).filter(lambda skipped: skipped.count(False) >= 2)


@every_method
@settings(max_examples=8)
@given(skips, st.integers(1, 30), st.sampled_from(["sgd", "adamw"]), st.booleans())
def test_any_skipped_steps_change_nothing_but_the_number_of_steps(name, skipped, every, optimizer, fused):
    """A run with overflows equals the run, without a scaler, of the batches that did not overflow."""
    chosen = {"every": every} if "every" in method_class(name).__dataclass_fields__ and name in TARGETED else {}
    method = any_length(name, **chosen)
    loop = Loop(method, len(skipped), optimizer, fused, scaled=True)
    plain = Loop(method, len(skipped), optimizer, fused)
    for number, overflow in enumerate(skipped):
        before = copy.deepcopy(loop.model.state_dict())
        loop.step(number, overflow)
        if overflow:
            assert_same(loop.model.state_dict(), before)
        else:
            plain.step(number)
    assert loop.sparsifier.step == skipped.count(False)
    assert_same(loop.model.state_dict(), plain.model.state_dict())
    regrows = issubclass(method_class(name), Growing)
    masks = loop.masks if regrows else None
    loop.sparsifier.finish()  # a target that is missed would warn, and warnings are errors
    assert loop.sparsifier.step == len(skipped)
    if regrows:  # nothing would train the weights
        assert_same(loop.masks, masks)
    if name in TARGETED:
        assert_exact(loop, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", TO_THE_END)
@settings(max_examples=10)
@given(st.data())
def test_thresholds_are_exact_without_finish_if_fewer_steps_are_lost_than_between_two_updates(name, data):
    steps, every = data.draw(st.integers(5, 30)), data.draw(st.integers(2, 9))
    method = any_length(name, begin=0.0, end=0.5, every=every)
    end, interval = round(0.5 * steps), every if 2 * every <= steps else max(steps // 10, 1)
    lost = data.draw(st.integers(0, min(interval - 1, steps - end)))
    skipped = data.draw(st.permutations([True] * lost + [False] * (steps - lost)))
    loop = Loop(method, steps, fused=data.draw(st.booleans()), scaled=True)
    for number, overflow in enumerate(skipped):
        loop.step(number, overflow)
    assert loop.sparsifier.step == steps - lost
    assert_exact(loop, name)


@pytest.mark.parametrize("name", ONE_SHOT)
@settings(max_examples=10)
@given(skips.filter(lambda skipped: skipped.count(False) >= 3), st.booleans())
def test_one_shot_methods_act_at_one_step_only(name, skipped, fused):
    method = GMP(sparsity=SPARSITY, begin=3, end=3) if name == "gmp_one_shot" else any_length(name)
    loop = Loop(method, len(skipped), fused=fused, scaled=True)
    acted, before = [], loop.masks
    for number, overflow in enumerate(skipped):
        loop.step(number, overflow)
        if any(not torch.equal(before[key], mask) for key, mask in loop.masks.items()):
            acted.append(loop.sparsifier.step)
        before = loop.masks
    assert acted == [ONE_SHOT[name]]


@pytest.mark.parametrize("overflows", ["first", "last"])
def test_snip_prunes_once_if_one_of_two_optimizers_skips_its_first_step(overflows):
    loop = Loop(any_length("snip"), 10, scaled=True, attach=False)
    first, last = (torch.optim.SGD(loop.model[index].parameters(), lr=0.1) for index in (0, 2))
    loop.sparsifier.attach(first, last)
    acted, before = 0, loop.masks
    for number in range(4):
        loop.model.zero_grad()
        loop.scaler.scale(loop.loss(number)).backward()
        if number == 0:
            loop.model[0 if overflows == "first" else 2].bias.grad.fill_(torch.inf)
        for optimizer in (first, last):
            loop.scaler.unscale_(optimizer)
        for optimizer in (first, last):
            loop.scaler.step(optimizer)
        loop.scaler.update()
        acted += any(not torch.equal(before[key], mask) for key, mask in loop.masks.items())
        before = loop.masks
    assert acted == 1
    assert sum(loop.active().values()) == TOTAL


@every_method
def test_distributed_checkpoints_save_and_load_without_counting_a_step(name):
    """torch.distributed.checkpoint takes a step with learning rate 0 to create the state of an optimizer."""
    loop = Loop(any_length(name), 12)
    get_state_dict(loop.model, loop.optimizer)
    assert loop.sparsifier.step == 0
    loop.train(range(6))
    model, optimizer = copy.deepcopy(get_state_dict(loop.model, loop.optimizer))
    fresh = Loop(any_length(name), 12, seed=1)
    set_state_dict(fresh.model, fresh.optimizer, model_state_dict=model, optim_state_dict=optimizer)
    assert fresh.sparsifier.step == 6
    assert_same(fresh.train(range(6, 12)).state(), loop.train(range(6, 12)).state())


def test_a_step_that_moves_nothing_does_not_count():
    loop = Loop(any_length("snip"), 10)
    loop.optimizer.zero_grad(set_to_none=True)
    loop.optimizer.step()  # before any backward pass
    assert (loop.sparsifier.step, sum(loop.active().values())) == (0, 240)
    for group in loop.optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in loop.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    loop.optimizer.step()
    assert (loop.sparsifier.step, sum(loop.active().values())) == (0, 240)
    loop.step(0)  # the first step of a warm-up from a learning rate of 0
    assert (loop.sparsifier.step, sum(loop.active().values())) == (1, TOTAL)
    for group in loop.optimizer.param_groups:
        group["lr"] = 0.1
    for parameter in loop.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    loop.optimizer.step()  # weight decay and momentum
    assert loop.sparsifier.step == 2


@pytest.mark.parametrize("name", ["snip", "grasp"])
def test_methods_that_rank_by_gradients_refuse_a_step_whose_gradients_are_all_zero(name):
    loop = Loop(any_length(name), 10)
    loss = lambda: 0 * loop.loss(0)  # noqa: E731
    if name == "grasp":  # it compares the gradients of two steps
        loss().backward()
        loop.optimizer.step()
    loss().backward()
    with pytest.raises(InputError, match=f"{name} ranks weights by their gradients, .* zero or missing"):
        loop.optimizer.step()


@every_method
def test_a_closure_changes_nothing(name):
    plain, loop = Loop(any_length(name), 12).train(range(12)), Loop(any_length(name), 12)

    def closure(number):
        loop.optimizer.zero_grad()
        loss = loop.loss(number)
        loss.backward()
        return loss

    for number in range(12):
        if number % 2:
            loop.optimizer.step(lambda number=number: closure(number))
        else:
            loop.optimizer.step(closure=lambda number=number: closure(number))
    assert_same(loop.state(), plain.state())


def test_a_closure_that_is_called_several_times_in_a_step_is_one_step():
    loop = Loop(GMP(sparsity=SPARSITY, begin=1, end=1), 10, attach=False)
    optimizer = torch.optim.LBFGS(loop.model.parameters(), lr=0.1, max_iter=4)
    loop.sparsifier.attach(optimizer)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = loop.loss(0)
        loss.backward()
        calls.append(sum(loop.active().values()))
        return loss

    optimizer.step(closure)
    assert (loop.sparsifier.step, sum(loop.active().values())) == (1, TOTAL)
    assert len(calls) > 1
    assert set(calls) == {240}
    snip = Loop(any_length("snip"), 10, attach=False)
    with pytest.raises(InputError, match="snip works on the gradients of a step and does not support LBFGS"):
        snip.sparsifier.attach(torch.optim.LBFGS(snip.model.parameters()))


def test_a_method_sees_the_gradients_of_the_first_call_of_a_closure_only():
    class Once(torch.optim.Optimizer):
        """Plain gradient descent."""

        calls = 1

        def step(self, closure):
            for _ in range(self.calls):
                closure()
            with torch.no_grad():
                for parameter in self.param_groups[0]["params"]:
                    parameter.sub_(0.1 * parameter.grad)

    class Twice(Once):
        """Calls its closure twice, as sharpness-aware minimization does."""

        calls = 2

    momenta = []
    for kind in (Once, Twice):
        loop = Loop(any_length("snfs"), 10, attach=False)
        optimizer = kind(loop.model.parameters(), {"lr": 0.1})
        loop.sparsifier.attach(optimizer)
        optimizer.step(lambda loop=loop: loop.loss(0).backward())
        momenta.append([layer.parametrization.momentum for layer in loop.sparsifier.layers.values()])
        assert loop.sparsifier.step == 1
    assert_same(*momenta)


def test_a_step_that_calls_the_step_of_its_base_class_is_one_step():
    class Logged(torch.optim.AdamW):
        memory_left = True

        def step(self, closure=None):
            if not self.memory_left:
                raise MemoryError
            return super().step(closure)

    loop = Loop(any_length("gmp"), 10, "adamw")  # torch adds the hooks to a class when its first instance is made
    loop.optimizer = Logged(loop.model.parameters())
    loop.sparsifier.attach(loop.optimizer)
    loop.train(range(3))
    assert loop.sparsifier.step == 3
    loop.optimizer.memory_left = False
    with pytest.raises(MemoryError):
        loop.step(3)
    loop.optimizer.memory_left = True
    loop.train(range(3, 10))
    assert loop.sparsifier.step == 10
    assert_exact(loop, "gmp")


@every_method
def test_a_shallow_copy_of_a_sparsifier_counts_no_step_twice(name):
    loop = Loop(any_length(name), 12)
    assert copy.copy(loop.sparsifier).layers is loop.sparsifier.layers
    assert loop.train(range(12)).sparsifier.step == 12
    assert_same(loop.state(), Loop(any_length(name), 12).train(range(12)).state())


@every_method
def test_copies_of_model_optimizer_and_sparsifier_go_on_by_themselves(name):
    loop = Loop(any_length(name), 12).train(range(6))
    twin = copy.copy(loop)
    twin.model, twin.optimizer, twin.sparsifier = copy.deepcopy((loop.model, loop.optimizer, loop.sparsifier))
    twin.train(range(6, 12))
    assert (loop.sparsifier.step, twin.sparsifier.step) == (6, 12)
    assert_same(twin.state(), loop.train(range(6, 12)).state())


class Wrapper:
    """An optimizer in a wrapper, as accelerate has it."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        self.optimizer.step()


def test_attach_looks_through_wrappers_and_a_second_call_moves_over():
    loop = Loop(any_length("gmp", every=1), 10, attach=False)
    first, second = loop.build_optimizer(), loop.build_optimizer("adamw")
    for optimizer, wrapped in ((first, Wrapper(Wrapper(first))), (second, Wrapper(second))):
        loop.sparsifier.attach(wrapped)
        loop.optimizer.zero_grad()
        loop.loss(0).backward()
        wrapped.step()
        assert loop.sparsifier.optimizers == (optimizer,)
    assert loop.sparsifier.step == 2
    first.step()  # no longer that of the run
    assert loop.sparsifier.step == 2
    with pytest.raises(InputError, match=r"needs a torch.optim.Optimizer or a wrapper that holds one as `.optimizer`"):
        loop.sparsifier.attach(object())
    with pytest.raises(InputError, match="needs the optimizer that trains the model"):
        loop.sparsifier.attach()


@pytest.mark.parametrize(("index", "what"), [(0, "dense weight"), (1, "s")])
def test_an_optimizer_without_a_weight_or_threshold_is_refused(index, what):
    model = nn.Linear(4, 2)
    sparsifier = sparing.sparsify_(model, STR())
    layer = sparsifier.layers["weight"]
    held = [layer.parametrization.s, layer.weight][index]
    with pytest.raises(
        InputError, match=f"does not hold the {what} of layer 'weight'. Build it after calling sparsify_"
    ):
        sparsifier.attach(torch.optim.SGD([held, model.bias], lr=0.1))


@pytest.mark.parametrize("taken", [0, 5])
@pytest.mark.parametrize("name", ["str", "gmp", "rigl"])
def test_parameters_that_are_replaced_after_attach_are_named(name, taken):
    loop = Loop(any_length(name), 100 + taken).train(range(taken))
    loop.model.load_state_dict({key: value.clone() for key, value in loop.model.state_dict().items()}, assign=True)
    with pytest.raises(InputError, match=r"does not hold the dense weight .* after load_state_dict\(assign=True\)"):
        loop.train(range(taken, 100 + taken))
    assert loop.sparsifier.step <= 100


def test_the_hooks_run_around_the_steps_of_two_optimizers():
    seen = []

    class Spy(sparing.Method):
        name = "spy"

        def parametrizations(self, layers, plan):
            return STR().parametrizations(layers, plan)

        def before_step(self, sparsifier, optimizers):
            seen.append(("before", sparsifier.step, optimizers, float(model.bias.detach()[0])))

        def after_step(self, sparsifier, optimizers):
            seen.append(("after", sparsifier.step, optimizers, float(model.bias.detach()[0])))

    model = nn.Linear(4, 2)
    sparsifier = sparing.sparsify_(model, Spy())
    groups = {group["name"]: group["params"] for group in sparing.param_groups(model, weight_decay=0.0)}
    pair = torch.optim.SGD(groups["weights"], lr=0.1), torch.optim.AdamW(groups["thresholds"], lr=0.1)
    sparsifier.attach(*pair)
    start = float(model.bias.detach()[0])
    model(torch.ones(1, 4)).sum().backward()
    for optimizer in pair:
        optimizer.step()
    assert [entry[:3] for entry in seen] == [("before", 0, pair), ("after", 1, pair)]
    assert seen[0][3] == start
    assert seen[1][3] == pytest.approx(start - 0.1)


def test_attach_ends_a_step_that_only_some_of_the_optimizers_took():
    loop = Loop(any_length("gmp"), 12)
    loop.sparsifier.attach(loop.optimizer, torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1))
    loop.train(range(6))
    loop.optimizer = torch.optim.SGD(loop.model.parameters(), lr=0.1)
    loop.sparsifier.attach(loop.optimizer)
    assert loop.train(range(6, 12)).sparsifier.step == 12


@pytest.mark.parametrize("name", ["rigl", "snip", "gmp"])
def test_two_optimizers_train_as_one_even_if_one_has_no_gradients(name):
    loops = [Loop(any_length(name, **({"every": 2} if name == "rigl" else {})), 12) for _ in range(2)]
    pair = loops[1]
    idle = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    first, second = (
        torch.optim.SGD([{**group, "params": group["params"][half::2]} for group in pair.optimizer.param_groups])
        for half in (0, 1)
    )
    pair.sparsifier.attach(idle, first, second)
    for number in range(12):
        loops[0].step(number)
        for optimizer in (first, second):
            optimizer.zero_grad()
        pair.loss(number).backward()
        for optimizer in (idle, first, second):
            optimizer.step()
        assert pair.sparsifier.step == loops[0].sparsifier.step == number + 1
        assert_same(pair.model.state_dict(), loops[0].model.state_dict())


def two_methods(seed):
    """Return a model with two methods that end at different steps, its optimizer, and both sparsifiers."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 5))
    pair = (
        sparing.sparsify_(model, GMP(sparsity=SPARSITY, every=1), select=["0"], steps=8),
        sparing.sparsify_(model, STR(sparsity=SPARSITY, every=2), select=["2"], steps=12),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for sparsifier in pair:
        sparsifier.attach(optimizer)
    return model, optimizer, pair


def train_both(model, optimizer, numbers):
    for number in numbers:
        optimizer.zero_grad()
        model(torch.randn(8, 10, generator=torch.Generator().manual_seed(number))).square().mean().backward()
        optimizer.step()


@quiet
def test_two_methods_on_one_model_keep_their_own_time_and_both_resume():
    model, optimizer, pair = two_methods(0)
    train_both(model, optimizer, range(5))
    other, its_optimizer, its_pair = two_methods(1)
    other.load_state_dict(model.state_dict())
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train_both(other, its_optimizer, range(5, 12))
    train_both(model, optimizer, range(5, 12))
    assert [sparsifier.step for sparsifier in pair + its_pair] == [12] * 4
    assert {name: layer.nonzero() for name, layer in sparing.sparse_layers(model).items()} == LAYERS
    assert_same(other.state_dict(), model.state_dict())


def test_the_end_of_one_method_says_nothing_about_another_that_goes_on():
    model, optimizer, _ = two_methods(0)
    train_both(model, optimizer, range(12))


@pytest.mark.parametrize("method", [RigL(sparsity=SPARSITY, budget="uniform", every=2), SNIP(sparsity=SPARSITY)])
def test_a_step_that_one_model_skips_is_taken_by_another_one_in_the_same_optimizer(method):
    encoder, decoder = nn.Linear(10, 16), nn.Linear(16, 5)
    pair = (
        sparing.sparsify_(encoder, method, steps=12),
        sparing.sparsify_(decoder, GMP(sparsity=SPARSITY, every=1), steps=12),
    )
    optimizer = torch.optim.SGD([*encoder.parameters(), *decoder.parameters()], lr=0.1)
    for sparsifier in pair:
        sparsifier.attach(optimizer)
    train_both(nn.Sequential(encoder, nn.Tanh(), decoder), optimizer, range(12))
    assert [sparsifier.step for sparsifier in pair] == [12, 12]
    assert sparing.report(decoder).missed == ()


# Targets that are missed


@pytest.mark.parametrize(
    ("taken", "attach", "reason"),
    [
        (9, False, r"no optimizer step was counted; call sparsifier.attach\(optimizer\) before training"),
        (
            5,
            True,
            r"5 of 12 optimizer steps were counted, .*; give sparsify_\(\) the optimizer steps of the run as ",
        ),
    ],
)
def test_a_run_without_attach_or_with_fewer_steps_misses_its_target_and_says_so(taken, attach, reason):
    """Fewer steps are those of a run cut short, or of gradient accumulation where `steps` counts batches."""
    loop = Loop(GMP(sparsity=SPARSITY, begin=2, end=8, every=3), 12, attach=attach).train(range(taken))
    now = sum(loop.active().values())
    assert now > TOTAL
    has, target = rf"{100 - now / 2.4:.2f} % \({now} of 240 weights\)", r"75.00 % \(60 of 240 weights\)"
    report = sparing.report(loop.model)
    (sentence,) = report.missed
    assert str(report).endswith(sentence)
    assert json.loads(report.to_json())["missed"] == [sentence]
    with pytest.warns(SparsityWarning, match=f"gmp: .* is {has}, the target {target}: {reason}"):
        sparing.densify_(loop.model)
    assert sparing.report(loop.model).missed == ()


@pytest.mark.parametrize("method", [STR(sparsity=SPARSITY), GMP(sparsity=SPARSITY, begin=6, end=6)])
def test_steps_and_counts_within_parametrize_cached_see_the_weights_of_now(method):
    plain, cached = Loop(method, 6).train(range(6)), Loop(method, 6)
    with nn.utils.parametrize.cached():
        for number in range(6):
            cached.sparsifier.sparsity()  # without gradients, which the forward pass needs
            cached.step(number)
        dense = sparing.dense_state_dict(cached.model)
        sparing.densify_(cached.model)
    assert all(torch.equal(value, dense[key]) for key, value in cached.model.state_dict().items())
    assert all(torch.equal(value, dense[key]) for key, value in sparing.densify_(plain.model).state_dict().items())


@pytest.mark.parametrize(
    "method", [STR(sparsity=SPARSITY), GMP(sparsity=SPARSITY), SNIP(sparsity=SPARSITY)], ids=lambda method: method.name
)
def test_a_run_of_more_steps_than_planned_warns_once(method):
    loop = Loop(method, 6).train(range(6))
    with pytest.warns(SparsityWarning, match=rf"{method.name}: step 7 of a run of 6 steps: the schedule") as caught:
        loop.step(6)
    assert ("or call sparsifier.retarget()" in str(caught[0].message)) == method.retargets
    loop.step(7)  # a second warning would be an error
    loop.sparsifier.clock.goal = 10
    (sentence,) = sparing.report(loop.model).missed
    assert "8 optimizer steps were taken, more than the 6 of the run" in sentence


def test_a_target_outgrown_by_the_last_step_warns_at_that_step():
    loop = Loop(STR(sparsity=SPARSITY), 6).train(range(5))
    loop.sparsifier.clock.goal = 10  # fewer than the run will reach
    with pytest.warns(SparsityWarning, match=r"the target 95.83 % \(10 of 240 weights\): all steps were taken, but"):
        loop.step(5)


@quiet
@pytest.mark.parametrize("change", [lambda p: p.clamp_(-0.02, 0.02), lambda p: p.mul_(0.5)], ids=["clamp", "decay"])
@pytest.mark.parametrize("name", ["str_sparsity", "str_feather", "feather", "gmp"])
def test_thresholds_that_were_changed_after_the_last_step_are_warned_of_with_both_numbers(name, change):
    """Clamping all parameters, as for a Wasserstein critic, raises s; decay by hand makes weights smaller."""
    loop = Loop(any_length(name), 12).train(range(12))
    assert sparing.report(loop.model).missed == ()
    with torch.no_grad():
        for parameter in loop.model.parameters():
            change(parameter)
    now = sum(loop.active().values())
    if now == TOTAL:
        assert sparing.report(loop.model).missed == ()
        return
    assert name != "gmp"
    expected = rf"\({now} of 240 weights\), the target 75.00 % \(60 of 240 weights\): all steps were taken, but weights"
    with pytest.warns(SparsityWarning, match=expected):
        sparing.densify_(loop.model)


def test_an_average_that_is_sparser_than_the_target_is_reported():
    loop, weights = Loop(any_length("feather"), 12), []
    average = copy.deepcopy(loop.model)
    for number in range(12):
        loop.step(number)
        weights.append([p.detach().clone() for p in loop.model.parameters()])
    assert sparing.report(loop.model).missed == ()
    with torch.no_grad():
        for p, values in zip(average.parameters(), zip(*weights, strict=True), strict=True):
            p.copy_(sum(values) / len(values))
    assert sparing.report(average).total.nonzero < 0.95 * TOTAL - 1
    (sentence,) = sparing.report(average).missed
    assert "or this is an average of several steps" in sentence


def test_a_target_missed_by_weights_that_have_diverged_names_them():
    loop = Loop(STR(sparsity=SPARSITY), 6).train(range(5))
    loop.sparsifier.layers["2"].weight.data[0, 0] = float("nan")
    with pytest.warns(SparsityWarning, match="the weights of '0', '2' are NaN or infinite; lower the learning rate"):
        loop.step(5)


def test_a_target_missed_because_no_masks_were_made_says_so():
    """GraSP makes its masks in the second step."""
    with pytest.warns(SparsityWarning, match="the masks for it were not made in the steps that were taken"):
        Loop(sparing.GraSP(sparsity=SPARSITY), 1).step(0)


class Shift(nn.Module):
    def forward(self, weight):
        return weight + 1


def test_a_target_missed_because_of_what_was_put_on_a_weight_later_names_it():
    loop = Loop(GMP(sparsity=SPARSITY, every=1), 6).train(range(5))
    nn.utils.parametrize.register_parametrization(loop.model[0], "weight", Shift())
    with pytest.warns(SparsityWarning, match=r"Shift was put on '0' after sparsify_\(\) and changes its zeros"):
        loop.step(5)


@pytest.mark.parametrize("name", ["variational_dropout", "dst", "continuous_sparsification"])
def test_a_step_without_the_penalty_warns_once_in_a_row(name):
    loop = Loop(any_length(name), 12)
    loop.train(range(2))  # with the penalty: no warning, which would be an error

    def step_without_penalty():
        with torch.no_grad():
            loop.sparsifier.penalty()  # for a log
        loop.optimizer.zero_grad()
        loop.model(torch.ones(1, 10)).sum().backward()
        loop.optimizer.step()

    with pytest.warns(SparsityWarning, match=rf"{name} adds a term to the loss, and step 3 was taken without it"):
        step_without_penalty()
    step_without_penalty()  # a second warning would be an error


@pytest.mark.parametrize(("steps", "told"), [(None, 100), (7, 7)])
def test_a_layer_that_loses_every_weight_is_named_once(steps, told):
    loop = Loop(STR(init=-20.0), steps)
    for group in loop.optimizer.param_groups:
        group["lr"] = 0.0
    loop.sparsifier.layers["2"].parametrization.s.data.fill_(5.0)
    with pytest.warns(SparsityWarning, match=f"step {told}: every weight of '2' .* is zero, so only biases pass"):
        loop.train([0] * told)
    assert loop.sparsifier.collapsed() == ["2"]
    loop.train([0] * 100)  # a second warning would be an error


@quiet
def test_layers_that_lost_every_weight_between_two_looks_are_named_by_densify():
    """Without steps= a run has no last step at which to look."""
    loop = Loop(STR(), None).train(range(3))
    with torch.no_grad():
        for layer in loop.sparsifier.layers.values():
            layer.parametrization.s.fill_(0.0)
    loop.step(3)
    with pytest.warns(SparsityWarning, match="step 4: every weight of '0' .*, '2' .* is zero, so only biases pass"):
        sparing.densify_(loop.model)


def test_after_densify_the_hooks_do_nothing():
    loop = Loop(RigL(sparsity=0.5, every=2, end=0.9), 100)
    sparing.densify_(loop.model)
    for number in range(5):
        before = loop.model[0].weight.detach().clone()
        loop.step(number)
        assert not torch.equal(loop.model[0].weight, before)
    assert loop.sparsifier.step == 0


# Checkpoints


@every_method
def test_the_model_alone_resumes_from_safetensors(name, tmp_path):
    loop = Loop(any_length(name), 12).train(range(6))
    save_file(loop.model.state_dict(), tmp_path / "model.safetensors")
    fresh = Loop(any_length(name), 12, seed=1)
    fresh.model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert_same(fresh.model.state_dict(), loop.model.state_dict())
    assert fresh.sparsifier.step == 6
    assert fresh.active() == loop.active()
    # A new optimizer on both: the run goes on from the model alone.
    for each in (fresh, loop):
        each.optimizer = each.build_optimizer()
        each.sparsifier.attach(each.optimizer)
        each.train(range(6, 12))
    assert_same(fresh.state(), loop.state())


def test_a_global_threshold_can_be_saved_with_safetensors(tmp_path):
    loop = Loop(STR(granularity="global"), None).train(range(3))
    save_file(loop.model.state_dict(), tmp_path / "model.safetensors")
    again = Loop(STR(granularity="global"), None, seed=1)
    again.model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert_same(again.model.state_dict(), loop.model.state_dict())
    first, second = (layer.parametrization for layer in again.sparsifier.layers.values())
    assert first is second


@pytest.mark.parametrize(
    ("theirs", "ours", "messages"),
    [
        (
            (GMP(sparsity=0.5), 10),
            (RigL(sparsity=0.5), 10),
            ["with method='gmp',", "has method='rigl'. Call .*"],
        ),
        ((GMP(sparsity=0.5), 10), (GMP(sparsity=0.9), 10), ["sparsity=0.5", "sparsity=0.9"]),
        ((GMP(sparsity=0.5), 10), (GMP(sparsity=0.5), 20), ["steps=10", "steps=20"]),
        ((STR(init=-5.0), None), (STR(init=-4.0), None), ["init=-5.0", "init=-4.0"]),
        (
            (GMP(sparsity=0.5, pattern=sparing.Block(5)), 10),
            (GMP(sparsity=0.5), 10),
            [r"pattern='Block\(n=5\)'", r"pattern='Unstructured\(\)'"],
        ),
        (
            (GMP(budget=sparing.Budget({"0": 0.5, "2": 0.5})), 10),
            (GMP(budget=sparing.Budget({"0": 0.5, "2": 0.6})), 10),
            ["budget=", "budget="],
        ),
    ],
)
def test_a_checkpoint_of_another_method_target_or_length_is_refused_with_both_values(theirs, ours, messages):
    models = []
    for method, steps in (theirs, ours):
        model = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 5))
        sparing.sparsify_(model, method, steps=steps)
        models.append(model)
    state = {**models[1].state_dict(), **{k: v for k, v in models[0].state_dict().items() if "_extra_state" in k}}
    with pytest.raises(InputError, match=f"{messages[0]}.*this run .*{messages[1]}.*(retarget|other method)"):
        models[1].load_state_dict(state)


# Another target


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*every weight of")
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gmp", {}),
        ("gmp", {"budget": "global"}),
        ("gmp", {"budget": "erk"}),
        ("str_sparsity", {}),
    ],
)
@settings(max_examples=10)
@example(12, 10, 1, 1)
@given(st.integers(10, 22), st.integers(1, 12), st.integers(0, 8), st.integers(1, 4))
def test_retarget_rises_from_todays_sparsity_to_the_new_one(name, changes, now, more, begin, every):
    first, second = now / 24, min(now + more, 23) / 24
    loop = Loop(any_length(name, sparsity=first, **changes), 10).train(range(10))
    today = before = sum(loop.active().values())
    loop.sparsifier.retarget(any_length(name, sparsity=second, begin=begin, end=9, every=every, **changes), steps=12)
    assert (loop.sparsifier.step, loop.sparsifier.steps) == (0, 12)
    for number in range(10, 22):
        updated = loop.sparsifier.plan.updates.due(loop.sparsifier.step + 1)
        loop.step(number)
        after = sum(loop.active().values())
        if updated:  # between updates, STR leaves the thresholds to the gradient
            assert after <= before
            assert after <= today
            before = after
    assert sum(loop.active().values()) == loop.sparsifier.clock.goal


@pytest.mark.parametrize("name", [name for name in TARGETED if name not in CANNOT_RETARGET])
def test_a_retargeted_run_ends_exact_and_resumes_in_its_middle(name):
    second = any_length(name, sparsity=SPARSITY)
    loop = Loop(any_length(name, sparsity=0.5), 10).train(range(10))
    loop.sparsifier.retarget(second, steps=12)
    loop.train(range(10, 16))
    fresh = Loop(second, 12, seed=1)
    fresh.model.load_state_dict(loop.model.state_dict())
    fresh.optimizer.load_state_dict(copy.deepcopy(loop.optimizer.state_dict()))
    assert fresh.sparsifier.step == 6
    assert_same(fresh.train(range(16, 22)).state(), loop.train(range(16, 22)).state())
    assert_exact(loop, name)


@pytest.mark.parametrize("name", CANNOT_RETARGET)
def test_retarget_refuses_methods_that_cannot_change_their_sparsity(name):
    loop = Loop(any_length(name), 12).train(range(3))
    with pytest.raises(InputError, match=f"'{name}' cannot change its sparsity during training"):
        loop.sparsifier.retarget(any_length(name), steps=12)
    assert loop.sparsifier.step == 3


@pytest.mark.parametrize(
    ("method", "steps", "message"),
    [
        (SNIP(sparsity=0.9), 10, "changes the arguments of 'gmp', not the method, to 'snip'"),
        (0.9, 10, "changes the arguments of 'gmp', not the method, to 0.9"),
        (GMP(sparsity=0.9, begin=9, end=8), 10, "comes after"),
        (GMP(sparsity=0.9, begin=0, end=0), 10, "begin=0 and end=0 prune in sparsify_.. only; give a later end"),
        (GMP(sparsity=0.9, pattern=sparing.Block(8)), 10, "changes targets and schedules, not pattern"),
        (GMP(sparsity=0.9), 0, "steps must be a whole number"),
    ],
)
def test_retarget_that_is_refused_changes_nothing(method, steps, message):
    loop = Loop(any_length("gmp"), 10).train(range(4))
    with pytest.raises(InputError, match=message):
        loop.sparsifier.retarget(method, steps=steps)
    assert (loop.sparsifier.step, loop.sparsifier.steps, loop.sparsifier.method) == (4, 10, any_length("gmp"))
