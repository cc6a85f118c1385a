"""Ranks that differ, stop, end, or are told to stop."""

import os
import signal
import time

import pytest
import torch

from small_run import RIGL, RUNS, assert_same, history, noise, on_ranks, recipe, train_ranks
from sparing import InputError
from sparing.run import distributed, loop, watch
from sparing.run.checkpoint import load_checkpoint
from sparing.run.distributed import Ranks
from sparing.run.interrupt import StopSignals

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")


TWO = {"method": RIGL, "checkpoint": {"steps": 4}, "schedule": {"epochs": 2}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("differs", "message", "written"),
    [
        ("learning rate", "the ranks have different recipes or options: optimizer.lr is 0.05 on rank 0 and", False),
        ("data", "the ranks have different data: train is", False),
        ("masks", "weights or masks: conv1.parametrizations.weight.0.mask is", False),
        ("masks later", "weights or masks: conv1.parametrizations.weight.0.mask is", True),
    ],
)
def test_ranks_that_differ_stop_and_name_the_difference(tmp_path, differs, message, written):
    # Without checkpoints in mid-epoch, a difference that is not found at the start is found after the first epoch.
    wanted = recipe(2, **TWO | ({} if written else {"checkpoint": {}}))
    for text, status in on_ranks(2, tmp_path, train_ranks, wanted, tmp_path / "run", differs):
        assert status == 2
        assert message in text
    assert not history(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint.pt").exists() == written
    if written:
        assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["progress"]["step"] == 4


@pytest.mark.slow
def test_ranks_without_a_shared_run_directory_are_reported_when_they_continue(tmp_path):
    def train(rank, differs, **options):
        train_ranks(rank, recipe(2, **TWO), tmp_path / "run", differs, **options)

    assert on_ranks(2, tmp_path, lambda rank: train(rank, "", stop_after=1)) == [("", 0)] * 2
    for text, status in on_ranks(2, tmp_path, lambda rank: train(rank, "directory")):
        assert status == 2
        assert "different progress, weights or masks: epoch is 1 on rank 0 and 0 on rank 1" in text


@pytest.mark.slow
def test_an_error_on_the_first_rank_ends_all_ranks_with_its_message(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "something").touch()
    for text, status in on_ranks(2, tmp_path, train_ranks, recipe(2, **TWO), tmp_path / "run"):
        assert status == 2
        assert "is not a run directory: it has no recipe.yaml" in text


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_the_run_ends_the_same(tmp_path):
    # The noise of this method is another one on each rank.
    wanted = recipe(2, **TWO | RUNS["variational_dropout"])
    for text, status in on_ranks(2, tmp_path, train_ranks, wanted, tmp_path / "run", "", 3):
        assert status == 2
        assert "stopped by SIGTERM" in text
    saved = load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert (saved["progress"]["step"], [part["examples"] for part in saved["ranks"]]) == (3, [6, 6])
    assert not torch.equal(*(part["random"]["cpu"] for part in saved["ranks"]))
    for out in ("run", "straight"):
        assert on_ranks(2, tmp_path, train_ranks, wanted, tmp_path / out) == [("", 0)] * 2
    assert_same(*(load_checkpoint(tmp_path / out / "checkpoint.pt") for out in ("run", "straight")))
    assert history(tmp_path / "run") == history(tmp_path / "straight")


@pytest.mark.slow
def test_a_signal_to_one_rank_during_an_evaluation_stops_all_after_the_epoch(tmp_path):
    for text, status in on_ranks(2, tmp_path, train_ranks, recipe(2, **TWO), tmp_path / "run", "", -1):
        assert status == 2
        assert "stopped by SIGTERM" in text
    progress = load_checkpoint(tmp_path / "run" / "checkpoint.pt")["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 0)


@pytest.mark.slow
def test_one_rank_continues_the_epoch_of_two(tmp_path):
    out = tmp_path / "run"
    on_ranks(2, tmp_path, train_ranks, recipe(2, **TWO), out, "", 3)
    parts = load_checkpoint(out / "checkpoint.pt")["ranks"]
    one = loop._Training(recipe(**TWO), noise(), Ranks(torch.device("cpu")), out, StopSignals())
    assert (one.progress.step, one._examples) == (3, 12)
    assert float(one._loss) == float(parts[0]["loss"] + parts[1]["loss"])
    one.run_epoch(1, None)
    assert (one.progress.epoch, one.progress.step) == (1, 0)


def stop_rank(rank, stopped, whole):
    watch.INTERVAL = 0.1
    with distributed.join("cpu", timeout=4.0) as ranks:  # more than a busy machine takes between two operations
        ranks.gather(rank)
        if rank == stopped:
            if whole:
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(30)
        ranks.gather(rank)


@pytest.mark.slow
@pytest.mark.parametrize(("stopped", "whole"), [(0, True), (1, True), (1, False)])
def test_a_rank_that_stops_is_named_and_the_run_ends(tmp_path, stopped, whole):
    text, status = on_ranks(2, tmp_path, stop_rank, stopped, whole, leave=stopped if whole else None)[1 - stopped]
    assert status == 1
    what = "does not answer" if whole else "does not go on: the other ranks have waited for it"
    assert f"rank {stopped} {what} for 4 s (rank_timeout)" in text


def end_rank(rank, waits):
    watch.INTERVAL = 0.1
    with distributed.join("cpu", timeout=30.0) as ranks:
        ranks.gather(rank)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if not waits:
            time.sleep(30)
        ranks.gather(rank)


@pytest.mark.parametrize("waits", [True, False], ids=["in an operation", "in a computation"])
def test_the_end_of_another_rank_is_one_sentence(tmp_path, waits):
    (text, status), _ = on_ranks(2, tmp_path, end_rank, waits)
    assert status == (2 if waits else 1)
    assert text.count("rank 0: another rank has ended, so this one ends too") == 1
    assert len(text.strip().splitlines()) == 1


def start_late(rank):
    watch.INTERVAL = 0.1
    with distributed.join("cpu", timeout=1.0) as ranks:
        if rank == 1:
            time.sleep(2.5)
        assert ranks.gather(rank) == [0, 1]


@pytest.mark.slow
def test_a_rank_may_need_longer_than_the_timeout_until_its_first_operation(tmp_path):
    assert on_ranks(2, tmp_path, start_late) == [("", 0)] * 2


def share(rank):
    def fail():
        raise InputError("rank 0 failed")

    with distributed.join("cpu") as ranks:
        model = torch.nn.BatchNorm1d(2)
        model.running_mean.fill_(rank)
        ranks.share_buffers(model)
        assert model.running_mean.tolist() == [0, 0]
        with pytest.raises(InputError, match="different options: b is None on rank 0 and 1 on rank 1"):
            ranks.check_same("options", {"a": 0} | ({"b": 1} if rank else {}))
        with pytest.raises(InputError, match="rank 0 failed"):
            ranks.run_on_first(fail)
        assert ranks.run_on_first(lambda: rank) == 0
        assert (ranks.max(rank, 5), ranks.sum(rank, 1)) == ([1, 5], [1, 2])


def test_ranks_share_values_buffers_and_errors(tmp_path):
    assert on_ranks(2, tmp_path, share) == [("", 0)] * 2
