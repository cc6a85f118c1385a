"""Test sweeps: the number of trials with failing workers, the Pareto front, and input validation."""

import contextlib
import functools
import json
import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from glob import glob
from pathlib import Path
from types import SimpleNamespace

import optuna
import pandas as pd
import pytest
import sqlalchemy
import torch
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import FixedTrial

import sparing.run.sweep
import sparing.run.sweep_file
from sparing import InputError
from sparing.cli import main
from sparing.data import DATASETS, Images
from sparing.data.image import ImageData
from sparing.files import atomic_write
from sparing.run.log import read_history
from sparing.run.sweep import MAX_RETRIES, run_sweep
from sparing.run.sweep_file import Sweep, load_sweep

SWEEPS = sorted(Path(__file__).parent.parent.joinpath("recipes", "sweeps").glob("*.yaml"))
RECIPE = {
    "model": {"name": "resnet8", "width": 2},
    "data": {"name": "noise", "batch_size": 20},
    "method": {"name": "str", "init": -4.0},
    "optimizer": {"lr": 0.1, "threshold_weight_decay": 0.05},
    "schedule": {"epochs": 1},
    "tensorboard": False,
}
SEARCH = {
    "optimizer.threshold_weight_decay": {"low": 1e-3, "high": 1e-1, "log": True},
    "method.init": [-4, -3.5],
}


def sweep(**changes):
    return Sweep.model_validate({"recipe": RECIPE, "search": SEARCH, "trials": 3, **changes})


def write(place, **changes):
    (place / "recipe.yaml").write_text(json.dumps(RECIPE))
    content = {"recipe": "recipe.yaml", "search": SEARCH, "trials": 4} | changes
    (place / "sweep.yaml").write_text(json.dumps(content))
    return place / "sweep.yaml"


def measured(recipe):
    """Return metrics computed from the recipe: the higher the decay, the fewer nonzero weights."""
    decay = recipe.optimizer.threshold_weight_decay
    nonzero = round(1 / decay)
    cost = {"sparsity": 1 - nonzero / 1000, "weights": 1000, "nonzero": nonzero, "macs": 50 * nonzero}
    return {"validation_accuracy": nonzero / 1000, "accuracy": 0.123456, "seconds": 1.0, **cost}


@functools.cache
def _noise(shift=0):
    images = Images(torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8), torch.arange(40) % 10)
    return ImageData(images, images, images, mean=(0.5,), std=(0.25,), num_classes=10, shift=shift)


@pytest.fixture(autouse=True)
def _small_data(monkeypatch):
    """Add a data set of 40 noisy images."""
    monkeypatch.setitem(DATASETS, "noise", lambda shift=0: _noise(shift))


@pytest.fixture
def untrained(monkeypatch):
    """Replace training by a stub. Returns the names of the run directories in training order."""
    trained = []
    monkeypatch.setattr(sparing.run.sweep_file, "resolve", lambda recipe, data: recipe)
    axes = SimpleNamespace(set=lambda **labels: None)
    monkeypatch.setattr("optuna.visualization.matplotlib.plot_pareto_front", lambda *args, **others: axes)
    monkeypatch.setattr("matplotlib.pyplot.savefig", lambda *args, **others: None)

    def train_run(recipe, out, *, resume):
        assert resume
        trained.append(out.name)
        out.mkdir(parents=True, exist_ok=True)
        return measured(recipe)

    monkeypatch.setattr(sparing.run.sweep, "train_run", train_run)
    return trained


@pytest.mark.slow
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_shipped_sweep_can_be_trained_and_starts_with_a_comment(path):
    assert path.read_text().startswith("#")
    try:
        load_sweep(path).check()
    except InputError as error:
        if "fashion_mnist: folder" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.slow
def test_an_interrupted_sweep_continues_its_run_and_writes_the_pareto_front(tmp_path, monkeypatch):
    train_run = sparing.run.sweep.train_run
    seen = []

    def interrupted(recipe, out, *, resume):
        seen.append((recipe, out))
        if len(seen) == 1:
            assert train_run(recipe, out, resume=resume, stop_after=1) is None
            raise KeyboardInterrupt
        return train_run(recipe, out, resume=resume)

    monkeypatch.setattr(sparing.run.sweep, "train_run", interrupted)
    wanted, out = sweep(set={"schedule.epochs": 2}, trials=1), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_sweep(wanted, out)
    result = run_sweep(wanted, out)
    assert len(seen) == 2
    assert seen[0] == seen[1]
    assert [line["epoch"] for line in read_history(seen[0][1])] == [1, 2]
    assert [path.name for path in (out / "trials").iterdir()] == ["0000"]
    assert list(result["state"]) == ["FAIL", "COMPLETE"]  # the interrupted attempt and the one that continued it
    assert list(result["front"]) == [False, True]
    metrics = json.loads((out / "trials" / "0000" / "metrics.json").read_text())
    for key in ("values_validation_accuracy", "values_nonzero", "user_attrs_macs", "user_attrs_sparsity"):
        assert result[key][1] == metrics[key.removeprefix("values_").removeprefix("user_attrs_")]
    assert not [key for key in result if key.endswith("_accuracy") and "validation" not in key]
    assert (out / "front.png").stat().st_size > 1000
    assert (out / "trials.csv").read_text() == result.to_csv(index=False)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_values_may_have_any_letters():
    recipe = {"model": {"name": "resnet8"}, "data": {"name": "mnist"}}
    roots = ["/d/é", "/d/𝔸😀"]
    sweep = Sweep.model_validate({"recipe": recipe, "set": {"select": roots}, "search": {"data.root": roots}})
    trial = sweep.recipe_of(FixedTrial({"data.root": json.dumps(roots[1], ensure_ascii=False)}))
    assert (trial.select, trial.data.model_extra) == (roots, {"root": roots[1]})


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["nonzero", "macs"])
def test_the_front_holds_exactly_the_trials_that_no_other_trial_dominates(tmp_path, monkeypatch, untrained, objective):
    def train_run(recipe, out, *, resume):
        # One cost rises while the other falls, and the accuracy follows neither.
        x = recipe.optimizer.threshold_weight_decay
        cost = {"nonzero": int(1e4 * x), "macs": int(1e4 * (0.1 - x))}
        return measured(recipe) | cost | {"validation_accuracy": abs(x - 0.05)}

    monkeypatch.setattr(sparing.run.sweep, "train_run", train_run)
    table = run_sweep(sweep(trials=7, objective=objective), tmp_path / "out")
    assert len(table) == 7
    points = list(zip(table["values_validation_accuracy"], -table[f"values_{objective}"], strict=True))
    for point, on_front in zip(points, table["front"], strict=True):
        assert on_front == (not any(p != point and p[0] >= point[0] and p[1] >= point[1] for p in points))


@pytest.mark.slow
def test_a_finished_sweep_is_unchanged_by_a_rerun_and_can_be_extended(tmp_path, untrained):
    out, before = tmp_path / "out", optuna.logging.get_verbosity()
    run_sweep(sweep(), out)
    table = (out / "trials.csv").read_text()
    run_sweep(sweep(), out)
    assert (len(untrained), (out / "trials.csv").read_text()) == (3, table)
    # Device and logging may change, and so may the number of trials.
    assert list(run_sweep(sweep(set={"device": "cpu", "tensorboard": True}), out, trials=5)["number"]) == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert len(run_sweep(sweep(trials=4), out)) == len(untrained) == 5
    assert optuna.logging.get_verbosity() == before


@pytest.mark.slow
def test_a_failed_trial_is_recorded_and_the_sweep_continues(tmp_path, monkeypatch, untrained):
    train_run = sparing.run.sweep.train_run
    errors = [InputError("the loss became nan"), torch.OutOfMemoryError("no memory\nof much")]

    def failing(recipe, out, *, resume):
        if errors:
            raise errors.pop(0)
        return train_run(recipe, out, resume=resume)

    monkeypatch.setattr(sparing.run.sweep, "train_run", failing)
    table = run_sweep(sweep(trials=3), tmp_path / "out")
    assert list(table["state"]) == ["PRUNED", "PRUNED", "COMPLETE"]
    assert list(table["user_attrs_error"])[:2] == ["InputError: the loss became nan", "OutOfMemoryError: no memory"]
    assert list(table["front"]) == [False, False, True]


@pytest.mark.slow
def test_a_trial_with_a_nonfinite_loss_is_recorded(tmp_path):
    table = run_sweep(sweep(set={"optimizer.lr": 1e30}, trials=1), tmp_path / "out")
    assert table["user_attrs_error"][0].startswith("InputError: the loss became nan in epoch 1: lower optimizer.lr")
    assert not table["front"].any()


def test_an_unexpected_error_is_raised(tmp_path, monkeypatch, untrained):
    monkeypatch.setattr(sparing.run.sweep, "train_run", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_sweep(sweep(), tmp_path / "out")


@pytest.mark.slow
def test_finished_trials_are_kept_after_an_interruption(tmp_path, monkeypatch, untrained):
    train_run = sparing.run.sweep.train_run

    def interrupted(recipe, out, *, resume):
        if len(untrained) in (2, 3, 4, 5):
            untrained.append(out.name)
            raise KeyboardInterrupt
        return train_run(recipe, out, resume=resume)

    monkeypatch.setattr(sparing.run.sweep, "train_run", interrupted)
    for _ in range(4):  # more often than a trial may kill its worker
        with pytest.raises(KeyboardInterrupt):
            run_sweep(sweep(trials=4), tmp_path / "out")
    table = run_sweep(sweep(trials=4), tmp_path / "out")
    assert list(table["state"]).count("COMPLETE") == 4
    assert list(table["state"]).count("FAIL") == 4
    assert untrained[2:7] == ["0002"] * 5, "the interrupted trial is continued first, in its directory"
    assert sorted(set(untrained)) == ["0000", "0001", "0002", "0007"]


# A forked worker starts at once, and trains nothing, so that it needs none of torch's threads.
FORK = multiprocessing.get_context("fork")
forks = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.fixture
def slow(monkeypatch, untrained):
    """Replace training by a stub that takes a third of a second."""

    def train_run(recipe, out, *, resume):
        out.mkdir(parents=True)
        (out / "started").touch()
        time.sleep(0.3)
        return measured(recipe)

    monkeypatch.setattr(sparing.run.sweep, "train_run", train_run)
    monkeypatch.setattr(sparing.run.sweep, "POLL_INTERVAL", 0.1)


def run_two_workers(wanted, outs, storage=None):
    with ProcessPoolExecutor(2, FORK) as pool:
        workers = [pool.submit(run_sweep, wanted, out, storage=storage) for out in outs]
        tables = [worker.result(timeout=300) for worker in workers]
    pd.testing.assert_frame_equal(*tables)
    assert list(tables[0]["state"]).count("COMPLETE") == wanted.trials
    return tables[0][tables[0]["state"] == "COMPLETE"]


@pytest.mark.slow
@forks
def test_two_concurrent_workers_run_exactly_the_requested_trials(tmp_path, slow):
    run_two_workers(sweep(trials=5), [tmp_path / "out"] * 2)
    assert len(list((tmp_path / "out" / "trials").glob("*/started"))) == 5


def miss_heartbeats(out):
    """Let the last heartbeats of all workers be long ago."""
    with contextlib.closing(sqlite3.connect(out / "study.db")) as database, database:
        database.execute("UPDATE trial_heartbeats SET heartbeat = '2000-01-01 00:00:00.000000'")


@pytest.mark.slow
@forks
def test_another_worker_continues_the_trial_of_a_killed_worker(tmp_path, monkeypatch, untrained):
    train_run, out = sparing.run.sweep.train_run, tmp_path / "out"
    started = out / "started"
    monkeypatch.setattr(sparing.run.sweep, "train_run", lambda *args, **others: (started.touch(), time.sleep(600)))
    killed = FORK.Process(target=run_sweep, args=(sweep(trials=2), out))
    killed.start()
    while not started.exists() and killed.is_alive():
        time.sleep(0.05)
    killed.kill()
    killed.join()
    assert started.exists()
    miss_heartbeats(out)
    monkeypatch.setattr(sparing.run.sweep, "train_run", train_run)
    table = run_sweep(sweep(trials=2), out)
    assert list(table["state"]) == ["FAIL", "COMPLETE", "COMPLETE"]
    # Optuna gives the continued trial a new number, but its run stays in directory 0000.
    assert untrained == ["0000", "0002"]


@pytest.mark.slow
def test_a_worker_that_lost_its_trial_continues_with_another_trial(tmp_path, monkeypatch, untrained):
    train_run, first = sparing.run.sweep.train_run, iter([True])

    def suspended(recipe, out, *, resume):
        if next(first, False):  # another worker takes over the trial
            storage = optuna.storages.RDBStorage(
                f"sqlite:///{tmp_path}/out/study.db", {"poolclass": sqlalchemy.NullPool}
            )
            other = optuna.load_study(study_name="out", storage=storage)
            RetryHeartbeatStaleTrialCallback()(other, other.tell(0, state=optuna.trial.TrialState.FAIL))
        return train_run(recipe, out, resume=resume)

    monkeypatch.setattr(sparing.run.sweep, "train_run", suspended)
    table = run_sweep(sweep(trials=2), tmp_path / "out")
    assert list(table["state"]) == ["FAIL", "COMPLETE", "COMPLETE"]
    assert untrained == ["0000", "0000", "0002"]


@pytest.mark.slow
def test_a_trial_whose_worker_dies_too_often_is_replaced(tmp_path, monkeypatch, untrained):
    train_run, deaths = sparing.run.sweep.train_run, iter(range(MAX_RETRIES + 1))

    class Death(BaseException):
        """Ends the worker like a signal: Optuna does not catch it, so the trial stays in state RUNNING."""

    def deadly(recipe, out, *, resume):
        if next(deaths, None) is not None:
            untrained.append(out.name)
            raise Death
        return train_run(recipe, out, resume=resume)

    monkeypatch.setattr(sparing.run.sweep, "train_run", deadly)
    for _ in range(MAX_RETRIES + 1):
        with pytest.raises(Death):
            run_sweep(sweep(trials=1), tmp_path / "out")
        miss_heartbeats(tmp_path / "out")
    table = run_sweep(sweep(trials=1), tmp_path / "out")
    assert list(table["state"]) == ["FAIL"] * (MAX_RETRIES + 1) + ["COMPLETE"]
    assert untrained == ["0000"] * (MAX_RETRIES + 1) + ["0003"]


@pytest.fixture
def postgres():
    """Start a PostgreSQL server for one test and yield its URL."""
    pytest.importorskip("psycopg")
    found = shutil.which("initdb", path=os.pathsep.join([os.environ["PATH"], *glob("/usr/lib/postgresql/*/bin")]))
    if found is None:
        pytest.skip("PostgreSQL is not installed")
    # PostgreSQL refuses to run as root, and its socket needs a short path that its user can read.
    user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as place:
        if user:
            shutil.chown(place, "postgres", "postgres")
        run = functools.partial(subprocess.run, check=True, stdout=subprocess.DEVNULL, cwd=place, **user)
        control = [str(Path(found).with_name("pg_ctl")), "--pgdata", f"{place}/data", "--wait", "--log", f"{place}/log"]
        run([found, "--pgdata", f"{place}/data", "--username", "sparing", "--auth", "trust", "--no-sync"])
        run([*control, "start", "--options", f"-k {place} -c listen_addresses='' -c fsync=off"])
        try:
            yield f"postgresql+psycopg://sparing@/postgres?host={place}"
        finally:
            run([*control, "stop", "--mode", "immediate"])


@pytest.mark.slow
@forks
def test_workers_without_a_shared_directory_run_exactly_the_requested_trials(tmp_path, slow, postgres):
    outs = tmp_path / "a" / "out", tmp_path / "b" / "out"
    finished = run_two_workers(sweep(trials=5), outs, postgres)
    started = [sorted(int(path.parent.name) for path in out.glob("trials/*/started")) for out in outs]
    assert sorted(started[0] + started[1]) == list(finished["number"])
    assert all(started), "each worker has run at least one trial"
    assert (outs[0] / "trials.csv").read_text() == (outs[1] / "trials.csv").read_text()


@pytest.mark.slow
def test_a_trial_that_exceeds_the_total_is_not_trained(tmp_path, monkeypatch, untrained):
    stop = optuna.study.MaxTrialsCallback.__call__

    def late(callback, study, trial):
        """Do not see the last trial, as if another worker started it at the same time."""
        if trial.number != 1:
            stop(callback, study, trial)

    monkeypatch.setattr(optuna.study.MaxTrialsCallback, "__call__", late)
    table = run_sweep(sweep(trials=2), tmp_path / "out")
    assert list(table["state"]) == ["COMPLETE", "COMPLETE", "FAIL"]
    run_sweep(sweep(trials=3), tmp_path / "out")
    assert untrained == ["0000", "0001", "0003"]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"search": {"method.init": [-4, -3.5]}}, "search.optimizer.threshold_weight_decay.high, "),
        ({"search": SEARCH | {"method.init": [-4, -3]}}, r"\(they differ in search.method.init\)"),
        ({"objective": "macs"}, r"\(they differ in objective\)"),
        ({"set": {"optimizer.lr": 0.2}}, r"\(they differ in recipe.optimizer.lr\)"),
    ],
)
def test_a_directory_with_a_study_of_another_sweep_is_refused(tmp_path, untrained, changes, names):
    run_sweep(sweep(trials=1), tmp_path / "out")
    with pytest.raises(InputError, match=f"out contains a study of another sweep .*{names}"):
        run_sweep(sweep(**changes), tmp_path / "out")
    assert len(untrained) == 1


def test_two_writers_with_one_process_id_have_their_own_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)  # as in two containers
    path = tmp_path / "trials.csv"
    with atomic_write(path) as first, atomic_write(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_searched_values_keep_their_type_in_the_recipe():
    spaces = {"schedule.epochs": {"low": 1, "high": 3}, "optimizer.lr": {"low": 1, "high": 2.5}}
    numeric = sweep(search=spaces | {"seed": {"low": 1, "high": 9, "step": 4}})
    study = optuna.create_study(storage=optuna.storages.InMemoryStorage())
    for _ in range(5):
        recipe = numeric.recipe_of(study.ask())
        assert isinstance(recipe.schedule.epochs, int)
        assert isinstance(recipe.optimizer.lr, float)
        assert recipe.seed in (1, 5, 9)
    methods = [{"name": "gmp"}, {"name": "static_random"}, None]
    chosen = sweep(search={"method.sparsity": [0.5], "method": methods[:2]})
    values = {"method.sparsity": "0.5", "method": '{"name": "static_random"}'}
    assert chosen.recipe_of(FixedTrial(values)).method == {"name": "static_random", "sparsity": 0.5}
    assert sweep(search={"method": methods}).recipe_of(FixedTrial({"method": "null"})).method is None


def test_trials_train_no_dense_baseline():
    trial = FixedTrial({"seed": "1"})
    assert not sweep(recipe=RECIPE | {"dense_baseline": True}, search={"seed": [1]}).recipe_of(trial).dense_baseline


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"serach": {}}, "unknown key 'serach'; did you mean 'search'"),
        ({"search": {}}, "search: .*at least 1 item"),
        ({"search": {"method.init": []}}, "search.method.init.*at least 1 item"),
        ({"search": {"method.init": -3}}, "search.method.init.*valid dictionary.*, got -3"),
        ({"search": {"method.init": {"low": 1, "hihg": 2}}}, "method.init.*unknown key .*hihg'; did you mean 'high'"),
        ({"search": {"seed": {"low": "a", "high": 9}}}, "seed.*low.*valid"),
        ({"search": {"seed": {"low": 1, "high": 1e300}}}, "seed.*high.*less than or equal"),
        ({"objective": "flops"}, "objective: input should be 'nonzero' or 'macs', got 'flops'"),
        ({"trials": 0}, "trials: input should be greater than or equal to 1, got 0"),
        ({"recipe": "absent.yaml"}, "recipe .*absent.yaml: cannot be read: No such file"),
    ],
)
def test_an_invalid_sweep_file_is_reported_in_one_sentence(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        load_sweep(write(tmp_path, **changes))


def test_a_value_of_an_unsupported_type_is_named(tmp_path):
    (tmp_path / "sweep.yaml").write_text("recipe: {}\nset: {seed: 2020-02-20}\nsearch: {seed: [1]}\n")
    with pytest.raises(InputError, match=r"set.seed: .*valid JSON.*date"):
        load_sweep(tmp_path / "sweep.yaml")


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"optimizer.lrr": [0.1]}, "search.optimizer.lrr = 0.1: .*unknown key 'optimizer.lrr'; did you mean 'lr'"),
        ({"method.int": [0.1]}, "search.method.int = 0.1: .*no argument 'int'; did you mean 'init'"),
        ({"model.widht": [2]}, "search.model.widht = 2: model 'resnet8' has no argument 'widht'; .*'width'"),
        ({"data.shift": [99]}, "search.data.shift = 99: data: shift must be"),
        ({"optimizer.lr": [0.1, "fast"]}, 'search.optimizer.lr = "fast": .*optimizer.lr: .*valid number'),
        ({"select": [["conv9"]]}, "search.select = .*conv9"),
        ({"method.init": {"low": 2, "high": 1}}, "search.method.init = 2: .*low <= high.*low=2, high=1"),
        ({"optimizer.lr": {"low": 0, "high": 1.5, "log": True}}, "search.optimizer.lr = 0: .*low > 0.*log=True"),
        ({"seed": {"low": 1, "high": 9, "log": True, "step": 2}}, "search.seed = 1: .*step.*log"),
        ({"seed": {"low": 1, "high": 9, "step": -1}}, "search.seed = 1: .*step > 0.*-1"),
    ],
)
def test_an_invalid_searched_key_is_found_before_training(tmp_path, search, message):
    with pytest.raises(InputError, match=message):
        run_sweep(sweep(search=search), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_data_without_a_validation_set_is_refused(tmp_path, monkeypatch, untrained):
    monkeypatch.setattr(ImageData, "size", lambda self, split: 0 if split == "validation" else 40)
    with pytest.raises(InputError, match="data 'noise' has no validation set to compare trials with"):
        run_sweep(sweep(), tmp_path / "out")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql+psycopg://u:secret@localhost:1/x", "the database of .*out: .*connection"),
        ("nonsense", "--storage: .*parse.*; use sqlite:///FILE or postgresql.psycopg://HOST/DATABASE"),
        ("oracle://u:secret@localhost:1/x", "--storage: Failed to import DB .*; use sqlite:///FILE or postgresql"),
        ("sqlite:////dev/full/x.db", "the database of .*out: .*unable to open"),
    ],
)
def test_an_unreachable_database_is_reported_in_one_sentence_without_the_password(
    tmp_path, monkeypatch, untrained, url, message
):
    if "psycopg" in url:
        pytest.importorskip("psycopg")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(InputError, match=message) as error:
        run_sweep(sweep(), tmp_path / "out", storage=url)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_directory_that_cannot_be_written_is_named(tmp_path, untrained):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file cannot be written: File exists"):
        run_sweep(sweep(), tmp_path / "file")


def test_torchrun_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(InputError, match="sweeps do not run under torchrun"):
        run_sweep(sweep(), tmp_path / "out")


@pytest.mark.parametrize("missing", ["optuna", "pandas"])
def test_without_optuna_or_pandas_the_extra_is_named(tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=r"sweeps require Optuna and pandas: pip install 'sparing\[sweep\]'"):
        run_sweep(sweep(), tmp_path / "out")


@pytest.mark.slow
def test_the_command_shows_the_front_and_the_command_to_continue(tmp_path, monkeypatch, capsys, untrained):
    path = write(tmp_path, trials=1)
    monkeypatch.chdir(tmp_path)
    arguments = ["sparing", "sweep", str(path), "--trials", "2", "--out", "my study"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    shown = capsys.readouterr().out
    assert "trial 1: nonzero" in shown
    assert shown.endswith("Written to my study\n")
    header, *rows, _ = shown.splitlines()[2:]
    assert header.split()[:3] == ["number", "values_nonzero", "values_validation_accuracy"]
    assert len(rows) == 2

    monkeypatch.setattr(sys, "argv", [*arguments, "--json"])
    with pytest.raises(SystemExit):
        main()
    shown = json.loads(capsys.readouterr().out)
    assert [(trial["number"], trial["front"]) for trial in shown["trials"]] == [(0, True), (1, True)]

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sparing.run.sweep, "train_run", interrupt)
    monkeypatch.setattr(sys, "argv", [*arguments[:4], "3", *arguments[5:]])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code
    assert f"continue with: sparing sweep {path} --trials 3 --out 'my study'" in capsys.readouterr().err
