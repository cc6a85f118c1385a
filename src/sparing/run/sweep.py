"""Hyperparameter sweeps: train one recipe with many settings and find the Pareto front.

A sweep is an Optuna study that minimizes the nonzero weights or the MACs and maximizes the validation accuracy. Any
number of workers (processes) share the study's database, and train each trial in its own run directory. Workers send
heartbeats to the database; if they stop, the next free worker continues the trial. Requires `sparing[sweep]`.
"""

import functools
import math
import random
import socket
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from sparing.errors import InputError, first_line
from sparing.files import atomic_write, write_text
from sparing.plots import AXIS_LABELS
from sparing.run.distributed import from_torchrun
from sparing.run.resolve import differing_keys
from sparing.run.sweep_file import Sweep
from sparing.run.training import train_run

if TYPE_CHECKING:
    import pandas as pd
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

HEARTBEAT_INTERVAL = 30
"""Seconds between two heartbeats of a worker. After four missed heartbeats its trial is given to another worker."""
MAX_RETRIES = 2
"""How often a trial is tried again after its worker died."""
POLL_INTERVAL = 5
"""Seconds between two checks of the trials of other workers, if no trial is left to start."""


def run_sweep(
    sweep: Sweep,
    out: str | Path,
    *,
    storage: str | None = None,
    trials: int | None = None,
    console: Console | None = None,
) -> "pd.DataFrame":
    """Run trials of a sweep until all trials are finished, including those of other workers.

    Args:
        sweep: recipe, search space and objective.
        out: the study directory. Its last component is the name of the study in the database.
        storage: URL of the database. None uses the SQLite file `study.db` in the study directory.
        trials: total number of trials; replaces the sweep's own number.
        console: console to print to; None prints nothing.

    Returns:
        Optuna's dataframe of the trials, as in `trials.csv`. Its column "front" is True on the Pareto front.

    Raises:
        InputError: Optuna is not installed; a value of the search space cannot be trained; the database
            cannot be reached, or contains a study of another sweep under this name.

    Reference: multi-objective tree-structured Parzen estimator; Akiba et al., "Optuna", KDD 2019.
    """
    if from_torchrun():
        raise InputError("sweeps do not run under torchrun: start `sparing sweep` once for each GPU")
    try:
        import optuna
        import pandas as pd  # noqa: F401 - Optuna's dataframe
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError as error:
        raise InputError("sweeps require Optuna and pandas: pip install 'sparing[sweep]'") from error
    out, identity, verbosity = Path(out), sweep.check(), optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # the worker prints the same information
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            out.mkdir(parents=True, exist_ok=True)
            study = _open_study(out, storage or f"sqlite:///{out.resolve() / 'study.db'}", identity)
            study.set_metric_names([sweep.objective, "validation_accuracy"])
            return _work(study, out, sweep, trials or sweep.trials, console or Console(quiet=True))
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
        raise InputError(f"the database of {out}: {first_line(error.__cause__ or error)}") from error
    except OSError as error:
        raise InputError(f"{error.filename or out} cannot be written: {error.strerror}") from error
    finally:
        optuna.logging.set_verbosity(verbosity)


def _open_study(out: Path, url: str, identity: dict[str, Any]) -> "Study":
    """Create the study that is named after the directory, or open it and check that it belongs to the sweep."""
    import optuna
    from sqlalchemy import NullPool
    from sqlalchemy.exc import ArgumentError, DBAPIError

    connect = functools.partial(
        optuna.storages.RDBStorage, url, heartbeat_interval=HEARTBEAT_INTERVAL, grace_period=4 * HEARTBEAT_INTERVAL,
        heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(MAX_RETRIES),
        # Without a pool, because an idle connection can time out during a long trial.
        engine_kwargs={"poolclass": NullPool, "connect_args": {"timeout": 60} if url.startswith("sqlite") else {}},
    )  # fmt: skip
    try:
        for tries_left in (4, 3, 2, 1, 0):
            try:
                storage = connect()
                break
            except DBAPIError:  # another worker may be creating the tables, in several steps
                if not tries_left:
                    raise
                time.sleep(random.uniform(0.3, 1))
    except (ArgumentError, ImportError, RuntimeError) as error:
        raise InputError(
            f"--storage: {first_line(error)}; use sqlite:///FILE or postgresql+psycopg://HOST/DATABASE "
            "(pip install 'psycopg[binary]')"
        ) from error
    study = optuna.create_study(
        storage=storage, study_name=out.resolve().name, directions=["minimize", "maximize"], load_if_exists=True,
        sampler=optuna.samplers.TPESampler(constant_liar=True),  # avoids the settings that other workers are trying
    )  # fmt: skip
    if different := differing_keys(study.user_attrs.get("sweep", identity), identity):
        raise InputError(
            f"{out} contains a study of another sweep (they differ in {', '.join(different)}); "
            "choose another directory with --out"
        )
    study.set_user_attr("sweep", identity)
    return study


def _work(study: "Study", out: Path, sweep: Sweep, total: int, console: Console) -> "pd.DataFrame":
    """Run trials until none is left, then wait for other workers and take over the trials of those that stopped."""
    from optuna import TrialPruned
    from optuna.storages import RetryHeartbeatStaleTrialCallback, fail_stale_trials
    from optuna.study import MaxTrialsCallback
    from optuna.trial import TrialState

    # Not a failed trial, whose worker died or was interrupted, nor the waiting one that continues it.
    counted = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)

    def states() -> list[TrialState]:
        return [trial.state for trial in study.get_trials(deepcopy=False)]

    def train(trial: "Trial") -> tuple[float, float]:
        run = trial.user_attrs.get("run", trial.number)  # a trial that is tried again has that of its first attempt
        if run == trial.number and sum(state in counted for state in states()[:run]) >= total:
            return math.nan, math.nan  # fails this trial: another worker started the last one at the same moment
        trial.set_user_attr("run", run)
        trial.set_user_attr("host", socket.gethostname())
        try:
            with console.status(f"training trial {trial.number}"):
                metrics = train_run(sweep.recipe_of(trial), out / "trials" / f"{run:04d}", resume=True)
        except (InputError, torch.OutOfMemoryError) as error:
            # Pruned instead of failed, because the sampler learns from pruned trials.
            trial.set_user_attr("error", f"{type(error).__name__}: {first_line(error)}")
            raise TrialPruned from error
        except KeyboardInterrupt:
            RetryHeartbeatStaleTrialCallback()(study, study.get_trials()[trial.number])
            raise
        assert metrics is not None
        for key in ("sparsity", "weights", "nonzero", "macs", "seconds"):  # the test accuracy must not select a trial
            trial.set_user_attr(key, metrics[key])
        return metrics[sweep.objective], metrics["validation_accuracy"]

    def show(study: "Study", trial: "FrozenTrial") -> None:
        if trial.values:
            result = f"{sweep.objective} {trial.values[0]:,.0f}  validation accuracy {100 * trial.values[1]:.2f} %"
        else:
            result = trial.user_attrs.get("error", "not trained, because another worker started the last trial")
        console.print(f"trial {trial.number}: {result}", highlight=False, soft_wrap=True)
        _write_results(study, out)

    while True:
        fail_stale_trials(study)
        if sum(state in counted for state in states()) < total:
            try:
                study.optimize(train, callbacks=[show, MaxTrialsCallback(total, counted)])
            except ValueError as error:
                if not str(error).startswith("Cannot tell"):
                    raise
                console.print("trial taken over by another worker, because this worker missed its heartbeats")
        elif TrialState.RUNNING in states():
            time.sleep(POLL_INTERVAL)
        else:
            return _write_results(study, out)


def _write_results(study: "Study", out: Path) -> "pd.DataFrame":
    """Write the table and the figure of all trials, and return the table. Every worker writes the same files."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt
    from optuna.visualization.matplotlib import plot_pareto_front

    front = [trial.number for trial in study.best_trials]
    table = study.trials_dataframe(attrs=("number", "state", "values", "user_attrs", "params"))
    table.insert(2, "front", table["number"].isin(front))
    write_text(out / "trials.csv", table.to_csv(index=False))
    if front:
        with mpl.rc_context(), atomic_write(out / "front.png") as temporary:  # Optuna sets a style
            names = [AXIS_LABELS.get(name, name.replace("_", " ")) for name in study.metric_names or ()]
            plot_pareto_front(study, target_names=names).set(xscale="log", title="")
            plt.savefig(temporary, format="png", dpi=120)
            plt.close()
    return table
