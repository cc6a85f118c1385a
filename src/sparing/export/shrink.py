"""Remove all-zero filters and unused channels: smaller dense layers for any runtime. Requires torch-pruning.

A channel between layers is removed if

- it is unused: its weights are zero in every layer that consumes it; or
- it is constant: every filter that produces it is zero, so its value does not depend on the input. The constant (the
  bias after batch normalization and activation) is folded into the biases of the layers that consume the channel. A
  convolution with padding reads zeros instead of the constant at the border, so the channel is kept in this case unless
  the constant is 0.

`STR(granularity="filter")` leaves all-zero filters. In a low-rank factorization U V, zero columns of U or zero rows of
V reduce the rank.

Source: Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, for the dependencies between layers.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparing.errors import InputError, first_line
from sparing.export.inputs import Example, find_inputs
from sparing.export.network import check, check_weights, outputs, plain, require, tolerance

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def shrink(model: nn.Module, example: Example) -> nn.Module:
    """Return a copy of a model without all-zero filters and unused channels.

    Repeat until there is nothing left to remove, because a filter whose inputs are all removed is zero, too. Each layer
    keeps at least one channel. Layers that normalize over channels, recurrent layers and attention are not changed.

    Args:
        model: a sparsified or plain model; it is not modified.
        example: the shape of one input, batch first, or tensors, as for `sparing.export.onnx.save`.

    Returns:
        A densified copy in evaluation mode, with the same outputs up to rounding.

    Raises:
        InputError: torch-pruning is missing or cannot trace the model; a weight is quantized; the outputs of the copy
            differ, for example because the model indexes channels by number.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 6, bias=False), nn.ReLU(), nn.Linear(6, 2))
        >>> with torch.no_grad():
        ...     _ = model[0].weight[:4].zero_()
        >>> shrink(model, (1, 8))
        Sequential(
          (0): Linear(in_features=8, out_features=2, bias=False)
          (1): ReLU()
          (2): Linear(in_features=2, out_features=2, bias=True)
        )
    """
    require("torch_pruning")
    network = plain(model)
    check_weights(network)
    args, kwargs = find_inputs(network, example).sample(3)
    expected = outputs(network, args, kwargs)
    while _remove_channels(network, args, kwargs):
        pass
    check("the model without all-zero filters", expected, outputs(network, args, kwargs), tolerance(network))
    return network


@dataclass(frozen=True)
class _Channels:
    """Channels of one layer in a group: index in the group → indices in the layer."""

    module: Any
    positions: dict[int, list[int]]


@dataclass(frozen=True)
class _Group:
    """Layers whose channels must be removed together."""

    root: nn.Module
    size: int
    producers: list[_Channels]
    depthwise: list[_Channels]
    consumers: list[_Channels]


@torch.no_grad()
def _remove_channels(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Remove channels from every group once. Return whether any channel was removed."""
    import torch_pruning

    inputs = _record_inputs(model, args, kwargs)
    # torch-pruning traces the autograd graph, so every parameter must require gradients.
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for parameter in frozen:
                parameter.requires_grad_(True)
            graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=kwargs or args)
    except Exception as error:  # torch-pruning raises exceptions of many types
        raise InputError(f"torch-pruning cannot trace the model: {first_line(error)}") from error
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    found = False
    for group in list(_groups(graph)):
        removable = _unused_channels(group) | _constant_channels(group, inputs)
        if len(removable) == group.size:
            removable.remove(min(removable))
        if not removable:
            continue
        _fold_constants(group, removable, inputs)
        prune = graph.get_pruner_of_module(group.root).prune_out_channels
        graph.get_pruning_group(group.root, prune, idxs=sorted(removable)).prune()
        found = True
    return found


def _record_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[nn.Module, Tensor]:
    """Run the model. Return the input of each convolution and Linear layer that runs exactly once, channels last."""
    inputs: dict[nn.Module, Tensor] = {}
    repeated: set[nn.Module] = set()

    def record(module: nn.Module, positional: tuple[Any, ...]) -> None:
        if module in inputs:
            repeated.add(module)
        inputs[module] = positional[0] if isinstance(module, nn.Linear) else positional[0].movedim(1, -1)

    modules = [module for module in model.modules() if isinstance(module, (nn.Linear, *CONVOLUTIONS))]
    handles = [module.register_forward_pre_hook(record) for module in modules]
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return {module: tensor for module, tensor in inputs.items() if module not in repeated}


def _groups(graph: Any) -> Iterator[_Group]:
    """Yield the groups of convolutions, Linear layers, batch normalization and modules without parameters only."""
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    for group in graph.get_all_groups(root_module_types=[nn.Linear, *CONVOLUTIONS]):
        root = group[0].dep.target.module
        producers: list[_Channels] = []
        depthwise: list[_Channels] = []
        consumers: list[_Channels] = []
        supported = True
        for item in group:
            module = item.dep.target.module
            positions: dict[int, list[int]] = {}
            for root_index, index in zip(item.root_idxs, item.idxs, strict=True):
                positions.setdefault(root_index, []).append(index)
            channels = _Channels(module, positions)
            produces = item.dep.handler.__name__ == "prune_out_channels"
            if isinstance(module, CONVOLUTIONS) and module.groups > 1:
                supported = supported and module.groups == module.in_channels == module.out_channels
                depthwise.append(channels)
            elif type(module) in (nn.Linear, *CONVOLUTIONS):
                (producers if produces else consumers).append(channels)
            # A parameter that belongs to no layer is an item of its own.
            elif isinstance(module, nn.Parameter) or (
                type(module) not in norms and list(module.parameters(recurse=False))
            ):
                supported = False
        if supported and consumers:
            yield _Group(root, len(group[0].idxs), producers, depthwise, consumers)


def _unused_channels(group: _Group) -> set[int]:
    """Return the channels whose weights are zero in every consumer."""
    return {index for index in range(group.size) if all(_is_unused(consumer, index) for consumer in group.consumers)}


def _constant_channels(group: _Group, inputs: dict[nn.Module, Tensor]) -> set[int]:
    """Return the constant channels that can be folded into every consumer."""

    def all_zero(channels: list[_Channels], index: int) -> bool:
        return all(not c.module.weight[c.positions.get(index, [])].any() for c in channels)

    found = set()
    for index in range(group.size):
        # With one producer, a depthwise convolution is between producer and consumers: its own zero filter is enough.
        depthwise = any(all_zero([channels], index) for channels in group.depthwise) and len(group.producers) == 1
        constant = all_zero(group.producers, index) or depthwise
        if constant and all(_can_fold(consumer, index, inputs) for consumer in group.consumers):
            found.add(index)
    return found


def _is_unused(consumer: _Channels, index: int) -> bool:
    return not consumer.module.weight[:, consumer.positions.get(index, [])].any()


def _can_fold(consumer: _Channels, index: int, inputs: dict[nn.Module, Tensor]) -> bool:
    """Return whether a channel is unused by a consumer, or is a constant that its bias can replace."""
    module = consumer.module
    if _is_unused(consumer, index):
        return True
    if module not in inputs:
        return False
    for position in consumer.positions.get(index, []):
        values = inputs[module][..., position]
        constant = values.reshape(-1)[0]
        if not bool((values == constant).all()):
            return False
        padded = not isinstance(module, nn.Linear) and module.padding not in ("valid", (0,) * len(module.kernel_size))
        if float(constant) != 0 and padded:
            return False
    return True


def _fold_constants(group: _Group, removable: set[int], inputs: dict[nn.Module, Tensor]) -> None:
    """Add the contribution of constant channels to the biases of the consumers."""
    unused = _unused_channels(group)
    for consumer in group.consumers:
        module = consumer.module
        for index in removable - unused:
            if _is_unused(consumer, index):
                continue
            for position in consumer.positions.get(index, []):
                constant = float(inputs[module][..., position].reshape(-1)[0])
                if constant == 0:
                    continue
                if module.bias is None:
                    module.bias = nn.Parameter(module.weight.new_zeros(len(module.weight)))
                module.bias += constant * module.weight[:, position].reshape(len(module.weight), -1).sum(1)
