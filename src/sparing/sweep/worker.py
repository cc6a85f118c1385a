"""Worker of a sweep: takes trials from a study, trains them and writes the result tables and the figure."""

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
from sparing.sweep.file import Range, Sweep, representative_values
from sparing.sweep.study import open_study, requeue, run_number
from sparing.train.distributed import from_torchrun
from sparing.train.log import read_history
from sparing.train.run import train_run

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial, Trial

METRICS = ("validation_accuracy", "sparsity", "weights", "nonzero", "macs", "seconds")
"""Keys of `metrics.json` that are stored in the study. The test accuracy must not be used to select trials."""
POLL_INTERVAL = 5
"""Seconds between two checks of the trials of other workers, if no trial is left to start."""


def run_sweep(
    sweep: Sweep,
    out: str | Path,
    *,
    storage: str | None = None,
    trials: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run trials of a sweep until all trials are finished, including those of other workers.

    Args:
        sweep: recipe, search space and objective.
        out: the study directory. Its last component is the name of the study in the database.
        storage: URL of the database. None uses the SQLite file `study.db` in the study directory.
        trials: total number of trials; replaces the sweep's own number.
        console: console for progress output. None prints nothing.

    Returns:
        A dict with "trials", a list with one dict per trial, and "front", the trials of the Pareto front
        in order of increasing cost.

    Raises:
        InputError: Optuna is not installed; a value of the search space cannot be trained; the database
            cannot be reached, or contains a study of another sweep under this name.

    Reference: multi-objective tree-structured Parzen estimator; Akiba et al., "Optuna", KDD 2019.
    """
    if from_torchrun():
        raise InputError("sweeps do not run under torchrun: start `sparing sweep` once for each GPU")
    sweep.check()
    with open_study(sweep, Path(out), storage) as study:
        return _Worker(sweep, study, Path(out), trials or sweep.trials, console or Console(quiet=True)).work()


class _SurplusTrialError(Exception):
    """Raised for a trial that exceeds the total because another worker started the last one at the same time."""


class _Worker:
    """State of one worker process."""

    def __init__(self, sweep: Sweep, study: "optuna.Study", out: Path, total: int, console: Console) -> None:
        self.sweep = sweep
        self.study = study
        self.out = out
        self.total = total
        self.console = console
        self.rows: list[dict[str, Any]] = []
        self.front: list[dict[str, Any]] = []
        self.trial_lost = False

    def work(self) -> dict[str, Any]:
        """Run trials until none is left, then wait for other workers and take over trials of dead ones."""
        import optuna

        with Live(get_renderable=self._table, console=self.console, refresh_per_second=1, transient=True):
            while True:
                self._refresh()
                self._write_results()
                states = [row["state"] for row in self.rows]
                if "waiting" in states or len(states) < self.total:
                    self._run_next_trial()
                elif "running" in states:
                    time.sleep(POLL_INTERVAL)
                    optuna.storages.fail_stale_trials(self.study)
                else:
                    break
        self.console.print(self._table())
        return {"trials": self.rows, "front": self.front}

    def _run_next_trial(self) -> None:
        """Take the next trial from the study and train it."""
        self.trial_lost = False
        try:
            catch = (InputError, torch.OutOfMemoryError, _SurplusTrialError)
            self.study.optimize(self._objective, n_trials=1, catch=catch)
        except ValueError:  # raised by Optuna if another worker has already finished the trial
            if not self.trial_lost:
                raise

    def _objective(self, trial: "Trial") -> tuple[float, float]:
        """Train a trial and return its validation accuracy and cost."""
        import optuna

        try:
            return self._train(trial)
        except optuna.exceptions.UpdateFinishedTrialError:
            # The heartbeats stopped for too long, for example because the machine was suspended.
            self.trial_lost = True
            run = run_number(trial)
            self.console.print(f"trial {run}: taken over by another worker, because this worker missed its heartbeats")
            raise

    def _train(self, trial: "Trial") -> tuple[float, float]:
        run = run_number(trial)
        if run == trial.number and self._started_before(run) >= self.total:
            trial.set_user_attr("too_many", True)
            raise _SurplusTrialError
        try:
            values = {key: _suggest(trial, key, space) for key, space in self.sweep.search.items()}
            trial.set_user_attr("host", socket.gethostname())
            self._refresh()
            metrics = train_run(self.sweep.recipe_with(values), self._directory(run), resume=True)
        except (InputError, torch.OutOfMemoryError) as error:
            reason = str(error).splitlines()[0]
            trial.set_user_attr("error", reason)
            self.console.print(f"trial {run} failed: {reason}", highlight=False, soft_wrap=True)
            raise
        except KeyboardInterrupt:
            requeue(self.study, trial, trial.user_attrs)
            raise
        assert metrics is not None
        for key in METRICS:
            trial.set_user_attr(key, metrics[key])
        self.console.print(
            f"trial {run}: validation accuracy {100 * metrics['validation_accuracy']:.2f} %  "
            f"{self.sweep.objective} {metrics[self.sweep.objective]:,}  sparsity {100 * metrics['sparsity']:.2f} %  "
            f"{metrics['seconds']:.0f} s",
            highlight=False,
            soft_wrap=True,
        )
        return metrics["validation_accuracy"], metrics[self.sweep.objective]

    def _started_before(self, run: int) -> int:
        """Return the number of runs with a lower number."""
        trials = self.study.get_trials(deepcopy=False)
        return len({run_number(t) for t in trials if run_number(t) < run and "too_many" not in t.user_attrs})

    def _directory(self, run: int) -> Path:
        return self.out / "trials" / f"{run:04d}"

    def _refresh(self) -> None:
        """Read the trials of all workers from the database."""
        attempts = {
            run_number(trial): trial
            for trial in self.study.get_trials(deepcopy=False)  # in order of number: the last attempt of a run wins
            if "too_many" not in trial.user_attrs
        }
        self.rows = [self._row(attempts[run]) for run in sorted(attempts)]
        # Not study.best_trials: it reads the database again, where another worker may have finished a trial since.
        self.front = _pareto_front([row for row in self.rows if row["state"] == "finished"], self.sweep.objective)

    def _row(self, trial: "FrozenTrial") -> dict[str, Any]:
        state = {"COMPLETE": "finished", "FAIL": "failed"}.get(trial.state.name, trial.state.name.lower())
        error = trial.user_attrs.get("error", "the worker died" if state == "failed" else None)
        return {
            "trial": run_number(trial),
            "state": state,
            **{key: trial.user_attrs.get(key) for key in METRICS},
            "host": trial.user_attrs.get("host"),
            "error": error,
            **{key: trial.params.get(key) for key in self.sweep.search},
        }

    def _write_results(self) -> None:
        """Write the tables and the figure of all trials. Every worker writes the same files."""
        for name, rows in (("trials", self.rows), ("front", self.front)):
            text = io.StringIO()
            table = csv.DictWriter(
                text, ["trial", "state", *METRICS, "host", "error", *self.sweep.search], lineterminator="\n"
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
        """Return a table of the Pareto front and the running trials."""
        states = [row["state"] for row in self.rows]
        counts = [f"{states.count(state)} {state}" for state in ("finished", "running", "waiting", "failed")]
        table = Table(title=f"{', '.join(counts)}, of {max(self.total, len(states))} trials; Pareto front:", box=None)
        for heading in ("trial", "validation accuracy", self.sweep.objective, "sparsity", *self.sweep.search):
            table.add_column(heading, justify="right", overflow="fold")
        for row in self.front:
            table.add_row(
                str(row["trial"]), f"{100 * row['validation_accuracy']:.2f} %", f"{row[self.sweep.objective]:,}",
                f"{100 * row['sparsity']:.2f} %", *(_format(row[key]) for key in self.sweep.search),
            )  # fmt: skip
        for row in self.rows:
            if row["state"] == "running":
                history = read_history(self._directory(row["trial"]))
                epoch = f"epoch {history[-1]['epoch']}" if history else "running"
                table.add_row(str(row["trial"]), epoch, "", "", *(_format(row[key]) for key in self.sweep.search))
        return table


def _pareto_front(rows: list[dict[str, Any]], cost: str) -> list[dict[str, Any]]:
    """Return the rows that no other row dominates in validation accuracy and cost, by increasing cost."""
    points = [(row["validation_accuracy"], -row[cost]) for row in rows]
    dominated = [any(all(map(ge, other, point)) and other != point for other in points) for point in points]
    front = [row for row, is_dominated in zip(rows, dominated, strict=True) if not is_dominated]
    return sorted(front, key=lambda row: row[cost])


def _suggest(trial: "Trial", key: str, space: Range | Sequence[Any]) -> str:
    """Return Optuna's suggestion for a key, as YAML."""
    if not isinstance(space, Range):
        # As text, because Optuna's choices must be scalars, while a recipe's value may be a mapping.
        return str(trial.suggest_categorical(key, representative_values(space)))
    if space.is_integer:
        return repr(trial.suggest_int(key, int(space.low), int(space.high), step=int(space.step or 1), log=space.log))
    return repr(trial.suggest_float(key, space.low, space.high, step=space.step, log=space.log))


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
