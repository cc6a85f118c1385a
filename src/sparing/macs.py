"""Count multiply-accumulates (MACs), dense and sparse; the papers' tables call them FLOPs.

    dense MACs of a layer  = Σ applications of its weights
    sparse MACs of a layer = Σ applications of its nonzero weights

where *applications* is how often one forward pass multiplies by a weight: the output positions of a convolution, the
input positions of a transposed one, the rows of a Linear's input, the time steps of a recurrent layer, each times the
batch. Only weights are counted: no bias, no normalization, no pooling. Taps that fall into the padding count, as they
do in the papers' tables.

The model runs once on the meta device, on shapes alone: no data, no arithmetic, no GPU. Every product of tensors is
seen as it happens, whichever module asks for it. A model that looks at the values of its inputs, such as an attention
mask, runs once for real instead.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves, tree_map_only

from sparing.errors import InputError
from sparing.layers import Layer, all_layers
from sparing.products import Applications, ProductCounter
from sparing.sharding import is_sharded

Example = Sequence[int] | Tensor | tuple[Any, ...] | Mapping[str, Any]


def count_applications(model: nn.Module, example: Example) -> dict[str, int]:
    """Count how often one forward pass multiplies by each weight of each layer.

    Args:
        model: any module, on any device, the meta device too.
        example: the shape of one float input, batch first, as `(1, 3, 224, 224)`; or the input
            itself, where it has another dtype or there are several: a tensor, a tuple of tensors
            or a mapping of keyword arguments. Their values matter only to a model that looks at them.

    Returns:
        Layer name → applications; 0 for a layer that the pass does not reach.

    Raises:
        InputError: the model cannot run on this input; the applications of a layer are not known, or differ between
            its weights.

    Examples:
        >>> count_applications(nn.Conv2d(3, 8, 3, padding=1), (1, 3, 32, 32))
        {'weight': 1024}
    """
    found = find_applications(model, example)
    return {name: found.per_weight(name) for name in found.counts}


def find_applications(model: nn.Module, example: Example) -> Applications:
    """Count how often one forward pass multiplies by each weight, and tell where that is not known.

    Raises:
        InputError: the model cannot run on this input, or is sharded.
    """
    if any(map(is_sharded, model.parameters())):
        raise InputError("the model is sharded: count its MACs before fully_shard(), or report without input_size")
    if parametrize._cache_enabled:
        raise InputError("MACs are not counted within parametrize.cached(), where weights are not computed anew")
    layers = all_layers(model)
    args, kwargs = _arguments(model, example)
    try:
        return _run_on_meta(model, layers, args, kwargs)
    except Exception as error:
        try:
            return _run(model, layers, args, kwargs)
        except Exception as real_error:
            shapes = [tuple(a.shape) for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            reason = (str(real_error) or str(error) or type(real_error).__name__).splitlines()[0]
            given = isinstance(example, Sequence) and type(example[0]) is int
            hint = (
                "; if the model takes other inputs than floating-point numbers, give these in place of a shape"
                if given
                else ""
            )
            raise InputError(f"the model does not run on an input of shape {shapes}: {reason}{hint}") from error


def _arguments(model: nn.Module, example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    leaves = tree_leaves(example)
    if isinstance(example, Sequence) and any(isinstance(part, Tensor) or hasattr(part, "__dict__") for part in leaves):
        return tuple(example), {}
    if not isinstance(example, Sequence) or not example or not all(type(n) is int and n > 0 for n in example):
        raise InputError(f"input_size={example!r:.200} is neither a shape such as (1, 3, 224, 224) nor tensors")
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    try:
        return (torch.zeros(tuple(example), dtype=dtype, device="cpu"),), {}
    except (RuntimeError, TypeError) as error:
        raise InputError(f"input_size={example!r:.200} is too large for the memory") from error


def _run_on_meta(model: nn.Module, layers: Mapping[str, Layer], args: Any, kwargs: Any) -> Applications:
    def meta(tensor: Tensor) -> Tensor:
        return tensor.detach().to("meta")

    # Each module once, and ties left to themselves: functional_call, told of a module under both
    # of its names, would put back the meta tensor of the first as if it were the original.
    state = {
        f"{prefix}.{name}".lstrip("."): meta(tensor)
        for prefix, module in model.named_modules()
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    }
    counter = ProductCounter(layers)
    for name, layer in layers.items():
        for place in layer.places:
            for key in (place.key, f"{place.key}_orig"):  # the latter of torch.nn.utils.prune
                if key in state:
                    counter.origins.mark_weight(state[key], name)
    args, kwargs = tree_map_only(Tensor, meta, (args, kwargs))
    counter.origins.mark((args, kwargs))
    with _counting(model, layers, counter), torch.device("meta"):
        functional_call(model, state, args, kwargs, tie_weights=False)
    return counter.applications()


def _run(model: nn.Module, layers: Mapping[str, Layer], args: Any, kwargs: Any) -> Applications:
    counter = ProductCounter(layers)
    for name, layer in layers.items():
        if layer.places[0].parametrizations is None:
            counter.origins.mark_weight(layer.weight, name)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    # Tensors of its own: the model may write into its inputs.
    args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.detach().clone().to(device), (args, kwargs))
    counter.origins.mark((args, kwargs))
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with _counting(model, layers, counter), torch.random.fork_rng(devices=[]):
            model(*args, **kwargs)
    finally:
        for buffer, before in buffers:
            buffer.detach().copy_(before)
    return counter.applications()


@contextmanager
def _counting(model: nn.Module, layers: Mapping[str, Layer], counter: ProductCounter) -> Iterator[None]:
    """Count the products of a forward pass."""
    names = {(id(place.module), place.tensor_name): name for name, layer in layers.items() for place in layer.places}

    def mark_made(module: nn.Module, args: Any, result: Tensor) -> None:
        counter.origins.mark_weight(result, made[module])

    def tell(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        for part, number in module.applications_of_parts(*args, **kwargs).items():  # type: ignore[operator]
            counter.tell(names[id(part), "weight"], number)

    made: dict[nn.Module, str] = {
        place.parametrizations: name
        for name, layer in layers.items()
        for place in layer.places
        if place.parametrizations is not None
    }
    handles = [module.register_forward_hook(mark_made) for module in made]
    # The recurrent layers of sparing multiply their factors out where that is faster, but a factor is what is stored.
    tellers = [module for module in model.modules() if hasattr(module, "applications_of_parts")]
    handles += [module.register_forward_hook(tell, with_kwargs=True) for module in tellers]
    try:
        # In inference mode, operations come as a whole, which otherwise come as the products they consist of.
        with evaluation(model), torch.inference_mode(False), torch.no_grad(), counter:
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode, eagerly and without its fast paths, and leave it as it was."""
    # A forward may cache tensors on its module, such as a table of positions; they would stay on meta.
    attributes = {module: dict(vars(module)) for module in model.modules()}
    containers = [
        (value, copy.copy(value))
        for before in attributes.values()
        for value in before.values()
        if isinstance(value, (list, dict, set))
    ]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it uses the weights of a whole layer in one operation
    model.eval()  # batch normalization in training mode refuses a batch of one
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, before in attributes.items():
            vars(module).clear()
            vars(module).update(before)
        for container, content in containers:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
