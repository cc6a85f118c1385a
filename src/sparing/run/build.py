"""Build the data, model, sparsifier and optimizer of a recipe."""

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from sparing.data import DATASETS, SplitDataset
from sparing.errors import InputError, first_line, nearest
from sparing.imports import import_object
from sparing.integrations.timm import PREFIX, timm_model
from sparing.models import MODELS
from sparing.param_groups import param_groups
from sparing.run.method_section import build_method
from sparing.run.recipe import DataSection, ModelSection, OptimizerSection, Recipe
from sparing.sparsifier import Sparsifier
from sparing.sparsify import sparsify_

DATA_ARGUMENTS = ("num_classes", "in_channels", "input_size")
"""Arguments of models that follow from the data."""


def data_function(spec: DataSection) -> Callable[..., Any]:
    """Return the function that loads the data set of a recipe, and check the names of its arguments."""
    function = DATASETS[spec.name] if spec.name in DATASETS else _imported(spec.name, "data", SplitDataset)
    _check_arguments("data", spec, function)
    return function


def build_data(spec: DataSection) -> SplitDataset:
    """Build the data set of a recipe.

    Raises:
        InputError: an argument is unknown or invalid, or the data is missing; an imported function fails, or returns
            no `SplitDataset`.
    """
    function, arguments = data_function(spec), dict(spec.model_extra or {})
    try:
        data = function(**arguments)
    except TypeError as error:
        raise InputError(f"data {spec.name!r} cannot be built from {arguments}: {first_line(error)}") from error
    if not isinstance(data, SplitDataset):
        raise InputError(f"data {spec.name!r} returned {type(data).__name__}, which is not a sparing.data.SplitDataset")
    return data


def build_model(spec: ModelSection, from_data: Mapping[str, int]) -> nn.Module:
    """Build the model of a recipe for its data.

    Args:
        spec: section `model` of the recipe.
        from_data: `model_arguments()` of the data set.

    Raises:
        InputError: an argument is unknown or invalid, or the model does not accept inputs of this kind; an imported
            function returns no module.
    """
    own = spec.name not in MODELS
    function = _model_function(spec.name)
    known = _check_arguments("model", spec, function)
    arguments = dict(spec.model_extra or {})
    for key in arguments:
        if key in known and key in DATA_ARGUMENTS:
            raise InputError(f"model: {key!r} follows from the data; leave it out")
    for key, value in from_data.items():
        if key in known:
            arguments[key] = value
        elif own:
            continue  # resolve() compares the output with the number of classes
        elif key == "in_channels":  # models without this argument take color images
            if value != 3:
                raise InputError(f"model {spec.name!r} takes images of 3 channels; the data has {value}")
        else:
            raise InputError(f"model {spec.name!r} has no argument {key!r}, but the data has {key}={value}")
    required = {key for key, parameter in known.items() if parameter.default is inspect.Parameter.empty}
    missing = [key for key in DATA_ARGUMENTS if key in required and key not in from_data]
    if missing:
        raise InputError(f"model {spec.name!r} needs {missing[0]}, which the data does not have")
    try:
        model = function(**arguments)
    except (TypeError, RuntimeError, ValueError, MemoryError) as error:
        raise InputError(f"model {spec.name!r} cannot be built from {arguments}: {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"model {spec.name!r} returned {type(model).__name__}, which is not a torch.nn.Module")
    return model


def _model_function(name: str) -> Callable[..., Any]:
    if name in MODELS:
        return MODELS[name]
    return timm_model(name) if name.startswith(PREFIX) else _imported(name, "model", nn.Module)


def _imported(path: str, kind: str, result: type) -> Callable[..., Any]:
    """Import a class, or a function that says what it returns. With others, such as os.system, a recipe runs programs.

    Raises:
        InputError: the object cannot be imported, or is another one.
    """
    found = import_object(path, kind)
    returned = found
    if inspect.isfunction(found):
        try:
            returned = typing.get_type_hints(found).get("return")
        except Exception:  # an annotation can name what the module does not have
            returned = None
    if not isinstance(returned, type) or not issubclass(returned, result):
        raise InputError(
            f"{kind} {path!r} must be a subclass of {result.__module__}.{result.__name__}, or a function with the "
            f"annotation -> {result.__name__}"
        )
    return found  # type: ignore[no-any-return]


def _check_arguments(
    kind: str, spec: ModelSection | DataSection, function: Callable[..., Any]
) -> Mapping[str, inspect.Parameter]:
    """Check that a function has the arguments of a section, and return its named parameters."""
    try:
        known = dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # some classes written in C have no signature
        return {}
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    known = {key: parameter for key, parameter in known.items() if parameter.kind not in variable}
    for key in spec.model_extra or {}:
        if key not in known and not takes_any:
            raise InputError(f"{kind} {spec.name!r} has no argument {key!r}; {nearest(key, known)}")
    return known


def build_sparsifier(recipe: Recipe, model: nn.Module) -> Sparsifier | None:
    """Sparsify the model by the method of a resolved recipe, in place; return None if the recipe has no method."""
    if recipe.method is None:
        return None
    assert recipe.resolved is not None, "resolve() the recipe first"
    method = build_method(recipe.method, recipe.resolved.input_size)
    return sparsify_(model, method, recipe.select, recipe.resolved.steps)


def build_optimizer(spec: OptimizerSection, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer of a recipe, with the parameter groups of `sparing.param_groups`."""
    decays = (spec.weight_decay, spec.threshold_weight_decay, spec.norm_weight_decay)
    groups = param_groups(model, *decays, threshold_lr=spec.threshold_lr)
    for group in groups:
        if "lr" in group:  # follows the schedule of the learning rate
            group["relative_lr"] = group["lr"] / spec.lr
    if spec.name == "adamw":
        return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas)
    return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum, nesterov=spec.nesterov)


def pick_device(name: str) -> torch.device:
    """Return the torch device of a recipe.

    Raises:
        InputError: the device is not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("its tensors have no values")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} cannot be used here: {first_line(error)}") from error
    return device
