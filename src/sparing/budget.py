"""Budgets: how sparse each layer is to be."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import nn

from sparing.errors import InputError
from sparing.files import write_text
from sparing.select import find_layers


class Budget(Mapping[str, float]):
    """A mapping from layer name to sparsity, a fraction in [0, 1].

    Args:
        sparsity: the mapping.

    Raises:
        InputError: a value is not a number in [0, 1].

    Example:
        >>> Budget({"conv1": 0.5, "fc": 0.9})["fc"]
        0.9
    """

    def __init__(self, sparsity: Mapping[str, float]) -> None:
        for name, value in sparsity.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise InputError(f"budget: the sparsity of layer {name!r} must be in [0, 1], got {value!r}")
        self._sparsity = {name: float(value) for name, value in sparsity.items()}

    @classmethod
    def from_model(cls, model: nn.Module) -> "Budget":
        """The budget a model has, learned or imposed: the counted sparsity of its effective weights.

        Takes every layer that `report` has a row for.

        Example:
            >>> Budget.from_model(nn.Linear(4, 2))
            Budget({'weight': 0.0})
        """
        return cls({name: layer.sparsity() for name, layer in find_layers(model).items()})

    @classmethod
    def load(cls, path: str | Path) -> "Budget":
        """Read a budget from a .json file (an object) or a .csv file (columns layer, sparsity).

        Raises:
            InputError: the file is missing, of another suffix, or not a budget.
        """
        path = Path(path)
        parse = _reader(path)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"budget {path}: cannot be read: {error.strerror}") from error
        try:
            return cls(parse(text))
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"budget {path}: not a table of layer and sparsity ({error})") from error

    def save(self, path: str | Path) -> None:
        """Write the budget to a .json or .csv file; `load` gives back equal numbers.

        Raises:
            InputError: the suffix is neither.
        """
        path = Path(path)
        _reader(path)
        if path.suffix == ".json":
            write_text(path, json.dumps(self._sparsity, indent=2) + "\n")
            return
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["layer", "sparsity"])
        writer.writerows((name, repr(value)) for name, value in self.items())
        write_text(path, text.getvalue())

    def __getitem__(self, name: str) -> float:
        return self._sparsity[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sparsity)

    def __len__(self) -> int:
        return len(self._sparsity)

    def __repr__(self) -> str:
        return f"Budget({self._sparsity})"


def _reader(path: Path):  # type: ignore[no-untyped-def]
    readers = {".json": json.loads, ".csv": _from_csv}
    if path.suffix not in readers:
        raise InputError(f"budget {path}: the suffix must be .json or .csv")
    return readers[path.suffix]


def _from_csv(text: str) -> dict[str, float]:
    return {row["layer"]: float(row["sparsity"]) for row in csv.DictReader(io.StringIO(text))}
