"""Checkpoints: exact at any step, stops by signals, damaged files, full disks, locks, temporaries."""

import copy
import hashlib
import multiprocessing
import os
import random
import resource
import signal
import time
import zipfile

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from small_run import RUNS, assert_same, history, in_child, noise, recipe
from sparing import CheckpointError, InputError, SparsityWarning, cli
from sparing.data.image import ImageData
from sparing.files import atomic_write, remove_temporaries
from sparing.run import loop
from sparing.run.checkpoint import load_checkpoint, load_newest, random_state, save_checkpoint, set_random_state
from sparing.run.distributed import Ranks
from sparing.run.interrupt import SAVED, Interrupted, StopSignals
from sparing.run.lock import RunLock
from sparing.run.training import train_run

CPU = Ranks(torch.device("cpu"))
QUIET = Console(quiet=True)


def fit(wanted, out, ranks=CPU, **options):
    out.mkdir(exist_ok=True)
    with StopSignals() as stop:
        return loop.fit(wanted, noise(), ranks, out, QUIET, stop, **options)


def stop_at(monkeypatch, signals):
    """Send signals to this process in the middle of these steps, counted over all calls of `fit`."""
    backward, taken = loop.backward, 0

    def interrupted(*arguments):
        nonlocal taken
        taken += 1
        if taken in signals:
            signal.raise_signal(signals[taken])
        return backward(*arguments)

    monkeypatch.setattr(loop, "backward", interrupted)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_stopped_in_mid_epoch_ends_as_if_it_had_not_been(tmp_path, monkeypatch, name):
    fit(recipe(**RUNS[name]), tmp_path / "straight")
    # The third one falls on the last step of an epoch, the last one on the last step of the run.
    stop_at(monkeypatch, {3: signal.SIGTERM, 4: signal.SIGUSR1, 10: signal.SIGINT, 20: signal.SIGTERM})
    often = recipe(**RUNS[name], checkpoint={"steps": 3})
    positions = []
    for _ in range(4):
        with pytest.raises(Interrupted, match=r"stopped by SIG(TERM|USR1|INT); the state of the run is saved"):
            fit(often, tmp_path / "stopped")
        progress = load_checkpoint(tmp_path / "stopped" / "checkpoint.pt")["progress"]
        positions.append((progress["epoch"], progress["step"]))
    assert positions == [(0, 3), (0, 4), (0, 10), (1, 10)]
    assert fit(often, tmp_path / "stopped") is not None
    for file in ("checkpoint.pt", "best.pt"):
        assert_same(*(load_checkpoint(tmp_path / run / file) for run in ("straight", "stopped")))
    assert history(tmp_path / "straight") == history(tmp_path / "stopped")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
@pytest.mark.parametrize(("split", "position"), [("validation", (0, 10)), ("test", (2, 0))])
def test_a_stop_during_an_evaluation_is_not_delayed_to_its_end(tmp_path, monkeypatch, split, position):
    train_run(recipe(), tmp_path / "straight")
    evaluation, used = ImageData.evaluation, []

    class Twice:
        """The batches, twice, and a signal between them."""

        def __init__(self, batches):
            self.batches, self.examples = batches, 80

        def __iter__(self):
            yield from self.batches
            signal.raise_signal(signal.SIGTERM)
            yield from self.batches

    def batches(self, wanted, rank=0, ranks=1):
        used.append(wanted)
        found = evaluation(self, wanted, rank, ranks)
        return Twice(found) if used.count(split) == 1 and wanted == split else found

    monkeypatch.setattr(ImageData, "evaluation", batches)
    with pytest.raises(Interrupted):
        train_run(recipe(), tmp_path / "stopped")
    progress = load_checkpoint(tmp_path / "stopped" / "checkpoint.pt")["progress"]
    assert (progress["epoch"], progress["step"]) == position
    assert train_run(recipe(), tmp_path / "stopped", resume=True)["test_count"] == 40
    assert_same(*(load_checkpoint(tmp_path / run / "checkpoint.pt") for run in ("straight", "stopped")))
    assert history(tmp_path / "straight") == history(tmp_path / "stopped")


@pytest.mark.parametrize("split", ["validation", "test"])
def test_an_evaluation_that_misses_examples_is_an_error(tmp_path, monkeypatch, split):
    evaluation = ImageData.evaluation

    def batches(self, wanted, rank=0, ranks=1):
        found = evaluation(self, wanted, rank, ranks)
        found.examples = 41 if wanted == split else 40
        return found

    monkeypatch.setattr(ImageData, "evaluation", batches)
    with pytest.raises(InputError, match="the data has 40 examples to evaluate, but 41 were promised"):
        train_run(recipe(), tmp_path / "run")


@pytest.mark.slow
def test_checkpoints_are_written_by_steps_by_minutes_and_after_epochs(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        loop, "save_checkpoint", lambda path, content, keep=1: written.append((path.name, content, keep))
    )

    def steps(section):
        written.clear()
        fit(recipe(method=None, checkpoint=section), tmp_path / "run")
        progress = [content["progress"] for name, content, keep in written if name == "checkpoint.pt" and keep == 7]
        return [10 * each["epoch"] + each["step"] for each in progress]

    assert steps({"minutes": None, "keep": 7}) == [10, 20]
    assert steps({"steps": 4, "minutes": None, "keep": 7}) == [4, 8, 10, 12, 16, 20]
    assert steps({"minutes": 1e-9, "keep": 7}) == list(range(1, 21))
    assert steps({"keep": 7}) == [10, 20]


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, 9, 10])  # 10 is the last step of the epoch
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_no_checkpoint_holds_numbers_that_are_not_finite(tmp_path, monkeypatch, at, value, what):
    backward, taken = loop.backward, []

    def poisoned(model, *arguments):
        loss = backward(model, *arguments)
        taken.append(loss)
        if len(taken) == at and what == "gradient":
            next(model.parameters()).grad[0] = value
        return loss * value if len(taken) == at and what == "loss" else loss

    wanted = recipe(checkpoint={"steps": 1})
    with monkeypatch.context() as patch:
        patch.setattr(loop, "backward", poisoned)
        with pytest.raises(InputError, match=r"(loss|conv1)\S* .* in epoch 1: .* checkpoint, if any, is kept"):
            fit(wanted, tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["progress"]["step"] == at - 1
    if at == 3:
        fit(wanted, tmp_path / "run")
        fit(wanted, tmp_path / "straight")
        assert_same(*(load_checkpoint(tmp_path / run / "checkpoint.pt") for run in ("straight", "run")))


# Signals


def test_a_second_ctrl_c_leaves_at_once():
    def twice():
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.received == signal.SIGINT
            signal.raise_signal(signal.SIGINT)

    assert in_child(twice) == -signal.SIGINT


def test_signals_that_the_process_ignores_remain_ignored():
    def ignoring():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        os._exit(10 + stop.received)

    assert in_child(ignoring) == 10


def test_the_command_line_exits_with_75_and_says_how_to_continue(tmp_path, monkeypatch):
    def stopped(*args, **kwargs):
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(cli, "train_run", stopped)
    (tmp_path / "r.yaml").write_text(recipe().to_yaml())
    result = CliRunner().invoke(cli.app, ["train", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run")])
    assert result.exit_code == SAVED == 75
    assert "stopped by SIGTERM; the state of the run is saved, continue with: sparing train" in result.output
    assert result.output.rstrip().endswith("--resume auto")


# Files


def test_every_flipped_bit_and_every_cut_is_found(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"w": torch.arange(3.0)})
    assert torch.equal(load_checkpoint(path)["w"], torch.arange(3.0))
    assert torch.load(path, weights_only=True).keys() == {"format", "w"}, "it is a plain file of torch.save"
    whole = path.read_bytes()
    with open(path, "rb+", buffering=0) as file:
        for position, byte in enumerate(whole):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), position)
                with pytest.raises(CheckpointError, match="damaged"):
                    load_checkpoint(path)
            os.pwrite(file.fileno(), bytes([byte]), position)
        assert path.read_bytes() == whole
        for size in range(len(whole) - 1, -1, -7):
            file.truncate(size)
            with pytest.raises(CheckpointError, match="damaged|truncated"):
                load_checkpoint(path)


@pytest.mark.slow
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, monkeypatch):
    wanted = recipe(checkpoint={"steps": 3})
    fit(wanted, tmp_path / "straight")
    out = tmp_path / "run"
    fit(wanted, out, stop_after=1)
    newest, before = out / "checkpoint.pt", out / "checkpoint.1.pt"
    assert load_checkpoint(before)["progress"]["step"] == 9
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    stop_at(monkeypatch, {1: signal.SIGTERM})
    damaged = rf"{newest}: is damaged.*Using the checkpoint before, {before}"
    with pytest.warns(SparsityWarning, match=damaged), pytest.raises(Interrupted):
        fit(wanted, out)
    assert load_checkpoint(before)["progress"]["step"] == 9, "the damaged file was not kept as the one before"
    assert fit(wanted, out) is not None
    assert_same(*(load_checkpoint(tmp_path / run / "checkpoint.pt") for run in ("straight", "run")))
    newest.unlink()  # as if the process was killed between two renames
    with pytest.warns(SparsityWarning, match="there is no such file. Using"):
        assert load_newest(newest)[1] == before
    before.write_bytes(b"")
    newest.write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"{newest}: is truncated; checkpoint {before}: is truncated"):
        fit(wanted, out)


def test_the_last_checkpoints_are_kept(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for number in range(5):
        save_checkpoint(path, {"number": number}, keep=3)
    assert [load_checkpoint(tmp_path / f"checkpoint{age}.pt")["number"] for age in ("", ".1", ".2")] == [4, 3, 2]
    (tmp_path / "checkpoint.mine.pt").touch()
    save_checkpoint(path, {"number": 5}, keep=1)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["checkpoint.mine.pt", "checkpoint.pt"]


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"number": 1})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (100, 20_000):  # of the largest file
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        try:
            with pytest.raises(CheckpointError, match=r"checkpoint.pt: cannot be written \(File too large\)"):
                save_checkpoint(path, {"w": torch.randn(10_000)}, keep=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert load_checkpoint(path)["number"] == 1
        assert [each.name for each in tmp_path.iterdir()] == ["checkpoint.pt"]


def add_checksum(path):
    """Give a forged zip file the checksum of a checkpoint."""
    content = path.read_bytes()[:-2] + (64).to_bytes(2, "little")
    path.write_bytes(content + hashlib.sha256(content[:-2]).hexdigest().encode())


def test_a_forged_file_runs_no_code_and_unfolds_into_no_memory(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'owned'}",))

    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"model": Evil()})
    with pytest.raises(CheckpointError, match="unreadable"):
        load_checkpoint(path)
    assert not (tmp_path / "owned").exists()
    for unfolded in (1000, 10**7):  # to a little more than the file, and to very much more
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02}.")
            archive.writestr("archive/data/0", bytes(unfolded))
        add_checksum(path)
        with pytest.raises(CheckpointError, match="declares more content than it has"):
            load_checkpoint(path)


def forge(content, where, value):
    content = copy.deepcopy(content)
    *parents, last = where
    section = content
    for key in parents:
        section = section[key]
    if value is None:
        del section[last]
    else:
        section[last] = value
    return content


FORGED = [
    (("model",), None), (("model",), 5), (("model", "fc.weight"), torch.zeros(3)), (("model", "fc.weight"), "text"),
    (("optimizer",), {}), (("optimizer", "param_groups"), []), (("optimizer", "state", 0), 7),
    (("optimizer", "state", 0, "momentum_buffer"), torch.zeros(2)),
    (("optimizer", "state", 0, "momentum_buffer"), "text"), (("optimizer", "state", 0, "other"), torch.zeros(())),
    (("optimizer", "param_groups", 0, "momentum"), "0.9"), (("optimizer", "param_groups", 0, "nesterov"), True),
    (("scaler", "scale"), "large"), (("scaler", "scale"), float("nan")), (("scaler", "growth_factor"), None),
    (("progress", "epoch"), 99), (("progress", "epoch"), -1), (("progress", "step"), 1.5), (("progress", "x"), 1),
    (("progress", "seconds"), "x"), (("progress", "sparsest"), "x"), (("progress", "best"), "x"),
    (("progress", "best", "sparsity"), float("nan")), (("progress", "step"), None), (("scaler", "scale"), 10**400),
    (("scaler", "growth_interval"), 2**63), (("scaler", "scale"), True), (("progress",), [1]),
    (("ranks",), []), (("ranks", 0, "random", "cpu"), torch.zeros(3, dtype=torch.uint8)),
    (("ranks", 0, "random", "python"), (1, 2, 3)), (("ranks", 0, "loss"), torch.zeros(2)),
    (("ranks", 0, "examples"), "many"), (("ranks", 0), {}), (("average", "n_averaged"), None),
]  # fmt: skip


@pytest.mark.slow
def test_a_checkpoint_with_a_damaged_part_is_refused_in_one_sentence(tmp_path):
    wanted = recipe(ema=0.9, amp="fp16")
    fit(wanted, tmp_path, stop_after=1)
    path = tmp_path / "checkpoint.pt"
    content = load_checkpoint(path)
    for where, value in FORGED:
        save_checkpoint(path, forge(content, where, value))
        try:
            fit(wanted, tmp_path)
        except CheckpointError as error:
            message = str(error)
        else:
            pytest.fail(f"{where} = {value} was accepted")
        assert message.startswith(f"checkpoint {path}: does not fit the recipe ("), where
        assert "\n" not in message, where


def test_the_random_generators_of_torch_python_and_numpy_are_restored(tmp_path):
    np = pytest.importorskip("numpy")
    save_checkpoint(tmp_path / "c.pt", random_state(torch.device("cpu")))
    drawn = [(torch.rand(2).tolist(), random.random(), np.random.rand(3).tolist())]
    content = load_checkpoint(tmp_path / "c.pt")
    set_random_state(content, torch.device("cpu"))
    drawn.append((torch.rand(2).tolist(), random.random(), np.random.rand(3).tolist()))
    assert drawn[0] == drawn[1]


def test_temporaries_of_killed_writes_are_removed_and_no_other_file(tmp_path):
    def killed():
        with atomic_write(tmp_path / "checkpoint.pt") as temporary, atomic_write(tmp_path / "figures" / "a.png"):
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    (tmp_path / "figures").mkdir()
    assert in_child(killed) == -signal.SIGKILL
    assert len([*tmp_path.glob(".checkpoint*"), *tmp_path.glob("figures/.a.png*")]) == 2
    for mine in (".profile", ".notes.1234", "model.host.1.0123abcd"):
        (tmp_path / mine).touch()
    with atomic_write(tmp_path / "in-use") as temporary:
        remove_temporaries(tmp_path)
        assert temporary.exists(), "its process still runs"
    names = {path.name for path in tmp_path.rglob("*")}
    assert names == {".profile", ".notes.1234", "model.host.1.0123abcd", "figures", "in-use"}


@pytest.mark.slow
def test_one_process_at_a_time_trains_in_a_run_directory(tmp_path):
    out = tmp_path / "run"
    fit(recipe(), out, stop_after=1)
    (out / "recipe.yaml").write_text(recipe().to_yaml())
    (out / ".checkpoint.pt.elsewhere.1.0123abcd").touch()
    ready, child = multiprocessing.Event(), os.fork()
    if not child:
        with RunLock(out) as lock:
            lock.acquire()
            ready.set()
            time.sleep(60)
    assert ready.wait(30)
    with pytest.raises(InputError, match=rf"run is in use by process {child} on .*; wait until it ends, or choose"):
        train_run(recipe(), out, resume=True)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert train_run(recipe(), out, resume=True)["epochs"] == 2
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")], "lock or temporaries are left"
