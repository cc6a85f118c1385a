"""The training loop."""

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparing.data import SplitDataset
from sparing.errors import CheckpointError, InputError
from sparing.report import report
from sparing.run.build import build_model, build_optimizer, build_sparsifier
from sparing.run.checkpoint import (
    checkpoint_exists,
    load_newest,
    random_state,
    save_checkpoint,
    seed_all,
    set_random_state,
)
from sparing.run.distributed import Ranks
from sparing.run.evaluate import evaluate
from sparing.run.interrupt import Interrupted, StopSignals
from sparing.run.log import RunLog
from sparing.run.progress import Progress, check_finite, check_numbers, check_optimizer, check_ranks, reason
from sparing.run.recipe import Recipe
from sparing.run.step import backward, is_emulated
from sparing.run.weights import load_weights


@dataclass(frozen=True)
class Fitted:
    """A trained model.

    Attributes:
        model: the model, or its moving average if the recipe has one.
        validation_accuracy: accuracy after the last epoch; None if the data has no validation split.
        seconds: duration of the training.
    """

    model: nn.Module
    validation_accuracy: float | None
    seconds: float


def fit(
    recipe: Recipe,
    data: SplitDataset,
    ranks: Ranks,
    out: Path,
    console: Console,
    stop: StopSignals,
    stop_after: int | None = None,
) -> Fitted | None:
    """Train a recipe, from the last checkpoint of the run directory if there is one.

    `checkpoint.pt` holds everything that the rest of the run depends on: model (weights, thresholds, masks and the
    count of steps), optimizer, loss scale, moving average, the position in the epoch and its sums so far, and the
    state of the random generators of all ranks. It is written after every epoch, in between as the recipe says, and
    when a signal asks to stop. A resumed run is equal to the last bit to one that was not stopped.

    `best.pt` holds the epoch with the highest validation accuracy among those within half a percentage point of the
    highest sparsity so far; without that condition an early, dense epoch would win.

    Args:
        recipe: resolved recipe of the run.
        data: data set, on the device of this rank.
        ranks: all ranks; rank 0 writes the files. A run may be resumed with another number of ranks: the batches stay
            the same, and sums over them differ by rounding.
        out: run directory.
        console: console to print to.
        stop: tells whether a signal asked to stop.
        stop_after: number of epochs to train now; None trains to the end.

    Returns:
        The trained model, or None if the run was stopped before its last epoch.

    Raises:
        InputError: the loss or a weight is not finite; the ranks differ; a file cannot be written. The last
            checkpoint is kept.
        CheckpointError: the checkpoint cannot be read, or does not fit the recipe.
        Interrupted: a signal asked to stop; the state is saved.
    """
    epochs = recipe.schedule.epochs
    training = _Training(recipe, data, ranks, out, stop)
    progress = training.progress
    if training.resumed:
        step = f", step {progress.step}" if progress.step else ""
        console.print(f"continuing after epoch {progress.epoch} of {epochs}{step}")
    if is_emulated(recipe.amp, ranks.device):
        console.print(f"amp: {recipe.amp} is emulated on this processor, and slower than amp: none", style="yellow")
    log = RunLog(out, progress.epoch, recipe.tensorboard, console) if ranks.first else None
    for epoch in range(progress.epoch + 1, min(epochs, progress.epoch + (stop_after or epochs)) + 1):
        training.run_epoch(epoch, log)
    if log:
        log.close()
    if progress.epoch < epochs:
        return None
    return Fitted(training.trained, progress.validation_accuracy, progress.seconds)


class _Training:
    """Everything that a run trains with, in the state of the checkpoint if there is one.

    Attributes:
        model: the model.
        trained: the model that is validated and tested: the moving average if the recipe has one.
        progress: how far the run is.
        resumed: whether there was a checkpoint.
    """

    def __init__(self, recipe: Recipe, data: SplitDataset, ranks: Ranks, out: Path, stop: StopSignals) -> None:
        self.recipe, self.ranks, self.out = recipe, ranks, out
        self._stop = stop
        device = ranks.device
        seed_all(recipe.seed)
        model = build_model(recipe.model, data.model_arguments())
        path = out / "checkpoint.pt"
        self.resumed = checkpoint_exists(path)
        if recipe.weights is not None and not self.resumed:
            load_weights(model, Path(recipe.weights), recipe.resolved.weights_sha256 if recipe.resolved else None)
        model = model.to(device)
        if recipe.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = model
        self.train = data.training(recipe.data.batch_size, recipe.seed, ranks.rank, ranks.count)
        if not hasattr(self.train, "start"):
            raise InputError(
                f"the batches of data {recipe.data.name!r} have no attribute `start`; a run that resumes in mid-epoch "
                "sets it to the number of batches to leave out"
            )
        self.promised = data.size("validation")
        self.validation = data.evaluation("validation", ranks.rank, ranks.count) if self.promised else None
        self.learning_rates = recipe.learning_rates(len(self.train))
        self.sparsifier = build_sparsifier(recipe, model)
        self.optimizer = build_optimizer(recipe.optimizer, model)
        if self.sparsifier is not None:
            self.sparsifier.attach(self.optimizer)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "fp16")
        self.average = None
        if recipe.ema:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True)
        self.trained: nn.Module = model if self.average is None else self.average.module
        self.progress = Progress()
        # Summed on the device: reading the loss at every step would synchronize with the GPU.
        self._loss = torch.zeros((), device=device)
        self._examples = 0

        saved, used = load_newest(path) if self.resumed else ({}, path)
        if self.resumed:
            try:
                self._restore(saved)
            # Its checksum is right, so it was made by hand, or is of another run: any type of error is possible.
            except Exception as error:
                raise CheckpointError(f"checkpoint {used}: does not fit the recipe ({reason(error)})") from error
        if ranks.count > 1:
            check_ranks(self.ranks, self.model, self.progress)
        if used != path and ranks.first:
            used.replace(path)  # in place of the damaged one, which would otherwise be kept as the one before
        parallel = ranks.wrap(model)
        # Everything above must draw the same random numbers on every rank; what follows, such as dropout, must not.
        if not ranks.first:
            seed_all(recipe.seed + 1_000_003 * (ranks.rank + ranks.count * self.progress.epoch))
        if self.resumed and ranks.rank < len(saved["ranks"]):
            set_random_state(saved["ranks"][ranks.rank]["random"], device)
        self._run_model: nn.Module = torch.compile(parallel) if recipe.compile else parallel  # type: ignore[assignment]
        now = time.perf_counter()
        self._began = now - self.progress.seconds
        self._saved = now

    def run_epoch(self, epoch: int, log: RunLog | None) -> None:
        """Train the rest of an epoch, validate and save.

        Raises:
            InputError: the loss or a weight is not finite, or a file cannot be written.
            Interrupted: a signal asked to stop; the state is saved.
        """
        recipe, progress, ranks = self.recipe, self.progress, self.ranks
        epoch_began = time.perf_counter() - progress.epoch_seconds
        self.model.train()
        self.train.epoch, self.train.start = epoch, progress.step
        rates = self.learning_rates[(epoch - 1) * len(self.train) : epoch * len(self.train)]
        batches = log.progress(self.train, epoch, recipe.schedule.epochs, recipe.data.batch_size) if log else self.train
        for batch in batches:
            if progress.step == len(self.train):
                raise InputError(
                    f"the data has more than the {len(self.train)} batches per epoch of its len(), or does not leave "
                    "out the first `start` batches"
                )
            self._take_step(batch, rates[progress.step])
            progress.step += 1
            progress.epoch_seconds = time.perf_counter() - epoch_began
            self._save_if_due(before_end=progress.step < len(self.train))
        if progress.step < len(self.train):
            raise InputError(f"the data has {progress.step} of the {len(self.train)} batches per epoch of its len()")

        loss_sum, seen = ranks.sum(float(self._loss), self._examples)
        if not seen:
            raise InputError(f"the training data gave no examples in epoch {epoch}")
        speed = seen / (time.perf_counter() - epoch_began)
        self._check_finite()
        if self.sparsifier is not None:
            if epoch == recipe.schedule.epochs:
                # The fp16 scaler may have skipped steps, and with them the last updates of masks or thresholds.
                taken = self.sparsifier.step
                self.sparsifier.finish()
                if self.average is not None and self.sparsifier.step > taken:
                    self.average.update_parameters(self.model)
            self.sparsifier.warn_collapsed()
        ranks.share_buffers(self.trained)
        result = None
        if self.validation is not None:
            result = evaluate(self.trained, self.validation, ranks, self._leave_evaluation, self.promised)
        accuracy = None if result is None else result.accuracy
        counts = report(self.trained)
        progress.seconds = time.perf_counter() - self._began
        better = progress.finish_epoch(counts.total.sparsity, accuracy)
        self._loss, self._examples = torch.zeros((), device=ranks.device), 0
        if log:
            log.epoch(
                {
                    "epoch": epoch,
                    "lr": rates[0],
                    "train_loss": loss_sum / seen,
                    "validation_loss": None if result is None else result.loss,
                    "validation_accuracy": accuracy,
                    "sparsity": counts.total.sparsity,
                    "seconds": progress.seconds,
                    "examples_per_second": speed,
                    # Only batches read from files have these.
                    "waited_seconds": getattr(self.train, "waited_seconds", 0.0),
                    "skipped": len(getattr(self.train, "skipped", ())),
                    "layers": {r.name: {"threshold": r.threshold, "sparsity": r.sparsity} for r in counts.layers},
                },
                recipe.schedule.epochs,
            )
        self._save(better)
        self._leave_if(ranks.max(self._stop.received)[0])

    def _take_step(self, batch: tuple[Tensor, ...], rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("relative_lr", 1.0)
        self.optimizer.zero_grad()
        self._loss += backward(self._run_model, batch, self.recipe, self.ranks, self.scaler, self.sparsifier)
        self._examples += len(batch[-1])
        if self.recipe.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def _save_if_due(self, before_end: bool) -> None:
        """Save after a step if it is time to, or if a signal asked to stop. At the end of an epoch it is saved anyway.

        Raises:
            Interrupted: a signal asked to stop; the state is saved.
        """
        section = self.recipe.checkpoint
        minutes = (time.perf_counter() - self._saved) / 60
        by_steps = section.steps is not None and self._steps_taken % section.steps == 0
        by_time = section.minutes is not None and minutes >= section.minutes
        # Clocks and signals differ between ranks, and all must do the same.
        due, signal = self.ranks.max(int(before_end and (by_steps or by_time)), self._stop.received)
        if due or signal:
            self._check_finite()
            self._save()
        self._leave_if(signal)

    @property
    def _steps_taken(self) -> int:
        return self.progress.epoch * len(self.train) + self.progress.step

    def _leave_if(self, signal: int) -> None:
        if signal:
            raise Interrupted(signal)

    def _leave_evaluation(self) -> None:
        """Leave an evaluation if a signal asked to stop; it is repeated when the run goes on. One rank alone can do so.

        Raises:
            Interrupted: a signal asked to stop; the state before the evaluation is saved.
        """
        if self._stop.received and self.ranks.count == 1:
            self._save()
            raise Interrupted(self._stop.received)

    def _check_finite(self) -> None:
        where = f"epoch {self.progress.epoch + 1}: lower optimizer.lr ({self.recipe.optimizer.lr:g})"
        check_finite(self.ranks, float(self._loss), self.model, self.optimizer, where)

    def _save(self, best: bool = False) -> None:
        """Write a checkpoint, and `best.pt` if the last epoch is the best so far."""
        if self.ranks.count > 1:
            check_ranks(self.ranks, self.model, self.progress)
        self.progress.seconds = time.perf_counter() - self._began
        own = {
            "random": random_state(self.ranks.device),
            "loss": self._loss.cpu(),
            "examples": self._examples,
            "skipped": dict(getattr(self.train, "skipped", {})),
        }
        ranks = self.ranks.gather(own)
        self.ranks.run_on_first(lambda: self._write(ranks, best))
        self._saved = time.perf_counter()

    def _write(self, ranks: list[dict[str, Any]], best: bool) -> None:
        progress = dict(vars(self.progress))
        if best:
            save_checkpoint(self.out / "best.pt", {"model": self.trained.state_dict(), "progress": progress})
        states = {name: each.state_dict() for name, each in self._stateful().items()}
        content = {**states, "progress": progress, "ranks": ranks}
        save_checkpoint(self.out / "checkpoint.pt", content, self.recipe.checkpoint.keep)

    def _restore(self, saved: dict[str, Any]) -> None:
        """Take the state of a checkpoint.

        Raises:
            Exception: it is not a checkpoint of this recipe.
        """
        self.progress = Progress.read(saved["progress"], self.recipe.schedule.epochs)
        before = copy.deepcopy(self.optimizer.state_dict()["param_groups"])
        check_numbers(self.scaler.state_dict(), saved["scaler"])
        for name, each in self._stateful().items():
            each.load_state_dict(saved[name])
        check_optimizer(self.optimizer, before)
        rank, count = self.ranks.rank, self.ranks.count
        if not saved["ranks"]:
            raise ValueError("it holds the state of no rank")
        for part in saved["ranks"][rank::count]:  # of several, if there are fewer ranks now
            self._loss = self._loss + part["loss"].to(self._loss)
            self._examples += int(part["examples"])
            getattr(self.train, "skipped", {}).update(part["skipped"])
        if self._loss.shape != ():
            raise ValueError(f"the loss has shape {tuple(self._loss.shape)}")
        if rank < len(saved["ranks"]):
            set_random_state(saved["ranks"][rank]["random"], self.ranks.device)

    def _stateful(self) -> dict[str, Any]:
        stateful: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        return stateful if self.average is None else {**stateful, "average": self.average}
