"""What the ranks of a model are, and what `compact_` makes of them."""

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from sparing.layers import Layer
from sparing.rnn.fastgrnn import FastGRNNCell
from sparing.rnn.low_rank import LowRankLinear, factored_layers, parts


@dataclass(frozen=True)
class Rank:
    """The account of one matrix.

    Attributes:
        name: of the layer.
        shape: (out, in).
        rank: how many values of its diagonal are not zero; min(shape) where there is no product.
        parameters: as it stands, m included.
        macs: multiply-accumulates a step (a row of a Linear's input) as it stands.
        compact_parameters: after `compact_`.
        compact_macs: after `compact_`.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    parameters: int
    macs: int
    compact_parameters: int
    compact_macs: int

    @property
    def full(self) -> int:
        """The most the rank can be."""
        return min(self.shape)


@dataclass(frozen=True)
class Ranks:
    """The matrices of a model that are products, and those of its FastGRNN cells. Printing it gives a table."""

    rows: tuple[Rank, ...]

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Name → the row in plain Python values."""
        values = {row.name: {**asdict(row), "full": row.full} for row in self.rows}
        return {name: {key: value for key, value in row.items() if key != "name"} for name, row in values.items()}

    def __str__(self) -> str:
        cells = [("matrix", "shape", "rank", "parameters", "compact", "MACs a step", "compact")]
        for row in self.rows:
            counts = (row.parameters, row.compact_parameters, row.macs, row.compact_macs)
            shape = "x".join(map(str, row.shape))
            cells.append((row.name, shape, f"{row.rank} of {row.full}", *(f"{count:,}" for count in counts)))  # type: ignore[arg-type]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if index else cell.ljust(width)
                for index, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in cells
        )


@torch.no_grad()
def ranks(model: nn.Module) -> Ranks:
    """Rank, parameters and multiply-accumulates of each matrix, before and after `compact_`.

    Examples:
        >>> ranks(sparing.rnn.FastGRNN(32, 100, hidden_rank=24)).as_dict()["cell.hidden"]["parameters"]
        4800
    """
    rows: dict[str, Rank] = {}
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            rows[name] = _low_rank(name, module)
        elif isinstance(module, FastGRNNCell):
            for part in ("input", "hidden"):
                matrix = getattr(module, part)
                if isinstance(matrix, nn.Linear):
                    place = f"{name}.{part}".lstrip(".")
                    shape = matrix.out_features, matrix.in_features
                    rows[place] = Rank(place, shape, min(shape), *(prod(shape),) * 4)
    rows |= {layer.name: _factored(layer) for layer in factored_layers(model)}
    return Ranks(tuple(rows.values()))


def _low_rank(name: str, module: LowRankLinear) -> Rank:
    shape = module.out_features, module.in_features
    width = module.right.out_features
    weights = width * sum(shape)
    if module.diagonal is None:
        return Rank(name, shape, width, *(weights,) * 4)
    rank = int(torch.count_nonzero(module.diagonal.weight))
    after = min(rank * sum(shape), prod(shape))
    return Rank(name, shape, rank, weights + width, weights + width, after, after)


def _factored(layer: Layer) -> Rank:
    out, inputs = layer.effective_weight.shape
    width, diagonal = parts(layer)[0].shape[1], parts(layer)[2]
    rank = width if diagonal is None else int(torch.count_nonzero(diagonal.weight))
    now = width * (out + inputs) + (0 if diagonal is None else width)
    # Multiplied out before it is used; only a Linear can run as two thin ones.
    after = rank * (out + inputs)
    whole = out * inputs
    smallest = min(after, whole)
    after, macs = (smallest, smallest) if isinstance(layer.module, nn.Linear) else (after, whole)
    return Rank(layer.name, (out, inputs), rank, now, whole, after, macs)
