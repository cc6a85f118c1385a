"""Parameter groups for torch's optimizers."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparing.errors import InputError
from sparing.layers import NORMALIZATIONS
from sparing.parametrizations import Sparse


def param_groups(
    model: nn.Module,
    weight_decay: float,
    threshold_weight_decay: float | None = None,
    norm_weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Sort a model's parameters into weights, thresholds and normalization, by type.

    In STR the weight decay on s is what makes a network sparse: s ← (1 − ηλ) s pulls the threshold
    up from its low start. The paper uses one λ for everything, and so do the defaults.

    Args:
        model: a model, sparsified or not.
        weight_decay: λ of the weights and biases, ≥ 0.
        threshold_weight_decay: λ of s; None takes `weight_decay`.
        norm_weight_decay: λ of normalization layers; None takes `weight_decay`.

    Returns:
        Groups with keys "name", "params" and "weight_decay". A group without parameters is left
        out; parameters that do not require a gradient are in none.

    Raises:
        InputError: a weight decay is negative.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        >>> _ = sparsify_(model, STR(init=-5.0))
        >>> [group["name"] for group in param_groups(model, weight_decay=1e-4)]
        ['weights', 'thresholds', 'norms']
    """
    decays = {
        "weights": weight_decay,
        "thresholds": weight_decay if threshold_weight_decay is None else threshold_weight_decay,
        "norms": weight_decay if norm_weight_decay is None else norm_weight_decay,
    }
    for name, decay in decays.items():
        if not decay >= 0:
            raise InputError(f"the weight decay of {name} must be ≥ 0, got {decay!r}")
    members: dict[str, list[nn.Parameter]] = {name: [] for name in decays}
    seen: set[int] = set()
    for module in model.modules():
        own = (
            "thresholds" if isinstance(module, Sparse) else "norms" if isinstance(module, NORMALIZATIONS) else "weights"
        )
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                members[own].append(parameter)
    return [{"name": n, "params": members[n], "weight_decay": decays[n]} for n in decays if members[n]]


@torch.no_grad()
def reset_state(optimizers: Iterable[torch.optim.Optimizer], parameter: Tensor, where: Tensor) -> None:
    """Zero what optimizers remember of some weights, momentum and second moments alike.

    A weight that is grown starts anew; the momentum of what stood in its place is not its own.

    Args:
        optimizers: whichever may hold the parameter.
        parameter: the weight.
        where: boolean, of its shape.
    """
    for optimizer in optimizers:
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value.masked_fill_(where, 0)


def skip_step(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Make the step that is about to come move nothing: torch's optimizers pass over what has no gradient."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
