"""Resolve a recipe before training: fix everything that its run depends on, and find what cannot be trained."""

import inspect
import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparing
from sparing.data import DATASETS, SplitDataset
from sparing.errors import InputError
from sparing.export.compressed import check_tensor
from sparing.macs import count_applications
from sparing.run.build import build_data, build_model, build_sparsifier, data_function
from sparing.run.method_section import build_method, settings, settle
from sparing.run.recipe import Recipe, ResolvedSection
from sparing.run.weights import checksum

MAX_STEPS = 10_000_000
"""Maximum length of a run in optimizer steps: the learning rates of all steps are computed before the first."""

FOLDERS = ("root", "cache")
"""Arguments of data sets that name a folder."""
SHARDS = ("train", "validation", "test")
"""Arguments of data sets that name files, or are URLs; only of the data sets of `sparing.data`."""


def resolve(recipe: Recipe, data: SplitDataset | None = None, ranks: int = 1) -> Recipe:
    """Return the recipe with everything fixed that its run depends on. Nothing is computed or written.

    The result has every argument of the method, the values of its budget, absolute paths, and the section `resolved`
    with the length of the run, the shape of the inputs, a checksum of the starting weights, and versions. It is a valid
    recipe, and resolving it again gives the same result.

    Args:
        recipe: the recipe.
        data: its data set; built if it is not given.
        ranks: number of ranks that train.

    Raises:
        InputError: model, method, starting weights and batch size do not fit the data or each other.
    """
    data = build_data(recipe.data) if data is None else data
    batch_size, accumulate, epochs = recipe.data.batch_size, recipe.data.accumulate, recipe.schedule.epochs
    if batch_size < ranks * accumulate:
        raise InputError(
            f"data.batch_size={batch_size} must be at least the number of ranks ({ranks}) times data.accumulate "
            f"({accumulate})"
        )
    steps = epochs * len(data.training(batch_size, recipe.seed, 0, ranks))
    # Settings must not depend on the number of ranks, so they follow from the steps of one.
    alone = len(data.training(batch_size, recipe.seed))
    if not 0 < steps <= MAX_STEPS or epochs * alone > MAX_STEPS:
        raise InputError(f"the run has {steps:,} optimizer steps; it must have 1 to {MAX_STEPS:,}")
    if not data.size("test"):
        raise InputError(f"data {recipe.data.name!r} has no test examples; a run is evaluated on them at its end")
    weights = None if recipe.weights is None else Path(recipe.weights).expanduser().absolute()
    resolved = ResolvedSection(
        steps=steps,
        input_size=tuple(data.input_size),
        model_arguments=data.model_arguments(),
        weights_sha256=None if weights is None else _checksum(recipe, weights),
        versions={"python": platform.python_version(), "torch": torch.__version__, "sparing": sparing.__version__},
    )
    recipe = with_settings(recipe, alone, resolved.input_size)
    located = recipe.data.model_copy(update=_absolute(recipe))
    recipe = recipe.model_copy(update={"data": located, "weights": weights and str(weights), "resolved": resolved})
    _check_model(recipe, data)
    return recipe


def with_settings(recipe: Recipe, steps_an_epoch: int, input_size: tuple[int, ...]) -> Recipe:
    """Return the recipe with all settings of its method, and the weight decay that `for_sparsity` chooses.

    Args:
        recipe: the recipe.
        steps_an_epoch: optimizer steps of an epoch.
        input_size: shape of a batch of one example.

    Raises:
        InputError: a setting is out of range, or the run is too short for it.
    """
    if recipe.method is None:
        return recipe
    given, optimizer = recipe.method, recipe.optimizer
    spec, decay = settle(given, recipe.learning_rates(steps_an_epoch), recipe.momentum)
    if decay is not None:
        optimizer = optimizer.model_copy(update={"threshold_weight_decay": decay})
    method = settings(given["name"], build_method(spec, input_size), keep=tuple(given))
    return recipe.model_copy(update={"method": method, "optimizer": optimizer})


def check_schedule(recipe: Recipe, steps_an_epoch: int) -> None:
    """Let the method of a recipe warn if it cannot work with its schedule."""
    if recipe.method is None:
        return
    given = recipe.optimizer.threshold_weight_decay
    decay = recipe.optimizer.weight_decay if given is None else given
    input_size = recipe.resolved.input_size if recipe.resolved else None
    method = build_method(recipe.method, input_size)
    method.check_schedule(recipe.learning_rates(steps_an_epoch), decay, recipe.momentum)


def what_is_computed(recipe: Recipe) -> dict[str, Any]:
    """Return the keys of a recipe that affect its results: all but device, data location, logging and versions.

    The number of steps is left out, as it depends on the number of ranks, which may change when a run is resumed.
    """
    without: dict[str, Any] = dict.fromkeys(("device", "tensorboard", "checkpoint", "rank_timeout"), True)
    nested = {"data": {*FOLDERS, "workers"}, "resolved": {"steps", "versions"}}
    return recipe.model_dump(mode="json", exclude=without | nested)


def differing_keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the keys, in dotted form, in which two nested mappings differ."""
    before, now = flatten(before), flatten(now)
    return sorted(key for key in (now | before) if before.get(key) != now.get(key))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _checksum(recipe: Recipe, weights: Path) -> str:
    """Return the checksum of the starting weights. A run that is resumed does not need the file any more."""
    known = recipe.resolved.weights_sha256 if recipe.resolved is not None else None
    return known if known is not None and not weights.exists() else checksum(weights)


def _absolute(recipe: Recipe) -> dict[str, Any]:
    """Return the arguments of the data set that name files, as absolute paths; URLs stay as they are."""
    keys = FOLDERS + (SHARDS if recipe.data.name in DATASETS else ())
    given, known = recipe.data.model_extra or {}, inspect.signature(data_function(recipe.data)).parameters
    values = {key: given.get(key, known[key].default) for key in keys if key in known}
    return {key: _absolute_path(value) for key, value in values.items() if isinstance(value, (str, list))}


def _absolute_path(value: Any) -> Any:
    if isinstance(value, list):
        return [_absolute_path(each) for each in value]
    return value if not isinstance(value, str) or "://" in value else str(Path(value).expanduser().absolute())


def _check_model(recipe: Recipe, data: SplitDataset) -> None:
    """Check that the model fits the data, and the method the model, on the meta device."""
    model = build_model(recipe.model, data.model_arguments())
    for name, tensor in model.state_dict().items():
        try:
            check_tensor(name, tensor)
        except InputError as error:
            raise InputError(
                f"model {recipe.model.name!r} cannot be written to a file: {error}; leave it out of the state dict, as "
                "register_buffer(..., persistent=False) does"
            ) from error
    model = model.to("meta")
    build_sparsifier(recipe, model)
    count_applications(model, data.input_size)
    classes = _outputs(model, data.input_size)
    if classes is not None and classes != data.num_classes:
        raise InputError(
            f"model {recipe.model.name!r} returns {classes} logits; the data has {data.num_classes} classes"
        )


@torch.no_grad()
def _outputs(model: nn.Module, input_size: tuple[int, ...]) -> int | None:
    """Return the number of logits; None if the model cannot be called without the values of its weights."""
    try:
        logits = model.eval()(torch.empty(input_size, device="meta"))
    except (RuntimeError, NotImplementedError, TypeError):
        return None
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        kind = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise InputError(f"the model must return logits of shape (N, classes); for one example it returned {kind}")
    return int(logits.shape[1])
