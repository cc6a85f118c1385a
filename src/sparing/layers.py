"""Find the weight tensors of a model, dense and sparsified.

A *layer* is one weight tensor under one name: `conv1` for the `weight` of module `conv1`, `lstm.weight_hh_l0` for a
tensor of another name, `moe.experts` for a parameter `experts` that the module `moe` multiplies by itself. A tensor
used in several places (tied weights, a module used twice) is one layer, named after the first of them. Biases,
normalizations and other vectors are no layers.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import takewhile
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparing.errors import InputError
from sparing.parametrizations import Sparse
from sparing.sharding import gathered

Predicate = Callable[[str, nn.Module], bool]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
NORMALIZATIONS = (
    nn.modules.batchnorm._NormBase,  # batch and instance normalization, lazy and synchronized ones too
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


@dataclass(frozen=True)
class Place:
    """One use of a weight: `module.tensor`, with the name of the module in the model."""

    module_name: str
    module: nn.Module
    tensor_name: str

    @property
    def name(self) -> str:
        if self.tensor_name == "weight":
            return self.module_name or "weight"
        return f"{self.module_name}.{self.tensor_name}".lstrip(".")

    @property
    def key(self) -> str:
        """Key of the plain tensor in a state_dict."""
        return f"{self.module_name}.{self.tensor_name}".lstrip(".")

    @property
    def parametrizations(self) -> parametrize.ParametrizationList | None:
        """Parametrizations of the tensor; None for a plain parameter."""
        if not parametrize.is_parametrized(self.module, self.tensor_name):
            return None
        return self.module.parametrizations[self.tensor_name]  # type: ignore[index, return-value]


@dataclass(frozen=True)
class Layer:
    """One weight of a model: the dense parameter, the effective weight, and the places where it is used."""

    places: tuple[Place, ...]

    @property
    def name(self) -> str:
        return self.places[0].name

    @property
    def module(self) -> nn.Module:
        return self.places[0].module

    @property
    def is_tied(self) -> bool:
        """Whether several modules use the weight."""
        return len({(id(place.module), place.tensor_name) for place in self.places}) > 1

    @property
    def kind(self) -> str:
        """Class of the module, such as "Conv2d"."""
        return parametrize.type_before_parametrizations(self.module).__name__

    @property
    def weight(self) -> Tensor:
        """The dense weight: the parameter that the optimizer moves, or what another parametrization makes of it."""
        made_by = self.places[0].parametrizations
        if made_by is None:
            return self.effective_weight
        before = list(takewhile(lambda each: not isinstance(each, Sparse), made_by))
        if not before:
            return made_by.original
        weight: Tensor = before[0](*self.originals)
        for each in before[1:]:
            weight = each(weight)
        return weight

    @property
    def originals(self) -> tuple[nn.Parameter, ...]:
        """The parameters that the weight is made from: itself, or those of weight normalization and its like."""
        made_by = self.places[0].parametrizations
        owner = self.module if made_by is None else made_by
        names = [self.places[0].tensor_name] if made_by is None else list(made_by._parameters)
        found = tuple(getattr(owner, name) for name in names)
        _check_whole(found)
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        made_by = self.places[0].parametrizations
        whole = made_by.original if hasattr(made_by, "original") else self.effective_weight  # type: ignore[union-attr]
        return tuple(whole.shape)

    @property
    def effective_weight(self) -> Tensor:
        """The effective weight, which the layer multiplies by.

        Within `parametrize.cached()` it is the tensor that the model uses, unless gradients are off: to read it for a
        count would leave a tensor without gradients to the forward pass.
        """
        made_by = self.places[0].parametrizations
        if made_by is None or torch.is_grad_enabled():
            return getattr(self.module, self.places[0].tensor_name)  # type: ignore[no-any-return]
        return made_by()  # type: ignore[no-any-return]

    @property
    def parametrization(self) -> Sparse:
        """The module that makes the effective weight.

        Raises:
            InputError: the layer is not sparsified.
        """
        found = self.find_parametrization()
        if found is None:
            raise InputError(f"layer {self.name!r} is not sparsified")
        found.refresh()
        return found

    @property
    def is_sparsified(self) -> bool:
        """Whether the layer is sparsified."""
        return self.find_parametrization() is not None

    def find_parametrization(self) -> Sparse | None:
        """Return the parametrization as it is: without first values after the meta device, or the state of a model.

        None for a layer that is not sparsified.
        """
        return next((each for each in self.places[0].parametrizations or () if isinstance(each, Sparse)), None)

    @property
    def threshold(self) -> Tensor | None:
        """The threshold in force; None if there is none."""
        return self.parametrization.threshold() if self.is_sparsified else None

    @torch.no_grad()
    def nonzero(self) -> int:
        """Count the effective weights that are not zero.

        Raises:
            InputError: the weight is on the meta device, where there is nothing to count.
        """
        if self.weight.is_meta:
            raise InputError(f"layer {self.name!r} is on the meta device and has no weights to count")
        weight = self.effective_weight
        try:
            return int(gathered((weight != 0).sum()))
        except NotImplementedError:  # a quantized tensor, such as torchao's
            return int((weight.dequantize() != 0).sum())

    def sparsity(self) -> float:
        """Return the fraction of effective weights that are zero, in [0, 1]."""
        weights = prod(self.shape)
        return (weights - self.nonzero()) / weights if weights else 0.0


def default(name: str, module: nn.Module) -> bool:
    """Select every convolution, transposed convolution, Linear, recurrent layer or cell, attention, and the like.

    Also selected is a module of another library with a matrix or kernel called `weight`, such as the Conv1D of
    transformers, unless its name says that it is an embedding, holds positions, or is the router of experts.

    Examples:
        >>> default("fc", nn.Linear(2, 2)), default("norm", nn.BatchNorm2d(2))
        (True, False)
    """
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, *RECURRENT, nn.Linear, nn.MultiheadAttention)):
        return True
    kind = parametrize.type_before_parametrizations(module)
    from_torch = any(base.__module__.startswith("torch.nn.modules") and base is not nn.Module for base in kind.__mro__)
    other = isinstance(module, torch.jit.ScriptModule) or any(
        word in kind.__name__.lower() for word in ("embed", "position", "router")
    )
    if from_torch or other or "weight" not in weight_names(module):
        return False
    return sum(size > 1 for size in Layer((Place(name, module, "weight"),)).shape) > 1


def is_transposed(module: nn.Module) -> bool:
    """Return whether the weight of a module has its inputs in the first dimension and its outputs in the second.

    The Conv1D of transformers, a Linear by another name, has it so too.
    """
    kind = parametrize.type_before_parametrizations(module).__name__
    return isinstance(module, TRANSPOSED_CONVOLUTIONS) or (kind == "Conv1D" and hasattr(module, "nf"))


def weight_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the weight matrices or kernels of a module, without biases."""
    if isinstance(module, NORMALIZATIONS):
        return ()
    if isinstance(module, nn.RNNBase):
        return tuple(n for n in module._flat_weights_names if n.startswith("weight") and _is_parameter(module, n))
    kernel = isinstance(module, CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS)
    found = []
    made_by = getattr(module, "parametrizations", {})
    if isinstance(made_by, nn.Module) and not isinstance(made_by, nn.ModuleDict):
        raise InputError(
            "this is an exported program, whose graph computes the effective weights of a sparsified model: give the "
            "model itself, or export it after sparing.densify_()"
        )
    made = {name: _original(each) for name, each in made_by.items()}  # type: ignore[arg-type]
    for name, parameter in {**dict(module._parameters.items()), **made}.items():
        if parameter is None or "bias" in name or isinstance(module, (Sparse, parametrize.ParametrizationList)):
            continue
        if name.endswith("_orig") and name.removesuffix("_orig") in vars(module):
            name = name.removesuffix("_orig")  # of torch.nn.utils.prune, which computes the weight before each forward
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            found += [name] if name == "weight" else []
        # A vector that broadcasts, such as a token of shape (1, 1, C), is no kernel; a convolution of one channel is.
        elif parameter.dim() == 2 or (kernel and name == "weight") or sum(size > 1 for size in parameter.shape) > 1:
            found.append(name)
    return tuple(found)


def _check_whole(parameters: Iterable[Tensor | None]) -> None:
    """Check that FSDP1 has not replaced parameters by a part of a flat one, or removed them."""
    parameters = list(parameters)
    if not parameters or any(getattr(each, "_fsdp_flattened", False) for each in parameters):
        raise InputError(
            "the model is sharded by FullyShardedDataParallel (FSDP1), which leaves flat parts of its weights: use "
            "fully_shard() (FSDP2) or DistributedDataParallel"
        )


def _original(made_by: parametrize.ParametrizationList) -> Tensor:
    """Return the parameter that has the shape of the weight, or the one with most dimensions."""
    _check_whole(made_by.parameters(recurse=False))
    return max(made_by.parameters(recurse=False), key=lambda each: (each.dim(), each.numel()))


def _is_parameter(module: nn.Module, name: str) -> bool:
    return name in module._parameters or parametrize.is_parametrized(module, name)


def check_module(model: nn.Module) -> None:
    """Check that a model is a module.

    Raises:
        InputError: it is something else, such as a state dict.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"the model must be a torch.nn.Module, got {type(model).__name__}")


def all_layers(model: nn.Module) -> dict[str, Layer]:
    """Return all layers of a model by name, in module order: every parameter that is a matrix or a kernel.

    Raises:
        InputError: the model is sharded by FSDP1, or is no module.

    Examples:
        >>> list(all_layers(nn.Sequential(nn.Embedding(9, 2), nn.ReLU(), nn.LSTM(2, 2))))
        ['0', '2.weight_ih_l0', '2.weight_hh_l0']
    """
    check_module(model)
    places: dict[int, list[Place]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        if module._parameters:
            _check_whole(module._parameters.values())
        for tensor_name in weight_names(module):
            place = Place(module_name, module, tensor_name)
            identity = id(place.parametrizations or dict(module._parameters.items()).get(tensor_name, module))
            places.setdefault(identity, []).append(place)
    layers = (Layer(tuple(where)) for where in places.values())
    return {layer.name: layer for layer in layers}


def find_layers(model: nn.Module, predicate: Predicate | None = None) -> dict[str, Layer]:
    """Return the selected layers of a model by name, in module order, dense and sparsified ones.

    A predicate selects modules, and of these the tensors with "weight" in their names. A tied weight is found if all
    modules that use it are selected: it is one tensor, which cannot be sparse in one of them and dense in another. So
    the default selection leaves out a classifier that shares its weight with an embedding.

    Args:
        model: the model to walk.
        predicate: which modules to select; None selects by `default`, and every sparsified layer.

    Examples:
        >>> list(find_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.LSTM(2, 2))))
        ['0', '2.weight_ih_l0', '2.weight_hh_l0']
    """
    select = default if predicate is None else predicate

    def is_taken(layer: Layer) -> bool:
        if predicate is None and layer.is_sparsified:
            return True
        return all("weight" in place.tensor_name and select(place.module_name, place.module) for place in layer.places)

    return {name: layer for name, layer in all_layers(model).items() if is_taken(layer)}


def sparse_layers(model: nn.Module) -> dict[str, Layer]:
    """Return the sparsified layers of a model by name, of all calls of `sparsify_`.

    Examples:
        >>> sparse_layers(nn.Linear(4, 2))
        {}
    """
    return {name: layer for name, layer in all_layers(model).items() if layer.is_sparsified}


def filter_shape(layer: Layer) -> tuple[int, ...]:
    """Return the shape with one number per filter (output channel or row) that broadcasts to the weight of a layer.

    Raises:
        InputError: the layer is a transposed convolution of several groups, or a parameter of more than two
            dimensions that is no convolution.

    Examples:
        >>> filter_shape(find_layers(nn.Conv2d(3, 8, 5))["weight"])
        (8, 1, 1, 1)
    """
    shape, module = layer.shape, layer.module
    if len(shape) > 2 and not isinstance(module, CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS):
        raise InputError(
            f"layer {layer.name!r} is a {layer.kind} with a weight of shape {shape}, whose filters are not known: one "
            "threshold per filter is not supported; leave it out with select="
        )
    if not is_transposed(module):
        return shape[:1] + (1,) * (len(shape) - 1)
    if getattr(module, "groups", 1) != 1:
        raise InputError(
            f"layer {layer.name!r} is a transposed convolution of {module.groups} groups, whose filters are not "
            "slices of its weight: one threshold per filter is not supported; leave it out with select="
        )
    return (1, shape[1]) + (1,) * (len(shape) - 2)
