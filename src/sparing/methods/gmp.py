"""GMP: gradual magnitude pruning, and one-shot magnitude pruning as its shortest ramp.

    s_t = s_f · (1 − (1 − (t − t0) / (t1 − t0))³)          the cubic ramp from 0 to s_f
    M   = the (1 − s_t) share of largest |W|                per layer, or over all layers; every `every` steps
    S   = W ⊙ M,   dW = dS ⊙ M

With `score` the largest scores are kept in place of the largest |W|, such as |W| · ‖x‖₂ of `sparing.calibrate`.

Source: Zhu & Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017, for
the ramp; Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015, for
one-shot pruning; Frankle & Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, section 4, for budget="global".
Deviations: the ramp of the STR repository divides by t1 − t0 + 1 and ends below s_f; here it ends at s_f. Pruned
weights keep their value and decay, as in the TensorFlow code, and may become active again while the ramp runs. Han et
al. prune below a multiple of the standard deviation, in several rounds; here the count is exact.
"""

from dataclasses import dataclass

from torch import Tensor

from sparing.allocation import Score, magnitude
from sparing.errors import InputError
from sparing.layers import Layer
from sparing.method import Layers, Optimizers, Parametrizations, Plan, Ranking
from sparing.parametrizations import Mask
from sparing.patterns import Units
from sparing.sparsifier import Sparsifier


@dataclass(frozen=True, kw_only=True)
class GMP(Ranking):
    """Prune the smallest weights, more and more of them, while training.

    With `begin` equal to `end` the pruning is one-shot. With both 0 `sparsify_` itself prunes, such as a trained model
    before fine-tuning, and needs no length of the run.

    `sparsity`, `budget` and `pattern` are those of `sparing.method.Ranking`.

    Args:
        begin: start of the sparsity ramp, a step (int) or a fraction of the run (float).
        end: end of the ramp, likewise.
        every: optimizer steps between two updates of the masks; shortened if fewer than two fit into the ramp.
        score: of the weights, the largest of which are kept: "magnitude", or a function (layer, units) → score of every
            unit, such as `sparing.calibrate(model, batches)`; recipes take "magnitude" only.

    Examples:
        >>> model = nn.Linear(100, 10)
        >>> _ = sparsify_(model, GMP(sparsity=0.9, begin=0, end=0))
        >>> report(model).total.nonzero
        100
    """

    name = "gmp"
    retargets = True
    ramps = True

    begin: int | float = 0.2
    end: int | float = 0.8
    every: int = 100
    score: Score | str = "magnitude"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score != "magnitude" and not callable(self.score):
            raise InputError(
                "GMP: score must be 'magnitude' or a function (layer, units) -> Tensor, such as "
                f"sparing.calibrate(model, batches), which a recipe cannot give; got {self.score!r:.200}"
            )

    def parametrizations(self, layers: Layers, plan: Plan) -> Parametrizations:
        if plan.updates is not None and plan.updates.end == 0:
            return {name: Mask(mask) for name, mask in plan.allocation.masks(self._scores).items()}
        return super().parametrizations(layers, plan)

    def after_step(self, sparsifier: Sparsifier, optimizers: Optimizers) -> None:
        if sparsifier.due and sparsifier.plan.updates.end > 0:
            masks = sparsifier.plan.allocation.masks(self._scores, sparsifier.progress)
            if sparsifier.clock.start > 0:  # the zeros of the start stay, whatever the share of their layer
                masks = {name: mask & (sparsifier.layers[name].weight != 0) for name, mask in masks.items()}
            sparsifier.set_masks(masks)

    def _scores(self, layer: Layer, units: Units) -> Tensor:
        scores = self.score(layer, units) if callable(self.score) else magnitude(layer, units)
        if scores.numel() != units.count:
            raise InputError(
                f"GMP: score must return one value for each of {units.count} weights or groups of layer "
                f"{layer.name!r}, got {scores.numel()}"
            )
        return scores
