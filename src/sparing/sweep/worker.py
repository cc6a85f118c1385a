"""A worker: takes trials from a study, trains them, and leaves the tables and the figure of all of them."""

import csv
import io
import socket
import time
from collections.abc import Sequence
from operator import ge
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

from sparing.errors import InputError
from sparing.files import atomic_write, write_text
from sparing.plots import pareto_front
from sparing.sweep.file import Range, Sweep, ends
from sparing.sweep.study import open_study, queue_again, run_of
from sparing.train.distributed import from_torchrun
from sparing.train.log import read_history
from sparing.train.run import train_run

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial, Trial

MEASURED = ("validation_accuracy", "sparsity", "weights", "nonzero", "macs", "seconds")
"""What a trial tells of its `metrics.json`. Not the test accuracy: nothing is to be chosen by it."""
LOOK_AGAIN = 5
"""Seconds between two looks at the trials of others, when no other is left."""


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
    with open_study(sweep, Path(out), storage) as study:
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
                    time.sleep(LOOK_AGAIN)
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
            run = run_of(trial)
            self.console.print(f"trial {run}: given to another worker, as this one was silent for too long")
            raise

    def _train(self, trial: "Trial") -> tuple[float, float]:
        run = run_of(trial)
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
            queue_again(self.study, trial, trial.user_attrs)
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
        return len({run_of(t) for t in trials if run_of(t) < run and "too_many" not in t.user_attrs})

    def _directory(self, run: int) -> Path:
        return self.out / "trials" / f"{run:04d}"

    def _read(self) -> None:
        """Take over what the database knows of all workers' trials."""
        attempts = {
            run_of(trial): trial
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
            "trial": run_of(trial),
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
            with atomic_write(self.out / "front.png") as temporary:
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


def _suggest(trial: "Trial", key: str, space: Range | Sequence[Any]) -> str:
    """What Optuna would try, as YAML."""
    if not isinstance(space, Range):
        # As text: Optuna's choices are plain values, a recipe's may be a whole method.
        return str(trial.suggest_categorical(key, ends(space)))
    if space.whole:
        return repr(trial.suggest_int(key, int(space.low), int(space.high), step=int(space.step or 1), log=space.log))
    return repr(trial.suggest_float(key, space.low, space.high, step=space.step, log=space.log))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
