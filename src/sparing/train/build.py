"""From a recipe to the objects of a run."""

import inspect

import torch
from torch import nn

from sparing.errors import InputError
from sparing.models import MODELS
from sparing.optim import param_groups
from sparing.select import nearest
from sparing.sparsify import Sparsifier, sparsify_
from sparing.train.recipe import Model, Optimizer, Recipe, build_method


def build_model(spec: Model, in_channels: int, num_classes: int) -> nn.Module:
    """The model a recipe names, fitted to the data.

    Raises:
        InputError: an argument is none of the model's, or the model takes another kind of image.
    """
    function = MODELS[spec.name]
    known = inspect.signature(function).parameters
    arguments = dict(spec.model_extra or {})
    for key in arguments:
        if key not in known:
            raise InputError(f"model {spec.name!r} has no argument {key!r}; {nearest(key, known)}")
        if key in ("num_classes", "in_channels"):
            raise InputError(f"model: {key!r} follows from the data; leave it out")
    arguments["num_classes"] = num_classes
    if "in_channels" in known:
        arguments["in_channels"] = in_channels
    elif in_channels != 3:
        raise InputError(f"model {spec.name!r} takes images of 3 channels; the data has {in_channels}")
    try:
        return function(**arguments)
    except (TypeError, RuntimeError, ValueError) as error:
        raise InputError(f"model {spec.name!r} cannot be built from {arguments}: {error}") from error


def build_sparsifier(recipe: Recipe, model: nn.Module, training_images: int) -> Sparsifier | None:
    """Sparsify the model as the recipe says; None for a dense run."""
    if recipe.method is None:
        return None
    steps = recipe.schedule.epochs * -(-training_images // recipe.data.batch_size)
    return sparsify_(model, build_method(recipe.method, steps), recipe.select)


def build_optimizer(spec: Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer, over weights, thresholds and normalization in groups of their own."""
    groups = param_groups(model, spec.weight_decay, spec.threshold_weight_decay, spec.norm_weight_decay)
    if spec.name == "adamw":
        return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas)
    return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum)


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
