"""Recipes: all settings of a run, in one YAML file."""

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sparing.data import DATASETS
from sparing.errors import InputError, nearest
from sparing.method import Method
from sparing.methods import STR, find_method
from sparing.models import MODELS
from sparing.patterns import NM, Block, Filters, Pattern, Unstructured
from sparing.schedules import warmup_cosine, warmup_drops

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base class of the sections of a recipe: unknown keys are errors, values cannot be changed after reading."""

    # Strict: `true` is not a number and "32" is not an integer.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSection(Section):
    """`name` of `sparing.models`; the other keys are the arguments of that function."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: str

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return _one_of(name, MODELS)


class DataSection(Section):
    """`name` of `sparing.data`; the other keys are the arguments of that function."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: str
    batch_size: int = Field(default=64, ge=1)
    """Examples per optimizer step, over all ranks."""
    accumulate: int = Field(default=1, ge=1)
    """Micro-batches into which each rank splits its share of a batch, for batches that do not fit in memory."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return _one_of(name, DATASETS)


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

    epochs: int = Field(default=20, ge=1)
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


class Recipe(Section):
    """All settings of a run. The same recipe and commit give the same weights on the same machine."""

    model: ModelSection
    data: DataSection
    method: dict[str, Any] | None = None
    """`name` of `sparing.METHODS`, or an import path such as `my_package.methods:TopKAST`, and the arguments of the
    method; left out for dense training. A pattern is `{name: block, n: 4}`, `{name: nm, n: 2, m: 4}` or `filters`.

    With `{name: str, for_sparsity: 0.9}`, `STR.for_schedule` chooses the weight decay of the thresholds for about
    that sparsity at the end of the run; `init` may be given as well.
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
    """Automatic mixed precision; fp16 scales the loss."""
    channels_last: bool = False
    """Store images and convolution weights channels last, which is faster for most networks. On the CPU, torch 2.13 has
    crashed on two threads in networks with fewer than 16 channels (`bench/channels_last.py`): leave it off there."""
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

    @field_validator("method")
    @classmethod
    def _check_method(cls, method: dict[str, Any] | None) -> dict[str, Any] | None:
        if method is not None and "for_sparsity" not in method:
            # The real input size follows from the data; errors that do not depend on it are found here.
            build_method(method, input_size=(1,))
        return method

    @model_validator(mode="after")
    def _check_baseline(self) -> "Recipe":
        if self.dense_baseline and self.method is None:
            raise ValueError("dense_baseline: true needs a method; without one the run is dense already")
        return self

    @model_validator(mode="after")
    def _check_for_sparsity(self) -> "Recipe":
        # Many steps, so that only errors that do not depend on the length of the run are found here.
        self._settled([self.optimizer.lr] * 10**6)
        return self

    def learning_rates(self, steps_an_epoch: int) -> list[float]:
        """Return the learning rate of every optimizer step of the run."""
        return [self.optimizer.lr * factor for factor in self.schedule.factors(steps_an_epoch)]

    @property
    def momentum(self) -> float:
        """Momentum that acts on weight decay: that of SGD, and 0 for AdamW, whose weight decay is decoupled."""
        return self.optimizer.momentum if self.optimizer.name == "sgd" else 0.0

    def settled(self, steps_an_epoch: int) -> "Recipe":
        """Return the recipe with `for_sparsity` replaced by the init and weight decay that follow from it.

        Raises:
            InputError: the method is not STR; the weight decay is given as well; a value is out of
                range, or the run is too short.
        """
        return self._settled(self.learning_rates(steps_an_epoch))

    def _settled(self, rates: list[float]) -> "Recipe":
        if self.method is None or "for_sparsity" not in self.method:
            return self
        spec = dict(self.method)
        sparsity = spec.pop("for_sparsity")
        if spec.get("name") != STR.name:
            raise InputError(f"method: for_sparsity is for method 'str', not {spec.get('name')!r}; give sparsity")
        if self.optimizer.threshold_weight_decay is not None:
            raise InputError("method.for_sparsity decides optimizer.threshold_weight_decay; leave one of them out")
        if spec.keys() & {"sparsity", "macs"}:
            raise InputError("method: give for_sparsity, or a total (sparsity or macs), not both")
        init = {"init": spec["init"]} if "init" in spec else {}
        method, decay = STR.for_schedule(sparsity, rates, self.momentum, **init)
        spec |= {"init": method.init}
        build_method(spec, input_size=(1,))
        optimizer = self.optimizer.model_copy(update={"threshold_weight_decay": float(f"{decay:.6g}")})
        return self.model_copy(update={"method": spec, "optimizer": optimizer})

    def dense(self) -> "Recipe":
        """Return the same recipe without its method."""
        return self.model_copy(update={"method": None, "select": None, "dense_baseline": False})

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML: every key, defaults filled in."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


PATTERNS: dict[str, type[Pattern]] = {"unstructured": Unstructured, "block": Block, "nm": NM, "filters": Filters}
"""Patterns by the name that a recipe uses."""


def build_method(spec: Mapping[str, Any], input_size: tuple[int, ...] | None = None) -> Method:
    """Build the method that the section `method` of a recipe describes.

    Args:
        spec: name and arguments of the method.
        input_size: shape of one input, for a target in MACs; `input_size` in the recipe itself takes precedence.

    Raises:
        InputError: the name is missing or unknown; an argument is missing, unknown or invalid.
    """
    arguments = dict(spec)
    name = arguments.pop("name", None)
    if not isinstance(name, str):
        raise InputError("method needs a name, such as str or gmp; `sparing methods` lists them")
    method = find_method(name)
    fields = {field.name: field for field in dataclasses.fields(method) if field.init}
    for key in arguments:
        if key not in fields:
            raise InputError(f"method {name!r} has no argument {key!r}; {nearest(key, fields)}")
    missing = [key for key, field in fields.items() if key not in arguments and not _has_default(field)]
    if missing:
        raise InputError(f"method {name!r} needs {missing[0]}=")
    if arguments.get("macs") is not None and "input_size" in fields:
        arguments.setdefault("input_size", input_size)
    if "pattern" in arguments:
        arguments["pattern"] = _build_pattern(arguments["pattern"])
    try:
        return method(**arguments)
    except TypeError as error:
        raise InputError(f"method {name!r} cannot be built from {arguments}: {error}") from error


def _has_default(field: "dataclasses.Field[Any]") -> bool:
    return not (field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING)


def _build_pattern(spec: Any) -> Pattern:
    arguments = {"name": spec} if isinstance(spec, str) else dict(spec) if isinstance(spec, Mapping) else {}
    name = arguments.pop("name", None)
    if not isinstance(name, str) or name not in PATTERNS:
        raise InputError(f"method.pattern: unknown pattern {name!r}; {nearest(str(name), PATTERNS)}")
    known = [field.name for field in dataclasses.fields(PATTERNS[name])]  # type: ignore[arg-type]
    for key in arguments:
        if key not in known:
            raise InputError(f"method.pattern: {name!r} has no argument {key!r}; {nearest(str(key), known)}")
    return PATTERNS[name](**arguments)


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
    for override in overrides:
        content = _override(content, override)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{where}: {explain(error, Recipe)}") from error


def read_mapping(path: str | Path, kind: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Args:
        path: the file.
        kind: "recipe" or "sweep", for error messages.

    Raises:
        InputError: the file is missing, not valid YAML, or does not hold a mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{kind} {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{kind} {path}: is not a text file") from error
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{kind} {path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{kind} {path}: must be a mapping of keys, such as 'model:', not {type(content).__name__}")
    return content


class _Loader(yaml.SafeLoader):
    """Loader that reads 1e-4 as a number; YAML 1.1 reads it as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _override(raw: dict[str, Any], override: str) -> dict[str, Any]:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override!r}: write key=value, such as optimizer.lr=0.05")
    raw = copy.deepcopy(raw)
    *parents, last = key.split(".")
    section = raw
    for parent in parents:
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            raise InputError(f"--set {override!r}: {parent!r} is not a mapping")
    try:
        section[last] = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise InputError(f"--set {override!r}: the value is not valid YAML") from error
    return raw


def explain(error: ValidationError, root: type[Section]) -> str:
    """Return all validation errors as one line, with the nearest known key for each unknown one.

    Args:
        error: raised by pydantic.
        root: class that was validated.
    """
    return "; ".join(_explain(each, root) for each in error.errors())


def _explain(error: Any, root: type[Section]) -> str:
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        *parents, last = error["loc"]
        return f"unknown key {where!r}; {nearest(str(last), _keys_at(root, parents))}"
    if error["type"] == "missing":
        return f"the key {where!r} is missing"
    if error["type"] == "value_error":
        message = error["msg"].removeprefix("Value error, ")
        return f"{where}: {message}" if where else message
    return f"{where}: {error['msg'][:1].lower()}{error['msg'][1:]}, got {error['input']!r}"


def _keys_at(root: type[Section], location: list[Any]) -> list[str]:
    section: Any = root
    for key in location:
        section = section.model_fields[key].annotation
    return list(section.model_fields)


def _one_of(name: str, table: Mapping[str, Any]) -> str:
    if name not in table:
        raise InputError(f"unknown name {name!r}; {nearest(name, table)}")
    return name
