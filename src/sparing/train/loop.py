"""The training loop, top to bottom."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from sparing.data import Batches, ImageData
from sparing.errors import CheckpointError, InputError
from sparing.report import report
from sparing.schedules import warmup_cosine
from sparing.train.build import build_model, build_optimizer, build_sparsifier, pick_device
from sparing.train.checkpoint import load_checkpoint, random_state, save_checkpoint, set_random_state
from sparing.train.evaluate import evaluate
from sparing.train.log import RunLog
from sparing.train.recipe import Recipe

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Fitted:
    """A trained model, and what it took."""

    model: nn.Module
    validation_accuracy: float
    seconds: float


def fit(recipe: Recipe, data: ImageData, out: Path, console: Console, stop_after: int | None = None) -> Fitted | None:
    """Train as the recipe says, from the run's checkpoint if it has one, else from the start.

    After every epoch `checkpoint.pt` holds all that the rest of the run depends on: weights,
    optimizer, learning rate, loss scale, average, steps, random state. `best.pt` holds the most
    accurate epoch on the validation part among those within half a point of the sparsest so far:
    early epochs are dense and would always win.

    Args:
        recipe: what to do.
        data: already on the recipe's device.
        out: the run directory.
        console: where to print.
        stop_after: epochs to train now, fewer than the recipe's; None trains to the end.

    Returns:
        The trained model (its moving average where the recipe has one), or None if stopped early.

    Raises:
        InputError: the loss is not finite; the last checkpoint is kept.
        CheckpointError: the checkpoint cannot be read.
    """
    device = pick_device(recipe.device)
    torch.manual_seed(recipe.seed)
    in_channels = data.input_size[1]
    model = build_model(recipe.model, in_channels, data.num_classes).to(device)
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    sparsifier = build_sparsifier(recipe, model, len(data.train))
    optimizer = build_optimizer(recipe.optimizer, model)
    if sparsifier is not None:
        sparsifier.attach(optimizer)

    train = Batches(
        data.train, data.mean, data.std, recipe.data.batch_size, shuffle=True, shift=recipe.data.shift, seed=recipe.seed
    )
    validation = Batches(data.validation, data.mean, data.std, 1000)
    schedule = recipe.schedule
    unit = len(train) if schedule.update == "step" else 1
    scheduler = LambdaLR(
        optimizer, lambda t: warmup_cosine(t, schedule.epochs * unit, round(schedule.warmup_epochs * unit))
    )
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "fp16")
    average = AveragedModel(model, multi_avg_fn=_moving_average(recipe.ema), use_buffers=True) if recipe.ema else None
    stateful: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    if sparsifier is not None:
        stateful["sparsifier"] = sparsifier
    if average is not None:
        stateful["average"] = average

    progress: dict[str, Any] = {"epoch": 0, "seconds": 0.0, "best": None, "sparsest": 0.0, "validation_accuracy": 0.0}
    path = out / "checkpoint.pt"
    if path.exists():
        saved = load_checkpoint(path)
        try:
            for name, thing in stateful.items():
                thing.load_state_dict(saved[name])
            progress = saved["progress"]
            set_random_state(saved["random"])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise CheckpointError(f"checkpoint {path}: does not fit the recipe ({reason})") from error
        console.print(f"continuing after epoch {progress['epoch']} of {schedule.epochs}")

    log = RunLog(out, progress["epoch"], recipe.tensorboard, console)
    run_model = torch.compile(model) if recipe.compile else model
    trained = model if average is None else average.module
    clock = time.perf_counter() - progress["seconds"]
    last = min(schedule.epochs, progress["epoch"] + (stop_after or schedule.epochs))
    for epoch in range(progress["epoch"] + 1, last + 1):
        train.epoch = epoch
        rate = optimizer.param_groups[0]["lr"]
        total_loss = torch.zeros((), device=device)
        model.train()
        for images, labels in log.progress(train, epoch, schedule.epochs):
            if recipe.channels_last:
                images = images.to(memory_format=torch.channels_last)
            with torch.autocast(device.type, AMP.get(recipe.amp), enabled=recipe.amp != "none"):
                loss = F.cross_entropy(run_model(images), labels, label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if recipe.clip_grad_norm is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            if average is not None:
                average.update_parameters(model)
            if schedule.update == "step":
                scheduler.step()
            # Summed on the device: reading it every step would make a GPU wait.
            total_loss += loss.detach() * len(labels)
        if schedule.update == "epoch":
            scheduler.step()

        train_loss = float(total_loss) / len(train.images)
        if not math.isfinite(train_loss):
            raise InputError(
                f"the loss became {train_loss} in epoch {epoch}: lower optimizer.lr ({recipe.optimizer.lr:g}) or set "
                "clip_grad_norm; the checkpoint of the epoch before is kept"
            )
        if sparsifier is not None:
            sparsifier.warn_collapsed()
        result = evaluate(trained, validation)
        account = report(trained)
        progress |= {
            "epoch": epoch,
            "seconds": time.perf_counter() - clock,
            "validation_accuracy": result.accuracy,
        }
        log.epoch(
            {
                "epoch": epoch,
                "lr": rate,
                "train_loss": train_loss,
                "validation_loss": result.loss,
                "validation_accuracy": result.accuracy,
                "sparsity": account.total.sparsity,
                "seconds": progress["seconds"],
                "layers": {r.name: {"threshold": r.threshold, "sparsity": r.sparsity} for r in account.layers},
            },
            schedule.epochs,
        )
        best = {"epoch": epoch, "validation_accuracy": result.accuracy, "sparsity": account.total.sparsity}
        progress["sparsest"] = max(progress["sparsest"], account.total.sparsity)
        data_shape = {"input_size": list(data.input_size), "num_classes": data.num_classes, "images": len(data.train)}
        if _is_better(best, progress["best"], progress["sparsest"]):
            progress["best"] = best
            save_checkpoint(out / "best.pt", {"model": trained.state_dict(), "data": data_shape, "progress": progress})
        states = {name: thing.state_dict() for name, thing in stateful.items()}
        save_checkpoint(path, {**states, "data": data_shape, "progress": progress, "random": random_state()})
    log.close()
    if progress["epoch"] < schedule.epochs:
        return None
    return Fitted(trained, progress["validation_accuracy"], progress["seconds"])


def _moving_average(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Any], None]:
    """p ← decay · p + (1 − decay) · new for what is floating point; masks and counts are taken as they are."""

    @torch.no_grad()
    def update(averages: Sequence[Tensor], news: Sequence[Tensor], count: Any) -> None:
        for average, new in zip(averages, news, strict=True):
            if average.is_floating_point():
                average.lerp_(new.to(average.dtype), 1 - decay)
            else:
                average.copy_(new)

    return update


def _is_better(new: dict[str, Any], old: dict[str, Any] | None, sparsest: float) -> bool:
    """Within half a point of the sparsest epoch, and more accurate than the best or the best is not."""
    if new["sparsity"] < sparsest - 0.005:
        return False
    if old is None or old["sparsity"] < sparsest - 0.005:
        return True
    return bool(new["validation_accuracy"] >= old["validation_accuracy"])
