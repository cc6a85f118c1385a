"""Sweeps: one recipe at many settings, and which of them nothing beats in accuracy and cost at once.

A sweep is an Optuna study of two objectives: accuracy on the validation part, up, and nonzero weights or
MACs, down. A worker is a process that takes trial after trial from the study's database, each a run
directory of its own; as many may work on one study as can reach the database. Workers tell the database
that they live. The trial of one that went silent is given to the next, which continues its run where it
finds its directory.

Needs the extra `sparing[sweep]`.
"""

import csv
import io
import json
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import ge
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, ValidationError, field_validator, model_validator
from rich.console import Console
from rich.live import Live
from rich.table import Table

from sparing.errors import InputError
from sparing.files import replacing, write_text
from sparing.plots import pareto_front
from sparing.train.build import build_data
from sparing.train.distributed import Ranks, from_torchrun
from sparing.train.log import read_history
from sparing.train.recipe import Part, Recipe, build_recipe, explain, read_mapping
from sparing.train.run import check_fits, differing_keys, train_run, what_is_computed

if TYPE_CHECKING:
    import optuna
    from optuna.storages import RDBStorage
    from optuna.trial import BaseTrial, FrozenTrial, Trial

MEASURED = ("validation_accuracy", "sparsity", "weights", "nonzero", "macs", "seconds")
"""What a trial tells of its `metrics.json`. Not the test accuracy: nothing is to be chosen by it."""
HEARTBEAT = 30
"""Seconds between two signs of life of a worker; after four without one its trial is given to another."""
DEATHS = 3
"""Workers that may die in one trial before it counts as failed: it may be what kills them."""


class Range(Part):
    """Every number between two, both included; whole numbers if both ends are."""

    low: int | float
    high: int | float
    log: bool = False
    """As many trials in each decade."""
    step: int | float | None = Field(default=None, gt=0)
    """Only `low`, `low + step`, and so on."""

    @property
    def whole(self) -> bool:
        """Whether it is one of whole numbers."""
        return all(isinstance(number, int) for number in (self.low, self.high, self.step or 1))

    @model_validator(mode="after")
    def _has_numbers(self) -> "Range":
        if not self.low < self.high:
            raise ValueError(f"low={self.low:g} must be below high={self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"log: true needs low above 0, got {self.low:g}")
        if self.log and self.step is not None:
            raise ValueError("step and log: true exclude each other")
        return self


class Sweep(Part):
    """What to try, on which recipe."""

    recipe: dict[str, Any]
    """The recipe; in a file, its path as seen from there."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Keys of the recipe to change in every trial, with dots, and their values."""
    search: dict[str, Range | list[Any]] = Field(min_length=1)
    """Keys of the recipe to search, with dots: a range, or a list of values to choose from."""
    objective: Literal["nonzero", "macs"] = "nonzero"
    """What shall be low, beside the error."""
    trials: int = Field(default=20, ge=1)
    """How many in all, over all workers."""

    @field_validator("set")
    @classmethod
    def _values(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {key: _plain(key, value) for key, value in values.items()}

    @field_validator("search", mode="before")
    @classmethod
    def _spaces(cls, search: Any) -> Any:
        # Here, since an error inside a union of types is explained once for each of them.
        return {key: _space(str(key), value) for key, value in search.items()} if isinstance(search, dict) else search

    def recipe_with(self, values: Mapping[str, str]) -> Recipe:
        """The recipe of one trial. No dense baseline is trained beside it.

        Args:
            values: the keys of `search`, and values as YAML.

        Raises:
            InputError: the recipe has no such key, or refuses the value.
        """
        # Parents first: `method` would undo `method.init`.
        changes = [f"{key}={json.dumps(value)}" for key, value in self.set.items()]
        changes += [f"{key}={values[key]}" for key in sorted(values, key=lambda key: key.count("."))]
        return build_recipe(self.recipe, [*changes, "dense_baseline=false"], "recipe of the sweep")

    def check(self) -> None:
        """Build what the ends of every range and every listed value lead to, each beside the others' first.

        Raises:
            InputError: one of them cannot be trained; it is named.
        """
        first = {key: _ends(space)[0] for key, space in self.search.items()}
        data: dict[str, Any] = {}
        for key, space in self.search.items():
            for value in _ends(space):
                try:
                    recipe = self.recipe_with(first | {key: value})
                    name = recipe.data.model_dump_json()
                    data[name] = data.get(name) or build_data(recipe.data)
                    if not data[name].size("validation"):
                        raise InputError(
                            f"data {recipe.data.name!r} has no validation part, by which a sweep judges its trials"
                        )
                    if not data[name].size("validation"):
                        raise InputError(
                            f"data {recipe.data.name!r} has no validation part, by which a sweep judges its trials"
                        )
                    check_fits(recipe, data[name], Ranks(torch.device("cpu")))
                except InputError as error:
                    raise InputError(f"search.{key}, at {value}: {error}") from error

    def what_is_searched(self) -> dict[str, Any]:
        """All that has to be the same for trials to be of one study; how many is not part of it."""
        recipe = self.recipe_with({key: _ends(space)[0] for key, space in self.search.items()})
        return {**self.model_dump(mode="json", include={"search", "objective"}), "recipe": what_is_computed(recipe)}


def load_sweep(path: str | Path) -> Sweep:
    """Read a sweep from a YAML file.

    Raises:
        InputError: the file, or that of its recipe, is missing or is no YAML; a key is unknown (the
            nearest known one is named), or a value of the wrong type or out of range.
    """
    path = Path(path)
    content = read_mapping(path, "sweep")
    if isinstance(content.get("recipe"), str):
        content["recipe"] = read_mapping(path.parent / content["recipe"], "recipe")
    try:
        return Sweep.model_validate(content)
    except ValidationError as error:
        raise InputError(f"sweep {path}: {explain(error, Sweep)}") from error


def run_sweep(
    sweep: Sweep,
    out: str | Path,
    *,
    storage: str | None = None,
    trials: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Work on a sweep until all its trials are finished, those of other workers included.

    Args:
        sweep: what to try.
        out: the directory of the study; its last part is the study's name in the database.
        storage: URL of the database; None is the SQLite file `study.db` of the directory.
        trials: how many in all, instead of the sweep's number.
        console: where to print; None prints nothing.

    Returns:
        "trials", a mapping for each; "front", those of them that no other beats in both objectives,
        from the lowest cost up.

    Raises:
        InputError: Optuna is not installed; a value that is searched cannot be trained; the database
            cannot be reached, or holds a study of this name of another sweep.

    Source: multi-objective tree-structured Parzen estimator; Akiba et al., "Optuna", KDD 2019.
    """
    if from_torchrun():
        raise InputError("a sweep is not started by torchrun: start `sparing sweep` itself, once for each GPU")
    sweep.check()
    with _study(sweep, Path(out), storage) as study:
        return _Worker(sweep, study, Path(out), trials or sweep.trials, console or Console(quiet=True)).work()


class _TooManyError(Exception):
    """A trial that another worker had begun as the last at the same moment."""


class _Worker:
    """One process at work on a study."""

    def __init__(self, sweep: Sweep, study: "optuna.Study", out: Path, wanted: int, console: Console) -> None:
        self.sweep = sweep
        self.study = study
        self.out = out
        self.wanted = wanted
        self.console = console
        self.rows: list[dict[str, Any]] = []
        self.front: list[dict[str, Any]] = []
        self.given_away = False

    def work(self) -> dict[str, Any]:
        """Take trials until none is left, and wait for those of others, who may die."""
        import optuna

        with Live(get_renderable=self._table, console=self.console, refresh_per_second=1, transient=True):
            while True:
                self._read()
                self._write()
                states = [row["state"] for row in self.rows]
                if "waiting" in states or len(states) < self.wanted:
                    self._take()
                elif "running" in states:
                    time.sleep(min(HEARTBEAT, 5))
                    optuna.storages.fail_stale_trials(self.study)
                else:
                    break
        self.console.print(self._table())
        return {"trials": self.rows, "front": self.front}

    def _take(self) -> None:
        """Take the next trial, and see it to its end."""
        self.given_away = False
        try:
            catch = (InputError, torch.OutOfMemoryError, _TooManyError)
            self.study.optimize(self._run, n_trials=1, catch=catch)
        except ValueError:  # Optuna's, about a trial that ended behind its back
            if not self.given_away:
                raise

    def _run(self, trial: "Trial") -> tuple[float, float]:
        """Optuna's objective."""
        import optuna

        try:
            return self._train(trial)
        except optuna.exceptions.UpdateFinishedTrialError:
            # A computer that slept, say: its trial was taken for dead.
            self.given_away = True
            run = _run_of(trial)
            self.console.print(f"trial {run}: given to another worker, as this one was silent for too long")
            raise

    def _train(self, trial: "Trial") -> tuple[float, float]:
        run = _run_of(trial)
        if run == trial.number and self._begun_before(run) >= self.wanted:
            trial.set_user_attr("too_many", True)
            raise _TooManyError
        try:
            values = {key: _suggest(trial, key, space) for key, space in self.sweep.search.items()}
            trial.set_user_attr("host", socket.gethostname())
            self._read()
            metrics = train_run(self.sweep.recipe_with(values), self._directory(run), resume=True)
        except (InputError, torch.OutOfMemoryError) as error:
            reason = str(error).splitlines()[0]
            trial.set_user_attr("error", reason)
            self.console.print(f"trial {run} failed: {reason}", highlight=False, soft_wrap=True)
            raise
        except KeyboardInterrupt:
            _queue_again(self.study, trial, trial.user_attrs)
            raise
        assert metrics is not None
        for key in MEASURED:
            trial.set_user_attr(key, metrics[key])
        self.console.print(
            f"trial {run}: validation accuracy {100 * metrics['validation_accuracy']:.2f} %  "
            f"{self.sweep.objective} {metrics[self.sweep.objective]:,}  sparsity {100 * metrics['sparsity']:.2f} %  "
            f"{metrics['seconds']:.0f} s",
            highlight=False,
            soft_wrap=True,
        )
        return metrics["validation_accuracy"], metrics[self.sweep.objective]

    def _begun_before(self, run: int) -> int:
        trials = self.study.get_trials(deepcopy=False)
        return len({_run_of(t) for t in trials if _run_of(t) < run and "too_many" not in t.user_attrs})

    def _directory(self, run: int) -> Path:
        return self.out / "trials" / f"{run:04d}"

    def _read(self) -> None:
        """Take over what the database knows of all workers' trials."""
        attempts = {
            _run_of(trial): trial
            for trial in self.study.get_trials(deepcopy=False)  # by number, so that the last attempt stays
            if "too_many" not in trial.user_attrs
        }
        self.rows = [self._row(attempts[run]) for run in sorted(attempts)]
        # Of these rows and not study.best_trials, which looks again: another worker may have finished one since.
        self.front = _unbeaten([row for row in self.rows if row["state"] == "finished"], self.sweep.objective)

    def _row(self, trial: "FrozenTrial") -> dict[str, Any]:
        state = {"COMPLETE": "finished", "FAIL": "failed"}.get(trial.state.name, trial.state.name.lower())
        error = trial.user_attrs.get("error", "its worker died" if state == "failed" else None)
        return {
            "trial": _run_of(trial),
            "state": state,
            **{key: trial.user_attrs.get(key) for key in MEASURED},
            "host": trial.user_attrs.get("host"),
            "error": error,
            **{key: trial.params.get(key) for key in self.sweep.search},
        }

    def _write(self) -> None:
        """Leave the tables and the figure in the directory; each worker of it writes all of them."""
        for name, rows in (("trials", self.rows), ("front", self.front)):
            text = io.StringIO()
            table = csv.DictWriter(
                text, ["trial", "state", *MEASURED, "host", "error", *self.sweep.search], lineterminator="\n"
            )
            table.writeheader()
            table.writerows(rows)
            write_text(self.out / f"{name}.csv", text.getvalue())
        cost = self.sweep.objective
        points = [(row[cost], row["validation_accuracy"]) for row in self.rows if row["state"] == "finished"]
        front = [(row[cost], row["validation_accuracy"]) for row in self.front]
        if points:
            with replacing(self.out / "front.png") as temporary:
                pareto_front(points, front, cost).savefig(temporary, format="png", dpi=120)

    def _table(self) -> Table:
        """The front, and what is running."""
        states = [row["state"] for row in self.rows]
        counts = [f"{states.count(state)} {state}" for state in ("finished", "running", "waiting", "failed")]
        table = Table(title=f"{', '.join(counts)}, of {max(self.wanted, len(states))} trials; the front:", box=None)
        for heading in ("trial", "validation accuracy", self.sweep.objective, "sparsity", *self.sweep.search):
            table.add_column(heading, justify="right", overflow="fold")
        for row in self.front:
            table.add_row(
                str(row["trial"]), f"{100 * row['validation_accuracy']:.2f} %", f"{row[self.sweep.objective]:,}",
                f"{100 * row['sparsity']:.2f} %", *(_short(row[key]) for key in self.sweep.search),
            )  # fmt: skip
        for row in self.rows:
            if row["state"] == "running":
                history = read_history(self._directory(row["trial"]))
                epoch = f"epoch {history[-1]['epoch']}" if history else "running"
                table.add_row(str(row["trial"]), epoch, "", "", *(_short(row[key]) for key in self.sweep.search))
        return table


def _unbeaten(rows: list[dict[str, Any]], cost: str) -> list[dict[str, Any]]:
    """Those that no other beats in validation accuracy or cost without losing in the other, from the lowest cost up."""
    points = [(row["validation_accuracy"], -row[cost]) for row in rows]
    beaten = [any(all(map(ge, other, point)) and other != point for other in points) for point in points]
    front = [row for row, is_beaten in zip(rows, beaten, strict=True) if not is_beaten]
    return sorted(front, key=lambda row: row[cost])


@contextmanager
def _study(sweep: Sweep, out: Path, url: str | None) -> "Iterator[optuna.Study]":
    """The study of a directory, made if there is none; Optuna keeps quiet while it is open."""
    try:
        import optuna
        from sqlalchemy import URL
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError as error:
        raise InputError("a sweep needs Optuna: pip install 'sparing[sweep]'") from error
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be made: {error.strerror}; choose another directory with --out") from error
    if url is None:
        url = URL.create("sqlite", database=str(out.resolve() / "study.db")).render_as_string()
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # it would log what the table shows
    storage = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = _open(url)
            # Told not to try what others are trying.
            sampler = optuna.samplers.TPESampler(constant_liar=True)
            yield _bound(sweep, out, storage, sampler)
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
        raise InputError(f"storage {_without_password(url)}: {_first_line(error)}") from error
    finally:
        optuna.logging.set_verbosity(verbosity)
        if storage is not None:
            storage.remove_session()
            storage.engine.dispose()


def _open(url: str) -> "RDBStorage":
    """The database, with its tables made if it has none."""
    from optuna.storages import RDBStorage
    from sqlalchemy import NullPool
    from sqlalchemy.exc import ArgumentError, DBAPIError

    # A connection of its own for every question: over a long trial one that is kept may end, and one that is
    # kept by a storage that could not be opened nobody closes.
    options: dict[str, Any] = {"poolclass": NullPool}
    if url.startswith("sqlite"):
        options["connect_args"] = {"timeout": 60}  # seconds to wait for another worker's write
    tries = 5
    while True:
        try:
            return RDBStorage(
                url, options, heartbeat_interval=HEARTBEAT, grace_period=4 * HEARTBEAT,
                heartbeat_stale_trial_callback=_after_death,
            )  # fmt: skip
        except DBAPIError:
            # Workers that start together make the same tables.
            tries -= 1
            if not tries:
                raise
            time.sleep(0.5)
        except ImportError as error:
            raise InputError(
                f"storage {_without_password(url)}: its driver is not installed; for postgresql+psycopg:// "
                "pip install 'psycopg[binary]'"
            ) from error
        except (ArgumentError, RuntimeError) as error:
            raise InputError(
                f"storage: {_first_line(error)}; write sqlite:///FILE or postgresql+psycopg://HOST/DATABASE"
            ) from error


def _bound(sweep: Sweep, out: Path, storage: "RDBStorage", sampler: "optuna.samplers.BaseSampler") -> "optuna.Study":
    """The study named like the directory, which is this sweep's and no other's."""
    import optuna

    name, now = out.resolve().name, sweep.what_is_searched()
    try:
        study = optuna.create_study(
            storage=storage, study_name=name, directions=["maximize", "minimize"], sampler=sampler
        )
        if any(out.glob("trials/*")):
            optuna.delete_study(study_name=name, storage=storage)
            raise InputError(f"{out / 'trials'} holds runs of another study; choose another directory with --out")
    except optuna.exceptions.DuplicatedStudyError:
        study = optuna.load_study(storage=storage, study_name=name, sampler=sampler)
    before = study.user_attrs.get("sweep")
    if before is None:
        study.set_user_attr("sweep", now)
        return study
    different = differing_keys(before, json.loads(json.dumps(now)))
    if different:
        raise InputError(
            f"{out} holds a study of another sweep (they differ in {', '.join(different)}); "
            "choose another directory with --out"
        )
    return study


def _run_of(trial: "BaseTrial") -> int:
    """The number of the run directory: of the first trial that Optuna counts in it."""
    return int(trial.user_attrs.get("run", trial.number))


def _queue_again(study: "optuna.Study", trial: "BaseTrial", attributes: Mapping[str, Any]) -> None:
    """Let the next free worker continue a trial. What has ended stays ended for Optuna, hence a new one."""
    import optuna

    waiting = optuna.create_trial(
        state=optuna.trial.TrialState.WAITING, params=trial.params, distributions=trial.distributions,
        user_attrs={**attributes, "run": _run_of(trial)},
    )  # fmt: skip
    study.add_trial(waiting)


def _after_death(study: "optuna.Study", trial: "FrozenTrial") -> None:
    deaths = trial.user_attrs.get("deaths", 0) + 1
    if deaths < DEATHS:
        _queue_again(study, trial, {**trial.user_attrs, "deaths": deaths})


def _space(key: str, value: Any) -> Any:
    if isinstance(value, list):
        if not value:
            raise ValueError(f"{key}: an empty list leaves nothing to choose")
        return _plain(key, value)
    if not isinstance(value, dict):
        raise ValueError(f"{key}: write a range, {{low: ..., high: ...}}, or a list of values, got {value!r}")
    try:
        return Range.model_validate(value)
    except ValidationError as error:
        raise ValueError(f"{key}: {explain(error, Range)}") from error


def _plain(key: str, value: Any) -> Any:
    try:
        json.dumps(value)
    except TypeError as error:
        raise ValueError(f"{key}: a value must be of numbers, text, lists and mappings ({error})") from error
    return value


def _ends(space: Range | Sequence[Any]) -> list[str]:
    """The values to check before anything is trained, as YAML."""
    return [repr(space.low), repr(space.high)] if isinstance(space, Range) else [json.dumps(value) for value in space]


def _suggest(trial: "Trial", key: str, space: Range | Sequence[Any]) -> str:
    """What Optuna would try, as YAML."""
    if not isinstance(space, Range):
        # As text: Optuna's choices are plain values, a recipe's may be a whole method.
        return str(trial.suggest_categorical(key, _ends(space)))
    if space.whole:
        return repr(trial.suggest_int(key, int(space.low), int(space.high), step=int(space.step or 1), log=space.log))
    return repr(trial.suggest_float(key, space.low, space.high, step=space.step, log=space.log))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _without_password(url: str) -> str:
    from sqlalchemy import make_url

    return make_url(url).render_as_string(hide_password=True)


def _first_line(error: Exception) -> str:
    cause: BaseException = error.__cause__ or error
    return str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
