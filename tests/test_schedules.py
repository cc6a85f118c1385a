"""Schedules: exact at both ends, monotone between, and updates at the steps that are documented."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing import InputError
from sparing.schedules import (
    Updates,
    check_number,
    check_positions,
    check_steps,
    cosine,
    cubic,
    to_step,
    warmup_cosine,
    warmup_drops,
)

laws = settings(max_examples=100)
steps = st.integers(0, 300)


@laws
@given(steps, steps, st.floats(0, 1))
def test_the_cubic_ramp_is_exact_at_its_ends_and_rises_between(begin, length, final):
    end = begin + length
    ramp = [cubic(step, begin, end, final) for step in range(end + 2)]
    assert ramp == sorted(ramp)
    assert all(value == 0 for value in ramp[: begin + (length > 0)])
    assert ramp[end] == ramp[end + 1] == final


def test_the_cubic_ramp_by_hand():
    assert [cubic(step, 10, 20, 0.8) for step in (10, 15, 20)] == [0.0, 0.8 * 7 / 8, 0.8]
    # After an eighth of the way, (7/8)³ of the sparsity is still to come.
    assert cubic(1, 0, 8, 1.0) == 1 - (7 / 8) ** 3
    # One-shot.
    assert [cubic(step, 5, 5, 0.9) for step in (4, 5)] == [0.0, 0.9]


@laws
@given(st.integers(1, 300), st.floats(1e-6, 1))
def test_the_cosine_falls_from_its_start_to_zero(end, initial):
    fall = [cosine(step, end, initial) for step in range(end + 2)]
    assert fall == sorted(fall, reverse=True)
    assert fall[0] == initial
    assert fall[end] == fall[end + 1] == 0


def test_the_cosine_by_hand():
    assert cosine(50, 100, 0.3) == pytest.approx(0.15)
    assert cosine(25, 100, 0.4) == pytest.approx(0.2 * (1 + 2**-0.5))
    assert cosine(0, 0, 0.3) == 0


@pytest.mark.parametrize(
    ("position", "factor"), [(0, 0.2), (4, 1.0), (5, 1.0), (52.5, 0.5), (100, 0.0), (101, 0.0), (2.5, 0.7)]
)
def test_warm_up_and_cosine_by_hand(position, factor):
    assert warmup_cosine(position, 100, 5) == pytest.approx(factor)


@pytest.mark.parametrize(("position", "factor"), [(0, 0.5), (1, 1.0), (2, 1.0), (9, 1.0), (10, 0.2), (20, 0.04)])
def test_warm_up_and_drops_by_hand(position, factor):
    assert warmup_drops(position, [10, 20], warmup=2, factor=0.2) == pytest.approx(factor)


@dataclass(frozen=True)
class Scheduled:
    """Names itself in the errors; `Updates.resolve` and the checks read its fields."""

    begin: int | float = 0
    end: int | float = 1.0
    every: int = 1
    share: float = 0.5


def resolve(begin, end, every, length, after_ramp=False):
    return Updates.resolve(Scheduled(), begin, end, every, length, after_ramp)


@laws
@given(st.data())
def test_updates_are_due_at_begin_every_interval_and_end(data):
    """The documented steps, counted; step 0 is before the first step that is taken, so nothing is due there."""
    length = data.draw(st.integers(1, 120))
    end = data.draw(st.integers(0, length))
    begin = data.draw(st.integers(0, end))
    every = data.draw(st.integers(1, max((end - begin) // 2, 1)))
    on_the_ramp = set(range(begin, end + 1, every)) | {end}
    updates = resolve(begin, end, every, length)
    due = {step for step in range(length + 50) if updates.due(step)}
    assert due == (on_the_ramp - {0} or {1})
    # To the end of the run, and at each of its last `every` steps: any of them may be the last that is taken.
    updates = resolve(begin, end, every, length, after_ramp=True)
    due = {step for step in range(length + 1) if updates.due(step)}
    last = {step for step in range(length - every + 1, length + 1) if step >= begin}
    assert due == (set(range(begin, length + 1, every)) | {end} | last) - {0}


@laws
@given(st.data(), st.floats(0, 1))
def test_progress_rises_from_the_start_to_exactly_one(data, start):
    length = data.draw(st.integers(1, 120))
    end = data.draw(st.integers(0, length))
    begin = data.draw(st.integers(0, end))
    updates = resolve(begin, end, 1, length)
    progress = [updates.progress(step, start) for step in range(length + 2)]
    assert progress == sorted(progress)
    assert all(value == start for value in progress[: begin + (begin < end)])
    assert all(value == 1.0 for value in progress[end:])
    assert progress[: end + 1] == pytest.approx(
        [start + (1 - start) * cubic(step, begin, end, 1.0) for step in range(end + 1)]
    )


@pytest.mark.parametrize(
    ("begin", "end", "every", "after_ramp", "interval"),
    [
        (0, 100, 50, False, 50),
        (0, 100, 51, False, 10),
        (20, 35, 8, False, 1),
        (20, 35, 8, True, 8),  # updates go on to step 100
        (20, 80, 1000, False, 6),
        (20, 80, 1000, True, 8),
        (5, 5, 7, False, 1),
        (0, 0, 100, False, 1),
    ],
)
def test_an_interval_that_fits_less_than_twice_becomes_a_tenth(begin, end, every, after_ramp, interval):
    assert resolve(begin, end, every, 100, after_ramp).every == interval


@pytest.mark.parametrize(
    ("position", "step"), [(0, 0), (1, 1), (40, 40), (0.0, 0), (1.0, 200), (0.25, 50), (0.333, 67), (200, 200)]
)
def test_an_int_is_a_step_and_a_float_a_fraction(position, step):
    assert to_step(position, 200) == step
    assert isinstance(to_step(position, 200), int)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: to_step(201, 200, "GMP: end=201"), "GMP: end=201 is step 201, beyond the 200 steps of the run"),
        (lambda: to_step(0.5, None, "GMP: end=0.5"), r"GMP: end=0.5 needs the length of the run: sparsify_\(model"),
        (lambda: resolve(0.9, 80, 1, 100), r"Scheduled: begin=0.9 \(step 90\) comes after end=80 \(step 80\)"),
        (lambda: resolve(0, 5, 1, None, after_ramp=True), r"Scheduled needs the length of the run"),
        (lambda: check_positions(Scheduled(begin=-1), "begin"), r"Scheduled: begin must be a step .int. ≥ 0 .*got -1"),
        (lambda: check_positions(Scheduled(end=1.5), "end"), "end must be .* got 1.5"),
        (lambda: check_positions(Scheduled(end="half"), "end"), "end must be .* got 'half'"),
        (lambda: check_positions(Scheduled(end=True), "end"), "end must be .* got True"),
        (lambda: check_positions(Scheduled(end=float("nan")), "end"), "end must be .* got nan"),
        (lambda: check_positions(Scheduled(every=0)), "every must be a whole number of optimizer steps.* got 0"),
        (lambda: check_positions(Scheduled(every="10")), "every must be a whole number of optimizer steps.* got '10'"),
        (lambda: check_positions(Scheduled(every=2.0)), "every must be a whole number of optimizer steps.* got 2.0"),
        (lambda: check_steps(0), "steps must be a whole number of optimizer steps, at least 1, got 0"),
        (lambda: check_steps(1e3), "steps must be a whole number of optimizer steps, at least 1, got 1000.0"),
        (lambda: check_steps(True), "steps must be a whole number of optimizer steps, at least 1, got True"),
        (lambda: check_positions(Scheduled(every=True)), "every must be a whole number of optimizer steps.* got True"),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_a_step_needs_no_length_and_a_schedule_that_fits_passes():
    assert to_step(40, None) == 40
    assert resolve(0, 40, 10, None) == Updates(0, 40, 10)
    check_steps(None)
    check_positions(Scheduled(begin=0, end=0.5, every=3), "begin", "end")


@pytest.mark.parametrize(
    ("interval", "good", "bad"),
    [
        ("(0, 1)", [0.1, 0.99], [0, 1, -0.1, 1.1]),
        ("[0, 1]", [0, 1, 0.5, True + 0.0], [-0.1, 1.1]),
        ("[0, inf)", [0, 1e30], [-1e-30, float("inf")]),
        ("(-inf, inf)", [-1e30, 0], [float("-inf"), float("inf")]),
    ],
)
def test_numbers_are_checked_against_their_interval(interval, good, bad):
    for value in good:
        check_number(Scheduled(share=value), "share", interval)
    for value in [*bad, True, "0.3", None, float("nan")]:
        with pytest.raises(InputError, match="Scheduled: share must be a number in .*, got"):
            check_number(Scheduled(share=value), "share", interval)
