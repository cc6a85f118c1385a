"""Targets of learned thresholds: met exactly, by one factor for all layers, on schedule; and what is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import sparing
from sparing import ST3, STR, Feather, InputError, ST3Sigma, STRFeather
from sparing.masks import count_kept
from sparing.patterns import NM, Block, Filters, Unstructured
from sparing.run.build import build_sparsifier
from sparing.run.recipe import Recipe
from sparing.run.resolve import resolve
from sparing.run.run import Run
from sparing.run.training import train_run
from sparing.schedules import cubic
from sparing.target import LOWEST, rescale


def layers_of(sizes, init, sparsity=0.5, std=1.0, **arguments):
    """Layers of 8 rows with normal weights and an s each, and the resolved target of a sparsity."""
    model = nn.Sequential(*(nn.Linear(size, 8, bias=False) for size in sizes))
    for module in model:
        nn.init.normal_(module.weight, std=std)
    sparsifier = sparing.sparsify_(model, STR(sparsity=sparsity, **arguments), steps=100)
    with torch.no_grad():
        for layer, s in zip(sparsifier.layers.values(), init, strict=True):
            layer.parametrization.s.fill_(s)
    return sparsifier.layers, sparsifier.plan


def nonzero(layers):
    return [layer.nonzero() for layer in layers.values()]


def numbers(layers):
    return torch.stack([layer.parametrization.s.detach().flatten()[0] for layer in layers.values()])


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**31),
    st.lists(st.integers(5, 60), min_size=1, max_size=5),
    st.floats(0, 0.85),
    st.sampled_from([("layer", 1), ("filter", 1), ("weight", 1), ("layer", 2), ("layer", 4)]),
    st.sampled_from(["sigmoid", "exp"]),
    st.sampled_from([1.0, 2.0]),
)
def test_the_count_is_met_exactly_by_one_factor_for_all_layers(seed, sizes, sparsity, grouping, g, k):
    torch.manual_seed(seed)
    granularity, block = grouping
    init = [-1.0 - 4 * torch.rand(()).item() for _ in sizes]
    pattern = Block(block) if block > 1 else Unstructured()
    layers, target = layers_of(sizes, init, sparsity, 0.1, granularity=granularity, pattern=pattern, g=g, scale=k)
    wanted = count_kept(8 * sum(sizes), sparsity)
    rescale(layers, target, wanted)
    assert sum(nonzero(layers)) == wanted // block * block
    units = [count // block for count in nonzero(layers)]
    assert all(count >= target.least[name] for name, count in zip(layers, units, strict=True))
    factors = numbers(layers) / torch.tensor(init)
    free = [count > target.least[name] for name, count in zip(layers, units, strict=True)]
    # Only a layer on its floor is rescaled less than the others.
    torch.testing.assert_close(factors[free], factors[free][:1].expand(sum(free)), rtol=1e-5, atol=1e-5)
    if any(free):
        assert (factors >= factors[free][0] - 1e-5).all()


class CountComparisons(TorchDispatchMode):
    """Counts the numbers that are compared with a threshold."""

    compared = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.gt.Tensor:
            self.compared += args[0].numel()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("granularity", ["layer", "filter"])
@pytest.mark.parametrize(("share", "most"), [(0.999, 5), (0.5, 12), (0.02, 12)])
def test_rescaling_compares_most_weights_only_a_few_times(granularity, share, most):
    torch.manual_seed(0)
    layers, target = layers_of([4000, 2000], [-2.0, -3.0], sparsity=0.99, std=0.1, granularity=granularity)
    rescale(layers, target, 10_000)
    with CountComparisons() as count:
        rescale(layers, target, round(share * 10_000))
    assert sum(nonzero(layers)) == round(share * 10_000)
    # Near the last count: two comparisons, two more that leave out what is far, and a part of them for each halving.
    assert 48_000 <= count.compared < most * 48_000


def test_weights_of_a_layer_on_its_floor_cost_the_others_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    sparsifier = sparing.sparsify_(model, STR(macs=0.1, input_size=(1, 1, 8, 8)), steps=100)
    layers, target = sparsifier.layers, sparsifier.plan
    with torch.no_grad():
        layers["3"].weight.mul_(1e-3)
    rescale(layers, target, target.final)
    convolution, linear = nonzero(layers)
    assert linear == target.least["3"]
    # The next weight of the convolution, which is applied 36 times, would be too much.
    assert target.final - 36 < 36 * convolution + linear <= target.final


def test_layers_keep_the_order_of_their_thresholds_and_the_gradient_decides_it():
    torch.manual_seed(0)
    layers, target = layers_of([50, 50], [-2.0, -4.0], sparsity=0.9, std=0.1)
    rescale(layers, target, count_kept(800, 0.9))
    low, high = nonzero(layers)
    assert low < high
    layers["0"].parametrization.s.data -= 2.0
    rescale(layers, target, count_kept(800, 0.9))
    assert nonzero(layers)[0] > low


def test_where_s_at_zero_is_not_enough_it_goes_on_above_by_the_same_value_in_all_layers():
    torch.manual_seed(0)
    layers, target = layers_of([50, 50], [-2.0, -4.0], sparsity=0.9, std=0.5)
    assert sum((layer.weight.abs() > 0.5).sum() for layer in layers.values()) > 80
    rescale(layers, target, 80)
    first, second = numbers(layers)
    assert first == second > 0
    assert sum(nonzero(layers)) == 80


def test_no_layer_keeps_less_than_its_floor():
    torch.manual_seed(0)
    layers, target = layers_of([100, 100, 1], [-3.0] * 3, sparsity=0.9, std=0.1)
    with torch.no_grad():
        layers["0"].weight.mul_(1e-4)
    wanted = count_kept(1608, 0.9)
    rescale(layers, target, wanted)
    assert nonzero(layers)[0] == target.least["0"] == math.floor(0.1 * wanted / 1608 * 800)
    assert target.least["2"] == 1
    assert sum(nonzero(layers)) == wanted


def test_the_highest_target_leaves_one_weight_in_each_layer():
    # A tenth of the density of all would be two weights of the first layer.
    layers, target = layers_of([2000] + [1] * 20, [-3.0] * 21, sparsity=1 - 21 / 16160, std=0.1)
    rescale(layers, target, 21)
    assert nonzero(layers) == [1] * 21


def test_weights_that_are_zero_and_weights_too_large_for_any_threshold_are_counted():
    layers, target = layers_of([50], [-3.0], sparsity=0.5)
    layers["0"].weight.data[:2] = 0.0
    assert 0 < (layers["0"].weight.abs() > 1).sum() < 200
    rescale(layers, target, 200)
    assert nonzero(layers) == [200]


def test_s_stays_within_reach_when_it_is_rescaled_to_a_dense_network():
    layers, target = layers_of([50, 20], [-1.0, -8.0])
    for _ in range(20):
        rescale(layers, target, target.dense)
        with torch.no_grad():
            layers["0"].parametrization.s.fill_(-1.0)
    assert numbers(layers).min() >= LOWEST
    rescale(layers, target, target.final)
    assert sum(nonzero(layers)) == target.final


def test_s_stays_finite_where_weights_are_too_large_for_any_threshold():
    layers, target = layers_of([50], [-3.0], sparsity=0.9, std=100.0)
    rescale(layers, target, 40)
    assert torch.isfinite(numbers(layers)).all()


@pytest.mark.parametrize(
    ("target", "unit"), [({"sparsity": 0.9}, "weights"), ({"macs": 0.1, "input_size": (1, 50)}, "MACs")]
)
def test_a_missed_target_warns_once_at_the_last_step_with_both_numbers(target, unit):
    model = nn.Linear(50, 8)
    sparsifier = sparing.sparsify_(model, STR(**target, every=4), steps=20)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    sparsifier.attach(optimizer)
    model.parametrizations.weight.original.data.fill_(3.0)  # no threshold of sigmoid is as large

    def train(steps):
        for _ in range(steps):
            model(torch.randn(2, 50)).sum().backward()
            optimizer.step()

    train(19)
    message = rf"str: the sparsity .* is 0.00 % \(400 of 400 {unit}\), the target 90.00 % \(40 of 400 {unit}\)"
    with pytest.warns(sparing.SparsityWarning, match=message) as caught:
        train(1)
    assert len(caught) == 1
    assert sparing.report(model).missed == (str(caught[0].message),)


def test_bf16_comes_within_half_a_point_and_s_stays_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).bfloat16()
    sparsifier = sparing.sparsify_(model, STR(sparsity=0.9), steps=100)
    rescale(sparsifier.layers, sparsifier.plan, count_kept(2 * 256**2, 0.9))
    assert all(layer.parametrization.s.dtype == torch.float32 for layer in sparsifier.layers.values())
    # Some 256 weights of a layer share each bf16 number near the threshold, 0.4 % of them.
    assert abs(sparing.report(model).total.sparsity - 0.9) < 0.005


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 4),
    )  # fmt: skip


def train(model, sparsifier, steps, each=lambda step: None):
    optimizer = torch.optim.SGD(sparing.param_groups(model, weight_decay=1e-3), lr=0.05, momentum=0.9)
    sparsifier.attach(optimizer)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 2, 8, 8, generator=generator), torch.randint(0, 4, (8,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        each(step + 1)


def test_the_count_follows_the_ramp_and_the_target_is_met_at_each_of_the_last_steps():
    model = small_network()
    sparsifier = sparing.sparsify_(model, STR(sparsity=0.9, begin=8, end=0.75, every=4), steps=40)
    start, weights = sparing.report(model).total.nonzero, sparing.report(model).total.weights
    final = weights - count_kept(weights, 0.9)
    seen = {}
    train(model, sparsifier, 40, lambda step: seen.update({step: sparing.report(model).total.nonzero}))
    assert all(seen[step] > 0.9 * start for step in range(1, 8))
    for step in [*range(8, 37, 4), 30, *range(37, 41)]:
        assert seen[step] == weights - math.floor(cubic(step, 8, 30, final)), step
    # The sparsities of the layers are learned: their thresholds differ.
    assert len({round(float(s), 3) for s in numbers(sparsifier.layers)}) == 3


@pytest.mark.parametrize("pattern", [Unstructured(), Block(4), Filters()])
@pytest.mark.parametrize("macs", [0.3, 14000])
def test_macs_are_met_over_the_whole_model(macs, pattern):
    model = small_network()
    dense = sparing.report(model, (1, 2, 8, 8)).total.macs
    method = STR(macs=macs, input_size=(1, 2, 8, 8), every=4, pattern=pattern)
    train(model, sparing.sparsify_(model, method, select=["3", "6"], steps=40), 40)
    report = sparing.report(model, (1, 2, 8, 8))
    wanted = macs if isinstance(macs, int) else round(macs * dense)
    # The next unit of the second convolution, of which each weight is applied 16 times, would be too much.
    unit = {Unstructured(): 16, Block(4): 64, Filters(): 16 * 144}[pattern]
    assert wanted - unit < report.total.macs <= wanted
    assert report.layers[0].nonzero == report.layers[0].weights


@pytest.mark.filterwarnings("ignore:.*every weight of")
@pytest.mark.parametrize("method", [Feather, ST3, ST3Sigma])
@pytest.mark.parametrize("pattern", [Unstructured(), Block(4), Filters()])
@pytest.mark.parametrize("macs", [0.3, 14000])
def test_one_threshold_for_all_layers_meets_macs(method, pattern, macs):
    model = small_network()
    dense = sparing.report(model, (1, 2, 8, 8)).total.macs
    chosen = method(macs=macs, input_size=(1, 2, 8, 8), every=4, pattern=pattern)
    sparsifier = sparing.sparsify_(model, chosen, select=["3", "6"], steps=40)
    train(model, sparsifier, 40)
    wanted = macs if isinstance(macs, int) else round(macs * dense)
    unit = {Unstructured(): 16, Block(4): 64, Filters(): 16 * 144}[pattern]
    assert wanted - unit < sparing.report(model, (1, 2, 8, 8)).total.macs <= wanted
    assert sparsifier.clock.goal is not None
    assert sparsifier.clock.unit == "MACs"


def test_a_weight_that_is_applied_more_often_needs_a_larger_score():
    """th_l = th · cost_l^¼: a weight of the convolution is applied 16 times, one of the Linear once."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 400, 3, bias=False), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(400, 9, bias=False)
    )
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight.copy_(torch.randperm(3600).reshape(layer.weight.shape) / 3600 + 0.001)
    sparsifier = sparing.sparsify_(model, Feather(macs=0.3, input_size=(1, 1, 6, 6), end=0, every=1), steps=10)
    sparsifier.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    model(torch.randn(1, 1, 6, 6)).sum().backward()
    sparsifier.optimizers[0].step()
    first, last = (float(layer.threshold) for layer in sparsifier.layers.values())
    assert first / last == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize("other", [{"sparsity": 0.5}, {"budget": "uniform"}, {"input_size": None}])
def test_macs_for_one_threshold_are_given_alone(other):
    with pytest.raises(InputError, match="give macs= alone|needs input_size="):
        Feather(**{"macs": 0.1, "input_size": (1, 8), **other})


def test_without_a_target_nothing_acts_and_a_target_adds_nothing_to_the_model():
    states = []
    for attach in (True, False):
        model = small_network()
        sparsifier = sparing.sparsify_(model, STR(init=-3.0))
        assert sparsifier.plan is None
        if not attach:
            sparsifier.attach = lambda optimizer: None
        train(model, sparsifier, 10)
        states.append(model.state_dict())
    for (key, value), other in zip(states[0].items(), states[1].values(), strict=True):
        if not key.endswith("_extra_state"):  # the count of steps
            assert torch.equal(value, other), key
    targeted = small_network()
    sparing.sparsify_(targeted, STR(sparsity=0.9), steps=100)
    assert targeted.state_dict().keys() == states[0].keys()


def test_thresholds_start_with_the_costs_of_weights_and_are_rescaled_from_there():
    """o_l = ¼ ln(cost_l / mean cost): here a weight of the convolution is applied 16 times, one of the Linear once."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(128, 4))
    sparsifier = sparing.sparsify_(model, STR(macs=0.2, input_size=(1, 4, 6, 6)), steps=100)
    mean = (16 * 288 + 512) / (288 + 512)
    offsets = torch.tensor([math.log(16 / mean) / 4, math.log(1 / mean) / 4])
    torch.testing.assert_close(numbers(sparsifier.layers), offsets - 5)
    with torch.no_grad():
        sparsifier.layers["0"].parametrization.s += 1
    before = numbers(sparsifier.layers) - offsets
    rescale(sparsifier.layers, sparsifier.plan, sparsifier.plan.final)
    after = numbers(sparsifier.layers) - offsets
    torch.testing.assert_close(after / before, (after / before)[:1].expand(2))
    assert after[0] / before[0] < 0.9


@pytest.mark.parametrize("method", [STR, STRFeather])
def test_a_target_in_macs_can_follow_one_in_weights(method):
    """The costs are in the rescaling alone: a checkpoint has the same weights in a model with the new target."""
    model, again = small_network(), small_network()
    sparsifier = sparing.sparsify_(model, method(sparsity=0.8, every=2), steps=10)
    train(model, sparsifier, 10)
    in_macs = method(macs=0.1, input_size=(1, 2, 8, 8), begin=0, every=2)
    sparsifier.retarget(in_macs, steps=10)
    other = sparing.sparsify_(again, in_macs, steps=10)
    again.load_state_dict(model.state_dict())
    for name, layer in sparsifier.layers.items():
        assert torch.equal(layer.effective_weight, other.layers[name].effective_weight)
    train(again, other, 10)
    total = sparing.report(again, (1, 2, 8, 8)).total
    assert total.macs == pytest.approx(0.1 * total.dense_macs, rel=2e-3)


def test_retarget_continues_from_the_sparsity_of_today():
    model = small_network()
    sparsifier = sparing.sparsify_(model, STR(sparsity=0.5, every=2), steps=10)
    train(model, sparsifier, 10)
    weights = sparing.report(model).total.weights
    assert sparing.report(model).total.nonzero == count_kept(weights, 0.5)
    sparsifier.retarget(STR(sparsity=0.9, begin=0, every=2), steps=20)
    seen = []
    train(model, sparsifier, 20, lambda step: seen.append(sparing.report(model).total.nonzero))
    updated = seen[1::2]
    assert updated == sorted(updated, reverse=True)
    # After 2 of 16 steps of the ramp, cubic in the remaining share, from 0.5 / 0.9 of the way.
    share = 5 / 9 + 4 / 9 * (1 - (14 / 16) ** 3)
    assert updated[0] == pytest.approx(weights * (1 - 0.9 * share), abs=2)
    assert seen[-1] == count_kept(weights, 0.9)


def test_a_recipe_gives_steps_and_input_size():
    recipe = Recipe.model_validate(
        {"model": {"name": "resnet8"}, "data": {"name": "mnist5k"}, "method": {"name": "str", "macs": 0.25}}
    )
    sparsifier = build_sparsifier(resolve(recipe), sparing.models.resnet8())
    assert (sparsifier.steps, sparsifier.method.input_size) == (20 * 55, (1, 1, 28, 28))


@pytest.mark.slow
def test_a_run_ends_on_its_macs_and_its_directory_is_read_without_data(tmp_path):
    recipe = Recipe.model_validate(
        {
            "model": {"name": "resnet8", "width": 2},
            "data": {"name": "small_run:noise", "batch_size": 4},
            "method": {"name": "str", "macs": 0.3, "every": 2},
            "schedule": {"epochs": 2},
            "tensorboard": False,
        }
    )
    metrics = train_run(recipe, tmp_path / "run")
    # A weight of the first convolution is applied 64 times.
    assert -64 < metrics["macs"] - 0.3 * metrics["dense_macs"] <= 0.5
    assert Run.open(tmp_path / "run").report().total.macs == metrics["macs"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be a fraction in \[0, 1\), got 1.0"),
        ({"sparsity": 0.9, "macs": 0.1}, "give sparsity= or macs=, not both"),
        ({"macs": 0.1}, r"macs=0.1 needs input_size=, the shape of one input such as \(1, 3"),
        ({"macs": 1.5, "input_size": (1, 8)}, "macs must be a number .int. above 0, or a fraction"),
        ({"macs": 0, "input_size": (1, 8)}, "macs must be a number .int. above 0, or a fraction"),
        ({"macs": True, "input_size": (1, 8)}, "macs must be a number .int. above 0, or a fraction"),
        ({"sparsity": 0.9, "granularity": "global"}, "a target needs a granularity other than 'global'"),
        ({"sparsity": 0.9, "g": torch.sigmoid}, "a target needs .* a g known by name"),
        ({"pattern": NM(2, 4)}, r"pattern must be Unstructured\(\), Block\(n\) or Filters\(\), got NM"),
    ],
)
def test_bad_targets_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        STR(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 0.99}, "leaves less than one weight or group for each of 2 layers; .* from 0 to 0.975"),
        ({"macs": 0.1}, "has 280 MACs, 200 of them in layers that are not sparsified, and 202 with .* above 0.721"),
        ({"macs": 281}, "macs=281 is out of reach: the model has 280 MACs"),
        ({"macs": 201}, "macs=201 is out of reach"),
        # A row of 8 weights stays in either layer.
        ({"macs": 215, "pattern": Filters()}, "macs=215 is out of reach: .* 216 with one weight or group"),
    ],
)
def test_targets_out_of_reach_are_refused_with_what_can_be_reached(arguments, message):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(2, 100))
    before = set(model.state_dict())
    with pytest.raises(InputError, match=message):
        sparing.sparsify_(model, STR(**arguments, input_size=(1, 8)), select=["0", "1"], steps=100)
    assert set(model.state_dict()) == before


def test_a_target_without_the_length_of_the_run_is_refused():
    with pytest.raises(
        InputError, match=r"STR: begin=0.2 needs the length of the run: sparsify_\(model, method, steps="
    ):
        sparing.sparsify_(nn.Linear(8, 8), STR(sparsity=0.5))
