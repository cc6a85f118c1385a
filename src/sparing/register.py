"""Put a parametrization on a layer, and take it off.

torch registers one parametrization on one tensor of one module. Here a layer may be tied, its weight used
in several places; deep copies of a module are to stay apart; and recurrent layers are to run with the
weights that they have now.
"""

import gc
import warnings
from collections.abc import Callable, Iterator, Mapping, ValuesView
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparing.effective_weight import EffectiveWeight, guarded, refuse_pickling, refuse_write
from sparing.errors import InputError, SparsityWarning
from sparing.layers import EMBEDDINGS, Layer, Place, check_module, sparse_layers
from sparing.run_state import RunState
from sparing.sharding import is_sharded


def check_weight(layer: Layer) -> None:
    """Check that a weight can be sparsified.

    Raises:
        InputError: it is sparsified already, tied and parametrized, not floating point, not finite, or has no elements;
            an embedding changes it in place, or has sparse gradients.
    """
    made_by = layer.places[0].parametrizations
    if layer.is_sparsified:
        raise InputError(
            f"layer {layer.name!r} is sparsified already: choose other layers with select=, change its target with "
            "sparsifier.retarget(), or call sparing.densify_(model) first"
        )
    if made_by is not None and (layer.is_tied or getattr(made_by[0], "stands_alone", False)):
        tied, other = "is tied and " if layer.is_tied else "", type(made_by[0]).__name__
        raise InputError(
            f"layer {layer.name!r} {tied}carries the parametrization {other}; remove it with "
            "torch.nn.utils.parametrize.remove_parametrizations, or leave the layer out with select="
        )
    for place in layer.places:
        if isinstance(place.module, torch.jit.ScriptModule):
            raise InputError(
                f"layer {place.name!r} is compiled by torch.jit.script(), and its weight cannot be replaced by another"
                ": call sparsify_() before that, or leave it out with select="
            )
        if getattr(place.module, "max_norm", None) is not None:
            raise InputError(
                f"layer {place.name!r} renormalizes its weight in place (max_norm={place.module.max_norm}), which a "
                "sparsified weight does not allow; set max_norm to None, or leave it out with select="
            )
        if isinstance(place.module, EMBEDDINGS) and place.module.sparse:
            raise InputError(
                f"layer {place.name!r} makes sparse gradients (sparse=True), which do not pass through a sparsified "
                "weight; set sparse to False, or leave it out with select="
            )
    weight = layer.weight
    if made_by is None and not isinstance(weight, nn.Parameter):
        raise InputError(
            f"the weight of layer {layer.name!r} is no parameter: something recomputes it, such as "
            "torch.nn.utils.prune; remove that first, or leave the layer out with select="
        )
    if weight.is_inference() or torch.is_inference_mode_enabled():
        raise InputError(
            f"layer {layer.name!r} was made or is sparsified within torch.inference_mode(), and could not be trained: "
            "call sparsify_() outside of it, on a model that was made outside of it"
        )
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise InputError(
            f"layer {layer.name!r} has {weight.dtype} weights; only floating point of 16 bits or more is supported"
        )
    if weight.numel() == 0:
        raise InputError(f"layer {layer.name!r} has no weights: its shape is {tuple(weight.shape)}")
    if not weight.is_meta:
        bad = weight.numel() - int(torch.isfinite(weight).sum())
        if bad:
            raise InputError(f"layer {layer.name!r} holds {bad} weights that are NaN or infinite, of {weight.numel()}")


def register(layer: Layer, parametrization: nn.Module) -> None:
    """Register a parametrization on a layer, in all places where its weight is used."""
    first, *others = _distinct(layer)
    for place in layer.places:
        if parametrize.is_parametrized(place.module):
            _own_class(place.module)
    parametrize.register_parametrization(first.module, first.tensor_name, parametrization)
    shared = first.module.parametrizations[first.tensor_name]  # type: ignore[index]
    shared.__class__ = ParametrizationList
    for place in others:
        parametrize.register_parametrization(place.module, place.tensor_name, parametrization)
        place.module.parametrizations[place.tensor_name] = shared  # type: ignore[index, operator]
    if isinstance(parametrization, RunState):
        for _ in layer.places:
            parametrization.set_home(shared)  # type: ignore[arg-type]
    for place in layer.places:
        _reset_dense_weights(place.module)
        _refuse_other_checkpoints(place.module)
        _refuse_replacement(place.module)
        if isinstance(place.module, nn.RNNBase):
            _read_weights_when_run(place.module)


class ParametrizationList(parametrize.ParametrizationList):
    """The parametrizations of a sparsified weight; others may follow that take it as it is, as spectral_norm does."""

    def __call__(self) -> Tensor:
        effective: Tensor = super().__call__()
        # Here, not in forward(): module hooks, such as those of torch.utils.flop_counter, put hooks on what they get.
        plain = parametrize._cache_enabled or effective is self._parameters.get("original")
        return effective if plain else guarded(effective)

    def append(self, module: nn.Module) -> "ParametrizationList":
        try:
            with torch.no_grad():
                module(self.forward())
        except Exception as error:
            raise InputError(
                f"{type(module).__name__} cannot compute a weight from one that is sparsified already ({error}): "
                "register it before sparsify_()"
            ) from error
        super().append(module)
        return self

    def right_inverse(self, value: Tensor) -> None:
        if not any(hasattr(part, "right_inverse") for part in self):
            refuse_write(value, "assigning a tensor")
        super().right_inverse(value)


def _reset_dense_weights(module: nn.Module) -> None:
    """Make the `reset_parameters` of a parametrized module initialize its dense weights.

    It would write into the effective weight, which is computed anew at every use. Recurrent layers initialize all
    parameters that they find, those of the parametrizations among them.
    """
    parametrized_class = type(module)
    for name in ("reset_parameters", "_reset_parameters"):
        if hasattr(parametrized_class, name) and name not in vars(parametrized_class):
            setattr(parametrized_class, name, _with_dense_weights(getattr(parametrized_class, name)))


def _refuse_other_checkpoints(module: nn.Module) -> None:
    """Make `load_state_dict` refuse dense weights and other prefixes, which strict=False would leave out."""
    parametrized_class: Any = type(module)
    if "_load_from_state_dict" in vars(parametrized_class):
        return
    load = parametrized_class._load_from_state_dict

    def refuse(self: Any, state_dict: Any, prefix: str, *args: Any) -> None:
        load(self, state_dict, prefix, *args)
        *_, unexpected, errors = args
        for name in self.parametrizations:
            key = f"{prefix}parametrizations.{name}.original"
            if key in state_dict:
                continue
            if prefix + name in state_dict:
                errors.append(
                    f"{prefix}{name} is of a dense model: call sparing.load_dense_state_dict(model, state_dict)"
                )
            elif other := [each for each in unexpected if each.endswith(f".{key}") or key.endswith(f".{each}")]:
                errors.append(f"{key} is called {other[0]} in the checkpoint: give the keys the prefix of the model's")

    parametrized_class._load_from_state_dict = refuse


def _with_dense_weights(method: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    def run(self: nn.Module) -> None:
        if "parametrizations" not in self._modules:  # called by the other of the two
            return method(self)
        modules, made_by = dict(self._modules), self._modules.pop("parametrizations")
        dense = {name: each.original for name, each in made_by.items() if hasattr(each, "original")}  # type: ignore[union-attr, operator]
        properties = {name: vars(type(self))[name] for name in dense}
        for name, weight in dense.items():
            delattr(type(self), name)
            self._parameters[name] = weight
        try:
            method(self)
        finally:
            for name, access in properties.items():
                assigned = self._parameters.pop(name)
                if assigned is not None and assigned is not dense[name]:
                    dense[name].data.copy_(assigned.detach())
                setattr(type(self), name, access)
            self._modules.clear()
            self._modules.update(modules)  # in the order in which they were

    return run


def _refuse_replacement(module: nn.Module) -> None:
    """Make pickling, and the assignment of a Parameter, as for quantization, errors that say what to do."""
    parametrized_class = type(module)
    if "register_parameter" in vars(parametrized_class):
        return
    register_other = parametrized_class.register_parameter

    def register_parameter(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        # torch.nn.utils.prune makes a parameter of the effective weight, under another name.
        if name in self._modules.get("parametrizations", ()) or isinstance(parameter, EffectiveWeight):  # type: ignore[operator]
            raise InputError(
                f"{name!r} of a sparsified {type(self).__bases__[0].__name__} is computed and cannot be replaced "
                "by a Parameter: call sparing.densify_(model) first"
            )
        register_other(self, name, parameter)

    parametrized_class.register_parameter = register_parameter  # type: ignore[assignment, method-assign]
    parametrized_class.__getstate__ = refuse_pickling  # type: ignore[method-assign]


def unregister(layer: Layer) -> None:
    """Replace the dense weight of a layer by its effective weight and remove all of its parametrizations."""
    for index, place in enumerate(_distinct(layer)):
        _own_class(place.module)
        # Only the first place is given the effective weight: the others hold the same Parameter, and would
        # threshold it a second time.
        parametrize.remove_parametrizations(place.module, place.tensor_name, leave_parametrized=index == 0)


def _distinct(layer: Layer) -> Iterator[Place]:
    """Iterate over the places of a layer, once for each module."""
    return iter({(id(place.module), place.tensor_name): place for place in reversed(layer.places)}.values())


def _read_weights_when_run(rnn: nn.RNNBase) -> None:
    """Make a recurrent layer use its effective weights, each computed once per call.

    torch's RNN layers keep a private list of their weights. It would go stale, keep the last graph alive,
    which breaks deepcopy, and evaluate every weight five times when it is refreshed.
    """
    parametrized_class = type(rnn)
    if "_flat_weights" in vars(parametrized_class):
        return
    run = parametrized_class.forward

    def forward(self: nn.RNNBase, *args: Any, **kwargs: Any) -> Any:
        with parametrize.cached():
            return run(self, *args, **kwargs)

    # They would refresh and copy that list at every call.
    parametrized_class._update_flat_weights = lambda self: None  # type: ignore[method-assign]
    parametrized_class.flatten_parameters = lambda self: None  # type: ignore[method-assign]
    parametrized_class._flat_weights = property(  # type: ignore[assignment]
        lambda self: [getattr(self, name) for name in self._flat_weights_names], lambda self, value: None
    )
    parametrized_class.forward = forward


def _own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own.

    torch puts the parametrized property on a class that deep copies share, and takes it off that
    class on removal: densifying a copy would break the model it was copied from.
    """
    shared = type(module)
    module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))


def check_held_once(model: nn.Module, layers: Mapping[str, Layer]) -> None:
    """Check that no parameter outside of the layers is one of their weights, or shares memory with one.

    Raises:
        InputError: there is one.

    Warns:
        SparsityWarning: a module holds a weight in a plain attribute, list or dict too.
    """
    known = {place.key for layer in layers.values() for place in layer.places}
    names = {id(layer.weight): name for name, layer in layers.items()}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in names and key not in known:
            raise InputError(
                f"the weight of layer {names[id(parameter)]!r} is also the parameter {key!r}, which would stay dense; "
                "leave the layer out with select="
            )
    for (_, end, one), (start, _, other) in pairwise(sorted(_spans(model))):
        if start < end and not known.isdisjoint((one, other)):
            raise InputError(
                f"the parameters {one!r} and {other!r} share memory, so that a step of one would fill the zeros of the "
                "other: make them one Parameter, clone one of them, or leave the layer out with select="
            )
    for key, held in _held_by_attributes(model):
        if name := names.get(id(held)) or names.get(id(held._base)):
            warnings.warn(
                f"the weight of layer {name!r} is also held by {key!r}, where it stays dense: a forward that reads it "
                "there does not see the zeros. Read it from its layer, or leave the layer out with select=",
                SparsityWarning,
                stacklevel=3,
            )


def _held_by_attributes(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Iterate over tensors that modules hold in plain attributes, lists and dicts, of which torch knows nothing."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute in ("_parameters", "_flat_weights"):  # of nn.Module and nn.RNNBase, which are replaced
                continue
            values = value.values() if isinstance(value, dict) else value
            for held in values if isinstance(values, (list, tuple, ValuesView)) else (values,):
                if isinstance(held, Tensor):
                    yield f"{name}.{attribute}".lstrip("."), held


def _spans(model: nn.Module) -> Iterator[tuple[int, int, str]]:
    """Iterate over where the parameters of a model are in memory: start, end, name."""
    for name, parameter in model.named_parameters():
        if type(parameter) is nn.Parameter and parameter.numel() and not parameter.is_meta:
            last = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
            start = parameter.data_ptr()
            yield start, start + (last + 1) * parameter.element_size(), name


def _is_held(model: nn.Module) -> bool:
    """Return whether a DistributedDataParallel outside of the model holds it: `sparsify_(parallel.module)`."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    gc.collect()  # wrappers that are not in use any more
    wrappers = (each for each in gc.get_objects() if issubclass(type(each), nn.parallel.DistributedDataParallel))
    return any(part is model for wrapper in wrappers for part in wrapper.modules())


def check_not_wrapped(model: nn.Module) -> None:
    """Check that the model is neither in DistributedDataParallel nor sharded: parametrized weights lose the hooks.

    Raises:
        InputError: it is, or it is no module.
    """
    check_module(model)
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()) or _is_held(model):
        raise InputError(
            "the model is wrapped in DistributedDataParallel, which would not average the gradients of weights that "
            "are sparsified later: wrap it after sparsify_(), and delete an earlier wrapper before"
        )
    if any(map(is_sharded, model.parameters())):
        raise InputError(
            "the model is sharded already, by fully_shard() or tensor parallelism, and weights sparsified later would "
            "not be gathered: call sparsify_() before fully_shard(). Tensor parallelism is not supported"
        )


def check_gathered(model: nn.Module) -> None:
    """Check that a model is not sharded, if it has sparsified layers.

    Raises:
        InputError: it is.
    """
    layers = sparse_layers(model).values()
    # After a forward pass FSDP2 may leave parameters gathered; its modules have a method unshard().
    sharded = any(hasattr(module, "unshard") for module in model.modules())
    if any(sharded or is_sharded(weight) for layer in layers for weight in layer.originals):
        raise InputError(
            "densify_(): the model is sharded by fully_shard(), which holds its parameters: load its full state dict "
            "into a sparsified model that is not sharded, and densify that one"
        )
