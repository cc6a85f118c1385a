"""The rule that chooses the weight decay of s for a target sparsity, and the warning that uses it."""

import csv
import itertools
import math
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from sparing import STR, InputError, SparsityWarning
from sparing.decay import ONSET, e_folds, weight_decay_for
from sparing.run.method_section import build_method
from sparing.run.recipe import Recipe, load_recipe
from sparing.run.resolve import check_schedule, resolve, with_settings
from sparing.run.training import train_run
from sparing.schedules import warmup_cosine

IMAGENET = [0.256 * warmup_cosine(epoch, 100, 5) for epoch in range(100) for _ in range(5004)]

# The epoch at which s reaches sigmoid⁻¹(1e-3) by weight decay alone, simulated with the schedule of the release.
ONSETS = {
    "79.55": 40, "81.27": 39, "87.70": 32, "90.23": 29, "90.55": 25, "94.80": 26, "95.03": 24, "95.15": 21,
    "96.11": 10, "96.53": 20, "97.78": 16, "98.05": 14, "99.10": 10,
}  # fmt: skip

with Path(__file__).parent.parent.joinpath("recipes/imagenet/paper.csv").open(newline="") as file:
    # Weight decay and init of all rows but 90.23 were written down from memory.
    ROWS = {
        row["sparsity"]: (float(row["weight_decay"]), float(row["init"]))
        for row in csv.DictReader(file)
        if (row["model"], row["method"]) == ("resnet50", "str")
    }


def optimized(kind, rates, decay, init, **options):
    """s after every step of a real optimizer, with no gradient of a loss."""
    s = torch.nn.Parameter(torch.tensor([init], dtype=torch.float64))
    optimizer = kind([s], lr=1.0, weight_decay=decay, **options)
    s.grad = torch.zeros_like(s)
    seen = []
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        seen.append(float(s.detach()))
    return seen


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.875, 0.9])
def test_s_decays_under_sgd_by_the_formula(momentum):
    rates = [0.1 * warmup_cosine(step, 10_000, 500) for step in range(10_000)]
    decay, init = 8.0 * (1 - momentum) / sum(rates), -300.0
    seen = optimized(torch.optim.SGD, rates, decay, init, momentum=momentum)
    onset = next(step for step, s in enumerate(seen) if s >= ONSET)
    sums = itertools.accumulate(rates)
    predicted = next(step for step, total in enumerate(sums) if e_folds([total], decay, momentum) >= math.log(300 / 7))
    # Momentum delays the decay by about 1 / (1 − μ) steps; the error is of second order, η λ / (1 − μ)².
    second_order = 0.1 * decay / (1 - momentum) ** 2
    assert second_order < 0.02
    assert abs(onset - predicted) <= 1 / (1 - momentum) + second_order * predicted
    assert math.log(init / seen[-1]) == pytest.approx(8.0, rel=second_order)


def test_s_decays_under_adamw_without_the_factor_of_momentum():
    rates = [0.01 * warmup_cosine(step, 3000, 100) for step in range(3000)]
    seen = optimized(torch.optim.AdamW, rates, 0.3, -50.0)
    assert math.log(-50.0 / seen[-1]) == pytest.approx(e_folds(rates, 0.3), rel=0.01)


def test_the_e_folds_of_the_released_configuration():
    assert e_folds(IMAGENET, 2.251757813e-5, 0.875) == pytest.approx(11.77, abs=0.005)
    assert e_folds(IMAGENET, 3.051757813e-5, 0.875) == pytest.approx(15.95, abs=0.005)


@pytest.mark.parametrize("row", ONSETS)
def test_the_onset_of_pruning_for_each_row_of_the_paper(row):
    decay, init = ROWS[row]
    least = math.log(init / math.log(1e-3 / (1 - 1e-3)))
    sums = itertools.accumulate(IMAGENET)
    found = next(step for step, total in enumerate(sums) if e_folds([total], decay, 0.875) >= least)
    assert found / 5004 == pytest.approx(ONSETS[row] + 0.5, abs=0.6)


@pytest.mark.parametrize("row", ROWS)
def test_the_fit_to_each_row_of_the_paper(row):
    (decay, init), sparsity = ROWS[row], float(row)
    left = e_folds(IMAGENET, decay, 0.875) - math.log(init / ONSET)
    assert left == pytest.approx(0.75 * (1 - sparsity / 100) ** -0.85, rel=0.125)
    predicted = 100 * (1 - (left / 0.75) ** (-1 / 0.85))
    assert predicted == pytest.approx(sparsity, abs=1.3 if sparsity < 90 else 0.8)
    # So the rule returns the weight decay of the row.
    assert weight_decay_for(sparsity / 100, IMAGENET, 0.875, init) == pytest.approx(decay, rel=0.11)


@pytest.mark.parametrize(("sparsity", "share"), [(0.80, 0.69), (0.90, 0.52), (0.95, 0.38)])
def test_the_share_of_the_run_before_pruning_starts(sparsity, share):
    decay = weight_decay_for(sparsity, IMAGENET, 0.875, -3200.0)
    assert math.log(3200 / 7) / e_folds(IMAGENET, decay, 0.875) == pytest.approx(share, abs=0.02)


def test_the_weight_decay_is_inversely_proportional_to_the_sum_of_the_schedule():
    rates = [0.1] * 5000
    first = weight_decay_for(0.9, rates, 0.9, -20.0)
    assert weight_decay_for(0.9, rates * 2, 0.9, -20.0) == pytest.approx(first / 2)
    assert weight_decay_for(0.9, rates, 0.8, -20.0) == pytest.approx(first * 2)
    assert weight_decay_for(0.95, rates, 0.9, -20.0) > first
    assert weight_decay_for(0.9, rates, 0.9, -200.0) > first
    assert STR.for_schedule(0.9, iter(rates), momentum=0.9) == (STR(init=-20.0), first)


def test_s_does_not_pass_zero_up_to_the_bound_on_the_weight_decay():
    """The bound on η λ follows from v ← μ v + λ s, s ← s − η v."""
    for momentum in (0.0, 0.9):
        limit = (1 - math.sqrt(momentum)) ** 2
        assert max(optimized(torch.optim.SGD, [0.1] * 2000, 9.9 * limit, -20.0, momentum=momentum)) <= 0
        assert max(optimized(torch.optim.SGD, [0.1] * 2000, 10.5 * limit, -20.0, momentum=momentum)) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, [0.1] * 999, 0.9, -20.0), r"sparsity must be in \(0, 1\), got 1.0"),
        ((90, [0.1] * 999, 0.9, -20.0), r"sparsity must be in \(0, 1\), got 90"),
        ((True, [0.1] * 999, 0.9, -20.0), r"sparsity must be in \(0, 1\), got True"),
        ((0.9, [0.1] * 999, 0.9, -5.0), "init must be finite and below -7, where pruning starts; got -5.0"),
        ((0.9, [0.1] * 999, 0.9, -math.inf), "init must be finite and below -7"),
        ((0.9, [0.1] * 999, 1.0, -20.0), r"momentum must be in \[0, 1\), got 1.0"),
        ((0.9, [], 0.9, -20.0), "the sum of the learning rates must be positive and finite, got 0"),
        ((0.9, [math.nan], 0.9, -20.0), "the sum of the learning rates must be positive and finite, got nan"),
        (
            (0.9, [0.1] * 100, 0.9, -20.0),
            "100 steps are too few for sparsity 0.9 from init -20: the weight decay this requires",
        ),
    ],
)
def test_bad_arguments_of_the_rule_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        weight_decay_for(*arguments)


INPUT = (1, 1, 28, 28)
NOISE = {"name": "small_run:noise", "batch_size": 4}


def recipe(**changes):
    base = {
        "model": {"name": "resnet8", "width": 2},
        "data": {"name": "mnist5k", "batch_size": 100},
        "method": {"name": "str", "for_sparsity": 0.9},
        "schedule": {"epochs": 30},
        "tensorboard": False,
    }
    return Recipe.model_validate(base | changes)


def test_for_sparsity_in_a_recipe_chooses_the_weight_decay_by_the_rule():
    settled = with_settings(recipe(), 35, INPUT)
    assert build_method(settled.method) == STR(init=-20.0)
    rates = [0.1 * warmup_cosine(step, 30 * 35) for step in range(30 * 35)]
    assert settled.learning_rates(35) == rates
    # Rounded, so that the recipe is the same on machines whose cosines differ in the last digit.
    chosen = float(f"{weight_decay_for(0.9, rates, 0.9, -20.0):.6g}")
    assert settled.optimizer.threshold_weight_decay == chosen
    assert with_settings(settled, 35, INPUT) == settled
    asked = recipe(method={"name": "str", "for_sparsity": 0.9, "init": -200.0, "granularity": "filter"})
    lower = with_settings(asked, 35, INPUT)
    assert build_method(lower.method) == STR(init=-200.0, granularity="filter")
    assert lower.optimizer.threshold_weight_decay > settled.optimizer.threshold_weight_decay
    adamw = with_settings(recipe(optimizer={"name": "adamw", "lr": 0.01}), 35, INPUT)
    assert adamw.optimizer.threshold_weight_decay == pytest.approx(
        weight_decay_for(0.9, adamw.learning_rates(35), 0.0, -20.0), rel=1e-5
    )


def test_whether_a_run_is_too_short_is_decided_by_its_steps():
    hard = recipe(method={"name": "str", "for_sparsity": 0.99}, schedule={"epochs": 1})
    assert with_settings(hard, 5005, INPUT).optimizer.threshold_weight_decay > 0
    with pytest.raises(InputError, match="50 steps are too few"):
        with_settings(hard, 50, INPUT)


def test_learning_rates_are_those_of_the_loop_per_epoch_too():
    schedule = {"epochs": 100, "warmup_epochs": 5, "update": "epoch"}
    settings = recipe(schedule=schedule, optimizer={"lr": 0.256, "momentum": 0.875})
    assert settings.learning_rates(5004) == IMAGENET


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"name": "str", "for_sparsity": 0.9, "sparsity": 0.5}}, "give for_sparsity, or a target"),
        ({"method": {"name": "gmp", "for_sparsity": 0.9}}, "method 'gmp' has no rule for for_sparsity; give sparsity"),
        ({"method": {"name": "str", "for_sparsity": 0.9, "inti": -9}}, "no argument 'inti'; did you mean 'init'"),
        (
            {"method": {"name": "str", "for_sparsity": 0.9, "init": "low"}},
            r"init must be a number in \(-inf, inf\), got 'low'",
        ),
        ({"optimizer": {"threshold_weight_decay": 0.1}}, "leave one of them out"),
    ],
)
def test_bad_for_sparsity_settings_are_refused_when_the_recipe_is_read(tmp_path, changes, message):
    good = recipe().model_dump(mode="json", exclude_unset=True)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(good | changes))
    with pytest.raises(InputError, match=message):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.slow
def test_a_run_saves_the_chosen_weight_decay_and_resumes(tmp_path):
    asked = recipe(data=NOISE, schedule={"epochs": 90})
    assert train_run(asked, tmp_path / "run", stop_after=1) is None
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == resolve(asked)
    assert train_run(asked, tmp_path / "run", resume=True, stop_after=1) is None


def warned(**changes):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_schedule(recipe(**changes), 35)
    return [str(warning.message) for warning in caught if warning.category is SparsityWarning]


def test_the_values_of_imagenet_warn_on_a_small_data_set():
    (message,) = warned(method={"name": "str", "init": -3200.0}, optimizer={"weight_decay": 2.25e-5})
    assert "in the 1050 steps of this run a weight decay of 2.25e-05 takes s from -3200 to -31" in message
    assert "a threshold of 0." in message
    # The weight decay that it recommends is enough.
    decay = float(message.partition("threshold_weight_decay=")[2].split()[0])
    assert not warned(method={"name": "str", "init": -20.0}, optimizer={"threshold_weight_decay": decay})


@pytest.mark.parametrize(
    ("method", "optimizer", "count"),
    [
        ({"name": "str", "init": -20.0}, {"threshold_weight_decay": 1e-2}, 0),
        ({"name": "str", "init": -20.0}, {"threshold_weight_decay": 0.0, "weight_decay": 1e-2}, 1),
        ({"name": "str", "init": -20.0}, {"weight_decay": 1e-2}, 0),
        ({"name": "str", "init": -20.0}, {"weight_decay": 1e-2, "momentum": 0.0}, 1),
        ({"name": "str", "init": -20.0}, {"weight_decay": 1e-2, "name": "adamw"}, 1),
        ({"name": "str", "init": -20.0}, {"weight_decay": 1e-1, "momentum": 0.0}, 0),
        ({"name": "str", "init": -5.0}, {"weight_decay": 0.0}, 0),
        ({"name": "str", "init": -8.0, "g": "exp"}, {"weight_decay": 0.0}, 1),
        ({"name": "str", "init": -8.0, "g": "exp", "scale": 10.0}, {"weight_decay": 0.0}, 0),
        ({"name": "gmp", "sparsity": 0.5}, {"weight_decay": 0.0}, 0),
    ],
)
def test_the_warning_takes_optimizer_and_map_into_account(method, optimizer, count):
    assert len(warned(method=method, optimizer=optimizer)) == count


def test_a_run_too_short_for_any_weight_decay_warns():
    (message,) = warned(method={"name": "str", "init": -50.0}, schedule={"epochs": 1})
    assert message.endswith("takes more steps and a higher optimizer.threshold_weight_decay")


def test_training_warns_at_its_start(tmp_path):
    far = recipe(data=NOISE, method={"name": "str", "init": -3200.0})
    with pytest.warns(SparsityWarning, match="nothing can be pruned"):
        train_run(far, tmp_path / "run", stop_after=1)
