"""Optuna study of a sweep, and the recovery of trials whose worker has died."""

import json
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparing.errors import InputError
from sparing.sweep.file import Sweep
from sparing.train.run import differing_keys

if TYPE_CHECKING:
    import optuna
    from optuna.storages import RDBStorage
    from optuna.trial import BaseTrial, FrozenTrial

HEARTBEAT_INTERVAL = 30
"""Seconds between two heartbeats of a worker. After four missed heartbeats its trial is given to another worker."""
MAX_DEATHS = 3
"""Number of dead workers after which a trial is marked as failed instead of being retried."""


@contextmanager
def open_study(sweep: Sweep, out: Path, url: str | None) -> "Iterator[optuna.Study]":
    """Open the study of a directory, or create it. Silences Optuna's log while the study is open."""
    try:
        import optuna
        from sqlalchemy import URL
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError as error:
        raise InputError("sweeps require Optuna: pip install 'sparing[sweep]'") from error
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be created: {error.strerror}; choose another directory with --out") from error
    if url is None:
        url = URL.create("sqlite", database=str(out.resolve() / "study.db")).render_as_string()
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # the table shows the same information
    storage = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = _connect(url)
            # constant_liar: avoid the settings that other workers are trying at the moment.
            sampler = optuna.samplers.TPESampler(constant_liar=True)
            yield _load_or_create(sweep, out, storage, sampler)
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
        raise InputError(f"storage {_without_password(url)}: {_first_line(error)}") from error
    finally:
        optuna.logging.set_verbosity(verbosity)
        if storage is not None:
            storage.remove_session()
            storage.engine.dispose()


def _connect(url: str) -> "RDBStorage":
    """Connect to the database and create Optuna's tables if they are missing."""
    from optuna.storages import RDBStorage
    from sqlalchemy import NullPool
    from sqlalchemy.exc import ArgumentError, DBAPIError

    # Without a pool, because an idle connection can time out during a long trial, and because a pooled
    # connection would stay open if RDBStorage raises.
    options: dict[str, Any] = {"poolclass": NullPool}
    if url.startswith("sqlite"):
        options["connect_args"] = {"timeout": 60}  # seconds to wait for the lock of another worker
    tries = 5
    while True:
        try:
            return RDBStorage(
                url, options, heartbeat_interval=HEARTBEAT_INTERVAL, grace_period=4 * HEARTBEAT_INTERVAL,
                heartbeat_stale_trial_callback=_requeue_stale_trial,
            )  # fmt: skip
        except DBAPIError:
            # Fails if another worker creates the tables at the same time.
            tries -= 1
            if not tries:
                raise
            time.sleep(0.5)
        except ImportError as error:
            raise InputError(
                f"storage {_without_password(url)}: the database driver is not installed; "
                "for postgresql+psycopg:// run pip install 'psycopg[binary]'"
            ) from error
        except (ArgumentError, RuntimeError) as error:
            raise InputError(
                f"storage: {_first_line(error)}; use sqlite:///FILE or postgresql+psycopg://HOST/DATABASE"
            ) from error


def _load_or_create(
    sweep: Sweep, out: Path, storage: "RDBStorage", sampler: "optuna.samplers.BaseSampler"
) -> "optuna.Study":
    """Load or create the study that is named after the directory, and check that it belongs to the sweep."""
    import optuna

    name, identity = out.resolve().name, sweep.identity()
    try:
        study = optuna.create_study(
            storage=storage, study_name=name, directions=["maximize", "minimize"], sampler=sampler
        )
        if any(out.glob("trials/*")):
            optuna.delete_study(study_name=name, storage=storage)
            raise InputError(f"{out / 'trials'} contains runs of another study; choose another directory with --out")
    except optuna.exceptions.DuplicatedStudyError:
        study = optuna.load_study(storage=storage, study_name=name, sampler=sampler)
    stored = study.user_attrs.get("sweep")
    if stored is None:
        study.set_user_attr("sweep", identity)
        return study
    different = differing_keys(stored, json.loads(json.dumps(identity)))
    if different:
        raise InputError(
            f"{out} contains a study of another sweep (they differ in {', '.join(different)}); "
            "choose another directory with --out"
        )
    return study


def run_number(trial: "BaseTrial") -> int:
    """Return the number of the trial's run directory, which is the number of its first attempt in Optuna."""
    return int(trial.user_attrs.get("run", trial.number))


def requeue(study: "optuna.Study", trial: "BaseTrial", attributes: Mapping[str, Any]) -> None:
    """Queue a trial for the next free worker, as a new Optuna trial because a finished one cannot be reopened."""
    import optuna

    waiting = optuna.create_trial(
        state=optuna.trial.TrialState.WAITING, params=trial.params, distributions=trial.distributions,
        user_attrs={**attributes, "run": run_number(trial)},
    )  # fmt: skip
    study.add_trial(waiting)


def _requeue_stale_trial(study: "optuna.Study", trial: "FrozenTrial") -> None:
    """Requeue the trial of a dead worker, up to `MAX_DEATHS` attempts."""
    deaths = trial.user_attrs.get("deaths", 0) + 1
    if deaths < MAX_DEATHS:
        requeue(study, trial, {**trial.user_attrs, "deaths": deaths})


def _without_password(url: str) -> str:
    from sqlalchemy import make_url

    return make_url(url).render_as_string(hide_password=True)


def _first_line(error: Exception) -> str:
    cause: BaseException = error.__cause__ or error
    return str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
