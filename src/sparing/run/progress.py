"""How far a run is, and checks of the state that a checkpoint restores."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparing.data.base import content_hash
from sparing.errors import InputError, listed
from sparing.run.distributed import Ranks

OPTIMIZER_STATE = {frozenset(names) for names in ((), ("momentum_buffer",), ("step", "exp_avg", "exp_avg_sq"))}
"""Names of the state that the optimizers of recipes keep for a parameter."""


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        epoch: number of finished epochs.
        step: number of batches that were taken in the epoch after them.
        seconds: duration of the training so far.
        epoch_seconds: duration of the epoch that is not finished, so far.
        best: the epoch in `best.pt`.
        sparsest: highest sparsity after an epoch so far.
        validation_accuracy: accuracy after the last finished epoch; None without validation data.
    """

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    best: dict[str, Any] | None = None
    sparsest: float = 0.0
    validation_accuracy: float | None = None

    @classmethod
    def read(cls, saved: dict[str, Any], epochs: int) -> "Progress":
        """Return the progress that a checkpoint holds.

        Raises:
            Exception: a value is missing, unknown or out of range.
        """
        if not isinstance(saved, dict) or saved.keys() != vars(cls()).keys():
            raise ValueError("progress: it has other keys")
        progress = cls(**saved)
        numbers = [progress.seconds, progress.epoch_seconds, progress.sparsest, progress.validation_accuracy or 0.0]
        if progress.best is not None:
            numbers += [progress.best["sparsity"], progress.best["validation_accuracy"] or 0.0]
        if not all(isinstance(each, (int, float)) and math.isfinite(each) for each in numbers):
            raise ValueError(f"progress: {saved} has a value that is not a finite number")
        for name, largest in (("epoch", epochs), ("step", None)):
            value = getattr(progress, name)
            if type(value) is not int or value < 0 or (largest is not None and value > largest):
                raise ValueError(f"progress: {name} is {value!r}")
        return progress

    def finish_epoch(self, sparsity: float, accuracy: float | None) -> bool:
        """Begin the next epoch, and return whether the finished one is the best so far.

        Args:
            sparsity: of the model after the epoch.
            accuracy: on the validation data after the epoch; None without validation data.
        """
        self.epoch, self.step, self.epoch_seconds = self.epoch + 1, 0, 0.0
        self.validation_accuracy = accuracy
        self.sparsest = max(self.sparsest, sparsity)
        finished = {"epoch": self.epoch, "validation_accuracy": accuracy, "sparsity": sparsity}
        better = is_better(finished, self.best, self.sparsest)
        self.best = finished if better else self.best
        return better


def is_better(new: dict[str, Any], old: dict[str, Any] | None, sparsest: float) -> bool:
    """Return whether an epoch replaces the best one so far.

    It must be within half a percentage point of the highest sparsity so far, and either the old one is not or the new
    one is at least as accurate. Without a validation split, the last epoch that is sparse enough is the best.
    """
    if new["sparsity"] < sparsest - 0.005:
        return False
    if old is None or old["sparsity"] < sparsest - 0.005:
        return True
    accuracies = new["validation_accuracy"], old["validation_accuracy"]
    return None in accuracies or bool(accuracies[0] >= accuracies[1])


def check_finite(ranks: Ranks, loss: float, model: nn.Module, optimizer: torch.optim.Optimizer, where: str) -> None:
    """Check loss, weights and optimizer, so that no checkpoint is replaced by one from which no run can go on.

    Args:
        ranks: all ranks.
        loss: sum of the losses of this rank.
        model: the model; its trained parameters are checked.
        optimizer: its optimizer.
        where: part of the message.

    Raises:
        InputError: the loss, a weight or its optimizer state is NaN or infinite. It is raised on all ranks.
    """
    (loss,) = ranks.sum(loss)
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors = [(name, parameter) for parameter, name in names.items() if parameter.requires_grad]
    for parameter, state in optimizer.state.items():
        owner = names.get(parameter, "a parameter")
        tensors += [(f"{key} of {owner}", each) for key, each in state.items() if isinstance(each, Tensor)]
    # Compared on the device: reading each result would synchronize with the GPU for each tensor.
    finite = torch.stack([each.isfinite().all().to(ranks.device) for _, each in tensors]).tolist()
    bad = [name for (name, _), each in zip(tensors, finite, strict=True) if not each]
    if ranks.max(bool(bad) or not math.isfinite(loss))[0]:
        found = listed(map(repr, bad), 3) or "a weight of another rank"
        what = f"{found} became NaN or infinite" if math.isfinite(loss) else f"the loss became {loss}"
        raise InputError(f"{what} in {where} or set clip_grad_norm. The last checkpoint, if any, is kept")


def check_ranks(ranks: Ranks, model: nn.Module, progress: Progress) -> None:
    """Check that progress, weights, thresholds and masks are equal on all ranks; statistics of batches differ.

    Progress differs if the run directory is not the same on all hosts.

    Raises:
        InputError: they differ.
    """
    buffers = {name for name, _ in model.named_buffers()}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in buffers}
    hashes = {name: content_hash(each) for name, each in state.items()}
    ranks.check_same("progress, weights or masks", {"epoch": progress.epoch, "step": progress.step, **hashes})


def reason(error: Exception) -> str:
    """Return one line that says why a checkpoint does not fit."""
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return (str(error) or type(error).__name__).splitlines()[-1].strip()


def check_numbers(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Check that the state of a scaler has the keys of ours, and values of the same types that its tensors can hold."""
    for name in ours | theirs:
        value: Any = theirs.get(name)
        largest = 1e38 if type(value) is float else 2**31
        if name not in ours or type(value) is not type(ours[name]) or not abs(value) < largest:
            raise ValueError(f"scaler: {name} is {value!r}")


def check_optimizer(optimizer: torch.optim.Optimizer, before: list[dict[str, Any]]) -> None:
    """Check what `Optimizer.load_state_dict` takes over unchecked: settings of the groups, shapes of the state."""
    for group, ours in zip(optimizer.state_dict()["param_groups"], before, strict=True):
        for name in ours | group:
            if name != "lr" and (name not in group or name not in ours or group[name] != ours[name]):
                raise ValueError(f"optimizer: {name} is {group.get(name)!r}, this run has {ours.get(name)!r}")
    names: set[frozenset[str]] = set()
    for parameter, state in optimizer.state.items():
        names.add(frozenset(state))
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape not in (parameter.shape, ()):
                raise ValueError(f"optimizer: {name} has shape {tuple(value.shape)}")
            if not isinstance(value, Tensor) and value is not None:
                raise ValueError(f"optimizer: {name} is {value!r}")
    if names - OPTIMIZER_STATE:
        raise ValueError(f"optimizer: its state has {', '.join(sorted(map(str, set().union(*names))))}")
