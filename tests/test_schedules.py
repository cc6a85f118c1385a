"""Schedules: exact at both ends, monotone between, and refused where they cannot be followed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing import InputError
from sparing.schedules import check_fraction, check_schedule, cosine, cubic, is_update, to_step, warmup_cosine

laws = settings(max_examples=100, deadline=None)
steps = st.integers(0, 500)
fractions = st.floats(0, 1)


@laws
@given(steps, steps, fractions)
def test_the_cubic_ramp_is_exact_at_its_ends_and_rises_between(begin, length, final):
    end = begin + length
    ramp = [cubic(step, begin, end, final) for step in range(end + 2)]
    assert ramp == sorted(ramp)
    assert all(value == 0 for value in ramp[: begin + (length > 0)])
    assert ramp[end] == final
    assert ramp[end + 1] == final


def test_the_cubic_ramp_by_hand():
    assert [cubic(step, 10, 20, 0.8) for step in (10, 15, 20)] == [0.0, 0.8 * 7 / 8, 0.8]
    # An eighth of the way, seven eighths cubed are left.
    assert cubic(1, 0, 8, 1.0) == 1 - (7 / 8) ** 3
    # One shot.
    assert [cubic(step, 5, 5, 0.9) for step in (4, 5)] == [0.0, 0.9]


@laws
@given(st.integers(1, 500), st.floats(1e-6, 1))
def test_the_cosine_falls_from_its_start_to_zero(end, initial):
    fall = [cosine(step, end, initial) for step in range(end + 2)]
    assert fall == sorted(fall, reverse=True)
    assert fall[0] == initial
    assert fall[end] == 0
    assert fall[end + 1] == 0


def test_the_cosine_by_hand():
    assert cosine(50, 100, 0.3) == pytest.approx(0.15)
    assert cosine(25, 100, 0.4) == pytest.approx(0.2 * (1 + 2**-0.5))
    assert cosine(0, 0, 0.3) == 0


@pytest.mark.parametrize(
    ("position", "factor"), [(0, 0.2), (4, 1.0), (5, 1.0), (52.5, 0.5), (100, 0.0), (101, 0.0), (2.5, 0.7)]
)
def test_warm_up_and_cosine_by_hand(position, factor):
    assert warmup_cosine(position, 100, 5) == pytest.approx(factor)


@laws
@given(steps, steps, st.integers(1, 100))
def test_updates_include_begin_and_end_and_come_every_so_many_steps(begin, length, every):
    end = begin + length
    updates = [step for step in range(end + 200) if is_update(step, begin, end, every)]
    last = max(end, 1)  # no step is done before the first
    assert updates[0] == begin
    assert updates[-1] == last
    assert set(range(begin, last + 1, every)) | {last} == set(updates)


@pytest.mark.parametrize(
    ("position", "step"), [(0, 0), (1, 1), (40, 40), (0.0, 0), (1.0, 200), (0.25, 50), (0.333, 67), (200, 200)]
)
def test_an_int_is_a_step_and_a_float_a_fraction(position, step):
    assert to_step(position, 200) == step
    assert isinstance(to_step(position, 200), int)


GOOD = {"steps": 100, "begin": 0.2, "end": 80, "every": 10}


@pytest.mark.parametrize(
    "change",
    [{}, {"begin": 0, "end": 100}, {"begin": 0.0, "end": 1.0}, {"begin": 80, "every": 1}, {"every": 60}, {"steps": 80}],
)
def test_schedules_that_can_be_followed_pass(change):
    check_schedule("GMP", **{**GOOD, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "GMP: steps must be a whole number of optimizer steps, at least 1, got 0"),
        ({"steps": 1e3}, "GMP: steps must be a whole number of optimizer steps, at least 1, got 1000.0"),
        ({"steps": True}, "GMP: steps must be a whole number of optimizer steps, at least 1, got True"),
        ({"every": 0}, "GMP: every must be a whole number of optimizer steps, at least 1, got 0"),
        ({"every": "10"}, "GMP: every must be a whole number of optimizer steps, at least 1, got '10'"),
        ({"begin": -1}, "begin must be a step from 0 to 100 or a fraction .float. from 0.0 to 1.0, got -1"),
        ({"begin": "half"}, "begin must be a step from 0 to 100 or a fraction .float. from 0.0 to 1.0, got 'half'"),
        ({"begin": False}, "begin must be a step from 0 to 100 or .* got False"),
        ({"end": 101}, "end must be a step from 0 to 100 or a fraction .float. from 0.0 to 1.0, got 101"),
        ({"end": 1.5}, "end must be a step from 0 to 100 or a fraction .float. from 0.0 to 1.0, got 1.5"),
        ({"begin": 0.9}, r"begin=0.9 \(step 90\) comes after end=80 \(step 80\)"),
        ({"every": 61}, "every=61 is longer than the 60 steps from begin to end"),
    ],
)
def test_schedules_that_cannot_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        check_schedule("GMP", **{**GOOD, **change})


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.1, True, "0.3", None, float("nan")])
def test_what_is_no_fraction_is_refused(value):
    with pytest.raises(InputError, match="RigL: fraction must be a fraction between 0 and 1, got"):
        check_fraction("RigL", "fraction", value)


def test_a_fraction_passes():
    check_fraction("RigL", "fraction", 0.3)
