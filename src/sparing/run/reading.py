"""Read the YAML files of recipes and sweeps, and explain what is wrong with their values.

A file may come from somebody else, so reading it executes nothing and takes no more memory than the file deserves:
aliases (`*name`), which can unfold a short file into gigabytes, deep nesting and large files are refused.
"""

import copy
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from sparing.errors import InputError, nearest
from sparing.files import read_text

Content = TypeVar("Content")

MAX_BYTES = 2**22
"""Maximum size of a file. The largest recipes hold a budget with one number per layer."""
MAX_DEPTH = 20
"""Maximum depth of nested mappings and lists."""


class _Loader(yaml.SafeLoader):
    """Loader without aliases, deep nesting and repeated keys. It reads 1e-4 as a number; YAML 1.1 reads a string."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not supported; write the values out")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"more than {MAX_DEPTH} nested levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        keys = [key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode)]
        if repeated := [key for key, count in Counter(keys).items() if count > 1]:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: the key {repeated[0]!r} is repeated")
        return super().construct_mapping(node, deep=deep)

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if any(char == "\0" or "\ud800" <= char <= "\udfff" for char in str(value)):
            raise yaml.YAMLError("a text has characters that no name of a file can have")
        return value


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        ValueError: the text is not valid YAML, or holds what `_Loader` refuses; the message is one line.
    """
    try:
        return yaml.load(text, _Loader)
    # Values such as impossible dates, and whole numbers of thousands of digits, raise errors of other types.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())[:300]) from error


def read_mapping(path: str | Path, kind: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Args:
        path: the file.
        kind: "recipe" or "sweep", for error messages.

    Raises:
        InputError: the file is missing, too large or not valid YAML, or does not hold a mapping.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8")
    except OSError as error:
        raise InputError(f"{kind} {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{kind} {path}: is not a text file") from error
    if len(content) > MAX_BYTES:
        raise InputError(f"{kind} {path}: is larger than {MAX_BYTES:,} bytes")
    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise InputError(f"{kind} {path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        found = "an empty file" if values is None else type(values).__name__
        raise InputError(f"{kind} {path}: must be a mapping of keys, such as 'model:', not {found}")
    for key in values:
        if not isinstance(key, str):
            raise InputError(
                f"{kind} {path}: keys must be text, got {key!r}; YAML reads on, off, yes and no as booleans"
            )
    return values


def override(content: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """Return a copy of a mapping with changes applied in order.

    Args:
        content: keys and values.
        changes: `key=value`; the key in dotted form, the value as YAML, such as `optimizer.lr=0.05`.

    Raises:
        InputError: a change has another form.
    """
    content = copy.deepcopy(content)
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key:
            raise InputError(f"--set {change!r}: write key=value, such as optimizer.lr=0.05")
        *parents, last = key.split(".")
        section = content
        for parent in parents:
            if section.get(parent) is None:
                section[parent] = {}
            section = section[parent]
            if not isinstance(section, dict):
                raise InputError(f"--set {change!r}: {parent!r} is not a mapping")
        try:
            section[last] = parse_yaml(value)
        except ValueError as error:
            raise InputError(f"--set {change!r}: the value is not valid YAML: {error}") from error
    return content


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """Return all validation errors as one line, with the nearest known key for each unknown one.

    Args:
        error: raised by pydantic.
        root: class that was validated.
    """
    return "; ".join(_explain(each, root) for each in error.errors())


def read_json(path: Path, remedy: str) -> Any:
    """Return the content of a JSON file that sparing has written.

    Args:
        path: the file.
        remedy: how to write it again, for the message.

    Raises:
        InputError: the file cannot be read, or is not valid JSON.
    """
    text = read_text(path, str(path))
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: unreadable ({error}); {remedy}") from error


def check_content(kind: type[Content], content: Any, path: Path) -> Content:
    """Return what was read from a file that sparing has written, as an object of the type `kind`.

    Raises:
        InputError: a field is missing or of another type; the message names the first.
    """
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{part}." for part in first["loc"][:4]).rstrip(".") or "the content"
        raise InputError(f"{path}: {place}: {first['msg'].lower()}; it is not as sparing writes it") from error


def _explain(error: Any, root: type[BaseModel]) -> str:
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


def _keys_at(root: type[BaseModel], location: list[Any]) -> list[str]:
    section = root
    for key in location:
        if key in section.model_fields:  # not a key of a mapping
            section = _section_in(section.model_fields[key].annotation) or section
    return list(section.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section in a type such as `Section | None` or `dict[str, Section | list]`."""
    if arguments := get_args(annotation):
        return next(filter(None, map(_section_in, arguments)), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
