"""Find the weight tensors of a model, dense and sparsified.

A *layer* is one weight tensor under one name: `conv1` for the `weight` of module `conv1`,
`lstm.weight_hh_l0` for a tensor of another name. A tensor used in several places (tied weights, a
module used twice) is one layer, named after the first of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparing.errors import InputError
from sparing.parametrizations import Sparse

Predicate = Callable[[str, nn.Module], bool]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
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
    def kind(self) -> str:
        """Class of the module, such as "Conv2d"."""
        return parametrize.type_before_parametrizations(self.module).__name__

    @property
    def weight(self) -> Tensor:
        """The dense weight, the parameter that the optimizer moves."""
        made_by = self.places[0].parametrizations
        # Weight normalization and its like have several originals; the computed weight stands for them.
        return made_by.original if hasattr(made_by, "original") else self.effective_weight  # type: ignore[union-attr]

    @property
    def effective_weight(self) -> Tensor:
        """The effective weight, which the layer multiplies by."""
        return getattr(self.module, self.places[0].tensor_name)  # type: ignore[no-any-return]

    @property
    def parametrization(self) -> Sparse | None:
        """The module that makes the effective weight; None for a layer that is not sparsified."""
        made_by = self.places[0].parametrizations
        first = None if made_by is None else made_by[0]
        if not isinstance(first, Sparse):
            return None
        first.refresh()
        return first

    @property
    def threshold(self) -> Tensor | None:
        """The threshold in force; None if there is none."""
        return None if self.parametrization is None else self.parametrization.threshold()

    @torch.no_grad()
    def nonzero(self) -> int:
        """Count the effective weights that are not zero.

        Raises:
            InputError: the weight is on the meta device, where there is nothing to count.
        """
        if self.weight.is_meta:
            raise InputError(f"layer {self.name!r} is on the meta device and has no weights to count")
        return int(torch.count_nonzero(self.effective_weight))

    def sparsity(self) -> float:
        """Return the fraction of effective weights that are zero, in [0, 1]."""
        weights = self.weight.numel()
        return (weights - self.nonzero()) / weights if weights else 0.0


def default(name: str, module: nn.Module) -> bool:
    """Select every convolution, transposed convolution, Linear, and recurrent layer or cell.

    Examples:
        >>> default("fc", nn.Linear(2, 2)), default("norm", nn.BatchNorm2d(2))
        (True, False)
    """
    return isinstance(module, CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS + RECURRENT + (nn.Linear,))


def weight_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the weight matrices or kernels of a module, without biases."""
    if isinstance(module, nn.RNNBase):
        return tuple(n for n in module._flat_weights_names if n.startswith("weight") and _is_parameter(module, n))
    if isinstance(module, nn.RNNCellBase):
        return ("weight_ih", "weight_hh")
    if isinstance(module, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return tuple(n for n in names if getattr(module, n, None) is not None)
    if isinstance(module, NORMALIZATIONS):
        return ()
    if parametrize.is_parametrized(module, "weight"):
        return ("weight",)
    weight = module._parameters.get("weight")
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return ("weight",)
    return ("weight",) if weight is not None and weight.dim() >= 2 else ()


def _is_parameter(module: nn.Module, name: str) -> bool:
    return name in module._parameters or parametrize.is_parametrized(module, name)


def find_layers(model: nn.Module, predicate: Predicate | None = None) -> dict[str, Layer]:
    """Return the layers of a model by name, in module order, dense and sparsified ones.

    A tied weight is found if `predicate` selects any of its places: it is one tensor, which cannot
    be sparse in one of them and dense in another.

    Args:
        model: the model to walk.
        predicate: which modules to select; None selects by `default`, and every sparsified layer.

    Examples:
        >>> list(find_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.LSTM(2, 2))))
        ['0', '2.weight_ih_l0', '2.weight_hh_l0']
    """
    places: dict[int, list[Place]] = {}
    chosen: set[int] = set()
    for module_name, module in model.named_modules(remove_duplicate=False):
        for tensor_name in weight_names(module):
            place = Place(module_name, module, tensor_name)
            identity = id(place.parametrizations or module._parameters[tensor_name])
            places.setdefault(identity, []).append(place)
            if predicate is None:
                taken = default(module_name, module) or Layer((place,)).parametrization is not None
            else:
                taken = predicate(module_name, module)
            if taken:
                chosen.add(identity)
    layers = (Layer(tuple(where)) for identity, where in places.items() if identity in chosen)
    return {layer.name: layer for layer in layers}


def sparse_layers(model: nn.Module) -> dict[str, Layer]:
    """Return the sparsified layers of a model by name, of all calls of `sparsify_`.

    Examples:
        >>> sparse_layers(nn.Linear(4, 2))
        {}
    """
    return {name: layer for name, layer in find_layers(model).items() if layer.parametrization is not None}


def filter_shape(layer: Layer) -> tuple[int, ...]:
    """Return the shape with one number per filter (output channel or row) that broadcasts to the weight of a layer.

    Raises:
        InputError: the layer is a transposed convolution of several groups.

    Examples:
        >>> filter_shape(find_layers(nn.Conv2d(3, 8, 5))["weight"])
        (8, 1, 1, 1)
    """
    shape = tuple(layer.weight.shape)
    if not isinstance(layer.module, TRANSPOSED_CONVOLUTIONS):
        return shape[:1] + (1,) * (len(shape) - 1)
    if layer.module.groups != 1:
        raise InputError(
            f"layer {layer.name!r} is a transposed convolution of {layer.module.groups} groups, whose filters are not "
            "slices of its weight: one threshold per filter is not supported; leave it out with select="
        )
    return (1, shape[1]) + (1,) * (len(shape) - 2)
