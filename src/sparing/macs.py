"""Count multiply-accumulates (MACs), dense and sparse; the papers' tables call them FLOPs.

    dense MACs of a layer  = applications · weights
    sparse MACs of a layer = applications · nonzero weights

where *applications* is how often one forward pass multiplies by each weight: the output positions of a
convolution, the input positions of a transposed one, the rows of a Linear's input, the time steps
of a recurrent layer, each times the batch. Only weights are counted: no bias, no normalization,
no pooling. Taps that fall into the padding count, as they do in the papers' tables.

The model runs once on the meta device, on shapes alone: no data, no arithmetic, no GPU.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import type_before_parametrizations

from sparing.errors import InputError
from sparing.layers import CONVOLUTIONS, RECURRENT, TRANSPOSED_CONVOLUTIONS, find_layers

Example = Sequence[int] | Tensor | tuple[Tensor, ...] | Mapping[str, Any]


def count_applications(model: nn.Module, example: Example) -> dict[str, int]:
    """Count how often one forward pass multiplies by each weight of each layer.

    Args:
        model: any module, on any device, the meta device too.
        example: the shape of one float input, batch first, as `(1, 3, 224, 224)`; or the input
            itself, where it has another dtype or there are several: a tensor, a tuple of tensors
            or a mapping of keyword arguments. Only shapes and dtypes matter.

    Returns:
        Layer name → applications; 0 for a layer that the pass does not reach.

    Raises:
        InputError: the model cannot run on this input, or not on the meta device.

    Examples:
        >>> count_applications(nn.Conv2d(3, 8, 3, padding=1), (1, 3, 32, 32))
        {'weight': 1024}
    """
    layers = find_layers(model)
    by_place = {(id(place.module), place.tensor_name): name for name, layer in layers.items() for place in layer.places}
    applications = dict.fromkeys(layers, 0)

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tell = getattr(module, "applications_of_parts", None)
        of_parts = {} if tell is None else {id(part): number for part, number in tell(*args, **kwargs).items()}
        for (identity, _), name in by_place.items():
            if identity in of_parts:
                applications[name] += of_parts[identity]
            elif identity == id(module):
                applications[name] += _applications(module, args, kwargs, output)
            elif isinstance(module, nn.MultiheadAttention) and identity == id(module.out_proj):
                # Attention multiplies by this weight without calling its module.
                applications[name] += int(prod(output[0].shape[:-1]))

    modules = {id(place.module): place.module for layer in layers.values() for place in layer.places}
    modules |= {id(module): module for module in model.modules() if _uses_children(module)}
    handles = [module.register_forward_hook(count, with_kwargs=True) for module in modules.values()]
    try:
        _run_on_meta(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return applications


def _uses_children(module: nn.Module) -> bool:
    """Return whether a module uses the weights of child modules without calling them.

    Those of sparing say how often, in `applications_of_parts(*inputs) -> {child: applications}`.
    """
    return isinstance(module, nn.MultiheadAttention) or hasattr(module, "applications_of_parts")


def _applications(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> int:
    given = args[0] if args else kwargs.get("input", next(iter(kwargs.values())))
    if isinstance(module, CONVOLUTIONS):
        return int(prod(output.shape)) // int(module.out_channels)
    if isinstance(module, TRANSPOSED_CONVOLUTIONS):
        return int(prod(given.shape)) // int(module.in_channels)
    if isinstance(module, nn.Embedding):
        return 0  # a row is read, nothing is multiplied
    if isinstance(given, nn.utils.rnn.PackedSequence):
        given = given.data
    if isinstance(module, nn.MultiheadAttention):
        inputs = [*args[:3], *(kwargs[name] for name in ("query", "key", "value") if name in kwargs)]
        if len({tuple(part.shape[:-1]) for part in inputs}) > 1:
            raise InputError("the MACs of attention with queries and keys of different lengths are not known")
    if isinstance(module, (*RECURRENT, nn.Linear, nn.MultiheadAttention)):
        return int(prod(given.shape[:-1]))
    kind = type_before_parametrizations(module).__name__
    raise InputError(f"the MACs of a {kind} are not known; leave input_size out to report without MACs")


def _run_on_meta(model: nn.Module, example: Example) -> None:
    def meta(tensor: Tensor) -> Tensor:
        return tensor.detach().to("meta")

    # Each module once, and ties left to themselves: functional_call, told of a module under both
    # of its names, would put back the meta tensor of the first as if it were the original.
    state = {
        f"{prefix}.{name}".lstrip("."): meta(tensor)
        for prefix, module in model.named_modules()
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    }
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example, Tensor):
        args = (meta(example),)
    elif isinstance(example, Mapping):
        kwargs = {key: meta(value) if isinstance(value, Tensor) else value for key, value in example.items()}
    elif not isinstance(example, Sequence):
        raise InputError(f"input_size={example!r} is neither a shape such as (1, 3, 224, 224) nor tensors")
    elif all(isinstance(part, Tensor) for part in example):
        args = tuple(meta(part) for part in example)  # type: ignore[arg-type]
    elif all(isinstance(part, int) and not isinstance(part, bool) and part > 0 for part in example):
        args = (torch.empty(tuple(example), device="meta"),)  # type: ignore[arg-type]
    else:
        raise InputError(f"input_size={example!r} is neither a shape such as (1, 3, 224, 224) nor tensors")
    attributes = {module: dict(vars(module)) for module in model.modules()}
    try:
        with torch.no_grad(), torch.device("meta"), _evaluating(model):
            functional_call(model, state, args, kwargs, tie_weights=False)
    except InputError:
        raise
    except Exception as error:
        shapes = [tuple(a.shape) for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"the model does not run on an input of shape {shapes} on the meta device: {reason}"
        ) from error
    finally:
        # A forward may cache tensors on its module, such as a table of positions; they would stay on meta.
        for module, before in attributes.items():
            vars(module).clear()
            vars(module).update(before)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode: batch normalization in training mode refuses a batch of one."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
