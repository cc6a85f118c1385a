"""Budgets: how sparse each layer is to be, by a rule, from a file, published or learned."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.resources import files
from math import floor, prod
from pathlib import Path

from torch import nn

from sparing.errors import InputError, nearest
from sparing.files import escape_cell, read_text, unescape_cell, write_text
from sparing.layers import find_layers


class Budget(Mapping[str, float]):
    """A layer-wise sparsity budget: a mapping from layer name to sparsity, a fraction in [0, 1].

    Args:
        sparsity: the mapping.

    Raises:
        InputError: it is no mapping, a name is not a str, or a value not a number in [0, 1].

    Examples:
        >>> Budget({"conv1": 0.5, "fc": 0.9})["fc"]
        0.9
    """

    def __init__(self, sparsity: Mapping[str, float]) -> None:
        if not isinstance(sparsity, Mapping):
            raise InputError(f"budget: not a table of layer and sparsity, but {sparsity!r:.200}")
        for name, value in sparsity.items():
            if not isinstance(name, str):
                raise InputError(f"budget: the name of a layer must be a str, got {name!r:.200}")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise InputError(f"budget: the sparsity of layer {name!r:.200} must be in [0, 1], got {value!r:.50}")
        self._sparsity = {name: float(value) for name, value in sparsity.items()}

    @classmethod
    def from_model(cls, model: nn.Module) -> "Budget":
        """Return the budget of a model: the counted sparsity of its effective weights, layer by layer.

        It has the layers that `sparsify_` selects by default, and every sparsified one.

        Examples:
            >>> Budget.from_model(nn.Linear(4, 2))
            Budget({'weight': 0.0})
        """
        return cls({name: layer.sparsity() for name, layer in find_layers(model).items()})

    @classmethod
    def uniform(cls, model: nn.Module, sparsity: float, dense: Sequence[str] = ()) -> "Budget":
        """Return a budget with the same sparsity in every layer.

        Args:
            model: the model.
            sparsity: of each layer, in [0, 1).
            dense: names of layers to leave dense, such as the first or the classifier; the others
                keep `sparsity`, so the total is below it.

        Raises:
            InputError: a name of `dense` is no layer; the sparsity is out of range.

        Examples:
            >>> Budget.uniform(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), 0.75, dense=["1"])
            Budget({'0': 0.75, '1': 0.0})
        """
        return cls.from_sizes(_shapes(model), "uniform", sparsity, dense)

    @classmethod
    def erk(cls, model: nn.Module, sparsity: float, dense: Sequence[str] = ()) -> "Budget":
        """Return the Erdős–Rényi-Kernel (ERK) budget: density in proportion to (sum of the shape) / (its product).

            density_l = min(1, ε · Σ shape_l / Π shape_l),      Σ kept_l = total kept

        ε is solved for exactly, with the layers that saturate at 1 found one at a time. Small layers
        are kept denser than large ones.

        Args:
            model: the model.
            sparsity: of all layers together, in [0, 1).
            dense: names of layers to leave dense; the others make up for them.

        Raises:
            InputError: a name of `dense` is no layer, or the dense layers alone are too many; the sparsity is out of
                range.

        Source: Evci et al., "Rigging the Lottery", ICML 2020, section 3, and its code
        (sparse_utils.get_sparsities_erdos_renyi).

        Examples:
            >>> budget = Budget.erk(nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 10)), 0.5)
            >>> round(budget["0"], 3), budget["1"]
            (0.55, 0.0)
        """
        return cls.from_sizes(_shapes(model), "erk", sparsity, dense)

    @classmethod
    def from_sizes(
        cls, shapes: Mapping[str, Sequence[int]], rule: str, sparsity: float, dense: Sequence[str] = ()
    ) -> "Budget":
        """Return a budget by rule, "uniform" or "erk", for layers given by their shapes.

        Examples:
            >>> Budget.from_sizes({"a": (4, 4), "b": (2, 4)}, "uniform", 0.5)
            Budget({'a': 0.5, 'b': 0.5})
        """
        if rule not in ("uniform", "erk"):
            raise InputError(f"budget: unknown rule {rule!r}; {nearest(rule, ('uniform', 'erk'))}")
        if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
            raise InputError(f"budget: sparsity must be in [0, 1), got {sparsity!r}")
        for name in dense:
            if name not in shapes:
                raise InputError(f"budget: dense names no layer {name!r}; {nearest(name, shapes)}")
        if rule == "uniform":
            return cls({name: 0.0 if name in dense else sparsity for name in shapes})
        return cls(_erdos_renyi_kernel(shapes, sparsity, set(dense)))

    @classmethod
    def published(cls, name: str) -> "Budget":
        """Return a published budget by name, such as "resnet50-str-90.23"; see `sparing.published`.

        Raises:
            InputError: there is no budget of that name; the message suggests the nearest one.

        Examples:
            >>> Budget.published("resnet50-str-90.23")["fc"]
            0.645
        """
        header, *rows = _published()
        names = header[1:]
        if name not in names:
            raise InputError(f"budget: none is published as {name!r}; {nearest(name, names)}")
        column = header.index(name)
        return cls({row[0]: float(row[column]) for row in rows})

    @classmethod
    def find(cls, source: str) -> "Budget":
        """Return the budget of a .json or .csv file, or the published budget of this name.

        Raises:
            InputError: as `load` for a name with a suffix or of a file, and as `published` for others.

        Examples:
            >>> Budget.find("resnet50-str-90.23")["fc"]
            0.645
        """
        is_file = Path(source).suffix in (".json", ".csv") or Path(source).is_file()
        return cls.load(source) if is_file else cls.published(source)

    @staticmethod
    def published_names() -> tuple[str, ...]:
        """Return the names that `published` knows.

        Examples:
            >>> len(Budget.published_names())
            22
        """
        return tuple(_published()[0][1:])

    @classmethod
    def load(cls, path: str | Path) -> "Budget":
        """Read a budget from a .json file (an object) or a .csv file (columns layer, sparsity).

        Raises:
            InputError: the file is missing, of another suffix, or not a budget; it has a layer twice.
        """
        path = Path(path)
        parse = _reader(path)
        text = read_text(path, f"budget {path}")
        try:
            return cls(parse(text))
        except InputError as error:
            raise InputError(f"budget {path}: {str(error).removeprefix('budget: ')}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error) as error:
            raise InputError(f"budget {path}: not a table of layer and sparsity ({error})") from error

    def save(self, path: str | Path) -> None:
        """Write the budget to a .json or .csv file; `load` gives back equal numbers.

        A name that spreadsheets would take for a formula, such as "=1", is written with an apostrophe in front.

        Raises:
            InputError: the suffix is neither, or the file cannot be written.
        """
        path = Path(path)
        _reader(path)
        if path.suffix == ".json":
            write_text(path, json.dumps(self._sparsity, indent=2) + "\n")
            return
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["layer", "sparsity"])
        writer.writerows((escape_cell(name), repr(value)) for name, value in self.items())
        write_text(path, text.getvalue())

    def __getitem__(self, name: str) -> float:
        return self._sparsity[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sparsity)

    def __len__(self) -> int:
        return len(self._sparsity)

    def __hash__(self) -> int:
        return hash(frozenset(self._sparsity.items()))

    def __repr__(self) -> str:
        return f"Budget({self._sparsity})"


RULES = ("uniform", "erk", "global")
"""Budgets by rule: the same sparsity in each layer; by Erdős–Rényi-Kernel; the best of all layers together."""


def check_target(method: str, sparsity: float | None, budget: Budget | str) -> None:
    """Check the target of a method: a sparsity for a rule, or a budget with sparsities of its own.

    Raises:
        InputError: neither sparsity nor budget is given, or both; the sparsity is outside [0, 1).
    """
    if not isinstance(budget, (Budget, str)):
        choices = ", ".join(map(repr, RULES))
        raise InputError(f"{method}: budget must be {choices}, a Budget, a file or a published name, got {budget!r}")
    rule = budget in RULES
    if rule and sparsity is None:
        raise InputError(f"{method}: give sparsity=, a fraction in [0, 1), or a Budget as budget=")
    if not rule and sparsity is not None:
        raise InputError(f"{method}: give sparsity= or a budget= with sparsities of its own, not both")
    if sparsity is not None and (
        isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1
    ):
        raise InputError(f"{method}: sparsity must be a fraction in [0, 1), got {sparsity!r}")


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(layer.weight.shape) for name, layer in find_layers(model).items()}


def _published() -> list[list[str]]:
    text = files("sparing.published").joinpath("resnet50.csv").read_text(encoding="utf-8")
    return list(csv.reader(io.StringIO(text)))


def _erdos_renyi_kernel(shapes: Mapping[str, Sequence[int]], sparsity: float, dense: set[str]) -> dict[str, float]:
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / max(prod(shape), 1) for name, shape in shapes.items()}
    dense = dense | {name for name, size in sizes.items() if size == 0}
    while True:
        sparse = [name for name in shapes if name not in dense]
        # ε · Σ raw_l N_l over sparse layers = weights to keep there: their share of the total, minus what
        # the dense layers keep beyond their own share.
        kept = sum(sizes[n] - floor(sparsity * sizes[n]) for n in sparse)
        beyond = sum(floor(sparsity * sizes[n]) for n in dense)
        if not sparse or kept < beyond:
            raise InputError(f"budget: with {', '.join(sorted(dense))} dense, sparsity {sparsity} cannot be reached")
        epsilon = (kept - beyond) / sum(raw[n] * sizes[n] for n in sparse)
        largest = max(raw[n] for n in sparse)
        if epsilon * largest <= 1:
            return {name: 0.0 if name in dense else 1 - epsilon * raw[name] for name in shapes}
        dense |= {name for name in sparse if raw[name] == largest}


def _reader(path: Path):  # type: ignore[no-untyped-def]
    readers = {".json": partial(json.loads, object_pairs_hook=_unique), ".csv": _from_csv}
    if path.suffix not in readers:
        raise InputError(f"budget {path}: the suffix must be .json or .csv")
    return readers[path.suffix]


def _from_csv(text: str) -> dict[str, float]:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    columns = list(reader.fieldnames or ())
    if columns.count("layer") != 1 or columns.count("sparsity") != 1:
        raise ValueError(f"its header must have layer and sparsity, once each, got {columns}"[:300])
    rows = list(reader)
    if any(None in row for row in rows):
        raise ValueError("a row has more cells than the header")
    return _unique([(unescape_cell(row["layer"]), float(row["sparsity"])) for row in rows])


def _unique(pairs: list[tuple[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it has layer {name!r:.200} twice")
        name.encode()  # UnicodeEncodeError, a ValueError: JSON can escape half of a character
        found[name] = value
    return found
