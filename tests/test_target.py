"""A total for STR: met exactly, by one factor for all layers, on schedule; and what is refused."""

import math

import pytest
import torch
from harness import STEPS, Run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import sparing
from sparing import STR, InputError
from sparing.masks import count_kept
from sparing.schedules import cubic
from sparing.target import LOWEST, _Tally, pull
from sparing.train.build import build_sparsifier
from sparing.train.recipe import Recipe
from sparing.train.run import report_run, train_run


def layers_of(sizes, init, sparsity=0.5, std=1.0, **arguments):
    """Layers with normal weights and an s each, of a model asked for a sparsity; and its goal."""
    model = nn.Sequential(*(nn.Linear(size, 8, bias=False) for size in sizes))
    for module in model:
        nn.init.normal_(module.weight, std=std)
    sparsifier = sparing.sparsify_(model, STR(sparsity=sparsity, steps=100, **arguments))
    with torch.no_grad():
        for layer, s in zip(sparsifier.layers.values(), init, strict=True):
            layer.parametrization.s.fill_(s)
    return sparsifier.layers, sparsifier.plan


def nonzero(layers):
    return [layer.nonzero() for layer in layers.values()]


def numbers(layers):
    return torch.stack([layer.parametrization.s.detach().flatten()[0] for layer in layers.values()])


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 2**31),
    st.lists(st.integers(5, 60), min_size=1, max_size=5),
    st.floats(0, 0.97),
    st.sampled_from(["layer", "filter", "weight"]),
    st.sampled_from(["sigmoid", "exp"]),
    st.sampled_from([1.0, 2.0]),
)
def test_the_count_is_met_exactly_by_one_factor_for_all_layers(seed, sizes, sparsity, granularity, g, k):
    torch.manual_seed(seed)
    init = [-1.0 - 4 * torch.rand(()).item() for _ in sizes]
    layers, goal = layers_of(sizes, init, sparsity, 0.1, granularity=granularity, g=g, scale=k)
    wanted = count_kept(8 * sum(sizes), sparsity)
    pull(layers, goal, wanted)
    assert sum(nonzero(layers)) == wanted
    assert all(live >= goal.least[name] for name, live in zip(layers, nonzero(layers), strict=True))
    factors = numbers(layers) / torch.tensor(init)
    free = [live > goal.least[name] for name, live in zip(layers, nonzero(layers), strict=True)]
    # Only a layer on its floor is pulled less than the others.
    torch.testing.assert_close(factors[free], factors[free][:1].expand(sum(free)), rtol=1e-5, atol=1e-5)
    if any(free):
        assert (factors >= factors[free][0] - 1e-5).all()


@pytest.mark.parametrize("granularity", ["layer", "filter"])
@pytest.mark.parametrize("share", [0.999, 0.5, 0.02])
def test_a_pull_counts_most_weights_only_a_few_times(granularity, share, monkeypatch):
    torch.manual_seed(0)
    layers, goal = layers_of([4000, 2000], [-2.0, -3.0], sparsity=0.99, std=0.1, granularity=granularity)
    pull(layers, goal, 10_000)
    counted = []
    above = _Tally._above
    monkeypatch.setattr(_Tally, "_above", lambda self, rho: counted.append(len(self.sizes)) or above(self, rho))
    pull(layers, goal, round(share * 10_000))
    assert sum(nonzero(layers)) == round(share * 10_000)
    # Near the last total: two looks, two more to set apart what is near, and a part of them for each halving.
    assert sum(counted) < (5 if share == 0.999 else 12) * 48_000


def test_weights_of_a_layer_on_its_floor_cost_the_others_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    sparsifier = sparing.sparsify_(model, STR(macs=0.1, steps=100, input_size=(1, 1, 8, 8)))
    layers, goal = sparsifier.layers, sparsifier.plan
    with torch.no_grad():
        layers["3"].weight.mul_(1e-3)
    pull(layers, goal, goal.final)
    convolution, linear = nonzero(layers)
    assert linear == goal.least["3"]
    # The next weight, of the 36 uses of the convolution, would be too much.
    assert goal.final - 36 < 36 * convolution + linear <= goal.final


def test_layers_keep_the_order_of_their_thresholds_and_the_gradient_decides_it():
    torch.manual_seed(0)
    layers, goal = layers_of([50, 50], [-2.0, -4.0], sparsity=0.9, std=0.1)
    pull(layers, goal, count_kept(800, 0.9))
    low, high = nonzero(layers)
    assert low < high
    layers["0"].parametrization.s.data -= 2.0
    pull(layers, goal, count_kept(800, 0.9))
    assert nonzero(layers)[0] > low


def test_where_zero_is_not_enough_s_goes_on_above_it_alike_in_all_layers():
    torch.manual_seed(0)
    layers, goal = layers_of([50, 50], [-2.0, -4.0], sparsity=0.9, std=0.5)
    assert sum((layer.weight.abs() > 0.5).sum() for layer in layers.values()) > 80
    pull(layers, goal, 80)
    first, second = numbers(layers)
    assert first == second > 0
    assert sum(nonzero(layers)) == 80


def test_no_layer_falls_under_its_floor():
    torch.manual_seed(0)
    layers, goal = layers_of([100, 100, 1], [-3.0] * 3, sparsity=0.9, std=0.1)
    with torch.no_grad():
        layers["0"].weight.mul_(1e-4)
    wanted = count_kept(1608, 0.9)
    pull(layers, goal, wanted)
    assert nonzero(layers)[0] == goal.least["0"] == math.floor(0.1 * wanted / 1608 * 800)
    assert goal.least["2"] == 1
    assert sum(nonzero(layers)) == wanted


def test_the_most_that_can_be_asked_for_leaves_one_weight_in_each_layer():
    # A tenth of the density of all would be two weights of the first layer.
    layers, goal = layers_of([2000] + [1] * 20, [-3.0] * 21, sparsity=1 - 21 / 16160, std=0.1)
    pull(layers, goal, 21)
    assert nonzero(layers) == [1] * 21


def test_weights_that_are_zero_and_weights_too_large_for_any_threshold_are_counted():
    layers, goal = layers_of([50], [-3.0], sparsity=0.5)
    layers["0"].weight.data[:2] = 0.0
    assert 0 < (layers["0"].weight.abs() > 1).sum() < 200
    pull(layers, goal, 200)
    assert nonzero(layers) == [200]


def test_pulls_to_a_dense_network_do_not_send_s_away():
    layers, goal = layers_of([50, 20], [-1.0, -8.0])
    for _ in range(20):
        pull(layers, goal, goal.dense)
        with torch.no_grad():
            layers["0"].parametrization.s.fill_(-1.0)
    assert numbers(layers).min() >= LOWEST
    pull(layers, goal, goal.final)
    assert sum(nonzero(layers)) == goal.final


def test_weights_too_large_for_any_threshold_do_not_blow_up():
    layers, goal = layers_of([50], [-3.0], sparsity=0.9, std=100.0)
    pull(layers, goal, 40)
    assert torch.isfinite(numbers(layers)).all()


@pytest.mark.parametrize("total", [{"sparsity": 0.9}, {"macs": 0.1, "input_size": (1, 50)}])
def test_a_total_that_is_missed_is_said(total):
    model = nn.Linear(50, 8)
    sparsifier = sparing.sparsify_(model, STR(**total, steps=20, every=4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier.attach(optimizer)
    model.parametrizations.weight.original.data.fill_(3.0)

    def train():
        for _ in range(20):
            (0 * model(torch.randn(2, 50)).sum()).backward()
            optimizer.step()

    with pytest.warns(sparing.SparsityWarning) as said:
        train()
    assert len(said) == 1
    message = str(said[0].message)
    assert "STR: the run ends at 400 " in message
    assert "where 40 were asked for" in message
    assert "(layer 'weight' has one of 3)" in message


def test_bf16_comes_within_half_a_point_and_s_stays_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).bfloat16()
    sparsifier = sparing.sparsify_(model, STR(sparsity=0.9, steps=100))
    pull(sparsifier.layers, sparsifier.plan, count_kept(2 * 256**2, 0.9))
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


def test_the_total_follows_the_ramp_and_is_met_at_the_end():
    model = small_network()
    sparsifier = sparing.sparsify_(model, STR(sparsity=0.9, steps=40, begin=8, end=0.75, every=4))
    start, weights = sparing.report(model).total.nonzero, sparing.report(model).total.weights
    final = weights - count_kept(weights, 0.9)
    seen = {}
    train(model, sparsifier, 40, lambda step: seen.update({step: sparing.report(model).total.nonzero}))
    assert all(seen[step] > 0.9 * start for step in range(1, 8))
    for step in range(8, 41, 4):
        assert seen[step] == weights - math.floor(cubic(step, 8, 30, final)), step
    assert seen[40] == count_kept(weights, 0.9)
    # The layers have parted: their shares are learned.
    assert len({round(float(s), 3) for s in numbers(sparsifier.layers)}) == 3


@pytest.mark.parametrize("macs", [0.3, 14000])
def test_macs_are_met_over_the_whole_model(macs):
    model = small_network()
    dense = sparing.report(model, (1, 2, 8, 8)).total.macs
    sparsifier = sparing.sparsify_(model, STR(macs=macs, steps=40, input_size=(1, 2, 8, 8), every=4), select=["3", "6"])
    train(model, sparsifier, 40)
    report = sparing.report(model, (1, 2, 8, 8))
    wanted = macs if isinstance(macs, int) else round(macs * dense)
    # The next weight, of the 16 uses of the second convolution, would be too much.
    assert wanted - 16 < report.total.macs <= wanted
    assert report.layers[0].nonzero == report.layers[0].weights


def test_without_a_total_nothing_acts_and_a_total_adds_nothing_to_the_model():
    states = []
    for attach in (True, False):
        model = small_network()
        sparsifier = sparing.sparsify_(model, STR(init=-3.0))
        assert sparsifier.plan is None
        if not attach:
            sparsifier.attach = lambda optimizer: None
        train(model, sparsifier, 10)
        states.append(model.state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    asked = small_network()
    sparing.sparsify_(asked, STR(sparsity=0.9, steps=100))
    assert asked.state_dict().keys() == states[0].keys()


def test_macs_continue_from_a_checkpoint_to_the_last_bit():
    def run(seed=0):
        return Run("conv2d", STR(macs=0.3, steps=STEPS, input_size=(1, 4, 5, 5), every=3), seed=seed)

    straight = run().train(STEPS)
    second = run(seed=7).load(run().train(STEPS // 2).state()).train(STEPS // 2)
    for key, value in straight.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[key]), key


def test_a_recipe_needs_to_say_neither_steps_nor_input_size():
    recipe = Recipe.model_validate(
        {"model": {"name": "resnet8"}, "data": {"name": "mnist5k"}, "method": {"name": "str", "macs": 0.25}}
    )
    method = build_sparsifier(recipe, sparing.models.resnet8(), 500, (1, 1, 28, 28)).method
    assert (method.steps, method.input_size) == (500, (1, 1, 28, 28))


def test_a_run_ends_on_its_macs_and_its_directory_can_be_read_without_data(tmp_path):
    recipe = Recipe.model_validate(
        {
            "model": {"name": "resnet8", "width": 2},
            "data": {"name": "mnist5k", "batch_size": 350},
            "method": {"name": "str", "macs": 0.3, "every": 2},
            "schedule": {"epochs": 2},
            "tensorboard": False,
        }
    )
    metrics = train_run(recipe, tmp_path / "run")
    # A weight of the first convolution has 784 uses.
    assert -784 < metrics["macs"] - 0.3 * metrics["dense_macs"] <= 0.5
    assert report_run(tmp_path / "run").total.macs == metrics["macs"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0, "steps": 100}, r"sparsity must be a fraction in \[0, 1\), got 1.0"),
        ({"sparsity": 90, "steps": 100}, r"sparsity must be a fraction in \[0, 1\), got 90"),
        ({"sparsity": 0.9}, "sparsity=0.9 needs steps=, the optimizer steps"),
        ({"macs": 0.1, "input_size": (1, 3, 8, 8)}, "macs=0.1 needs steps=, the optimizer steps"),
        ({"sparsity": 0.9, "macs": 0.1, "steps": 100}, "give sparsity= or macs=, not both"),
        ({"macs": 0.1, "steps": 100}, r"macs=0.1 needs input_size=, the shape of one input such as \(1, 3"),
        ({"macs": 1.5, "steps": 100, "input_size": (1, 8)}, "macs must be a number .int. above 0, or a fraction"),
        ({"macs": 0, "steps": 100, "input_size": (1, 8)}, "macs must be a number .int. above 0, or a fraction"),
        ({"macs": True, "steps": 100, "input_size": (1, 8)}, "macs must be a number .int. above 0, or a fraction"),
        ({"sparsity": 0.9, "steps": 100, "begin": 0.9}, "begin=0.9 .step 90. comes after end=0.8"),
        ({"sparsity": 0.9, "steps": 100, "granularity": "global"}, "a total needs a granularity other than 'global'"),
        ({"sparsity": 0.9, "steps": 100, "g": torch.sigmoid}, "a total needs .* a g known by name"),
    ],
)
def test_bad_totals_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        STR(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 0.99}, "leaves less than one weight for each of 2 layers; with 80 weights .* from 0 to 0.975"),
        ({"macs": 0.1}, "has 280 MACs, 200 of them in layers that are not sparsified, and 202 with .* above 0.721"),
        ({"macs": 281}, "macs=281 is out of reach: the model has 280 MACs"),
        ({"macs": 201}, "macs=201 is out of reach"),
    ],
)
def test_totals_out_of_reach_are_refused_with_what_can_be_had(arguments, message):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(2, 100))
    before = set(model.state_dict())
    with pytest.raises(InputError, match=message):
        sparing.sparsify_(model, STR(**arguments, steps=100, input_size=(1, 8)), select=["0", "1"])
    assert set(model.state_dict()) == before


def test_a_sparsifier_of_a_second_phase_works_out_its_goal_again():
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))
    method = sparing.STR(sparsity=0.8, steps=20, every=4)
    first = sparing.sparsify_(model, method)
    again = sparing.Sparsifier(model, method)
    assert again.plan == first.plan
    again.attach(torch.optim.SGD(sparing.param_groups(model, weight_decay=0.0), lr=0.01))
    for _ in range(20):
        model(torch.randn(8, 16)).square().mean().backward()
        again.optimizers[0].step()
    assert sparing.report(model).total.nonzero == round(0.2 * (16 * 24 + 24 * 4))


def test_sharded_weights_are_refused_at_the_first_step():
    model = nn.Linear(8, 8)
    sparsifier = sparing.sparsify_(model, STR(sparsity=0.5, steps=100))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    # What a DTensor has, and FSDP2 makes of parameters.
    model.parametrizations.weight.original.full_tensor = lambda: None
    model(torch.randn(2, 8)).sum().backward()
    with pytest.raises(InputError, match="STR: a total does not run under FSDP2; use DistributedDataParallel"):
        optimizer.step()
