"""Recurrent models for sequence classification."""

from torch import Tensor, nn

from sparing.errors import check_sizes
from sparing.rnn import FastGRNN


def fastgrnn(
    num_classes: int = 12,
    input_size: int = 32,
    hidden_size: int = 100,
    input_rank: int | None = None,
    hidden_rank: int | None = None,
    learned_rank: bool = False,
    gate: str = "sigmoid",
    update: str = "tanh",
) -> nn.Module:
    """Build a FastGRNN classifier: a FastGRNN layer and a Linear on its last state.

    With the default arguments the cell has 13,402 parameters.

    Args:
        num_classes: number of classes.
        input_size: number of features per time step.
        hidden_size: size of the hidden state.
        input_rank: rank of the input matrix. None uses a dense matrix.
        hidden_rank: rank of the recurrent matrix. None uses a dense matrix.
        learned_rank: factorize both matrices with a diagonal, at the given rank or at full rank, and learn
            the rank by sparsifying the diagonal (`select: ["*.diagonal"]` in a recipe).
        gate: activation of the gate, one of `sparing.rnn.GATES`.
        update: activation of the candidate state, one of `sparing.rnn.GATES`.

    Returns:
        A module from sequences (N, T, input_size), and lengths (N,) if they differ, to logits
        (N, num_classes).

    Raises:
        InputError: an argument is out of range, see `FastGRNNCell`.

    Examples:
        >>> fastgrnn().fc
        Linear(in_features=100, out_features=12, bias=True)
    """
    check_sizes("fastgrnn", num_classes=num_classes)
    rnn = FastGRNN(
        input_size,
        hidden_size,
        input_rank=input_rank,
        hidden_rank=hidden_rank,
        learned_rank=learned_rank,
        gate=gate,
        update=update,
    )
    return SequenceClassifier(rnn, nn.Linear(hidden_size, num_classes))


class SequenceClassifier(nn.Module):
    """Classify a sequence from the last state of a recurrent layer."""

    def __init__(self, rnn: FastGRNN, fc: nn.Linear) -> None:
        super().__init__()
        self.rnn = rnn
        self.fc = fc

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.fc(self.rnn(x, lengths)[1])  # type: ignore[no-any-return]
