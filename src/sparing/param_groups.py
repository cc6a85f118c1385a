"""Parameter groups for torch's optimizers."""

import math
from typing import Any

from torch import nn

from sparing.errors import InputError
from sparing.layers import NORMALIZATIONS, check_module
from sparing.parametrizations import Sparse


def param_groups(
    model: nn.Module,
    weight_decay: float,
    threshold_weight_decay: float | None = None,
    norm_weight_decay: float | None = None,
    threshold_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Sort the parameters of a model into weights, thresholds and normalization, each with its weight decay.

    In STR the weight decay on s is what makes a network sparse: s ← (1 − ηλ) s raises the threshold from its low
    start. The paper uses one λ for everything, and so do the defaults. A parametrization says in `Sparse.decays`
    which of its parameters decay; the others, such as the masks of continuous sparsification, get no weight decay.

    Args:
        model: a model, sparsified or not.
        weight_decay: λ of the weights and biases, ≥ 0.
        threshold_weight_decay: λ of s; None takes `weight_decay`.
        norm_weight_decay: λ of normalization layers; None takes `weight_decay`.
        threshold_lr: learning rate of s; None takes `Sparse.rate`: 1 / steps for STR-Feather, and that of the optimizer
            for other methods. A scheduler such as `LambdaLR` multiplies it as it does the others.

    Returns:
        Groups with keys "name" ("weights", "thresholds", "norms" or "no_decay"), "params", "weight_decay" and, for
        thresholds with a rate of their own, "lr". A group without parameters is left out; parameters that do not
        require a gradient are in none.

    Raises:
        InputError: a weight decay or `threshold_lr` is negative or infinite.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        >>> _ = sparsify_(model, STR(init=-5.0))
        >>> [group["name"] for group in param_groups(model, weight_decay=1e-4)]
        ['weights', 'thresholds', 'norms']
    """
    check_module(model)
    decays = {
        "weights": weight_decay,
        "thresholds": weight_decay if threshold_weight_decay is None else threshold_weight_decay,
        "norms": weight_decay if norm_weight_decay is None else norm_weight_decay,
        "no_decay": 0.0,
    }
    for name, decay in decays.items():
        if not _is_rate(decay):
            raise InputError(f"the weight decay of {name} must be in [0, inf), got {decay!r}")
    if threshold_lr is not None and not _is_rate(threshold_lr):
        raise InputError(f"threshold_lr must be in [0, inf), got {threshold_lr!r}")
    members: dict[tuple[str, float | None], list[nn.Parameter]] = {(name, None): [] for name in decays}
    seen: set[int] = set()
    for module in model.modules():
        group, rate = "norms" if isinstance(module, NORMALIZATIONS) else "weights", None
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                if isinstance(module, Sparse):
                    group = module.decays.get(name, "no_decay")
                    rate = module.rate if threshold_lr is None else threshold_lr
                members.setdefault((group, rate if group == "thresholds" else None), []).append(parameter)
    return [
        {"name": name, "params": parameters, "weight_decay": decays[name], **({} if rate is None else {"lr": rate})}
        for (name, rate), parameters in members.items()
        if parameters
    ]


def _is_rate(value: Any) -> bool:
    """Return whether a value is a number ≥ 0 that is finite; tensors of one number are."""
    try:
        return bool(0 <= value < math.inf)
    except (TypeError, RuntimeError):
        return False
