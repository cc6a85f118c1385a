"""Copies of a model in training: averages have the masks of the model, snapshots and trained copies their own."""

import copy
import gc
import pickle
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sparing
from sparing import GMP, STR, InputError, RigL
from sparing.parametrizations import Masked

METHODS = {
    "gmp": GMP(sparsity=0.9, begin=0, end=0.8, every=1),
    "rigl": RigL(sparsity=0.8, budget="uniform", every=2, end=0.9),
}
STEPS = 20
pytestmark = pytest.mark.filterwarnings("ignore::sparing.SparsityWarning")


class Loop:
    def __init__(self, method):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5))
        self.sparsifier = sparing.sparsify_(self.model, method, steps=STEPS)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.sparsifier.attach(self.optimizer)

    def step(self):
        step(self.model, self.optimizer)


def step(model, optimizer):
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(8, 10)), torch.randint(0, 5, (8,))).backward()
    optimizer.step()


def masks(model):
    return {
        name: layer.parametrization.mask.clone()
        for name, layer in sparing.sparse_layers(model).items()
        if isinstance(layer.parametrization, Masked)
    }


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


class TorchAverage:
    def __init__(self, model, **options):
        self.average = AveragedModel(model, **options)
        self.model = self.average.module

    def update(self, model):
        self.average.update_parameters(model)


class ParametersByHand:
    def __init__(self, model):
        self.model = copy.deepcopy(model).requires_grad_(False)

    def update(self, model):
        for average, parameter in zip(self.model.parameters(), model.parameters(), strict=True):
            average.data.mul_(0.9).add_(parameter.data, alpha=0.1)


class StateDictInPlace:
    """As timm's ModelEmaV2: every tensor of the state_dict is mixed and copied back."""

    def __init__(self, model):
        self.model = copy.deepcopy(model)

    @torch.no_grad()
    def update(self, model):
        for average, value in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            average.copy_(0.9 * average + 0.1 * value)


class StateDictByHand:
    def __init__(self, model):
        self.state, self.copy = copy.deepcopy(model.state_dict()), copy.deepcopy(model)

    def update(self, model):
        self.state = {key: 0.9 * self.state[key] + 0.1 * value for key, value in model.state_dict().items()}

    @property
    def model(self):
        self.copy.load_state_dict(self.state)
        return self.copy


class Swapped:
    """As Lightning's callback: the average changes places with the parameters and buffers of the model."""

    def __init__(self, model):
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)

    def update(self, model):
        self.average.update_parameters(model)
        self.live = model

    @property
    def model(self):
        with torch.no_grad():
            for tensors in ("parameters", "buffers"):
                for average, value in zip(
                    getattr(self.average.module, tensors)(), getattr(self.live, tensors)(), strict=True
                ):
                    value.data.copy_(average.data)
        return self.live


AVERAGES = {
    "swa": TorchAverage,
    "swa of buffers": lambda model: TorchAverage(model, use_buffers=True),
    "ema": lambda model: TorchAverage(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "ema of buffers": lambda model: TorchAverage(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    "own function": lambda model: TorchAverage(model, avg_fn=lambda a, p, n: 0.9 * a + 0.1 * p, use_buffers=True),
    "parameters by hand": ParametersByHand,
    "state_dict in place": StateDictInPlace,
    "state_dict by hand": StateDictByHand,
    "swapped": Swapped,
}


@pytest.mark.parametrize("read", ["at every step", "at the end"])
@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("name", METHODS)
def test_an_average_has_the_masks_of_the_model(name, kind, read):
    loop = Loop(METHODS[name])
    average = AVERAGES[kind](loop.model)
    for _ in range(STEPS):
        loop.step()
        average.update(loop.model)
        if read == "at every step" and kind != "swapped":
            assert same(masks_in_use(average.model), masks(loop.model))
    wanted, report = masks(loop.model), sparing.report(loop.model).total.nonzero
    assert same(masks_in_use(average.model), wanted)
    assert sparing.report(average.model).total.nonzero <= report
    assert sparing.report(average.model).missed == ()
    assert same(masks(average.model), wanted)


def masks_in_use(model):
    """Return the masks after the model was used."""
    with torch.no_grad():
        model(torch.randn(8, 10))
    return masks(model)


def test_the_state_dict_of_an_average_has_the_masks_of_the_model():
    loop = Loop(METHODS["gmp"])
    average = AveragedModel(loop.model)
    for _ in range(STEPS):
        loop.step()
        average.update_parameters(loop.model)
    saved = {key: value for key, value in average.state_dict().items() if key.endswith("mask")}
    assert same(
        saved, {f"module.{key}": value for key, value in loop.model.state_dict().items() if key.endswith("mask")}
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("compiled", ["model", "average"])
@pytest.mark.parametrize("name", METHODS)
def test_a_compiled_average_has_the_masks_of_the_model_in_one_graph(name, compiled):
    torch._dynamo.reset()
    loop, graphs, x = Loop(METHODS[name]), [], torch.randn(4, 10)

    def compiling(model):
        return torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph, fullgraph=True)

    average = AveragedModel(compiling(loop.model) if compiled == "model" else loop.model).eval()
    run, inner = (average, average.module._orig_mod) if compiled == "model" else (compiling(average), average.module)
    for _ in range(STEPS):
        loop.step()
        average.update_parameters(loop.model)
        with torch.no_grad():
            torch.testing.assert_close(run(x), inner(x))  # first the compiled one: the other takes the masks
    assert same(masks(inner), masks(loop.model))
    assert len(graphs) == 1


def test_an_average_of_learned_thresholds_knows_the_step_of_the_model():
    loop = Loop(STR(sparsity=0.9))
    average = AveragedModel(loop.model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    for _ in range(STEPS):
        loop.step()
        average.update_parameters(loop.model)
    (missed,) = sparing.report(average).missed
    assert "all steps were taken" in missed


@pytest.mark.parametrize(
    "change", [lambda model: model, lambda model: model.half(), lambda model: model.bfloat16().eval()]
)
def test_a_snapshot_keeps_its_masks(change):
    loop = Loop(METHODS["gmp"])
    for _ in range(5):
        loop.step()
    snapshot, before = change(copy.deepcopy(loop.model)), masks(loop.model)
    for _ in range(5, STEPS):
        loop.step()
    sparing.report(snapshot)
    assert same(masks(snapshot), before)
    assert not same(before, masks(loop.model))


def test_a_snapshot_that_is_loaded_again_keeps_its_masks():
    loop = Loop(METHODS["gmp"])
    best = copy.deepcopy(loop.model)
    for number in range(STEPS):
        loop.step()
        if number == 4:
            best.load_state_dict(loop.model.state_dict())
            before = masks(loop.model)
    sparing.report(best)
    assert same(masks(best), before)


def test_an_average_that_is_loaded_goes_on():
    loop = Loop(METHODS["gmp"])
    average = AveragedModel(loop.model)
    for number in range(STEPS):
        loop.step()
        average.update_parameters(loop.model)
        if number == 9:
            saved = copy.deepcopy(average.state_dict())
            average = AveragedModel(loop.model)
            average.load_state_dict(saved)
    sparing.report(average.module)
    assert same(masks(average.module), masks(loop.model))


def test_a_copy_that_is_trained_keeps_its_masks():
    loop = Loop(METHODS["gmp"])
    for _ in range(5):
        loop.step()
    other, before = copy.deepcopy(loop.model), masks(loop.model)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(5, STEPS):
        loop.step()
        step(other, optimizer)
    sparing.report(other)
    assert same(masks(other), before)


def test_an_average_stays_one_if_a_gradient_flows_through_it():
    """As for adversarial examples and saliency maps: backward() gives its parameters gradients, too."""
    loop = Loop(METHODS["gmp"])
    average = AveragedModel(loop.model)
    for number in range(STEPS):
        loop.step()
        average.update_parameters(loop.model)
        if number == 4:
            average(torch.ones(2, 10, requires_grad=True)).square().sum().backward()
    sparing.report(average.module)
    assert same(masks(average.module), masks(loop.model))


def test_an_average_is_copied_with_its_model():
    loop = Loop(METHODS["gmp"])
    average = AveragedModel(loop.model)
    for _ in range(5):
        loop.step()
        average.update_parameters(loop.model)
    first = masks(loop.model)
    twin = copy.copy(loop)
    twin.model, twin_average, twin.optimizer, twin.sparsifier = copy.deepcopy(
        (loop.model, average, loop.optimizer, loop.sparsifier)
    )
    for _ in range(5, STEPS):
        twin.step()
        twin_average.update_parameters(twin.model)
    sparing.report(twin_average.module)
    assert same(masks(twin_average.module), masks(twin.model))
    assert same(masks(loop.model), first)


def test_a_pickled_copy_keeps_its_masks():
    loop = Loop(METHODS["gmp"])
    part = loop.sparsifier.layers["0"].parametrization
    again = pickle.loads(pickle.dumps(copy.deepcopy(part)))
    assert torch.equal(again.mask, part.mask)
    assert again._source is None


def test_masks_are_not_buffers_but_are_saved_loaded_and_moved():
    model = nn.Linear(8, 4)
    sparing.sparsify_(model, GMP(sparsity=0.5, begin=0, end=0))
    part = model.parametrizations.weight[0]
    assert list(model.buffers()) == []
    assert model.state_dict()["parametrizations.weight.0.mask"].data_ptr() == part.mask.data_ptr()
    model.to("meta")
    assert part.mask.is_meta
    with pytest.raises(RuntimeError, match="size mismatch for parametrizations.weight.0.mask"):
        model.load_state_dict({**model.state_dict(), "parametrizations.weight.0.mask": torch.ones(2, 2)})
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("mask")}
    with pytest.raises(RuntimeError, match="Missing key.*mask"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Unexpected key.*other"):
        model.load_state_dict({**model.state_dict(), "parametrizations.weight.0.other": torch.ones(2)})


def test_an_average_of_the_masks_of_another_model_is_refused():
    loop = Loop(METHODS["gmp"])
    key = "0.parametrizations.weight.0.mask"
    state = {**loop.model.state_dict(), key: torch.full((16, 10), 0.5)}
    with pytest.raises(
        InputError, match=f"{key} is an average of masks.*: 160 of 160 weights are .*; at 0 all of them"
    ):
        loop.model.load_state_dict(state)  # nothing was trained
    loop.step()
    state = {**loop.model.state_dict(), key: torch.full((16, 10), 0.5)}
    loop.model.load_state_dict(state)
    mask = loop.model.state_dict()[key]
    state[key][mask], active = 0.0, int(mask.sum())
    with pytest.raises(
        InputError, match=f"{key} is an .*: {160 - active} of 160 weights are .*; at {active} all of them differ"
    ):
        loop.model.load_state_dict(state)
    with pytest.raises(
        InputError, match=f"{key} is an average .*: {160 - active} of 160 weights are active in a part of them. Load"
    ):
        Loop(METHODS["gmp"]).model.to("meta").load_state_dict(state, assign=True)


def train(loop, average=None, steps=STEPS):
    for _ in range(steps):
        loop.step()
        if average is not None:
            average.update_parameters(loop.model)


def wide():
    """A first layer with inputs that are always zero, and a last layer that starts at zero."""
    loop = Loop(METHODS["gmp"])
    loop.model = nn.Sequential(nn.Linear(784, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 5))
    nn.init.zeros_(loop.model[3].weight)
    loop.sparsifier = sparing.sparsify_(loop.model, METHODS["gmp"], steps=STEPS)
    loop.optimizer = torch.optim.SGD(loop.model.parameters(), lr=0.1)
    loop.sparsifier.attach(loop.optimizer)
    x = torch.zeros(8, 784)

    def step():
        x[:, 300:500] = torch.randn(8, 200)
        loop.optimizer.zero_grad()
        F.cross_entropy(loop.model(x), torch.randint(0, 5, (8,))).backward()
        loop.optimizer.step()

    loop.step = step
    return loop


def test_averages_notice_changes_of_few_weights_and_of_layers_that_start_at_zero():
    loop = wide()
    average = AveragedModel(loop.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    train(loop, average)
    assert same(masks(average.module), masks(loop.model))


def test_a_copy_of_an_average_that_was_not_used_has_its_masks():
    loop = Loop(METHODS["gmp"])
    average = AveragedModel(loop.model)
    train(loop, average)
    best = copy.deepcopy(average)
    assert same(masks(best.module), masks(loop.model))


def test_an_average_outlives_its_model():
    loop = Loop(METHODS["gmp"])
    average = AveragedModel(loop.model)
    train(loop, average)
    expected = masks(loop.model)
    del loop
    gc.collect()
    assert same(masks(average.module), expected)


def test_copies_of_copies_do_not_keep_each_other_alive():
    model = Loop(METHODS["gmp"]).model
    generations = []
    for _ in range(4):
        generations.append(weakref.ref(model[0].parametrizations.weight.original))
        model = copy.deepcopy(model)
    gc.collect()
    # torch itself keeps the first alive: copies share the class of a parametrized layer.
    assert [each() is None for each in generations[1:]] == [True] * 3


@pytest.mark.parametrize(("model_dtype", "dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_an_average_may_have_another_dtype_than_the_model(model_dtype, dtype):
    loop = Loop(METHODS["gmp"])
    loop.model.to(model_dtype)
    average = copy.deepcopy(loop.model).to(dtype)
    for _ in range(STEPS):
        loop.optimizer.zero_grad()
        F.cross_entropy(loop.model(torch.randn(8, 10).to(model_dtype)).float(), torch.randint(0, 5, (8,))).backward()
        loop.optimizer.step()
        for theirs, parameter in zip(average.parameters(), loop.model.parameters(), strict=True):
            theirs.data.lerp_(parameter.data.to(theirs.dtype), 0.1)
    assert same(masks(average), masks(loop.model))


def test_a_snapshot_keeps_its_masks_through_conversions_and_functional_calls():
    loop = Loop(METHODS["gmp"])
    train(loop, steps=5)
    snapshot, before = copy.deepcopy(loop.model), masks(loop.model)
    converted = copy.deepcopy(loop.model).half().float()
    train(loop, steps=STEPS - 5)
    changed = {key: value + 1 for key, value in snapshot.named_parameters()}
    functional_call(snapshot, changed, (torch.randn(8, 10),))
    assert same(masks(snapshot), before)
    assert same(masks(converted), before)


@pytest.mark.parametrize(
    "wrap", [lambda model: model, AveragedModel, nn.DataParallel], ids=["bare", "average", "wrapped"]
)
def test_distributed_checkpoints_of_wrapped_models_have_the_masks(wrap):
    loop = Loop(METHODS["gmp"])
    train(loop)
    saved = get_model_state_dict(wrap(loop.model))
    again = Loop(METHODS["gmp"])
    wrapped = wrap(again.model)
    set_model_state_dict(wrapped, saved)
    inner = wrapped.module if isinstance(wrapped, AveragedModel) else again.model
    assert same(masks(inner), masks(loop.model))


@pytest.mark.parametrize("name", METHODS)
def test_the_replicas_of_data_parallel_have_the_masks_on_their_device(name, monkeypatch):
    """On the meta device, which stands for a second GPU."""
    broadcast = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(broadcast, "_get_device_index", lambda device, optional: device)
    monkeypatch.setattr(
        broadcast,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[tensor.to(device) for tensor in tensors] for device in devices],
    )
    loop = Loop(METHODS[name])
    train(loop, steps=STEPS // 2)
    before = masks(loop.model)
    first, second = nn.parallel.replicate(loop.model, [torch.device("cpu"), torch.device("meta")])
    inputs = torch.randn(8, 10)
    assert second(inputs.to("meta")).is_meta
    assert torch.equal(first.eval()(inputs), loop.model.eval()(inputs))
    assert same(masks(loop.model), before)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("method", [STR(init=-5.0), METHODS["gmp"], sparing.ST3(sparsity=0.5)], ids=lambda m: m.name)
def test_a_checkpoint_in_half_precision_keeps_the_dtypes_and_the_step(method, assign):
    loop, again = Loop(method), Loop(method)
    train(loop, steps=5)
    before = {
        key: value.dtype for key, value in again.model.state_dict().items() if ".parametrizations.weight.0." in key
    }
    state = {key: value.bfloat16() for key, value in loop.model.state_dict().items()}
    again.model.load_state_dict(state, assign=assign)
    assert before == {key: again.model.state_dict()[key].dtype for key in before}
    for key in before:
        torch.testing.assert_close(again.model.state_dict()[key], state[key].to(before[key]), rtol=0, atol=0)
    assert again.sparsifier.step == 5


@pytest.mark.parametrize("content", [b"\0" * 50, b"[1, 2]", b'{"step": "5"}', b"\xff"], ids=str)
def test_a_step_count_that_cannot_be_read_is_refused(content):
    loop = Loop(METHODS["gmp"])
    state = loop.model.state_dict()
    key = next(key for key in state if key.endswith("_extra_state"))
    with pytest.raises(InputError, match="the step count of a checkpoint cannot be read"):
        loop.model.load_state_dict(state | {key: torch.tensor(list(content), dtype=torch.uint8)})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", [METHODS["gmp"], STR(init=-5.0)], ids=lambda method: method.name)
def test_weights_that_are_loaded_without_the_state_of_their_run_are_warned_of_where_it_is_not_known(method):
    loop, again = Loop(method), Loop(method)
    train(loop, steps=5)
    state = {key: value.detach() for key, value in loop.model.named_parameters()}
    what = "mask, step count" if method.name == "gmp" else "step count"
    with pytest.warns(sparing.SparsityWarning, match=f"weights of sparsified layers without their {what}, which stay"):
        again.model.load_state_dict(state, strict=False)
    loop.model.load_state_dict(state, strict=False)  # as weights that change places with their average
    again.model.load_state_dict({"0.bias": torch.zeros(16)}, strict=False)


@pytest.mark.parametrize(("first", "last", "step"), [(16, 18, 17), (17, 18, STEPS), (9, 17, STEPS)])
def test_an_average_of_checkpoints_does_not_begin_the_run_again(first, last, step):
    method = sparing.SNIP(sparsity=0.8)
    loop, again = Loop(method), Loop(method)
    train(loop, steps=first)
    one = copy.deepcopy(loop.model.state_dict())
    train(loop, steps=last - first)
    average = {key: (one[key].double() + value.double()) / 2 for key, value in loop.model.state_dict().items()}
    again.model.load_state_dict(average)
    assert again.sparsifier.step == step
    before = masks(again.model)
    train(again, steps=3)
    assert same(masks(again.model), before)
    loop.model.load_state_dict({key: value.half() for key, value in one.items()})
    assert loop.sparsifier.step == first


def test_an_average_of_state_dicts_that_was_cast_back_to_integers_is_refused():
    loop = Loop(METHODS["gmp"])
    train(loop, steps=9)
    first = copy.deepcopy(loop.model.state_dict())
    train(loop, steps=3)
    last = loop.model.state_dict()
    average = {key: (0.9 * first[key].float() + 0.1 * last[key].float()).to(last[key].dtype) for key in last}
    with pytest.raises(InputError, match="Average parameters"):
        loop.model.load_state_dict(average)


@pytest.mark.parametrize("method", [STR(init=-5.0), sparing.ST3(sparsity=0.5)], ids=lambda method: method.name)
def test_a_model_that_left_the_meta_device_may_be_converted_before_its_first_use(method):
    with torch.device("meta"):
        model = nn.Linear(8, 4)
    sparing.sparsify_(model, method, steps=STEPS)
    model.to_empty(device="cpu").double()
    model.reset_parameters()
    expected = nn.Linear(8, 4)
    sparing.sparsify_(expected, method, steps=STEPS)
    theirs = expected.state_dict()
    for key, value in model.state_dict().items():
        if ".weight.0." in key:
            torch.testing.assert_close(value, theirs[key], check_dtype=False)
