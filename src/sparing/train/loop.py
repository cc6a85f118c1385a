"""The training loop."""

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

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
    recipe: Recipe, data: SplitDataset, ranks: Ranks, out: Path, console: Console, stop_after: int | None = None
) -> Fitted | None:
    """Train a recipe, from the checkpoint of the run directory if there is one.

    After every epoch `checkpoint.pt` holds everything that the rest of the run depends on: model (weights, masks and
    the count of steps), optimizer, loss scale, moving average, random state. `best.pt` holds the epoch with the highest
    validation accuracy among those within half a percentage point of the highest sparsity so far; without that
    condition an early, dense epoch would win.

    Args:
        recipe: recipe of the run.
        data: data set, on the device of this rank.
        ranks: all ranks; rank 0 writes the files. A run may be resumed with another number of ranks: the batches stay
            the same, and sums over them differ by rounding.
        out: run directory.
        console: console to print to.
        stop_after: number of epochs to train now; None trains to the end.

    Returns:
        The trained model, or None if the run was stopped before its last epoch.

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
    path = out / "checkpoint.pt"
    saved = load_checkpoint(path) if path.exists() else None
    schedule = recipe.schedule
    steps = schedule.epochs * len(train)
    if saved is not None:
        # The number of batches may differ by one per epoch if the number of ranks has changed.
        steps = saved.get("data", {}).get("steps", steps)
    sparsifier = build_sparsifier(recipe, model, steps, data.input_size)
    optimizer = build_optimizer(recipe.optimizer, model)
    if sparsifier is not None:
        sparsifier.attach(optimizer)
    learning_rates = recipe.learning_rates(len(train))
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "fp16")
    average = None
    if recipe.ema:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True)
    stateful: dict[str, Any] = {"model": model, "optimizer": optimizer, "scaler": scaler}
    if average is not None:
        stateful["average"] = average

    progress: dict[str, Any] = {"epoch": 0, "seconds": 0.0, "best": None, "sparsest": 0.0, "validation_accuracy": 0.0}
    if saved is None and ranks.first:
        warn_if_nothing_prunes(recipe, len(train))
    if saved is not None:
        try:
            for name, each in stateful.items():
                each.load_state_dict(saved[name])
            progress = saved["progress"]
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise CheckpointError(f"checkpoint {path}: does not fit the recipe ({reason})") from error
        console.print(f"continuing after epoch {progress['epoch']} of {schedule.epochs}")
    parallel = ranks.wrap(model)
    # Everything above must draw the same random numbers on every rank; what follows, such as dropout, must not.
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
        rates = learning_rates[(epoch - 1) * len(train) : epoch * len(train)]
        total_loss, examples = torch.zeros((), device=device), 0
        began = time.perf_counter()
        model.train()
        batches = log.progress(train, epoch, schedule.epochs, recipe.data.batch_size) if log else train
        # There are fewer batches than rates if no image of a batch can be read.
        for batch, rate in zip(batches, rates, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            # Summed on the device: reading the loss at every step would synchronize with the GPU.
            total_loss += backward(run_model, batch, recipe, ranks, scaler, sparsifier)
            examples += len(batch[-1])
            if recipe.clip_grad_norm is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            if average is not None:
                average.update_parameters(model)

        loss_sum, seen = ranks.sum(float(total_loss), examples)
        speed = seen / (time.perf_counter() - began)
        train_loss = loss_sum / seen
        if not math.isfinite(train_loss):
            raise InputError(
                f"the loss became {train_loss} in epoch {epoch}: lower optimizer.lr ({recipe.optimizer.lr:g}) or set "
                "clip_grad_norm. The checkpoint of the previous epoch is kept"
            )
        if sparsifier is not None:
            if epoch == schedule.epochs:
                # The fp16 scaler may have skipped steps, and with them the last updates of masks or thresholds.
                taken = sparsifier.step
                sparsifier.finish()
                if average is not None and sparsifier.step > taken:
                    average.update_parameters(model)
            sparsifier.warn_collapsed()
        ranks.share_buffers(trained)
        result = evaluate(trained, validation, ranks) if validation is not None else None
        accuracy = None if result is None else result.accuracy
        counts = report(trained)
        progress |= {
            "epoch": epoch,
            "seconds": time.perf_counter() - clock,
            "validation_accuracy": accuracy,
        }
        if log:
            log.epoch(
                {
                    "epoch": epoch,
                    "lr": rates[0],
                    "train_loss": train_loss,
                    "validation_loss": None if result is None else result.loss,
                    "validation_accuracy": accuracy,
                    "sparsity": counts.total.sparsity,
                    "seconds": progress["seconds"],
                    "examples_per_second": speed,
                    # Only batches read from files have these.
                    "waited_seconds": getattr(train, "waited_seconds", 0.0),
                    "skipped": len(getattr(train, "skipped", ())),
                    "layers": {r.name: {"threshold": r.threshold, "sparsity": r.sparsity} for r in counts.layers},
                },
                schedule.epochs,
            )
        candidate = {"epoch": epoch, "validation_accuracy": accuracy, "sparsity": counts.total.sparsity}
        progress["sparsest"] = max(progress["sparsest"], counts.total.sparsity)
        shape = {
            "input_size": list(data.input_size),
            "model_arguments": data.model_arguments(),
            "steps": steps,
        }
        better = _is_better(candidate, progress["best"], progress["sparsest"])
        if better:
            progress["best"] = candidate
        random = ranks.gather(random_state(device))
        if ranks.first and better:
            save_checkpoint(out / "best.pt", {"model": trained.state_dict(), "data": shape, "progress": progress})
        if ranks.first:
            states = {name: each.state_dict() for name, each in stateful.items()}
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
    """Compute the gradient of the mean loss over the global batch, plus the penalty of the method.

        L = Σ loss(example) / n + penalty          n examples on all ranks

    Every example has the same weight, also where ranks or micro-batches have different numbers of examples. The ranks
    average their gradients, so the loss of each is multiplied by their number, and the penalty is not.

    Args:
        model: the model as it is run: compiled, distributed.
        batch: share of this rank, `(*inputs, labels)`.
        recipe: recipe of the run.
        ranks: all ranks.
        scaler: gradient scaler; disabled without fp16.
        sparsifier: gives the penalty; None for dense training.

    Returns:
        The sum of the losses over the examples of this rank, on the device.
    """
    n = ranks.sum_(torch.tensor(float(len(batch[-1])), device=ranks.device))
    total = torch.zeros((), device=ranks.device)
    micro_batches = list(zip(*(tensor.chunk(recipe.data.accumulate) for tensor in batch), strict=True))
    for index, (*inputs, labels) in enumerate(micro_batches):
        if recipe.channels_last:
            inputs = [tensor.to(memory_format=torch.channels_last) for tensor in inputs]
        last = index == len(micro_batches) - 1
        # Gradients are exchanged once per step, with the last micro-batch.
        with nullcontext() if last or ranks.count == 1 else model.no_sync():  # type: ignore[operator]
            with torch.autocast(ranks.device.type, AMP.get(recipe.amp), enabled=recipe.amp != "none"):
                logits = model(*inputs)
                loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing, reduction="sum")
            objective = loss * (ranks.count / n)
            if sparsifier is not None and last:
                # In full on every rank, since the ranks average their gradients.
                objective = objective + sparsifier.penalty()
            scaler.scale(objective).backward()
        total += loss.detach()
    return total


def _is_better(new: dict[str, Any], old: dict[str, Any] | None, sparsest: float) -> bool:
    """Return whether an epoch replaces the best one so far.

    It must be within half a percentage point of the highest sparsity so far, and either the old one is not or the new
    one is at least as accurate. Without a validation split, the last epoch that is sparse enough is the best.
    """
    if new["sparsity"] < sparsest - 0.005:
        return False
    if old is None or old["sparsity"] < sparsest - 0.005:
        return True
    return bool(new["validation_accuracy"] is None or new["validation_accuracy"] >= old["validation_accuracy"])
