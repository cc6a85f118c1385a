"""The YAML file of a sweep: a recipe, and which of its keys to search."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, field_validator, model_validator

from sparing.errors import InputError
from sparing.train.build import build_data
from sparing.train.distributed import Ranks
from sparing.train.recipe import Part, Recipe, build_recipe, explain, read_mapping
from sparing.train.run import check_fits, what_is_computed


class Range(Part):
    """Every number between two, both included; whole numbers if both ends are."""

    low: int | float
    high: int | float
    log: bool = False
    """As many trials in each decade."""
    step: int | float | None = Field(default=None, gt=0)
    """Only `low`, `low + step`, and so on."""

    @property
    def whole(self) -> bool:
        """Whether it is one of whole numbers."""
        return all(isinstance(number, int) for number in (self.low, self.high, self.step or 1))

    @model_validator(mode="after")
    def _has_numbers(self) -> "Range":
        if not self.low < self.high:
            raise ValueError(f"low={self.low:g} must be below high={self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"log: true needs low above 0, got {self.low:g}")
        if self.log and self.step is not None:
            raise ValueError("step and log: true exclude each other")
        return self


class Sweep(Part):
    """What to try, on which recipe."""

    recipe: dict[str, Any]
    """The recipe; in a file, its path as seen from there."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Keys of the recipe to change in every trial, with dots, and their values."""
    search: dict[str, Range | list[Any]] = Field(min_length=1)
    """Keys of the recipe to search, with dots: a range, or a list of values to choose from."""
    objective: Literal["nonzero", "macs"] = "nonzero"
    """What shall be low, beside the error."""
    trials: int = Field(default=20, ge=1)
    """How many in all, over all workers."""

    @field_validator("set")
    @classmethod
    def _values(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {key: _plain(key, value) for key, value in values.items()}

    @field_validator("search", mode="before")
    @classmethod
    def _spaces(cls, search: Any) -> Any:
        # Here, since an error inside a union of types is explained once for each of them.
        return {key: _space(str(key), value) for key, value in search.items()} if isinstance(search, dict) else search

    def recipe_with(self, values: Mapping[str, str]) -> Recipe:
        """The recipe of one trial. No dense baseline is trained beside it.

        Args:
            values: the keys of `search`, and values as YAML.

        Raises:
            InputError: the recipe has no such key, or refuses the value.
        """
        # Parents first: `method` would undo `method.init`.
        changes = [f"{key}={json.dumps(value)}" for key, value in self.set.items()]
        changes += [f"{key}={values[key]}" for key in sorted(values, key=lambda key: key.count("."))]
        return build_recipe(self.recipe, [*changes, "dense_baseline=false"], "recipe of the sweep")

    def check(self) -> None:
        """Build what the ends of every range and every listed value lead to, each beside the others' first.

        Raises:
            InputError: one of them cannot be trained; it is named.
        """
        first = {key: ends(space)[0] for key, space in self.search.items()}
        data: dict[str, Any] = {}
        for key, space in self.search.items():
            for value in ends(space):
                try:
                    recipe = self.recipe_with(first | {key: value})
                    name = recipe.data.model_dump_json()
                    data[name] = data.get(name) or build_data(recipe.data)
                    if not data[name].size("validation"):
                        raise InputError(
                            f"data {recipe.data.name!r} has no validation part, by which a sweep judges its trials"
                        )
                    check_fits(recipe, data[name], Ranks(torch.device("cpu")))
                except InputError as error:
                    raise InputError(f"search.{key}, at {value}: {error}") from error

    def what_is_searched(self) -> dict[str, Any]:
        """All that has to be the same for trials to be of one study; how many is not part of it."""
        recipe = self.recipe_with({key: ends(space)[0] for key, space in self.search.items()})
        return {**self.model_dump(mode="json", include={"search", "objective"}), "recipe": what_is_computed(recipe)}


def load_sweep(path: str | Path) -> Sweep:
    """Read a sweep from a YAML file.

    Raises:
        InputError: the file, or that of its recipe, is missing or is no YAML; a key is unknown (the
            nearest known one is named), or a value of the wrong type or out of range.
    """
    path = Path(path)
    content = read_mapping(path, "sweep")
    if isinstance(content.get("recipe"), str):
        content["recipe"] = read_mapping(path.parent / content["recipe"], "recipe")
    try:
        return Sweep.model_validate(content)
    except ValidationError as error:
        raise InputError(f"sweep {path}: {explain(error, Sweep)}") from error


def _space(key: str, value: Any) -> Any:
    if isinstance(value, list):
        if not value:
            raise ValueError(f"{key}: an empty list leaves nothing to choose")
        return _plain(key, value)
    if not isinstance(value, dict):
        raise ValueError(f"{key}: write a range, {{low: ..., high: ...}}, or a list of values, got {value!r}")
    try:
        return Range.model_validate(value)
    except ValidationError as error:
        raise ValueError(f"{key}: {explain(error, Range)}") from error


def _plain(key: str, value: Any) -> Any:
    try:
        json.dumps(value)
    except TypeError as error:
        raise ValueError(f"{key}: a value must be of numbers, text, lists and mappings ({error})") from error
    return value


def ends(space: Range | Sequence[Any]) -> list[str]:
    """The values to check before anything is trained, as YAML."""
    return [repr(space.low), repr(space.high)] if isinstance(space, Range) else [json.dumps(value) for value in space]
