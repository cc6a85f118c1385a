"""Loss and accuracy of a model."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparing.train.distributed import Ranks


@dataclass(frozen=True)
class Evaluation:
    """The result of going through one part of the data once.

    Attributes:
        loss: mean cross entropy, in nats, without label smoothing.
        accuracy: fraction of examples whose largest logit is the label's, in [0, 1].
        correct: how many those are.
        count: how many there were.
        top5_correct: examples whose label is among the five largest logits; None where there are no more than five.
        top5_accuracy: the fraction of those, or None.
    """

    loss: float
    correct: int
    count: int
    top5_correct: int | None = None

    @property
    def accuracy(self) -> float:
        return self.correct / self.count

    @property
    def top5_accuracy(self) -> float | None:
        return None if self.top5_correct is None else self.top5_correct / self.count


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, ...]], ranks: Ranks | None = None) -> Evaluation:
    """Loss and accuracy in evaluation mode; the mode is put back afterwards.

    Args:
        model: gives logits (N, classes).
        batches: of `(*inputs, labels)`; with several ranks, this rank's share of them.
        ranks: sum over these, so that every rank returns the result over all examples.
    """
    training = model.training
    model.eval()
    loss, correct, top5, count = 0.0, 0, 0, 0
    classes = 0
    for *inputs, labels in batches:
        logits = model(*inputs)
        classes = logits.shape[1]
        loss += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
        correct += int((logits.argmax(dim=1) == labels).sum())
        top5 += int((logits.topk(min(5, classes)).indices == labels[:, None]).sum())
        count += len(labels)
    model.train(training)
    if ranks is not None:
        loss, *counts = ranks.sum(loss, correct, top5, count)
        correct, top5, count = map(int, counts)
    return Evaluation(loss / count, correct, count, top5 if classes > 5 else None)
