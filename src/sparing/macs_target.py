"""Targets in multiply-accumulates (MACs): what a unit costs, and what a network may cost at the end."""

from collections.abc import Mapping

from torch import nn

from sparing.errors import InputError
from sparing.layers import Layer, all_layers
from sparing.macs import Example, find_applications
from sparing.patterns import Units

COST_POWER = 0.25
"""With a target in MACs, thresholds grow with the cost of a weight to this power: ½ would suit a loss of one weight in
proportion to its square, 0 is one threshold for all layers."""


def check_macs(method: str, macs: float | int, input_size: Example | None) -> None:
    """Check a target in MACs.

    Raises:
        InputError: it is neither a number (int) above 0 nor a fraction (float) between 0 and 1; there is no input size.
    """
    number = isinstance(macs, int) and not isinstance(macs, bool) and macs > 0
    if not number and not (isinstance(macs, float) and 0 < macs < 1):
        raise InputError(
            f"{method}: macs must be a number (int) above 0, or a fraction (float) of the dense model's between 0 "
            f"and 1, got {macs!r}"
        )
    if input_size is None:
        raise InputError(f"{method}: macs={macs!r} needs input_size=, the shape of one input such as (1, 3, 224, 224)")


def resolve_macs(
    method: str,
    model: nn.Module,
    layers: Mapping[str, Layer],
    units: Mapping[str, Units],
    macs: float | int,
    input_size: Example,
) -> tuple[dict[str, int], int]:
    """Return what a unit of each layer costs, in MACs of one forward pass, and what all layers may cost at the end.

    Args:
        method: names itself in errors.
        model: the model of the layers.
        layers: the layers to sparsify.
        units: what is pruned together, by layer.
        macs: target for the whole model: a fraction (float) of the dense model's MACs, or their number (int).
        input_size: of one input, as `sparing.report` takes it.

    Raises:
        InputError: the layers that are not sparsified have more MACs; the target leaves less than a unit in each layer.
    """
    found = find_applications(model, input_size)
    costs = {name: found.per_weight(name) * units[name].weights for name in layers}
    dense_macs = {name: found.dense_macs(layer) or 0 for name, layer in all_layers(model).items()}
    beside = sum(cost for name, cost in dense_macs.items() if name not in layers)
    wanted = macs if isinstance(macs, int) else round(macs * sum(dense_macs.values()))
    # A layer without weights would output only its bias.
    lowest, highest = beside + sum(costs.values()), beside + dense_cost(units, costs)
    if not lowest <= wanted <= highest or highest == beside:
        unselected = f", {beside:,} of them in layers that are not sparsified" if beside else ""
        raise InputError(
            f"{method}: macs={macs!r} is out of reach: the model has {highest:,} MACs{unselected}, and {lowest:,} with "
            "one weight or group left in each sparsified layer; give a number between, or a fraction above "
            f"{lowest / max(highest, 1):.3g}"
        )
    return costs, wanted - beside


def dense_cost(units: Mapping[str, Units], costs: Mapping[str, int]) -> int:
    """Return the cost of all units of all layers."""
    return sum(costs[name] * each.count for name, each in units.items())
