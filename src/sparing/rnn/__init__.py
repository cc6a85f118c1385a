"""Recurrent networks of low rank, and of a rank that is learned."""

from sparing.rnn.fastgrnn import FastGRNN, FastGRNNCell
from sparing.rnn.gates import GATES
from sparing.rnn.low_rank import Diagonal, LowRankLinear, compact_, factorize_, is_diagonal
from sparing.rnn.ranks import Ranks, ranks

__all__ = [
    "GATES",
    "Diagonal",
    "FastGRNN",
    "FastGRNNCell",
    "LowRankLinear",
    "Ranks",
    "compact_",
    "factorize_",
    "is_diagonal",
    "ranks",
]
