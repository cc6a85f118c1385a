"""From a recipe to the objects of a run."""

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
from sparing.train.recipe import Data as DataSpec
from sparing.train.recipe import Model, Optimizer, Recipe, build_method

FITTED = ("num_classes", "in_channels", "input_size")
"""Arguments of models that follow from the data."""

LEAST_THRESHOLD = 1e-3
"""Trained weights are mostly larger than this, so a lower threshold prunes nearly none."""


def build_data(spec: DataSpec) -> SplitDataset:
    """The data set a recipe names.

    Raises:
        InputError: an argument is none of the data set's, or the data is not there.
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


def build_model(spec: Model, fits: Mapping[str, int]) -> nn.Module:
    """The model a recipe names, fitted to the data.

    Args:
        spec: of the recipe.
        fits: the data's `model_arguments()`.

    Raises:
        InputError: an argument is none of the model's, or the model takes another kind of input.
    """
    function = MODELS[spec.name]
    known = inspect.signature(function).parameters
    arguments = dict(spec.model_extra or {})
    for key in arguments:
        if key not in known:
            raise InputError(f"model {spec.name!r} has no argument {key!r}; {nearest(key, known)}")
        if key in FITTED:
            raise InputError(f"model: {key!r} follows from the data; leave it out")
    for key, value in fits.items():
        if key in known:
            arguments[key] = value
        elif key == "in_channels":  # models that do not say take colors
            if value != 3:
                raise InputError(f"model {spec.name!r} takes images of 3 channels; the data has {value}")
        else:
            raise InputError(f"model {spec.name!r} does not take {key}={value}, which is what the data has")
    missing = [
        key for key in FITTED if key in known and key not in fits and known[key].default is inspect.Parameter.empty
    ]
    if missing:
        raise InputError(f"model {spec.name!r} needs {missing[0]}, which the data does not have")
    try:
        return function(**arguments)
    except (TypeError, RuntimeError, ValueError) as error:
        raise InputError(f"model {spec.name!r} cannot be built from {arguments}: {error}") from error


def build_sparsifier(
    recipe: Recipe, model: nn.Module, steps: int, input_size: tuple[int, ...] | None = None
) -> Sparsifier | None:
    """Sparsify the model as the recipe says; None for a dense run.

    Args:
        recipe: of the run.
        model: as it was built.
        steps: optimizer steps of the run.
        input_size: the data's, with a leading 1; for methods that count MACs.
    """
    if recipe.method is None:
        return None
    return sparsify_(model, build_method(recipe.method, input_size), recipe.select, steps)


def warn_if_nothing_prunes(recipe: Recipe, steps_an_epoch: int) -> None:
    """Warn of a run of STR whose weight decay cannot raise the threshold to where it prunes.

    The loss only holds s back, so what decay does alone is the most it can come to; the values that
    suit one data set leave s where it was on a smaller one.
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
        f"{method.init:g} to {end:.4g} at best, a threshold of {threshold:.1g}. About 90 % of zeros takes "
        f"optimizer.threshold_weight_decay={enough}; method.for_sparsity=0.9 works it out (sparing.STR.for_schedule)",
        SparsityWarning,
        stacklevel=2,
    )


def build_optimizer(spec: Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer, over weights, thresholds and normalization in groups of their own."""
    groups = param_groups(model, spec.weight_decay, spec.threshold_weight_decay, spec.norm_weight_decay)
    if spec.name == "adamw":
        return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas)
    return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum, nesterov=spec.nesterov)


def pick_device(name: str) -> torch.device:
    """The torch device of a recipe.

    Raises:
        InputError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device
