"""Report ranks and costs of factorized weight matrices, before and after `compact_`."""

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from sparing.layers import Layer
from sparing.rnn.factorize import factored_layers, factors_of
from sparing.rnn.fastgrnn import FastGRNNCell
from sparing.rnn.low_rank import LowRankLinear


@dataclass(frozen=True)
class MatrixRank:
    """Rank and costs of one weight matrix.

    Attributes:
        name: name of the layer.
        shape: (out, in).
        rank: number of nonzero diagonal values, the rank of the factors if there is no diagonal, or min(shape) for
            a dense matrix.
        parameters: number of parameters now, including the diagonal.
        macs: MACs per time step (or per row of a Linear's input) now.
        compact_parameters: number of parameters after `compact_`.
        compact_macs: MACs per time step (or row) after `compact_`.
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
        """The full rank, min(shape)."""
        return min(self.shape)


@dataclass(frozen=True)
class RankReport:
    """Ranks of a model, returned by `ranks`. Printing it gives a table.

    Attributes:
        rows: one row per factorized matrix, and per matrix of a FastGRNN cell.
    """

    rows: tuple[MatrixRank, ...]

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return a dictionary: name → the other fields of the row, as plain Python values."""
        rows = [{**asdict(row), "full": row.full} for row in self.rows]
        return {row.pop("name"): row for row in rows}

    def __str__(self) -> str:
        cells = [("matrix", "shape", "rank", "parameters", "compact", "MACs/step", "compact")]
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
def ranks(model: nn.Module) -> RankReport:
    """Report rank, parameters and MACs of each factorized matrix, before and after `compact_`.

    Args:
        model: any module.

    Returns:
        One row per factorized matrix, and per matrix of a FastGRNN cell.

    Examples:
        >>> ranks(sparing.rnn.FastGRNN(32, 100, hidden_rank=24)).as_dict()["cell.hidden"]["parameters"]
        4800
    """
    rows: dict[str, MatrixRank] = {}
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            rows[name] = _low_rank(name, module)
        elif isinstance(module, FastGRNNCell):
            for child in ("input", "hidden"):
                matrix = getattr(module, child)
                if isinstance(matrix, nn.Linear):
                    full_name = f"{name}.{child}".lstrip(".")
                    shape = matrix.out_features, matrix.in_features
                    rows[full_name] = MatrixRank(full_name, shape, min(shape), *(prod(shape),) * 4)
    rows |= {layer.name: _factored(layer) for layer in factored_layers(model)}
    return RankReport(tuple(rows.values()))


def _low_rank(name: str, module: LowRankLinear) -> MatrixRank:
    shape = module.out_features, module.in_features
    width = module.right.out_features
    weights = width * sum(shape)
    if module.diagonal is None:
        return MatrixRank(name, shape, width, *(weights,) * 4)
    rank = int(torch.count_nonzero(module.diagonal.weight))
    after = min(rank * sum(shape), prod(shape))
    return MatrixRank(name, shape, rank, weights + width, weights + width, after, after)


def _factored(layer: Layer) -> MatrixRank:
    out, inputs = layer.effective_weight.shape
    left, _, diagonal = factors_of(layer)
    width = left.shape[1]
    rank = width if diagonal is None else int(torch.count_nonzero(diagonal.weight))
    now = width * (out + inputs) + (0 if diagonal is None else width)
    dense = out * inputs
    # The layer uses the dense matrix. After compact_, only a Linear uses the two factors.
    after = rank * (out + inputs)
    smaller = min(after, dense)
    after, macs = (smaller, smaller) if isinstance(layer.module, nn.Linear) else (after, dense)
    return MatrixRank(layer.name, (out, inputs), rank, now, dense, after, macs)
