"""The section `method` of a recipe: check it, build the method, and write all its settings down."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sparing.budget import RULES, Budget
from sparing.errors import InputError, first_line, nearest
from sparing.method import Method
from sparing.methods import find_method
from sparing.patterns import NM, Block, Filters, Pattern, Unstructured

PATTERNS: dict[str, type[Pattern]] = {"unstructured": Unstructured, "block": Block, "nm": NM, "filters": Filters}
"""Patterns by the name that a recipe uses."""

Spec = Mapping[str, Any]
"""Name and arguments of a method, as a recipe has them."""


def build_method(spec: Spec, input_size: tuple[int, ...] | None = None) -> Method:
    """Build the method that the section `method` of a recipe describes.

    Args:
        spec: name and arguments of the method.
        input_size: shape of one input, for a target in MACs; `input_size` in the recipe itself takes precedence.

    Raises:
        InputError: the name is missing or unknown; an argument is missing, unknown or invalid.
    """
    method, arguments = _parse(spec)
    if arguments.get("macs") is not None and "input_size" in _fields(method):
        arguments.setdefault("input_size", input_size)
    try:
        return method(**arguments)
    except (TypeError, OverflowError) as error:
        raise InputError(f"method {spec['name']!r} cannot be built from {arguments}: {first_line(error)}") from error


def check_method(spec: Spec) -> None:
    """Check everything about the section `method` that does not depend on model, data or length of the run.

    Raises:
        InputError: as for `build_method`; `for_sparsity` is combined with another target.
    """
    spec = dict(spec)
    if "for_sparsity" in spec:
        if spec.keys() & {"sparsity", "macs"}:
            raise InputError("give for_sparsity, or a target (sparsity or macs), not both")
        method = find_method(_name(spec))
        if method.for_schedule.__func__ is Method.for_schedule.__func__:  # type: ignore[attr-defined]
            method.for_schedule(spec["for_sparsity"], [], 0.0)
        del spec["for_sparsity"]
    method, arguments = _parse(spec)
    # The input size follows from the data, if the recipe does not give it.
    if arguments.get("macs") is None or "input_size" in arguments or "input_size" not in _fields(method):
        build_method(spec)


def settle(spec: Spec, learning_rates: Sequence[float], momentum: float) -> tuple[Spec, float | None]:
    """Replace `for_sparsity` by the arguments and the weight decay of thresholds that follow from the schedule.

    Args:
        spec: name and arguments of the method.
        learning_rates: learning rate of every step of the run.
        momentum: momentum of SGD; 0 for AdamW.

    Returns:
        The section without `for_sparsity`, and the weight decay of learned thresholds; None if it is not decided here.

    Raises:
        InputError: the sparsity is out of range, or the run is too short.
    """
    if "for_sparsity" not in spec:
        return spec, None
    cls, arguments = _parse({key: value for key, value in spec.items() if key != "for_sparsity"})
    method, decay = cls.for_schedule(spec["for_sparsity"], learning_rates, momentum, **arguments)
    return settings(spec["name"], method), float(f"{decay:.6g}")


def settings(name: str, method: Method, keep: Sequence[str] = ()) -> dict[str, Any]:
    """Return a section `method` with every argument, in plain values. `build_method` gives back an equal method.

    Budgets become mappings from layer to sparsity, unless they are rules such as "erk". The input size is left out, as
    it follows from the data. Defaults that a YAML file cannot hold are left out, too.

    Args:
        name: name of the method in the recipe.
        method: the method.
        keep: names of arguments that the recipe gives itself.
    """
    found: dict[str, Any] = {"name": name}
    for key in _fields(type(method)):
        value = getattr(method, key)
        if key == "budget" and isinstance(value, str) and value not in RULES:
            value = Budget.find(value)
        try:
            plain = _plain(value)
        except TypeError:
            continue  # it has its default value: recipes hold plain values only
        if key in keep or key != "input_size":
            found[key] = plain
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Pattern):
        name = next(name for name, pattern in PATTERNS.items() if type(value) is pattern)
        return {"name": name, **dataclasses.asdict(value)}  # type: ignore[call-overload]
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(type(value))


def _parse(spec: Spec) -> tuple[type[Method], dict[str, Any]]:
    """Return the class of the method and its arguments, with patterns, budgets and shapes as objects."""
    name, method = _name(spec), find_method(_name(spec))
    arguments = {key: value for key, value in spec.items() if key != "name"}
    fields = _fields(method)
    for key in arguments:
        if key not in fields:
            raise InputError(f"method {name!r} has no argument {key!r}; {nearest(key, fields)}")
    missing = [key for key, field in fields.items() if key not in arguments and not _has_default(field)]
    if missing:
        raise InputError(f"method {name!r} needs {missing[0]}=")
    if "pattern" in arguments:
        arguments["pattern"] = _build_pattern(arguments["pattern"])
    if isinstance(arguments.get("budget"), Mapping):
        # YAML reads the name of a layer such as 0 as a number.
        arguments["budget"] = Budget({str(layer): sparsity for layer, sparsity in arguments["budget"].items()})
    if isinstance(arguments.get("input_size"), list):
        arguments["input_size"] = tuple(arguments["input_size"])
    return method, arguments


def _name(spec: Spec) -> str:
    name = spec.get("name")
    if not isinstance(name, str):
        raise InputError("method needs a name, such as str or gmp; `sparing methods` lists them")
    return name


def _fields(method: type[Method]) -> "dict[str, dataclasses.Field[Any]]":
    return {field.name: field for field in dataclasses.fields(method) if field.init}


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
