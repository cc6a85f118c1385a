"""FastGRNN, and weight matrices of low or learned rank."""

from sparing.rnn.factorize import compact_, factorize_
from sparing.rnn.fastgrnn import FastGRNN, FastGRNNCell
from sparing.rnn.gates import GATES
from sparing.rnn.low_rank import Diagonal, LowRankLinear, is_diagonal
from sparing.rnn.ranks import MatrixRank, RankReport, ranks

__all__ = [
    "GATES",
    "Diagonal",
    "FastGRNN",
    "FastGRNNCell",
    "LowRankLinear",
    "MatrixRank",
    "RankReport",
    "compact_",
    "factorize_",
    "is_diagonal",
    "ranks",
]
