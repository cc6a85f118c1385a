"""AC/DC: alternating compressed and decompressed training.

    dense            t < t0                                    the warm-up
    compressed       T steps: M = the (1 − s) share of largest |W|, all layers at once, then fixed;
                     S = W ⊙ M,   dW = dS ⊙ M
    dense            T steps: S = W, with the dead weights starting from zero
    ... in turn as long as both fit before t1; the last dense phase lasts until t1
    compressed       t ≥ t1, to the end

Source: Peste, Iofinova, Vladu & Alistarh, "AC/DC: Alternating Compressed/DeCompressed Training of Deep
Neural Networks", NeurIPS 2021, and its code (pruners.py, recyclers.py, the configurations of neurips/).
Deviations: the code holds dead weights at zero while they are masked, and leaves their momentum to decay
or clears all momentum; here both may move under the mask, to no effect, and are cleared for the dead
weights, and only for them, when these return.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from sparing.budget import check_target
from sparing.errors import InputError
from sparing.layers import Layer
from sparing.masks import count_kept, keep_top_together
from sparing.param_groups import reset_state
from sparing.parametrizations import Mask, Sparse
from sparing.schedules import check_schedule, to_step
from sparing.sparsify import Method, Sparsifier


@dataclass(frozen=True)
class ACDC(Method):
    """Train the largest weights of the whole network and all of them in turn; end on the largest.

    Between `begin` and `end`, phases of S = W ⊙ M with a fixed M alternate with phases of S = W. The
    `keep` of a mask is what its layer has now, as no layer has a number of its own to arrive at.

    Args:
        steps: optimizer steps of the whole run.
        sparsity: in every compressed phase and at the end, of all layers together.
        begin: t0, the end of the dense warm-up: a step (int) or a fraction of `steps` (float).
        end: t1, where the last dense phase ends and the final compressed one begins, likewise.
        phase: T, the length of the phases between, likewise.

    Raises:
        InputError: a value is out of range (see `check_target` and `check_schedule`); there is no dense
            step before `begin`; two phases do not fit between `begin` and `end`.

    Examples:
        >>> ACDC(steps=1000, sparsity=0.9)
        ACDC(steps=1000, sparsity=0.9, begin=0.1, end=0.85, phase=0.05)
    """

    name: ClassVar[str] = "acdc"

    steps: int
    sparsity: float
    begin: int | float = 0.1
    end: int | float = 0.85
    phase: int | float = 0.05

    def __post_init__(self) -> None:
        check_target("ACDC", self.sparsity, None)
        check_schedule("ACDC", self.steps, self.begin, self.end, 1)
        begin, end = to_step(self.begin, self.steps), to_step(self.end, self.steps)
        if begin < 1:
            raise InputError(f"ACDC: begin={self.begin!r} leaves no dense step of {self.steps} to warm up")
        phase = self.phase
        if isinstance(phase, bool) or not isinstance(phase, (int, float)) or not to_step(phase, self.steps) >= 1:
            raise InputError(
                f"ACDC: phase must be a step (int) or a fraction (float) of at least 1 step of {self.steps}, "
                f"got {phase!r}"
            )
        if begin + 2 * to_step(phase, self.steps) > end:
            raise InputError(
                f"ACDC: phase={phase!r} is too long: a compressed and a dense phase of "
                f"{to_step(phase, self.steps)} steps do not fit between step {begin} and step {end}"
            )

    def parametrizations(self, layers: Mapping[str, Layer]) -> dict[str, Sparse]:
        return {
            name: Mask(torch.ones_like(layer.weight, dtype=torch.bool), layer.weight.numel())
            for name, layer in layers.items()
        }

    def is_compressed(self, step: int) -> bool:
        """Whether training is compressed after that many steps.

        Examples:
            >>> method = ACDC(steps=20, sparsity=0.9, begin=2, end=15, phase=3)
            >>> "".join("C" if method.is_compressed(step) else "d" for step in range(20))
            'ddCCCdddCCCddddCCCCC'
        """
        begin, end = to_step(self.begin, self.steps), to_step(self.end, self.steps)
        phase = to_step(self.phase, self.steps)
        if step < begin or step >= end:
            return step >= end
        since = (step - begin) % (2 * phase)
        return since < phase and step - since + 2 * phase <= end

    @torch.no_grad()
    def after_step(self, sparsifier: Sparsifier) -> None:
        compressed = self.is_compressed(sparsifier.step)
        if compressed == self.is_compressed(sparsifier.step - 1):
            return
        layers, parts = zip(*sparsifier.parts(Mask), strict=True)
        if compressed:
            scores = [layer.weight.abs() for layer in layers]
            keep = count_kept(sum(score.numel() for score in scores), self.sparsity)
            for part, mask in zip(parts, keep_top_together(scores, keep), strict=True):
                part.mask.copy_(mask)
                part.keep.copy_(mask.sum())
            return
        for layer, part in zip(layers, parts, strict=True):
            layer.weight.masked_fill_(~part.mask, 0)
            reset_state(sparsifier.optimizers, layer.weight, ~part.mask)
            part.mask.fill_(True)
            part.keep.fill_(part.mask.numel())
