"""Zeros in whole rows and columns, cut out: fewer filters, smaller dense layers. Needs torch-pruning.

A channel between layers can go if

- nobody reads it: the weights of every layer it feeds are zero for it; or
- nobody writes it: every filter that makes it is zero, so that it is a constant, whatever the input.
  That constant (its bias, what batch normalization makes of it, the activation after that) is
  multiplied into the biases of the layers it feeds. A padded convolution reads zeros instead of the
  constant at its border; there no bias can stand in for it, and the filter stays unless the constant is 0.

This is what thresholds a filter leave behind (`STR(granularity="filter")`), and what a low-rank
factorization U V with zero columns of U or rows of V comes to: a smaller rank.

Source: Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, for which layers a channel
ties together.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparing.errors import InputError
from sparing.export.network import check, outputs, plain, random_inputs, require
from sparing.macs import Example

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def shrink(model: nn.Module, example: Example) -> nn.Module:
    """A copy of a model without the channels that make no difference.

    Repeated until nothing is left to cut, since a filter that loses all it reads is dead itself. A layer
    keeps at least one channel. Layers that normalize over channels, recurrent layers and attention
    keep theirs.

    Args:
        model: sparsified or plain; it is left as it is.
        example: the shape of one input, batch first, or tensors, as for `sparing.export.onnx.save`.

    Returns:
        A densified copy in evaluation mode, whose outputs are the model's up to rounding.

    Raises:
        InputError: torch-pruning is missing; it cannot follow the model; the model cut gives other
            outputs, as one that looks at its channels by number would.

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
    small = plain(model)
    args, kwargs = random_inputs(example, batch=3)
    expected = outputs(small, args, kwargs)
    while _cut(small, args, kwargs):
        pass
    check("the model without its dead channels", expected, outputs(small, args, kwargs))
    return small


@dataclass(frozen=True)
class _Channels:
    """A channel of several layers: position in the group → positions in one layer."""

    module: Any
    positions: dict[int, list[int]]


@dataclass(frozen=True)
class _Group:
    """Layers whose channels come and go together."""

    root: nn.Module
    size: int
    writers: list[_Channels]
    depthwise: list[_Channels]
    readers: list[_Channels]


@torch.no_grad()
def _cut(model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> bool:
    """Cut every group once; whether there was anything to cut."""
    import torch_pruning

    seen = _inputs(model, args, kwargs)
    # Pruning needs a graph of gradients.
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for parameter in frozen:
                parameter.requires_grad_(True)
            graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=kwargs or args)
    except Exception as error:  # it raises almost anything
        raise InputError(f"torch-pruning cannot follow the model: {str(error).splitlines()[0]}") from error
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    found = False
    for group in list(_groups(graph)):
        gone = _unread(group) | _unwritten(group, seen)
        if len(gone) == group.size:
            gone.remove(min(gone))
        if not gone:
            continue
        _fold(group, gone, seen)
        prune = graph.get_pruner_of_module(group.root).prune_out_channels
        graph.get_pruning_group(group.root, prune, idxs=sorted(gone)).prune()
        found = True
    return found


def _inputs(model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> dict[nn.Module, Tensor]:
    """What every convolution and Linear layer reads, channels last; none for one that is run twice."""
    seen: dict[nn.Module, Tensor] = {}
    twice: set[nn.Module] = set()

    def keep(module: nn.Module, given: tuple[Any, ...]) -> None:
        if module in seen:
            twice.add(module)
        seen[module] = given[0] if isinstance(module, nn.Linear) else given[0].movedim(1, -1)

    modules = [module for module in model.modules() if isinstance(module, (nn.Linear, *CONVOLUTIONS))]
    handles = [module.register_forward_pre_hook(keep) for module in modules]
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return {module: tensor for module, tensor in seen.items() if module not in twice}


def _groups(graph: Any) -> Iterator[_Group]:
    """The groups that hold nothing but convolutions, Linear layers, batch normalization and what has no weights."""
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    for group in graph.get_all_groups(root_module_types=[nn.Linear, *CONVOLUTIONS]):
        root = group[0].dep.target.module
        writers: list[_Channels] = []
        depthwise: list[_Channels] = []
        readers: list[_Channels] = []
        sound = True
        for item in group:
            module = item.dep.target.module
            positions: dict[int, list[int]] = {}
            for root_index, index in zip(item.root_idxs, item.idxs, strict=True):
                positions.setdefault(root_index, []).append(index)
            channels = _Channels(module, positions)
            writes = item.dep.handler.__name__ == "prune_out_channels"
            if isinstance(module, CONVOLUTIONS) and module.groups > 1:
                sound = sound and module.groups == module.in_channels == module.out_channels
                depthwise.append(channels)
            elif type(module) in (nn.Linear, *CONVOLUTIONS):
                (writers if writes else readers).append(channels)
            # A parameter of its own, beside the layers, comes as itself.
            elif isinstance(module, nn.Parameter) or (
                type(module) not in norms and list(module.parameters(recurse=False))
            ):
                sound = False
        if sound and readers:
            yield _Group(root, len(group[0].idxs), writers, depthwise, readers)


def _unread(group: _Group) -> set[int]:
    """The channels whose columns are zero in every reader."""
    return {index for index in range(group.size) if all(_ignores(reader, index) for reader in group.readers)}


def _unwritten(group: _Group, seen: dict[nn.Module, Tensor]) -> set[int]:
    """The channels that are constant, and that the readers can do without."""

    def dead(channels: list[_Channels], index: int) -> bool:
        return all(not c.module.weight[c.positions.get(index, [])].any() for c in channels)

    found = set()
    for index in range(group.size):
        # With one writer alone a depthwise convolution stands between it and the readers.
        passed = any(dead([channels], index) for channels in group.depthwise) and len(group.writers) == 1
        if (dead(group.writers, index) or passed) and all(_does_without(r, index, seen) for r in group.readers):
            found.add(index)
    return found


def _ignores(reader: _Channels, index: int) -> bool:
    return not reader.module.weight[:, reader.positions.get(index, [])].any()


def _does_without(reader: _Channels, index: int, seen: dict[nn.Module, Tensor]) -> bool:
    """Whether a reader ignores a channel, or gets 0, or gets a constant that its bias can stand in for."""
    module = reader.module
    if _ignores(reader, index):
        return True
    if module not in seen:
        return False
    for position in reader.positions.get(index, []):
        values = seen[module][..., position]
        constant = values.reshape(-1)[0]
        if not bool((values == constant).all()):
            return False
        padded = not isinstance(module, nn.Linear) and module.padding not in ("valid", (0,) * len(module.kernel_size))
        if float(constant) != 0 and padded:
            return False
    return True


def _fold(group: _Group, gone: set[int], seen: dict[nn.Module, Tensor]) -> None:
    """Put what constants contribute into the biases of the readers."""
    unread = _unread(group)
    for reader in group.readers:
        module = reader.module
        for index in gone - unread:
            for position in reader.positions.get(index, []):
                constant = 0.0 if _ignores(reader, index) else float(seen[module][..., position].reshape(-1)[0])
                if constant == 0:
                    continue
                if module.bias is None:
                    module.bias = nn.Parameter(module.weight.new_zeros(len(module.weight)))
                module.bias += constant * module.weight[:, position].reshape(len(module.weight), -1).sum(1)
