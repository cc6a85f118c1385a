"""`sparsify_` and `densify_`: make a model sparse in place, and plain again.

A method says how the effective weight of each layer is made, and what happens around `optimizer.step()`. The
loop, the optimizer and the loss stay the user's. Time is counted by the `Sparsifier`.
"""

import warnings

import torch
from torch import Tensor, nn

from sparing.errors import InputError, SparsityWarning, listed
from sparing.goal import make_clock, set_costs, start_ramp, warn_at_end
from sparing.layers import Layer, sparse_layers
from sparing.method import Method
from sparing.missed import warn_missed_target
from sparing.pretrained import check_saved, save_effective_weights
from sparing.register import check_gathered, check_held_once, check_not_wrapped, check_weight, register, unregister
from sparing.schedules import check_steps
from sparing.select import Select, resolve
from sparing.sparsifier import Sparsifier


def sparsify_(model: nn.Module, method: Method, select: Select | None = None, steps: int | None = None) -> Sparsifier:
    """Make layers of a model sparse, in place.

    Every selected weight W becomes the effective weight that the method makes of it; the dense W stays in the model
    as the parameter that the optimizer moves. Another call may sparsify other layers by another method. Of a weight
    with another parametrization, such as weight normalization, the result of that is made sparse. If the weights are
    sparse already, a sparsity ramp starts at their zeros.

    Args:
        model: any module.
        method: how to train it, such as `STR(init=-5.0)`.
        select: which layers: a predicate `(module name, module) -> bool`, which chooses the tensors of a module with
            "weight" in their names, or a list of layer names or shell patterns, which chooses any matrix or kernel.
            None takes every convolution, transposed convolution, Linear, recurrent and attention weight, and those of
            modules like them (see `sparing.select.default`), but the heads of transformers models. A tied weight is one
            layer and is made sparse once. Frozen layers, whose weights have requires_grad=False, are left as they are,
            and a warning names them.
        steps: length of the run in optimizer steps, for a method that follows a schedule. With gradient
            accumulation it is smaller than the number of batches.

    Returns:
        The sparsifier; `attach` it to the optimizer.

    Raises:
        InputError: nothing is selected, or only frozen layers; a name matches nothing; a layer is selected twice or
            sparsified already; a weight is not finite, not floating point or not initialized; another parametrization
            computes it and the method works on its gradient; the weights are sparser than the target; the method needs
            `steps` or refuses the model; the model is wrapped in DistributedDataParallel or sharded.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> sparsifier = sparsify_(model, GMP(sparsity=0.9), select=["0"], steps=1000)
        >>> model[0].weight.shape, sparsifier.layers["0"].weight.shape
        (torch.Size([32, 64]), torch.Size([32, 64]))
    """
    if not isinstance(method, Method):
        raise InputError(f"method={method!r:.200} is not a method object; give one such as sparing.STR(init=-5.0)")
    check_steps(steps)
    check_not_wrapped(model)
    layers = _trained(resolve(model, select))
    for layer in layers.values():
        check_weight(layer)
        _check_computed(layer, method)
    check_held_once(model, layers)
    check_saved(model, layers)
    plan = method.prepare(model, layers, steps)
    with torch.no_grad():
        made = method.parametrizations(layers, plan)
        for name, layer in layers.items():
            made[name](layer.weight)
        start = start_ramp(method, plan, {name: layer.weight for name, layer in layers.items()}, made)
    # Everything that can fail has been tried by now, so an error leaves the model as it was.
    clock = make_clock(method, plan, steps, len(layers), start)
    for name, layer in layers.items():
        made[name].clock = clock
        register(layer, made[name])
    save_effective_weights(model, layers)
    set_costs(layers, method, plan)
    sparsifier = Sparsifier(model, method, layers, plan, clock)
    if any(layer.weight.is_meta for layer in layers.values()):
        for part in made.values():
            part.start_with(sparsifier.start)
    sparsifier.warn_collapsed()
    return sparsifier


def _check_computed(layer: Layer, method: Method) -> None:
    """Check that a method can train a weight that another parametrization computes, and that is no parameter."""
    acts = method.edits_gradients or type(method).resets is not Method.resets
    if acts and not isinstance(layer.weight, nn.Parameter):
        other = type(layer.places[0].parametrizations[0]).__name__  # type: ignore[index]
        raise InputError(
            f"layer {layer.name!r} carries the parametrization {other}, so its weight is computed, no parameter, and "
            f"{method.name!r} works on its gradient or its optimizer state; use a method that does not, such as GMP or "
            "STR, or leave the layer out with select="
        )


def _trained(layers: dict[str, Layer]) -> dict[str, Layer]:
    """Return the layers that are not frozen: the others could not adapt to the loss of weights."""
    frozen = [name for name, layer in layers.items() if not layer.weight.requires_grad]
    if len(frozen) == len(layers):
        raise InputError(
            f"all {len(frozen)} selected layers are frozen: call requires_grad_(True) on the weights to sparsify"
        )
    if frozen:
        warnings.warn(
            f"{len(frozen)} of {len(layers)} selected layers are frozen and stay dense: {listed(frozen, 8)}. "
            "Leave them out with select=, or call requires_grad_(True) on their weights",
            SparsityWarning,
            stacklevel=3,
        )
    return {name: layer for name, layer in layers.items() if layer.weight.requires_grad}


def densify_(model: nn.Module) -> nn.Module:
    """Put the effective weights, zeros included, in place of the dense ones; plain modules remain.

    Outputs stay equal to the last bit. Each weight keeps its Parameter object. A model without sparsified layers is
    left as it is. Warnings tell of a missed target, with both numbers, empty layers, and training without `attach`.

    Returns:
        The same model.

    Raises:
        InputError: the model is sharded.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> _ = sparsify_(model, STR(init=-2.0))
        >>> densify_(model)
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
        )
    """
    check_gathered(model)
    warn_missed_target(model)
    warn_at_end(model)
    for layer in sparse_layers(model).values():
        if (clock := layer.parametrization.clock) is not None:
            clock.stale = True
        unregister(layer)
    return model


@torch.no_grad()  # methods that train with noise give the weight of evaluation where no gradient is recorded
def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the effective weights as a dense state dict: plain keys, without changing the model.

    It loads strictly into the model as it was before `sparsify_`. Tied weights share one tensor.

    Examples:
        >>> model = nn.Linear(4, 2)
        >>> _ = sparsify_(model, STR(init=-2.0))
        >>> sorted(dense_state_dict(model))
        ['bias', 'weight']
    """
    effective: dict[str, Tensor] = {}
    internal: list[str] = []
    for layer in sparse_layers(model).values():
        tensor = Tensor.detach(layer.effective_weight)  # a plain tensor, which may be changed
        for place in layer.places:
            effective[place.key] = tensor
            prefix = f"{place.module_name}." if place.module_name else ""
            internal.append(f"{prefix}parametrizations.{place.tensor_name}.")
    plain = {key: value for key, value in model.state_dict().items() if not key.startswith(tuple(internal))}
    return {**plain, **effective}
