"""Train with Lightning. Requires lightning."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from sparing.errors import InputError
from sparing.layers import sparse_layers
from sparing.method import Method
from sparing.select import Select
from sparing.sparsifier import Sparsifier
from sparing.sparsify import sparsify_


class SparsityCallback(Callback):
    """Sparsify the module of a Lightning `Trainer` when `fit` begins, attach its optimizers, and log the sparsity.

    Checkpoints hold the thresholds, masks and step count in the state dict of the module, so `fit(ckpt_path=...)` with
    the same callback resumes exactly. To load one without `fit`, call `sparsify_` on the module first. After training,
    call `densify_` on it.

    Args:
        method: how to train the module.
        select: which of its layers, see `sparsify_`.
        steps: length of the run in optimizer steps; None takes the Trainer's.

    Raises:
        InputError: layers of the module are sparsified already; the length of the Trainer's run is not known, or has
            changed; a callback that averages weights comes before this one.

    Examples:
        >>> from sparing.integrations.lightning import SparsityCallback
        >>> trainer = Trainer(max_epochs=3, callbacks=[SparsityCallback(STR(sparsity=0.9))])  # doctest: +SKIP
    """

    def __init__(self, method: Method, select: Select | None = None, steps: int | None = None) -> None:
        self.method, self.select, self.steps = method, select, steps
        self.sparsifier: Sparsifier | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sparsify the module before its optimizers are made and a checkpoint is loaded."""
        if stage != "fit":
            return
        if sparse_layers(pl_module):
            raise InputError(
                "the module is sparsified already, by sparsify_() or an earlier fit(), as in Tuner.lr_find(): leave "
                "out the callback or the call of sparsify_(), or make module, callback and Trainer anew"
            )
        for each in trainer.callbacks[: trainer.callbacks.index(self)]:  # type: ignore[attr-defined]
            if isinstance(each, (StochasticWeightAveraging, WeightAveraging)):
                name = type(each).__name__
                raise InputError(f"{name} has copied the dense module: put SparsityCallback before it in callbacks=")
        steps = self.steps or _length(trainer.estimated_stepping_batches)
        self.sparsifier = sparsify_(pl_module, self.method, self.select, steps)
        # Trial steps of LearningRateFinder, before on_train_start, are undone: no warning that they are not counted.
        self.sparsifier.uncounted = self.sparsifier.UNCOUNTED

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the optimizers, and check that the run has the length it had in `setup`."""
        steps = self.steps or _length(trainer.estimated_stepping_batches)
        if steps != self._sparsifier.steps:
            raise InputError(
                f"the Trainer's run has {steps:,} optimizer steps, and had {self._sparsifier.steps:,} when the module "
                "was sparsified: find the batch size (BatchSizeFinder) with a Trainer without SparsityCallback, and "
                "make module, callback and Trainer anew with it"
            )
        self._sparsifier.attach(*trainer.optimizers)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the sparsity of the sparsified layers."""
        pl_module.log("sparsity", self._sparsifier.sparsity())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Perform what is due in skipped steps, unless training was stopped early."""
        if trainer.global_step >= (self._sparsifier.steps or 0) * len(trainer.optimizers):
            self._sparsifier.finish()

    @property
    def _sparsifier(self) -> Sparsifier:
        assert self.sparsifier is not None
        return self.sparsifier


def _length(steps: Any) -> int:
    if steps not in (-1, float("inf")):
        return int(steps)
    raise InputError("the Trainer's run has no end: give it max_steps or max_epochs, or SparsityCallback(steps=...)")
