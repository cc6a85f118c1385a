"""Parameter groups for torch's optimizers."""

from typing import Any

from torch import nn

from sparing.errors import InputError
from sparing.layers import NORMALIZATIONS
from sparing.parametrizations import Sparse


def param_groups(
    model: nn.Module,
    weight_decay: float,
    threshold_weight_decay: float | None = None,
    norm_weight_decay: float | None = None,
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

    Returns:
        Groups with keys "name" ("weights", "thresholds", "norms" or "no_decay"), "params" and "weight_decay". A group
        without parameters is left out; parameters that do not require a gradient are in none.

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
        "no_decay": 0.0,
    }
    for name, decay in decays.items():
        if not decay >= 0:
            raise InputError(f"the weight decay of {name} must be ≥ 0, got {decay!r}")
    members: dict[str, list[nn.Parameter]] = {name: [] for name in decays}
    seen: set[int] = set()
    for module in model.modules():
        group = "norms" if isinstance(module, NORMALIZATIONS) else "weights"
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                own = module.decays.get(name, "no_decay") if isinstance(module, Sparse) else group
                members[own].append(parameter)
    return [{"name": n, "params": members[n], "weight_decay": decays[n]} for n in decays if members[n]]
