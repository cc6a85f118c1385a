"""Test sweeps: the number of trials with failing workers, the Pareto front, and input validation."""

import copy
import csv
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from glob import glob
from pathlib import Path

import optuna
import pytest
import torch
from matplotlib.figure import Figure

import sparing.sweep
from sparing import InputError
from sparing.cli import main
from sparing.data import DATASETS
from sparing.sweep import Range, Sweep, load_sweep, run_sweep
from sparing.sweep.study import MAX_DEATHS, _requeue_stale_trial, run_number
from sparing.sweep.worker import _suggest, _Worker
from sparing.train.log import read_history

SWEEPS = sorted(Path(__file__).parent.parent.joinpath("recipes", "sweeps").glob("*.yaml"))
RECIPE = {
    "model": {"name": "resnet8", "width": 2},
    "data": {"name": "mnist5k", "batch_size": 350},
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


def table(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def measured(recipe):
    """Return metrics computed from the recipe: the higher the decay, the fewer nonzero weights."""
    decay = recipe.optimizer.threshold_weight_decay
    nonzero = round(1 / decay)
    cost = {"sparsity": 1 - nonzero / 1000, "weights": 1000, "nonzero": nonzero, "macs": 50 * nonzero}
    return {"validation_accuracy": nonzero / 1000, "accuracy": 0.123456, "seconds": 1.0, **cost}


@functools.cache
def _cached_data(name, arguments):
    return DATASETS[name](**dict(arguments))


@pytest.fixture(autouse=True)
def _cache_data(monkeypatch):
    """Cache the data set, because loading the digits takes longer than training on them."""
    for module in (sparing.sweep.file, sparing.train.run):
        monkeypatch.setattr(module, "build_data", lambda spec: _cached_data(spec.name, tuple(spec.model_extra.items())))


@pytest.fixture
def untrained(monkeypatch):
    """Replace training by a stub. Returns the list of run directories in training order."""
    trained = []
    monkeypatch.setattr(Sweep, "check", lambda self: None)
    monkeypatch.setattr(sparing.sweep.worker, "pareto_front", lambda points, front, cost: Figure())

    def train_run(recipe, out, *, resume):
        assert resume
        trained.append(out)
        out.mkdir(parents=True, exist_ok=True)
        return measured(recipe)

    monkeypatch.setattr(sparing.sweep.worker, "train_run", train_run)
    return trained


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_shipped_sweep_can_be_trained_and_starts_with_a_comment(path):
    assert path.read_text().startswith("#")
    try:
        load_sweep(path).check()
    except InputError as error:
        if "fashion_mnist: no folder" in str(error):
            pytest.skip(str(error))
        raise


def test_a_sweep_trains_and_writes_the_pareto_front(tmp_path):
    result = run_sweep(sweep(trials=1), tmp_path / "out")
    rows = table(tmp_path / "out" / "trials.csv")
    assert [row["trial"] for row in rows] == ["0"]
    assert {row["state"] for row in rows} == {"finished"}
    for row in rows:
        metrics = json.loads((tmp_path / "out" / "trials" / f"{int(row['trial']):04d}" / "metrics.json").read_text())
        assert float(row["validation_accuracy"]) == metrics["validation_accuracy"]
        assert (int(row["nonzero"]), int(row["macs"])) == (metrics["nonzero"], metrics["macs"])
        assert "accuracy" not in row, "trials must not be selected by test accuracy"
    assert result["front"]
    assert len(table(tmp_path / "out" / "front.csv")) == len(result["front"])
    assert (tmp_path / "out" / "front.png").stat().st_size > 1000
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("objective", ["nonzero", "macs"])
def test_the_front_holds_exactly_the_trials_that_no_other_trial_dominates(tmp_path, monkeypatch, untrained, objective):
    def train_run(recipe, out, *, resume):
        # One cost rises while the other falls, and the accuracy follows neither.
        x = recipe.optimizer.threshold_weight_decay
        cost = {"nonzero": int(1e4 * x), "macs": int(1e4 * (0.1 - x))}
        return measured(recipe) | cost | {"validation_accuracy": abs(x - 0.05)}

    monkeypatch.setattr(sparing.sweep.worker, "train_run", train_run)
    result = run_sweep(sweep(trials=12, objective=objective), tmp_path / "out")
    assert len(result["trials"]) == 12

    def dominates(a, b):
        return (
            a["validation_accuracy"] >= b["validation_accuracy"] and a[objective] <= b[objective]
            and (a["validation_accuracy"], a[objective]) != (b["validation_accuracy"], b[objective])
        )  # fmt: skip

    on_front = [row["trial"] for row in result["front"]]
    for row in result["trials"]:
        assert (row["trial"] in on_front) == (not any(dominates(other, row) for other in result["trials"]))
    assert [row[objective] for row in result["front"]] == sorted(row[objective] for row in result["front"])


def test_a_finished_sweep_is_unchanged_by_a_rerun_and_can_be_extended(tmp_path, untrained):
    run_sweep(sweep(), tmp_path / "out")
    before = (tmp_path / "out" / "trials.csv").read_text()
    run_sweep(sweep(), tmp_path / "out")
    assert (len(untrained), (tmp_path / "out" / "trials.csv").read_text()) == (3, before)
    result = run_sweep(sweep(), tmp_path / "out", trials=5)
    assert [row["trial"] for row in result["trials"]] == [0, 1, 2, 3, 4]
    assert (tmp_path / "out" / "trials.csv").read_text().startswith(before)
    assert len(run_sweep(sweep(trials=4), tmp_path / "out")["trials"]) == len(untrained) == 5


def test_a_failed_trial_is_recorded_and_the_sweep_continues(tmp_path, monkeypatch, untrained):
    train_run = sparing.sweep.worker.train_run
    errors = [InputError("the loss became nan"), torch.OutOfMemoryError("no memory\nof much")]

    def failing(recipe, out, *, resume):
        if errors:
            raise errors.pop(0)
        return train_run(recipe, out, resume=resume)

    monkeypatch.setattr(sparing.sweep.worker, "train_run", failing)
    result = run_sweep(sweep(trials=3), tmp_path / "out")
    rows = table(tmp_path / "out" / "trials.csv")
    assert [row["state"] for row in rows] == ["failed", "failed", "finished"]
    assert [row["error"] for row in rows] == ["the loss became nan", "no memory", ""]
    assert [row["trial"] for row in result["front"]] == [2]


def test_a_trial_with_a_nonfinite_loss_is_recorded_as_failed(tmp_path):
    result = run_sweep(sweep(set={"optimizer.lr": 1e30}, trials=1), tmp_path / "out")
    assert result["front"] == []
    assert result["trials"][0]["error"].startswith("the loss became nan in epoch 1: lower optimizer.lr")


def test_an_unexpected_error_is_raised(tmp_path, monkeypatch, untrained):
    monkeypatch.setattr(sparing.sweep.worker, "train_run", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_sweep(sweep(), tmp_path / "out")


def test_an_interrupted_trial_is_continued_in_its_directory(tmp_path, monkeypatch):
    train_run = sparing.sweep.worker.train_run
    seen = []

    def interrupted(recipe, out, *, resume):
        seen.append((recipe, out))
        if len(seen) == 1:
            assert train_run(recipe, out, resume=resume, stop_after=1) is None
            raise KeyboardInterrupt
        return train_run(recipe, out, resume=resume)

    monkeypatch.setattr(sparing.sweep.worker, "train_run", interrupted)
    wanted = sweep(set={"schedule.epochs": 2}, trials=1)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(wanted, tmp_path / "out")
    result = run_sweep(wanted, tmp_path / "out")
    assert [(row["trial"], row["state"]) for row in result["trials"]] == [(0, "finished")]
    assert len(seen) == 2
    assert seen[0] == seen[1]
    assert [line["epoch"] for line in read_history(seen[0][1])] == [1, 2]
    assert [path.name for path in (tmp_path / "out" / "trials").iterdir()] == ["0000"]


def test_finished_trials_are_kept_after_an_interruption(tmp_path, monkeypatch, untrained):
    train_run = sparing.sweep.worker.train_run

    def interrupted(recipe, out, *, resume):
        if len(untrained) == 2:
            untrained.append(out)
            raise KeyboardInterrupt
        return train_run(recipe, out, resume=resume)

    monkeypatch.setattr(sparing.sweep.worker, "train_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep(trials=4), tmp_path / "out")
    kept = table(tmp_path / "out" / "trials.csv")
    assert [row["state"] for row in kept] == ["finished", "finished"]
    result = run_sweep(sweep(trials=4), tmp_path / "out")
    assert [row["state"] for row in result["trials"]] == ["finished"] * 4
    assert table(tmp_path / "out" / "trials.csv")[:2] == kept
    assert untrained[2] == untrained[3], "the interrupted trial is continued first, in its directory"


WORKER = """
import json, sys, time, warnings
import sparing.sweep
from test_sweep import measured
warnings.simplefilter("error")
path, out, seconds, storage = sys.argv[1:]
def train_run(recipe, out, *, resume):
    out.mkdir(parents=True)
    (out / "started").touch()
    time.sleep(float(seconds))
    return measured(recipe)
sparing.sweep.worker.train_run = train_run
sparing.sweep.Sweep.check = lambda self: None
print(json.dumps(sparing.sweep.run_sweep(sparing.sweep.load_sweep(path), out, storage=storage or None)))
"""


def worker(path, out, seconds, storage=""):
    """Start a worker process on a sweep, in which each trial takes the given number of seconds."""
    command = [sys.executable, "-c", WORKER, str(path), str(out), str(seconds), storage]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=Path(__file__).parent, **pipes)


def test_another_worker_continues_the_trial_of_a_killed_worker(tmp_path, monkeypatch, untrained):
    path = write(tmp_path, trials=2)
    started = tmp_path / "out" / "trials" / "0000" / "started"
    with worker(path, tmp_path / "out", 600) as killed:
        deadline = time.monotonic() + 120
        while not started.exists() and killed.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        killed.kill()
    assert started.exists()
    monkeypatch.setattr(sparing.sweep.study, "HEARTBEAT_INTERVAL", 1)
    monkeypatch.setattr(sparing.sweep.worker, "POLL_INTERVAL", 1)
    result = run_sweep(load_sweep(path), tmp_path / "out")
    assert [row["state"] for row in result["trials"]] == ["finished", "finished"]
    # Optuna gives the continued trial a new number, but its run stays in directory 0000.
    assert sorted(out.name for out in untrained) in (["0000", "0001"], ["0000", "0002"])


def test_a_worker_that_lost_its_trial_continues_with_another_trial(tmp_path, monkeypatch, untrained):
    train_run = sparing.sweep.worker.train_run

    def suspended(recipe, out, *, resume):
        if not untrained:
            storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/out/study.db")
            other = optuna.load_study(study_name="out", storage=storage)
            _requeue_stale_trial(other, other.tell(0, state=optuna.trial.TrialState.FAIL))
            storage.remove_session()
            storage.engine.dispose()
        return train_run(recipe, out, resume=resume)

    monkeypatch.setattr(sparing.sweep.worker, "train_run", suspended)
    result = run_sweep(sweep(trials=2), tmp_path / "out")
    assert [row["state"] for row in result["trials"]] == ["finished", "finished"]
    assert [out.name for out in untrained] == ["0000", "0000", "0002"]


def test_a_trial_fails_after_the_maximum_number_of_dead_workers():
    study = optuna.create_study(storage=optuna.storages.InMemoryStorage())
    for _ in range(MAX_DEATHS):
        trial = study.ask()
        assert run_number(trial) == 0
        trial.suggest_float("x", 0, 1)
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        _requeue_stale_trial(study, study.trials[trial.number])
    assert run_number(study.ask()) == MAX_DEATHS
    assert len({trial.params["x"] for trial in study.trials[:MAX_DEATHS]}) == 1


def test_two_concurrent_workers_run_exactly_the_requested_trials(tmp_path):
    path = write(tmp_path, trials=9)
    with worker(path, tmp_path / "out", 0.3) as first, worker(path, tmp_path / "out", 0.3) as second:
        answers = [process.communicate(timeout=300) for process in (first, second)]
    assert [err for _, err in answers] == ["", ""]
    results = [json.loads(out) for out, _ in answers]
    assert results[0] == results[1]
    assert [row["state"] for row in results[0]["trials"]] == ["finished"] * 9
    assert len(list((tmp_path / "out" / "trials").glob("*/started"))) == 9


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
        run([found, "--pgdata", f"{place}/data", "--username", "sparing", "--auth", "trust"])
        run([*control, "start", "--options", f"-k {place} -c listen_addresses='' -c fsync=off"])
        try:
            yield f"postgresql+psycopg://sparing@/postgres?host={place}"
        finally:
            run([*control, "stop", "--mode", "immediate"])


def test_workers_without_a_shared_directory_run_exactly_the_requested_trials(tmp_path, postgres):
    path = write(tmp_path, trials=5)
    outs = tmp_path / "a" / "out", tmp_path / "b" / "out"
    with worker(path, outs[0], 0.3, postgres) as first, worker(path, outs[1], 0.3, postgres) as second:
        answers = [process.communicate(timeout=300) for process in (first, second)]
    assert [err for _, err in answers] == ["", ""]
    results = [json.loads(out) for out, _ in answers]
    assert results[0] == results[1]
    assert [row["state"] for row in results[0]["trials"]] == ["finished"] * 5
    started = [sorted(path.parent.name for path in out.glob("trials/*/started")) for out in outs]
    assert sorted(started[0] + started[1]) == [f"{row['trial']:04d}" for row in results[0]["trials"]]
    assert all(started), "each worker has run at least one trial"


def test_a_trial_that_finishes_while_the_tables_are_built_is_handled(tmp_path, monkeypatch, untrained):
    run_sweep(sweep(), tmp_path / "out")
    row = _Worker._row
    first_call = iter([True])

    def outdated_row(worker, trial):
        """Return the row of the first trial as if it were still running."""
        before = copy.copy(trial)
        if next(first_call, False):
            before.state, before._user_attrs = optuna.trial.TrialState.RUNNING, {}
        return row(worker, before)

    monkeypatch.setattr("sparing.sweep.worker.time.sleep", lambda seconds: None)
    monkeypatch.setattr(_Worker, "_row", outdated_row)
    result = run_sweep(sweep(), tmp_path / "out")
    assert [row["state"] for row in result["trials"]] == ["finished"] * 3


def test_a_trial_that_exceeds_the_total_is_not_trained(tmp_path, monkeypatch, untrained):
    run_sweep(sweep(), tmp_path / "out")
    refresh = _Worker._refresh

    def outdated(worker):
        """Hide the last trial, as if another worker had started it after this worker read the database."""
        refresh(worker)
        monkeypatch.setattr(_Worker, "_refresh", refresh)
        worker.rows = worker.rows[:-1]

    monkeypatch.setattr(_Worker, "_refresh", outdated)
    result = run_sweep(sweep(), tmp_path / "out")
    assert (len(result["trials"]), len(untrained)) == (3, 3)
    result = run_sweep(sweep(), tmp_path / "out", trials=4)
    assert [row["trial"] for row in result["trials"]] == [0, 1, 2, 4]


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


def test_device_and_logging_may_change_between_workers(tmp_path, untrained):
    run_sweep(sweep(trials=1), tmp_path / "out")
    run_sweep(sweep(trials=2, set={"device": "cpu", "tensorboard": True}), tmp_path / "out")
    assert len(untrained) == 2


def test_run_directories_without_their_study_are_refused(tmp_path, untrained):
    run_sweep(sweep(trials=1), tmp_path / "out")
    (tmp_path / "out" / "study.db").unlink()
    for _ in range(2):
        with pytest.raises(InputError, match="out/trials contains runs of another study"):
            run_sweep(sweep(trials=1), tmp_path / "out")


def test_searched_values_keep_their_type_in_the_recipe():
    spaces = {"schedule.epochs": {"low": 1, "high": 3}, "optimizer.lr": {"low": 1, "high": 2.5}}
    numeric = Sweep.model_validate({"recipe": RECIPE, "search": spaces})
    study = optuna.create_study(storage=optuna.storages.InMemoryStorage())
    for _ in range(5):
        trial = study.ask()
        values = {key: _suggest(trial, key, space) for key, space in numeric.search.items()}
        assert isinstance(numeric.recipe_with(values).schedule.epochs, int)
        assert isinstance(numeric.recipe_with(values).optimizer.lr, float)
    methods = [{"name": "gmp"}, {"name": "static_random"}, None]
    chosen = sweep(search={"method.sparsity": [0.5], "method": methods[:2]})
    values = {"method.sparsity": "0.5", "method": '{"name": "static_random"}'}
    assert chosen.recipe_with(values).method == {"name": "static_random", "sparsity": 0.5}
    assert sweep(search={"method": methods}).recipe_with({"method": "null"}).method is None


def test_trials_train_no_dense_baseline():
    assert not sweep(recipe=RECIPE | {"dense_baseline": True}).recipe_with({}).dense_baseline


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"serach": {}}, "unknown key 'serach'; did you mean 'search'"),
        ({"search": {}}, "search: .*at least 1 item"),
        ({"search": {"method.init": []}}, "search: method.init: the list of values must not be empty"),
        (
            {"search": {"method.init": -3}},
            "search: method.init: must be a range {low: ..., high: ...} or a list of values, got -3",
        ),
        ({"search": {"method.init": {"low": 1, "hihg": 2}}}, "method.init: .*unknown key 'hihg'; did you mean 'high'"),
        ({"search": {"method.init": {"low": 2, "high": 1}}}, "method.init: low=2 must be below high=1"),
        ({"search": {"method.init": {"low": 0, "high": 1, "log": True}}}, "log: true requires low > 0, got 0"),
        ({"search": {"seed": {"low": 1, "high": 9, "log": True, "step": 2}}}, "step cannot be combined with log: true"),
        ({"search": {"seed": {"low": "a", "high": 9}}}, "seed: low.*valid"),
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
    with pytest.raises(
        InputError, match=r"set: seed: values may only contain numbers, strings, lists and mappings \(.*date"
    ):
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
    ],
)
def test_an_invalid_searched_key_is_found_before_training(tmp_path, search, message):
    with pytest.raises(InputError, match=message):
        run_sweep(sweep(search=search), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql+psycopg://u:secret@localhost:1/x", "storage postgresql.psycopg://u:...@localhost:1/x: "),
        ("nonsense", "storage: .*parse.*; use sqlite:///FILE or postgresql.psycopg://HOST/DATABASE"),
        ("sqlite:////dev/full/x.db", "storage sqlite:////dev/full/x.db: .*unable to open"),
    ],
)
def test_an_unreachable_database_is_reported_in_one_sentence_without_the_password(tmp_path, monkeypatch, url, message):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(InputError, match=message) as error:
        run_sweep(sweep(), tmp_path / "out", storage=url)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_directory_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file cannot be created: File exists"):
        run_sweep(sweep(), tmp_path / "file")


def test_torchrun_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(InputError, match="sweeps do not run under torchrun"):
        run_sweep(sweep(), tmp_path / "out")


def test_without_optuna_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"sweeps require Optuna: pip install 'sparing\[sweep\]'"):
        run_sweep(sweep(), tmp_path / "out")


def test_optuna_log_level_is_restored(tmp_path, untrained):
    before = optuna.logging.get_verbosity()
    run_sweep(sweep(trials=1), tmp_path / "out")
    assert optuna.logging.get_verbosity() == before


def test_the_command_shows_the_front_and_the_command_to_continue(tmp_path, monkeypatch, capsys, untrained):
    path = write(tmp_path, trials=1)
    monkeypatch.chdir(tmp_path)
    arguments = ["sparing", "sweep", str(path), "--trials", "2", "--out", "my study"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    shown = capsys.readouterr().out
    assert "trial 1: validation accuracy" in shown
    assert "2 finished, 0 running, 0 waiting, 0 failed, of 2 trials" in " ".join(shown.split())
    assert shown.endswith("Written to my study\n")

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sparing.sweep.worker, "train_run", interrupt)
    monkeypatch.setattr(sys, "argv", [*arguments[:4], "3", *arguments[5:]])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130
    assert f"continue with: sparing sweep {path} --trials 3 --out 'my study'" in capsys.readouterr().err


def test_a_range_of_integers_holds_integers():
    assert Range(low=1, high=5).is_integer
    assert Range(low=1, high=5, step=2).is_integer
    assert not Range(low=1, high=5.0).is_integer
    assert not Range(low=1, high=5, step=0.5).is_integer
