"""AC/DC: alternating compressed and decompressed training.

    dense            t < t0                                    the warm-up
    compressed       T steps: M = the (1 − s) share of largest |W|, all layers at once, then fixed;
                     S = W ⊙ M,   dW = dS ⊙ M
    dense            T steps: S = W; the pruned weights and all momentum start from zero
    ...              in turn while both fit before t1; the last dense phase lasts until t1
    compressed       t ≥ t1, to the end

Source: Peste, Iofinova, Vladu & Alistarh, "AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural
Networks", NeurIPS 2021, and its code (pruners.py, recyclers.py, the configurations of neurips/).
Deviations: the code keeps masked weights at zero. Here they may move under the mask, without effect, and are set to
zero when the mask is removed.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparing.allocation import Allocation, magnitude
from sparing.budget import Budget
from sparing.errors import InputError
from sparing.method import Layers, Optimizers, Ranking
from sparing.optimizers import parameters_of, reset_state
from sparing.parametrizations import Mask
from sparing.schedules import Updates, to_step
from sparing.sparsifier import Sparsifier


@dataclass(frozen=True)
class Phases:
    """The plan of a run: how many weights a compressed phase keeps, and when the phases are.

    Examples:
        >>> phases = Phases(allocation=None, begin=2, end=15, length=3)
        >>> "".join("C" if phases.compressed(step) else "d" for step in range(20))
        'ddCCCdddCCCddddCCCCC'
    """

    allocation: Allocation
    begin: int
    end: int
    length: int

    def compressed(self, step: int) -> bool:
        """Return whether training is compressed after that many steps."""
        if not self.begin <= step < self.end:
            return step >= self.end
        since = (step - self.begin) % (2 * self.length)
        return since < self.length and step - since + 2 * self.length <= self.end


@dataclass(frozen=True, kw_only=True)
class ACDC(Ranking):
    """Train the largest weights of the whole network and all of them in turn; end on the largest.

    `sparsity`, `budget` and `pattern` are those of `sparing.method.Ranking`: the target of every compressed phase.

    Args:
        begin: t0, the end of the dense warm-up, a step (int) or a fraction of the run (float).
        end: t1, where the last dense phase ends and the final compressed one begins, likewise.
        phase: T, the length of the phases between, likewise.

    Raises:
        InputError: a value is out of range; two phases do not fit between `begin` and `end`.

    Examples:
        >>> ACDC(sparsity=0.9).phase
        0.05
    """

    name = "acdc"
    retargets = True
    sets_weights = True

    budget: Budget | str = "global"
    begin: int | float = 0.1
    end: int | float = 0.85
    phase: int | float = 0.05

    def prepare(self, model: nn.Module, layers: Layers, steps: int | None) -> Phases:  # type: ignore[override]
        window = Updates.resolve(self, self.begin, self.end, 1, steps)
        begin, end = max(window.begin, 1), window.end
        length = max(to_step(self.phase, steps, f"ACDC: phase={self.phase!r}"), 1)
        if begin + 2 * length > end:
            raise InputError(
                f"ACDC: a compressed and a dense phase of {length} steps each (phase={self.phase!r}) do not fit "
                f"between step {begin} and step {end}"
            )
        return Phases(super().prepare(model, layers, steps).allocation, begin, end, length)

    def resets(self, sparsifier: Sparsifier, optimizers: Optimizers) -> Iterable[Tensor]:
        return parameters_of(optimizers)

    @torch.no_grad()
    def after_step(self, sparsifier: Sparsifier, optimizers: Optimizers) -> None:
        phases: Phases = sparsifier.plan
        before, now = (phases.compressed(step) for step in (sparsifier.step - 1, sparsifier.step))
        if now and not before:
            sparsifier.set_masks(phases.allocation.masks(magnitude))
        if before and not now:
            for layer, part in sparsifier.each(Mask):
                layer.weight.masked_fill_(~part.mask, 0)
                part.mask.fill_(True)
            for parameter in self.resets(sparsifier, sparsifier.optimizers):
                reset_state(optimizers, parameter)
