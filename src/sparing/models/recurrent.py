"""A recurrent network that reads a sequence and names its class."""

from torch import Tensor, nn

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
    """FastGRNN, and a Linear on its last state. 13,402 parameters in the cell at the defaults.

    Args:
        num_classes: outputs of the classifier.
        input_size: features of a step.
        hidden_size: of the state.
        input_rank: rank of the input matrix; None is a whole matrix.
        hidden_rank: rank of the recurrent matrix; None is a whole matrix.
        learned_rank: have a diagonal in both, at the rank given or at full rank, for a method to
            sparsify: `select: ["*.diagonal"]` in a recipe.
        gate: the nonlinearity of the gate, one of `sparing.rnn.GATES`.
        update: the nonlinearity of the candidate state.

    Returns:
        A module from sequences (N, T, input_size), and lengths (N,) if they differ, to logits
        (N, num_classes).

    Raises:
        InputError: as `FastGRNNCell`.

    Examples:
        >>> fastgrnn().fc
        Linear(in_features=100, out_features=12, bias=True)
    """
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
    """Logits from the last state of a recurrent layer."""

    def __init__(self, rnn: FastGRNN, fc: nn.Linear) -> None:
        super().__init__()
        self.rnn = rnn
        self.fc = fc

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.fc(self.rnn(x, lengths)[1])  # type: ignore[no-any-return]
