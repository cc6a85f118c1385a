"""Sweep files: the recipe, search space and objective of a sweep."""

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, JsonValue, Tag, ValidationError

from sparing.errors import InputError
from sparing.run.build import build_data
from sparing.run.reading import explain, read_mapping
from sparing.run.recipe import DataSection, Recipe, Section, build_recipe
from sparing.run.resolve import resolve, what_is_computed

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

# Values as text for `build_recipe`. YAML does not read the escapes of JSON for letters beyond 16 bits.
_text = functools.partial(json.dumps, ensure_ascii=False)

# The database stores every parameter as a double, which holds integers up to 2**53 exactly.
Number = Annotated[int | float, Field(ge=-(2**53), le=2**53)]


class Range(Section):
    """Search range with inclusive bounds. It holds integers if `low`, `high` and `step` are integers."""

    low: Number
    high: Number
    log: bool = False
    """Sample uniformly on a logarithmic scale."""
    step: Number | None = None
    """Restrict the values to `low`, `low + step`, `low + 2 * step`, ..."""


# With a discriminator, because pydantic reports an error in a plain union once for each of its types.
Space = Annotated[
    Annotated[Range, Tag("range")] | Annotated[list[JsonValue], Tag("list"), Field(min_length=1)],
    Discriminator(lambda space: "list" if isinstance(space, list) else "range"),
]


class Sweep(Section):
    """Recipe, search space and objective of a sweep."""

    recipe: dict[str, Any]
    """The recipe. A sweep file may give its path instead, relative to the sweep file."""
    set: dict[str, JsonValue] = Field(default_factory=dict)
    """Recipe keys, in dotted form, and the values they have in every trial."""
    search: dict[str, Space] = Field(min_length=1)
    """Recipe keys to search, in dotted form, each with a range or a list of values."""
    objective: Literal["nonzero", "macs"] = "nonzero"
    """Cost to minimize: nonzero weights or MACs."""
    trials: int = Field(default=20, ge=1)
    """Total number of trials of all workers."""

    def recipe_of(self, trial: "BaseTrial") -> Recipe:
        """Return the recipe of a trial: the values that Optuna suggests, and no dense baseline."""
        changes = [f"{key}={_text(value)}" for key, value in self.set.items()]
        for key in sorted(self.search, key=lambda key: key.count(".")):  # `method` would overwrite `method.init`
            space = self.search[key]
            if isinstance(space, list):  # as text, because Optuna's choices are scalars
                value: Any = trial.suggest_categorical(key, [_text(choice) for choice in space])
            elif all(isinstance(number, int) for number in (space.low, space.high, space.step or 1)):
                value = trial.suggest_int(key, **space.model_dump(exclude_none=True))
            else:
                value = trial.suggest_float(key, **space.model_dump())
            changes.append(f"{key}={value}")
        return build_recipe(self.recipe, [*changes, "dense_baseline=false"], "recipe of the sweep")

    def check(self) -> dict[str, Any]:
        """Check that both ends of every range and every listed value can be trained, without training anything.

        Returns:
            The settings that must be equal for all trials of a study.

        Raises:
            InputError: a value cannot be trained with the first value of all other keys.
        """
        from optuna.trial import FixedTrial

        build = functools.cache(lambda section: build_data(DataSection.model_validate_json(section)))
        ends = {
            key: [space.low, space.high] if isinstance(space, Range) else [_text(choice) for choice in space]
            for key, space in self.search.items()
        }
        first = {key: values[0] for key, values in ends.items()}
        for key, value in [(key, value) for key, values in ends.items() for value in values]:
            try:
                recipe = self.recipe_of(FixedTrial(first | {key: value}))
                data = build(recipe.data.model_dump_json())
                resolve(recipe, data)
                if not data.size("validation"):
                    raise InputError(f"data {recipe.data.name!r} has no validation set to compare trials with")
            except ValueError as error:  # an InputError, or Optuna refuses the range
                raise InputError(f"search.{key} = {value}: {error}") from error
        computed = what_is_computed(self.recipe_of(FixedTrial(first)))
        return {**self.model_dump(mode="json", include={"search", "objective"}), "recipe": computed}


def load_sweep(path: str | Path) -> Sweep:
    """Read a sweep from a YAML file; raise `InputError` if it or its recipe file is not valid."""
    content = read_mapping(path, "sweep")
    if isinstance(content.get("recipe"), str):
        content["recipe"] = read_mapping(Path(path).parent / content["recipe"], "recipe")
    try:
        return Sweep.model_validate(content)
    except ValidationError as error:
        raise InputError(f"sweep {path}: {explain(error, Sweep)}") from error
