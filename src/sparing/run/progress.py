"""How far a run is, and checks of the state that a checkpoint restores."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
            ValueError: a value is missing, unknown or out of range.
        """
        try:
            progress = cls(**saved)
        except TypeError as error:
            raise ValueError(f"progress: {error}") from error
        for name, largest in (("epoch", epochs), ("step", None)):
            value = getattr(progress, name)
            if type(value) is not int or value < 0 or (largest is not None and value > largest):
                raise ValueError(f"progress: {name} is {value!r}")
        return progress


def is_better(new: dict[str, Any], old: dict[str, Any] | None, sparsest: float) -> bool:
    """Return whether an epoch replaces the best one so far.

    It must be within half a percentage point of the highest sparsity so far, and either the old one is not or the new
    one is at least as accurate. Without a validation split, the last epoch that is sparse enough is the best.
    """
    if new["sparsity"] < sparsest - 0.005:
        return False
    if old is None or old["sparsity"] < sparsest - 0.005:
        return True
    return bool(new["validation_accuracy"] is None or new["validation_accuracy"] >= old["validation_accuracy"])


def all_finite(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the trained parameters and the state of the optimizer are finite."""
    tensors: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tensors += [each for state in optimizer.state.values() for each in state.values() if isinstance(each, Tensor)]
    # Compared on the device: reading each result would synchronize with the GPU for each tensor.
    return bool(torch.stack([each.isfinite().all().to(tensors[0].device) for each in tensors]).all())


def check_numbers(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Check that a state of plain numbers has the keys of ours, and finite values."""
    for name in ours | theirs:
        value = theirs.get(name)
        if name not in ours or not isinstance(value, (int, float)) or not math.isfinite(value):
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
