"""The gradient of one training step."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparing.run.distributed import Ranks
from sparing.run.recipe import Recipe
from sparing.sparsifier import Sparsifier

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


def is_emulated(amp: str, device: torch.device) -> bool:
    """Return whether the processor has no instructions for a precision, so that it takes longer than float32.

    Args:
        amp: "none", or a key of `AMP`.
        device: of the model.
    """
    return amp != "none" and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


def backward(
    model: nn.Module,
    batch: tuple[Tensor, ...],
    recipe: Recipe,
    ranks: Ranks,
    scaler: torch.amp.GradScaler,
    sparsifier: Sparsifier | None = None,
) -> Tensor:
    """Compute the gradient of the mean loss over the global batch, plus the penalty of the method.

        L = Σ loss(example) / n + penalty          n examples on all ranks

    Every example has the same weight, also where ranks or micro-batches have different numbers of examples. The ranks
    average their gradients, so the loss of each is multiplied by their number, and the penalty is not.

    Args:
        model: the model as it is run: compiled, distributed.
        batch: share of this rank, `(*inputs, labels)`.
        recipe: recipe of the run.
        ranks: all ranks.
        scaler: gradient scaler; disabled without fp16.
        sparsifier: gives the penalty; None for dense training.

    Returns:
        The sum of the losses over the examples of this rank, on the device.
    """
    n = ranks.sum_(torch.tensor(float(len(batch[-1])), device=ranks.device))
    total = torch.zeros((), device=ranks.device)
    micro_batches = list(zip(*(tensor.chunk(recipe.data.accumulate) for tensor in batch), strict=True))
    for index, (*inputs, labels) in enumerate(micro_batches):
        if recipe.channels_last:
            inputs = [tensor.to(memory_format=torch.channels_last) for tensor in inputs]
        last = index == len(micro_batches) - 1
        # Gradients are exchanged once per step, with the last micro-batch.
        with nullcontext() if last or ranks.count == 1 else model.no_sync():  # type: ignore[operator]
            with torch.autocast(ranks.device.type, AMP.get(recipe.amp), enabled=recipe.amp != "none"):
                logits = model(*inputs)
                loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing, reduction="sum")
            objective = loss * (ranks.count / n)
            if sparsifier is not None and last:
                # In full on every rank, since the ranks average their gradients.
                objective = objective + sparsifier.penalty()
            scaler.scale(objective).backward()
        total += loss.detach()
    return total
