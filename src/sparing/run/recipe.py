"""Recipes: all settings of a run, in one YAML file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sparing.data import DATASETS
from sparing.errors import InputError, nearest
from sparing.imports import PATH
from sparing.integrations.timm import PREFIX
from sparing.models import MODELS
from sparing.run.method_section import check_method
from sparing.run.reading import explain, override, read_mapping
from sparing.schedules import warmup_cosine, warmup_drops

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base class of the sections of a recipe: unknown keys are errors, values cannot be changed after reading."""

    # Strict: `true` is not a number and "32" is not an integer.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSection(Section):
    """`name` of `sparing.models`, `timm/NAME`, or an import path `my_package.nets:MyNet`; other keys are its arguments.

    An imported class or function returns a module from inputs to logits. Of `num_classes`, `in_channels` and
    `input_size` it receives those that it has as named arguments.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: str

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return name if name.startswith(PREFIX) else _check_name(name, MODELS)


class DataSection(Section):
    """`name` of `sparing.data`, or an import path such as `my_package.data:load`; the other keys are its arguments.

    An imported function returns a `sparing.data.SplitDataset`.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: str
    batch_size: int = Field(default=64, ge=1)
    """Examples per optimizer step, over all ranks."""
    accumulate: int = Field(default=1, ge=1)
    """Micro-batches into which each rank splits its share of a batch, for batches that do not fit in memory."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return _check_name(name, DATASETS)


class OptimizerSection(Section):
    """Optimizer, and the weight decays of `sparing.param_groups`."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.1
    """Peak learning rate."""
    momentum: Momentum = 0.9
    """Momentum of SGD; AdamW does not use it."""
    nesterov: bool = False
    """Use Nesterov momentum; SGD only."""
    betas: Annotated[tuple[Momentum, Momentum], Field(strict=False)] = (0.9, 0.999)
    """Betas of AdamW; SGD does not use them."""
    weight_decay: NotNegative = 1e-4
    """λ of weights and biases."""
    threshold_weight_decay: NotNegative | None = None
    """λ of the s of learned thresholds; defaults to `weight_decay`."""
    threshold_lr: Positive | None = None
    """Peak learning rate of the s of learned thresholds; defaults to 0.01 for str_feather, and to `lr` otherwise."""
    norm_weight_decay: NotNegative | None = None
    """λ of normalization layers; defaults to `weight_decay`."""

    @model_validator(mode="after")
    def _check_nesterov(self) -> "OptimizerSection":
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError(
                f"nesterov: true requires name: sgd and momentum > 0, got name: {self.name} and momentum: "
                f"{self.momentum:g}"
            )
        return self


class ScheduleSection(Section):
    """Length of the run and learning rate schedule: linear warm-up, then a cosine to zero or drops."""

    epochs: int = Field(default=20, ge=1, le=100_000)
    warmup_epochs: NotNegative = 0
    update: Literal["step", "epoch"] = "step"
    """How often the learning rate changes; the STR paper changes it once per epoch."""
    drops: list[Positive] | None = None
    """Epochs after which the learning rate drops; replaces the cosine."""
    drop_factor: float = Field(default=0.1, gt=0, lt=1)
    """Factor by which each drop multiplies the learning rate."""

    @model_validator(mode="after")
    def _check_warmup(self) -> "ScheduleSection":
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs:g} must be below epochs={self.epochs}")
        return self

    @model_validator(mode="after")
    def _check_drops(self) -> "ScheduleSection":
        for drop in self.drops or []:
            if not self.warmup_epochs <= drop < self.epochs:
                raise ValueError(
                    f"drops: {drop:g} must be in [warmup_epochs, epochs) = [{self.warmup_epochs:g}, {self.epochs})"
                )
        return self

    def factor(self, position: int, steps_an_epoch: int) -> float:
        """Return the factor on the peak learning rate after `position` changes of the learning rate."""
        unit = steps_an_epoch if self.update == "step" else 1
        warmup = round(self.warmup_epochs * unit)
        if self.drops is not None:
            return warmup_drops(position, [drop * unit for drop in self.drops], warmup, self.drop_factor)
        return warmup_cosine(position, self.epochs * unit, warmup)

    def factors(self, steps_an_epoch: int) -> list[float]:
        """Return the factor on the peak learning rate at every optimizer step of the run."""
        unit = steps_an_epoch if self.update == "step" else 1
        each = [self.factor(position, steps_an_epoch) for position in range(self.epochs * unit)]
        return [factor for factor in each for _ in range(steps_an_epoch // unit)]


class CheckpointSection(Section):
    """When a run saves its complete state; it always does so after an epoch and when it is told to stop by a signal."""

    minutes: Positive | None = 10.0
    """Save when this many minutes have passed since the last checkpoint; null saves after epochs only."""
    steps: int | None = Field(default=None, ge=1)
    """Save after every so many optimizer steps as well."""
    keep: int = Field(default=2, ge=1, le=1000)
    """Number of checkpoints to keep. If the newest one is damaged, a run continues from the one before it."""


class ResolvedSection(Section):
    """What a run depends on beside its settings, see `sparing.run.resolve`."""

    steps: int = Field(ge=1)
    """Length of the run in optimizer steps."""
    input_size: Annotated[tuple[int, ...], Field(strict=False)]
    """Shape of a batch of one example."""
    model_arguments: dict[str, int]
    """Arguments of the model that follow from the data."""
    weights_sha256: str | None = None
    """Checksum of the file of starting weights."""
    versions: dict[str, str]
    """Versions of Python, torch and sparing with which the run was started."""


class Recipe(Section):
    """All settings of a run. The same recipe and commit give the same weights on the same machine."""

    model: ModelSection
    data: DataSection
    weights: str | None = None
    """File of starting weights, for fine-tuning: .safetensors, or a checkpoint of PyTorch with weights only. Names and
    shapes of its tensors must be those of the model before it is made sparse."""
    method: dict[str, Any] | None = None
    """`name` of `sparing.METHODS`, or an import path such as `my_package.methods:TopKAST`, and the arguments of the
    method; left out for dense training. A pattern is `{name: block, n: 4}`, `{name: nm, n: 2, m: 4}` or `filters`; a
    budget is a rule, a file, the name of a published budget, or a mapping from layer to sparsity.

    With `{name: str, for_sparsity: 0.9}`, `STR.for_schedule` chooses the weight decay of the thresholds for about
    that sparsity at the end of the run; other arguments may be given as well.
    """
    select: list[str] | None = None
    """Names or shell patterns of the layers to sparsify; defaults to all layers with weights."""
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    checkpoint: CheckpointSection = CheckpointSection()
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    clip_grad_norm: Positive | None = None
    """Maximum norm of all gradients together."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay per step of an exponential moving average of the weights; the average is validated, tested and exported."""
    amp: Literal["none", "bf16", "fp16"] = "none"
    """Automatic mixed precision; fp16 scales the loss. Processors without instructions for bf16 emulate it, slowly."""
    channels_last: bool = False
    """Store images and convolution weights channels last, which is faster for most networks. On the CPU, torch 2.13 has
    crashed in networks with fewer than 16 channels (`bench/channels_last.py`), with AVX2 even on one thread: leave it
    off there."""
    compile: bool = False
    """Compile the model with torch.compile."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    device: str = "auto"
    """"auto" (a GPU if there is one), or a torch device such as "cpu" or "cuda:1"."""
    rank_timeout: float = Field(default=300.0, gt=0, le=86_400)
    """Seconds after which a run on several ranks ends if one of them stops, with a message that names the rank."""
    dense_baseline: bool = False
    """Train the same recipe without its method first, in the folder `dense` of the run."""
    tensorboard: bool = True
    """Log to the folder `tensorboard` of the run, if the package is installed."""
    resolved: ResolvedSection | None = None
    """What follows from recipe and data, in the recipe.yaml of a run; `sparing train` computes it for a new run."""

    @field_validator("method")
    @classmethod
    def _check_method(cls, method: dict[str, Any] | None) -> dict[str, Any] | None:
        if method is not None:
            check_method(method)
        return method

    @model_validator(mode="after")
    def _check_baseline(self) -> "Recipe":
        if self.dense_baseline and self.method is None:
            raise ValueError("dense_baseline: true needs a method; without one the run is dense already")
        return self

    @model_validator(mode="after")
    def _check_for_sparsity(self) -> "Recipe":
        chooses_decay = self.method is not None and "for_sparsity" in self.method
        if chooses_decay and self.optimizer.threshold_weight_decay is not None:
            raise ValueError("method.for_sparsity decides optimizer.threshold_weight_decay; leave one of them out")
        return self

    def learning_rates(self, steps_an_epoch: int) -> list[float]:
        """Return the learning rate of every optimizer step of the run."""
        return [self.optimizer.lr * factor for factor in self.schedule.factors(steps_an_epoch)]

    @property
    def momentum(self) -> float:
        """Momentum that acts on weight decay: that of SGD, and 0 for AdamW, whose weight decay is decoupled."""
        return self.optimizer.momentum if self.optimizer.name == "sgd" else 0.0

    def dense(self) -> "Recipe":
        """Return the same recipe without its method."""
        return self.model_copy(update={"method": None, "select": None, "dense_baseline": False})

    def to_yaml(self) -> str:
        """Return the recipe as YAML: every key, defaults filled in."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a YAML file.

    Args:
        path: the file.
        overrides: `key=value`, applied in order; the key in dotted form, the value as YAML, such as
            `optimizer.lr=0.05`.

    Raises:
        InputError: the file is missing or not valid YAML; a key is unknown (the nearest known one is named); a value
            has the wrong type or is out of range; an override is not `key=value`.
    """
    return build_recipe(read_mapping(path, "recipe"), overrides, f"recipe {path}")


def build_recipe(content: dict[str, Any], overrides: Sequence[str] = (), where: str = "recipe") -> Recipe:
    """Build a recipe from a mapping, as `load_recipe` does from a file.

    Args:
        content: keys and values of a recipe; not changed.
        overrides: `key=value`, applied in order.
        where: start of error messages.

    Raises:
        InputError: a key, value or override is invalid, as for `load_recipe`.
    """
    try:
        return Recipe.model_validate(override(content, overrides))
    except ValidationError as error:
        raise InputError(f"{where}: {explain(error, Recipe)}") from error


def _check_name(name: str, table: Mapping[str, Any]) -> str:
    if name not in table and not PATH.fullmatch(name):
        raise InputError(f"unknown name {name!r}; {nearest(name, table)} (or an import path module:Name)")
    return name
