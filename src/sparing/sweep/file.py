"""Sweep files (YAML): a recipe and the keys to search."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, field_validator, model_validator

from sparing.errors import InputError
from sparing.train.build import build_data
from sparing.train.distributed import Ranks
from sparing.train.recipe import Recipe, Section, build_recipe, explain, read_mapping
from sparing.train.run import check_fits, what_is_computed


class Range(Section):
    """Search range with inclusive bounds. It holds integers if `low`, `high` and `step` are integers."""

    low: int | float
    high: int | float
    log: bool = False
    """Sample uniformly on a logarithmic scale."""
    step: int | float | None = Field(default=None, gt=0)
    """Restrict the values to `low`, `low + step`, `low + 2 * step`, ..."""

    @property
    def is_integer(self) -> bool:
        """Whether the range holds integers."""
        return all(isinstance(number, int) for number in (self.low, self.high, self.step or 1))

    @model_validator(mode="after")
    def _check_bounds(self) -> "Range":
        if not self.low < self.high:
            raise ValueError(f"low={self.low:g} must be below high={self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"log: true requires low > 0, got {self.low:g}")
        if self.log and self.step is not None:
            raise ValueError("step cannot be combined with log: true")
        return self


class Sweep(Section):
    """Recipe, search space and objective of a sweep."""

    recipe: dict[str, Any]
    """The recipe. A sweep file may give its path instead, relative to the sweep file."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Recipe keys, in dotted form, and the values they have in every trial."""
    search: dict[str, Range | list[Any]] = Field(min_length=1)
    """Recipe keys to search, in dotted form, each with a range or a list of values."""
    objective: Literal["nonzero", "macs"] = "nonzero"
    """Cost to minimize: nonzero weights or MACs."""
    trials: int = Field(default=20, ge=1)
    """Total number of trials of all workers."""

    @field_validator("set")
    @classmethod
    def _check_values(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {key: _json_value(key, value) for key, value in values.items()}

    @field_validator("search", mode="before")
    @classmethod
    def _parse_search(cls, search: Any) -> Any:
        # Parsed here because pydantic would report an error in a union once for each of its types.
        return (
            {key: _parse_space(str(key), value) for key, value in search.items()}
            if isinstance(search, dict)
            else search
        )

    def recipe_with(self, values: Mapping[str, str]) -> Recipe:
        """Return the recipe of one trial, without a dense baseline.

        Args:
            values: for each key of `search`, its value as YAML.

        Raises:
            InputError: a key is unknown, or a value is invalid.
        """
        # Parents first, because setting `method` would overwrite `method.init`.
        changes = [f"{key}={json.dumps(value)}" for key, value in self.set.items()]
        changes += [f"{key}={values[key]}" for key in sorted(values, key=lambda key: key.count("."))]
        return build_recipe(self.recipe, [*changes, "dense_baseline=false"], "recipe of the sweep")

    def check(self) -> None:
        """Check that both ends of every range and every listed value can be trained.

        Each value is checked together with the first value of all other keys, by building the data, the
        model and the method. Nothing is trained.

        Raises:
            InputError: a value cannot be trained. The message names its key.
        """
        first = {key: representative_values(space)[0] for key, space in self.search.items()}
        data: dict[str, Any] = {}
        for key, space in self.search.items():
            for value in representative_values(space):
                try:
                    recipe = self.recipe_with(first | {key: value})
                    name = recipe.data.model_dump_json()
                    data[name] = data.get(name) or build_data(recipe.data)
                    if not data[name].size("validation"):
                        raise InputError(
                            f"data {recipe.data.name!r} has no validation set, which a sweep needs to compare trials"
                        )
                    check_fits(recipe, data[name], Ranks(torch.device("cpu")))
                except InputError as error:
                    raise InputError(f"search.{key} = {value}: {error}") from error

    def identity(self) -> dict[str, Any]:
        """Return the settings that must be equal for all trials of a study. `trials` is not one of them."""
        recipe = self.recipe_with({key: representative_values(space)[0] for key, space in self.search.items()})
        return {**self.model_dump(mode="json", include={"search", "objective"}), "recipe": what_is_computed(recipe)}


def load_sweep(path: str | Path) -> Sweep:
    """Read a sweep from a YAML file.

    Raises:
        InputError: the sweep file or its recipe file is missing or not valid YAML; a key is unknown; a
            value has the wrong type or is out of range.
    """
    path = Path(path)
    content = read_mapping(path, "sweep")
    if isinstance(content.get("recipe"), str):
        content["recipe"] = read_mapping(path.parent / content["recipe"], "recipe")
    try:
        return Sweep.model_validate(content)
    except ValidationError as error:
        raise InputError(f"sweep {path}: {explain(error, Sweep)}") from error


def _parse_space(key: str, value: Any) -> Any:
    if isinstance(value, list):
        if not value:
            raise ValueError(f"{key}: the list of values must not be empty")
        return _json_value(key, value)
    if not isinstance(value, dict):
        raise ValueError(f"{key}: must be a range {{low: ..., high: ...}} or a list of values, got {value!r}")
    try:
        return Range.model_validate(value)
    except ValidationError as error:
        raise ValueError(f"{key}: {explain(error, Range)}") from error


def _json_value(key: str, value: Any) -> Any:
    try:
        json.dumps(value)
    except TypeError as error:
        raise ValueError(f"{key}: values may only contain numbers, strings, lists and mappings ({error})") from error
    return value


def representative_values(space: Range | Sequence[Any]) -> list[str]:
    """Return both ends of a range, or all values of a list, as YAML."""
    return [repr(space.low), repr(space.high)] if isinstance(space, Range) else [json.dumps(value) for value in space]
