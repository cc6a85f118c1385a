"""The study of a sweep in its database, and what becomes of a trial whose worker dies."""

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

HEARTBEAT = 30
"""Seconds between two signs of life of a worker; after four without one its trial is given to another."""
DEATHS = 3
"""Workers that may die in one trial before it counts as failed: it may be what kills them."""


@contextmanager
def open_study(sweep: Sweep, out: Path, url: str | None) -> "Iterator[optuna.Study]":
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


def run_of(trial: "BaseTrial") -> int:
    """The number of the run directory: of the first trial that Optuna counts in it."""
    return int(trial.user_attrs.get("run", trial.number))


def queue_again(study: "optuna.Study", trial: "BaseTrial", attributes: Mapping[str, Any]) -> None:
    """Let the next free worker continue a trial. What has ended stays ended for Optuna, hence a new one."""
    import optuna

    waiting = optuna.create_trial(
        state=optuna.trial.TrialState.WAITING, params=trial.params, distributions=trial.distributions,
        user_attrs={**attributes, "run": run_of(trial)},
    )  # fmt: skip
    study.add_trial(waiting)


def _after_death(study: "optuna.Study", trial: "FrozenTrial") -> None:
    deaths = trial.user_attrs.get("deaths", 0) + 1
    if deaths < DEATHS:
        queue_again(study, trial, {**trial.user_attrs, "deaths": deaths})


def _without_password(url: str) -> str:
    from sqlalchemy import make_url

    return make_url(url).render_as_string(hide_password=True)


def _first_line(error: Exception) -> str:
    cause: BaseException = error.__cause__ or error
    return str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
