"""Loss and accuracy of a model."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Evaluation:
    """The result of going through one part of the data once.

    Attributes:
        loss: mean cross entropy, in nats, without label smoothing.
        accuracy: fraction of examples whose largest logit is the label's, in [0, 1].
        correct: how many those are.
        count: how many there were.
    """

    loss: float
    correct: int
    count: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.count


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
    """Loss and accuracy in evaluation mode; the mode is put back afterwards."""
    training = model.training
    model.eval()
    loss, correct, count = 0.0, 0, 0
    for images, labels in batches:
        logits = model(images)
        loss += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
        correct += int((logits.argmax(dim=1) == labels).sum())
        count += len(labels)
    model.train(training)
    return Evaluation(loss / count, correct, count)
