"""Train with `transformers.Trainer`, and write folders for the Hugging Face Hub. Requires transformers."""

import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparing.errors import InputError, SparsityWarning
from sparing.files import write_text
from sparing.report import Report, report
from sparing.sparsifier import Sparsifier
from sparing.sparsify import dense_state_dict, densify_


class SparsityCallback(TrainerCallback):  # type: ignore[misc]
    """Attach a sparsifier to the optimizer of a `Trainer`, log the sparsity, and densify the model at the end.

    The sparsity of the sparsified layers, together and of each, is added to every entry of `trainer.state.log_history`
    that has a loss. Callbacks before this one, such as that of TensorBoard, do not see it.

    Args:
        sparsifier: of the model that is trained. Its `steps` are the optimizer steps of the Trainer.
        densify: whether the model is plain at the end of training, so that `trainer.save_model` writes dense tensors
            with zeros. A second call of `train` needs a sparsified model.

    Raises:
        InputError: the Trainer trains another model, or the model is no longer sparsified.

    Warns:
        SparsityWarning: the run of the Trainer is longer or shorter than that of the sparsifier.

    Examples:
        >>> from sparing.integrations.huggingface import SparsityCallback
        >>> sparsifier = sparing.sparsify_(model, sparing.GMP(sparsity=0.9), steps=1000)  # doctest: +SKIP
        >>> arguments = TrainingArguments(output_dir="out", max_steps=1000)  # doctest: +SKIP
        >>> Trainer(model, arguments, train_dataset=data, callbacks=[SparsityCallback(sparsifier)])  # doctest: +SKIP
    """

    def __init__(self, sparsifier: Sparsifier, densify: bool = True) -> None:
        self.sparsifier, self.densify = sparsifier, densify
        self._step = 0  # of the sparsifier, after the last step of the Trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach the optimizer, which exists by now, and compare the lengths of the runs."""
        if not all(layer.is_sparsified for layer in self.sparsifier.layers.values()):
            raise InputError(
                "the model is no longer sparsified, as after a training with SparsityCallback(densify=True): call "
                "sparsify_() again and give its sparsifier to a new callback, or train with densify=False"
            )
        parameters = {id(parameter) for parameter in kwargs["model"].parameters()}
        other = [name for name, layer in self.sparsifier.layers.items() if id(layer.weight) not in parameters]
        if other:
            raise InputError(
                f"the Trainer's model has no sparsified layer {other[0]!r}: give the callback the "
                "sparsifier of this model"
            )
        self.sparsifier.attach(kwargs["optimizer"])
        steps = self.sparsifier.steps
        if steps is not None and steps != state.max_steps:
            warnings.warn(
                f"the Trainer takes {state.max_steps:,} optimizer steps, and sparsify_() was given steps={steps:,}: "
                f"give it steps={state.max_steps}, or the Trainer max_steps={steps}",
                SparsityWarning,
                stacklevel=2,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the step, which a checkpoint that is loaded at the end sets back."""
        self._step = self.sparsifier.step

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the sparsity to what is logged while training."""
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        layers = {f"sparsity/{name}": layer.sparsity() for name, layer in self.sparsifier.layers.items()}
        for record in (logs, state.log_history[-1]):
            record.update(layers, sparsity=self.sparsifier.sparsity())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Perform what is due in steps that a gradient scaler skipped, and make the model plain."""
        updates = getattr(self.sparsifier.plan, "updates", None)
        # Finishing a checkpoint of the ramp, of load_best_model_at_end, would prune it without training.
        early = updates is not None and self.sparsifier.step < min(self._step, updates.end)
        if state.global_step >= state.max_steps and not early:
            self.sparsifier.finish()
        if self.densify:
            densify_(self.sparsifier.model)


def save_pretrained(model: nn.Module, folder: str | Path, base_model: str | None = None, **options: Any) -> None:
    """Write the effective weights of a model of transformers, and a model card that says how sparse it is.

    `from_pretrained` reads the folder without sparing, and `huggingface_hub.upload_folder` publishes it. The model is
    not changed.

    Args:
        model: sparsified, densified or dense.
        folder: where to write. A README.md in it is replaced.
        base_model: name on the Hub of the model from which this one was trained.
        options: of the model's own `save_pretrained`.
    """
    model.save_pretrained(folder, state_dict=dense_state_dict(model), **options)  # type: ignore[operator]
    write_text(Path(folder) / "README.md", model_card(report(model), base_model))


def model_card(counts: Report, base_model: str | None = None) -> str:
    """Return the model card of a sparse model: metadata for the Hub, and the sparsity of every layer."""
    sparse = counts.sparsified or counts.total
    data = ModelCardData(library_name="transformers", base_model=base_model, tags=["sparse", "pruning", "sparing"])
    rows = "\n".join(
        f"| `{row.name}` | {row.weights:,} | {row.nonzero:,} | {100 * row.sparsity:.2f} % |"
        for row in (*counts.layers, *counts.sums)
    )
    return _CARD.format(
        metadata=data.to_yaml(),
        sparsity=100 * sparse.sparsity,
        nonzero=sparse.nonzero,
        weights=sparse.weights,
        missed="".join(f"\n**Target missed.** {text}\n" for text in counts.missed),
        rows=rows,
    )


_CARD = """\
---
{metadata}
---

# A sparse model

{nonzero:,} of {weights:,} weights of the sparsified matrices are not zero: a sparsity of {sparsity:.2f} %. The zeros
are stored in dense tensors, so `from_pretrained` reads the model as any other.
{missed}
| layer | weights | nonzero | sparsity |
|---|---|---|---|
{rows}
"""
