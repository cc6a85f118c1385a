"""The training loop, top to bottom."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from sparing.data import SplitDataset
from sparing.errors import CheckpointError, InputError
from sparing.report import report
from sparing.sparsifier import Sparsifier
from sparing.train.build import build_model, build_optimizer, build_sparsifier, warn_if_nothing_prunes
from sparing.train.checkpoint import load_checkpoint, random_state, save_checkpoint, set_random_state
from sparing.train.distributed import Ranks
from sparing.train.evaluate import evaluate
from sparing.train.log import RunLog
from sparing.train.recipe import Recipe

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Fitted:
    """A trained model, and what it took."""

    model: nn.Module
    validation_accuracy: float | None
    """None where the data has no validation part."""
    seconds: float


def fit(
    recipe: Recipe, data: SplitDataset, ranks: Ranks, out: Path, console: Console, stop_after: int | None = None
) -> Fitted | None:
    """Train as the recipe says, from the run's checkpoint if it has one, else from the start.

    After every epoch `checkpoint.pt` holds all that the rest of the run depends on: weights,
    optimizer, learning rate, loss scale, average, steps, random state. `best.pt` holds the most
    accurate epoch on the validation part among those within half a point of the sparsest so far:
    early epochs are dense and would always win.

    Args:
        recipe: what to do.
        data: already on the device of this rank.
        ranks: who trains with this process; rank 0 writes the files. A run may go on with another
            number of ranks: batches are the same, and their sums differ by rounding.
        out: the run directory.
        console: where to print.
        stop_after: epochs to train now, fewer than the recipe's; None trains to the end.

    Returns:
        The trained model (its moving average where the recipe has one), or None if stopped early.

    Raises:
        InputError: the loss is not finite; the last checkpoint is kept.
        CheckpointError: the checkpoint cannot be read.
    """
    device = ranks.device
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.model, data.model_arguments()).to(device)
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    train = data.training(recipe.data.batch_size, recipe.seed, ranks.rank, ranks.count)
    validation = data.evaluation("validation", ranks.rank, ranks.count) if data.size("validation") else None
    sparsifier = build_sparsifier(recipe, model, recipe.schedule.epochs * len(train), data.input_size)
    optimizer = build_optimizer(recipe.optimizer, model)
    if sparsifier is not None:
        sparsifier.attach(optimizer)
    schedule = recipe.schedule
    scheduler = LambdaLR(optimizer, lambda t: schedule.factor(t, len(train)))
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "fp16")
    average = AveragedModel(model, multi_avg_fn=_moving_average(recipe.ema), use_buffers=True) if recipe.ema else None
    stateful: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    if average is not None:
        stateful["average"] = average

    progress: dict[str, Any] = {"epoch": 0, "seconds": 0.0, "best": None, "sparsest": 0.0, "validation_accuracy": 0.0}
    path = out / "checkpoint.pt"
    saved = load_checkpoint(path) if path.exists() else None
    if saved is None and ranks.first:
        warn_if_nothing_prunes(recipe, len(train))
    if saved is not None:
        try:
            for name, thing in stateful.items():
                thing.load_state_dict(saved[name])
            progress = saved["progress"]
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise CheckpointError(f"checkpoint {path}: does not fit the recipe ({reason})") from error
        console.print(f"continuing after epoch {progress['epoch']} of {schedule.epochs}")
    parallel = ranks.wrap(model)
    # Last: what is built above must draw alike on every rank, what follows, such as dropout, must not.
    if not ranks.first:
        torch.manual_seed(recipe.seed + 1_000_003 * (ranks.rank + ranks.count * progress["epoch"]))
    if saved is not None:
        set_random_state(saved["random"], ranks.rank, device)

    log = RunLog(out, progress["epoch"], recipe.tensorboard, console) if ranks.first else None
    run_model: nn.Module = torch.compile(parallel) if recipe.compile else parallel  # type: ignore[assignment]
    trained = model if average is None else average.module
    clock = time.perf_counter() - progress["seconds"]
    last = min(schedule.epochs, progress["epoch"] + (stop_after or schedule.epochs))
    for epoch in range(progress["epoch"] + 1, last + 1):
        train.epoch = epoch
        rate = optimizer.param_groups[0]["lr"]
        total_loss, examples = torch.zeros((), device=device), 0
        began = time.perf_counter()
        model.train()
        batches = log.progress(train, epoch, schedule.epochs, recipe.data.batch_size) if log else train
        for batch in batches:
            optimizer.zero_grad()
            # Summed on the device: reading it at every step would make a GPU wait.
            total_loss += backward(run_model, batch, recipe, ranks, scaler, sparsifier)
            examples += len(batch[-1])
            if recipe.clip_grad_norm is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            if average is not None:
                average.update_parameters(model)
            if schedule.update == "step":
                scheduler.step()
        if schedule.update == "epoch":
            scheduler.step()

        loss_sum, seen = ranks.sum(float(total_loss), examples)
        speed = seen / (time.perf_counter() - began)
        train_loss = loss_sum / seen
        if not math.isfinite(train_loss):
            raise InputError(
                f"the loss became {train_loss} in epoch {epoch}: lower optimizer.lr ({recipe.optimizer.lr:g}) or set "
                "clip_grad_norm; the checkpoint of the epoch before is kept"
            )
        if sparsifier is not None:
            if epoch == schedule.epochs:
                sparsifier.finish()  # an fp16 scaler may have skipped steps
            sparsifier.warn_collapsed()
        ranks.share_buffers(trained)
        result = evaluate(trained, validation, ranks) if validation is not None else None
        accuracy = None if result is None else result.accuracy
        account = report(trained)
        progress |= {
            "epoch": epoch,
            "seconds": time.perf_counter() - clock,
            "validation_accuracy": accuracy,
        }
        if log:
            log.epoch(
                {
                    "epoch": epoch,
                    "lr": rate,
                    "train_loss": train_loss,
                    "validation_loss": None if result is None else result.loss,
                    "validation_accuracy": accuracy,
                    "sparsity": account.total.sparsity,
                    "seconds": progress["seconds"],
                    "examples_per_second": speed,
                    # Of batches that come from files; those in memory wait for nothing.
                    "waited_seconds": getattr(train, "waited_seconds", 0.0),
                    "skipped": len(getattr(train, "skipped", ())),
                    "layers": {r.name: {"threshold": r.threshold, "sparsity": r.sparsity} for r in account.layers},
                },
                schedule.epochs,
            )
        best = {"epoch": epoch, "validation_accuracy": accuracy, "sparsity": account.total.sparsity}
        progress["sparsest"] = max(progress["sparsest"], account.total.sparsity)
        shape = {
            "input_size": list(data.input_size),
            "model_arguments": data.model_arguments(),
            "steps": schedule.epochs * len(train),
        }
        better = _is_better(best, progress["best"], progress["sparsest"])
        if better:
            progress["best"] = best
        random = ranks.gather(random_state(device))
        if ranks.first and better:
            save_checkpoint(out / "best.pt", {"model": trained.state_dict(), "data": shape, "progress": progress})
        if ranks.first:
            states = {name: thing.state_dict() for name, thing in stateful.items()}
            save_checkpoint(path, {**states, "data": shape, "progress": progress, "random": random})
    if log:
        log.close()
    if progress["epoch"] < schedule.epochs:
        return None
    return Fitted(trained, progress["validation_accuracy"], progress["seconds"])


def backward(
    model: nn.Module,
    batch: tuple[Tensor, ...],
    recipe: Recipe,
    ranks: Ranks,
    scaler: torch.amp.GradScaler,
    sparsifier: Sparsifier | None = None,
) -> Tensor:
    """Leave the gradient of the mean loss over the global batch in the parameters.

    L = Σ loss(example) / n, with n the examples of all ranks: shares of unequal sizes, and parts of a
    share, weigh as much as their examples. Ranks average their gradients, hence the factor.

    Returns:
        The sum of the losses of this rank's examples, on the device.
    """
    n = ranks.sum_(torch.tensor(float(len(batch[-1])), device=ranks.device))
    total = torch.zeros((), device=ranks.device)
    parts = list(zip(*(tensor.chunk(recipe.data.accumulate) for tensor in batch), strict=True))
    for index, (*inputs, labels) in enumerate(parts):
        if recipe.channels_last:
            inputs = [tensor.to(memory_format=torch.channels_last) for tensor in inputs]
        last = index == len(parts) - 1
        # Gradients go over the wire once a step, with the last part.
        with nullcontext() if last or ranks.count == 1 else model.no_sync():  # type: ignore[operator]
            with torch.autocast(ranks.device.type, AMP.get(recipe.amp), enabled=recipe.amp != "none"):
                logits = model(*inputs)
                loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing, reduction="sum")
            objective = loss * (ranks.count / n)
            if sparsifier is not None and last:
                # In full on every rank: the ranks average their gradients.
                objective = objective + sparsifier.penalty()
            scaler.scale(objective).backward()
        total += loss.detach()
    return total


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
    """Within half a point of the sparsest epoch, and more accurate than the best or the best is not.

    Without a validation part the last such epoch is the best.
    """
    if new["sparsity"] < sparsest - 0.005:
        return False
    if old is None or old["sparsity"] < sparsest - 0.005:
        return True
    return bool(new["validation_accuracy"] is None or new["validation_accuracy"] >= old["validation_accuracy"])
