"""Evaluate the loss and accuracy of a model."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparing.errors import InputError
from sparing.run.distributed import Ranks


@dataclass(frozen=True)
class Evaluation:
    """Results of a model on one split of the data.

    Attributes:
        loss: mean cross entropy, in nats, without label smoothing.
        accuracy: fraction of correctly classified examples, in [0, 1].
        correct: number of correctly classified examples.
        count: number of examples.
        top5_correct: number of examples whose label is among the five largest logits; None with five classes or fewer.
        top5_accuracy: fraction of those examples, in [0, 1], or None.
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

    def as_dict(self) -> dict[str, Any]:
        """Return the results in plain values."""
        keys = ("accuracy", "top5_accuracy", "loss", "correct", "count")
        return {key: getattr(self, key) for key in keys}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, ...]],
    ranks: Ranks | None = None,
    before_batch: Callable[[], None] = lambda: None,
    size: int | None = None,
) -> Evaluation:
    """Compute loss and accuracy in evaluation mode, and restore the mode of the model afterwards.

    Args:
        model: returns logits of shape (N, classes).
        batches: batches `(*inputs, labels)`; with several ranks, the share of this rank.
        ranks: with several ranks, all of them: every rank returns the result over all examples.
        before_batch: called before each batch; it can raise an error to leave the evaluation.
        size: number of examples that the data set promised, over all ranks, if the batches have no `examples`.

    Raises:
        InputError: there are no examples, or not as many as the data set promised.
    """
    training = model.training
    model.eval()
    loss, correct, top5, count = 0.0, 0, 0, 0
    classes = 0
    for *inputs, labels in batches:
        before_batch()
        logits = model(*inputs)
        classes = logits.shape[1]
        loss += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
        correct += int((logits.argmax(dim=1) == labels).sum())
        top5 += int((logits.topk(min(5, classes)).indices == labels[:, None]).sum())
        count += len(labels)
    model.train(training)
    unreadable = getattr(batches, "unreadable", 0)
    if ranks is not None:
        loss, *counts = ranks.sum(loss, correct, top5, count, unreadable)
        correct, top5, count, unreadable = map(int, counts)
    promised = getattr(batches, "examples", size)
    if promised is not None and count + unreadable != promised:
        raise InputError(f"the data has {count + unreadable} examples to evaluate, but {promised} were promised")
    if count == 0:
        raise InputError("there are no examples to evaluate")
    return Evaluation(loss / count, correct, count, top5 if classes > 5 else None)
