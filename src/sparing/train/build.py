"""Build the data, model, sparsifier and optimizer of a recipe."""

import inspect
import math
import warnings
from collections.abc import Mapping

import torch
from torch import nn

from sparing.data import DATASETS, SplitDataset
from sparing.decay import e_folds, weight_decay_for
from sparing.errors import InputError, SparsityWarning, nearest
from sparing.methods import STR
from sparing.models import MODELS
from sparing.param_groups import param_groups
from sparing.sparsifier import Sparsifier
from sparing.sparsify import sparsify_
from sparing.threshold import MAPS
from sparing.train.recipe import DataSection, ModelSection, OptimizerSection, Recipe, build_method

DATA_ARGUMENTS = ("num_classes", "in_channels", "input_size")
"""Arguments of models that follow from the data."""

LEAST_THRESHOLD = 1e-3
"""Thresholds below this prune almost nothing: most trained weights are larger."""


def build_data(spec: DataSection) -> SplitDataset:
    """Build the data set of a recipe.

    Raises:
        InputError: an argument is unknown or invalid, or the data is missing.
    """
    function = DATASETS[spec.name]
    arguments = dict(spec.model_extra or {})
    known = inspect.signature(function).parameters
    for key in arguments:
        if key not in known:
            raise InputError(f"data {spec.name!r} has no argument {key!r}; {nearest(key, known)}")
    try:
        return function(**arguments)
    except TypeError as error:
        raise InputError(f"data {spec.name!r} cannot be built from {arguments}: {error}") from error


def build_model(spec: ModelSection, from_data: Mapping[str, int]) -> nn.Module:
    """Build the model of a recipe for its data.

    Args:
        spec: section `model` of the recipe.
        from_data: `model_arguments()` of the data set.

    Raises:
        InputError: an argument is unknown or invalid, or the model does not accept inputs of this kind.
    """
    function = MODELS[spec.name]
    known = inspect.signature(function).parameters
    arguments = dict(spec.model_extra or {})
    for key in arguments:
        if key not in known:
            raise InputError(f"model {spec.name!r} has no argument {key!r}; {nearest(key, known)}")
        if key in DATA_ARGUMENTS:
            raise InputError(f"model: {key!r} follows from the data; leave it out")
    for key, value in from_data.items():
        if key in known:
            arguments[key] = value
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
        return function(**arguments)
    except (TypeError, RuntimeError, ValueError) as error:
        raise InputError(f"model {spec.name!r} cannot be built from {arguments}: {error}") from error


def build_sparsifier(
    recipe: Recipe, model: nn.Module, steps: int, input_size: tuple[int, ...] | None = None
) -> Sparsifier | None:
    """Sparsify the model by the method of the recipe, in place; return None if the recipe has no method.

    Args:
        recipe: recipe of the run.
        model: the dense model.
        steps: length of the run in optimizer steps.
        input_size: shape of a batch of one example, for a target in MACs.
    """
    if recipe.method is None:
        return None
    return sparsify_(model, build_method(recipe.method, input_size), recipe.select, steps)


def warn_if_nothing_prunes(recipe: Recipe, steps_an_epoch: int) -> None:
    """Warn if the weight decay of an STR run without a target is too small to prune any weight.

    The loss only slows s down, so weight decay alone gives an upper bound on the final threshold. Values that suit a
    large data set hardly move s on a small one, where a run has fewer steps.
    """
    method = build_method(recipe.method, input_size=(1,)) if recipe.method else None
    if not isinstance(method, STR) or method.sparsity is not None or method.macs is not None:
        return
    spec, rates = recipe.optimizer, recipe.learning_rates(steps_an_epoch)
    decay = spec.weight_decay if spec.threshold_weight_decay is None else spec.threshold_weight_decay
    end = method.init * math.exp(-e_folds(rates, decay, recipe.momentum))
    threshold = float(method.scale * MAPS[method.g](torch.tensor(end, dtype=torch.float64)))  # type: ignore[index]
    if threshold >= LEAST_THRESHOLD:
        return
    try:
        enough = f"{weight_decay_for(0.9, rates, recipe.momentum, -20.0):.2g} and method.init=-20"
    except InputError:
        enough = "more, over more steps than these"
    warnings.warn(
        f"nothing can be pruned: in the {len(rates)} steps of this run a weight decay of {decay:.3g} takes s from "
        f"{method.init:g} to {end:.4g} at best, a threshold of {threshold:.1g}. A sparsity of about 90 % takes "
        f"optimizer.threshold_weight_decay={enough}. method.for_sparsity=0.9 chooses it (sparing.STR.for_schedule)",
        SparsityWarning,
        stacklevel=2,
    )


def build_optimizer(spec: OptimizerSection, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer of a recipe, with the parameter groups of `sparing.param_groups`."""
    groups = param_groups(model, spec.weight_decay, spec.threshold_weight_decay, spec.norm_weight_decay)
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
        raise InputError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device
