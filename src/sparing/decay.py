"""Weight decay of the STR thresholds: its effect on s, and a rule that chooses it for a target sparsity.

While s is far below zero, g'(s) is negligible, the loss has almost no gradient with respect to s, and
only weight decay moves it. One step of SGD with momentum μ is v ← μ v + λ s, s ← s − η v. Over many
steps each term λ s contributes 1 / (1 − μ) times:

    s(t) ≈ s(0) · exp(−E(t)),      E(t) = λ · Σ η / (1 − μ)          the number of e-folds

The approximation holds if η λ is small compared with (1 − μ)². AdamW multiplies s by (1 − η λ) and
does not apply its momentum to the decay, so E(t) = λ · Σ η.

Pruning starts when g(s) reaches about 1e-3. For both sigmoid and exp this is at s = −7, which takes
E₁ = ln(|s(0)| / 7) e-folds. The e-folds after this onset, which act against the loss, determine the
final sparsity. For the 16 ResNet-50 rows of the paper (79.55 % to 99.10 %, s(0) from −100 to −12800)
they follow from the sparsity alone,

    E − E₁ ≈ 0.75 · (1 − sparsity)^−0.85

to within 12 %. Solved for the sparsity, the formula is within 1.3 percentage points for every row, and
within 0.8 above 90 %. The share of the run before the onset, E₁ / E, is 0.69 at 80 %, 0.52 at 90 % and
0.38 at 95 % for the rows with s(0) = −3200.

Reference: the momentum factor is the sum of a geometric series. The rows are from the appendix of
Kusupati et al., ICML 2020 (weight decays and initial values of s). The values of the 90.23 % row were
read from the released configuration. The other fifteen were written down from memory and not checked
against the paper, so the fit is only as reliable as they are.
"""

import math
import warnings
from collections.abc import Iterable, Sequence

import torch

from sparing.errors import InputError, SparsityWarning
from sparing.threshold import MAPS

ONSET = -7.0
"""Value of s at which pruning starts: sigmoid(−7) = 0.0009."""

LEAST_THRESHOLD = 1e-3
"""Thresholds below this prune almost nothing: most trained weights are larger."""


def e_folds(learning_rates: Iterable[float], weight_decay: float, momentum: float = 0.0) -> float:
    """Return the number of e-folds by which weight decay alone shrinks s.

        E = λ · Σ η / (1 − μ),      s(end) = s(0) · exp(−E)

    Args:
        learning_rates: learning rate η of every step of the run.
        weight_decay: weight decay λ of s.
        momentum: momentum μ of SGD; 0 for AdamW.

    Raises:
        InputError: the momentum is not in [0, 1).

    Examples:
        >>> round(e_folds([0.1] * 1000, 0.01, momentum=0.9), 6)
        10.0
    """
    if not 0 <= momentum < 1:
        raise InputError(f"momentum must be in [0, 1), got {momentum!r}")
    return weight_decay * math.fsum(learning_rates) / (1 - momentum)


def weight_decay_for(sparsity: float, learning_rates: Iterable[float], momentum: float, init: float) -> float:
    """Return the weight decay of s with which STR reaches approximately the given sparsity.

        λ = (ln(|init| / 7) + 0.75 · (1 − sparsity)^−0.85) · (1 − μ) / Σ η

    The rule was fitted to ResNet-50 on ImageNet, trained with SGD, from 80 % to 99 % sparsity. A network
    with fewer redundant weights ends up denser than requested, and one with more ends up sparser. For
    AdamW (momentum=0) the decay of s is correct, but AdamW normalizes the gradient of s, which the fit
    does not take into account.

    Args:
        sparsity: total sparsity of all sparsified layers, in (0, 1).
        learning_rates: learning rate η of every step of the run.
        momentum: momentum μ of SGD; 0 for AdamW.
        init: initial value of s, below −7. The lower it is, the later in the run pruning starts.

    Returns:
        The weight decay λ.

    Raises:
        InputError: an argument is out of range, or the run is so short that momentum would move s past
            zero (η λ > (1 − √μ)²).

    Examples:
        >>> from sparing.schedules import warmup_cosine
        >>> rates = [0.256 * warmup_cosine(step // 5005, 100, 5) for step in range(100 * 5005)]
        >>> f"{weight_decay_for(0.9, rates, momentum=0.875, init=-3200):.2e}"  # the paper uses 2.25e-5 for its 90.23 %
        '2.19e-05'
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 < sparsity < 1:
        raise InputError(f"sparsity must be in (0, 1), got {sparsity!r}")
    if isinstance(init, bool) or not isinstance(init, (int, float)) or not -math.inf < init < ONSET:
        raise InputError(f"init must be finite and below {ONSET:g}, where pruning starts; got {init!r}")
    rates = list(learning_rates)
    unit_e_folds = e_folds(rates, 1.0, momentum)  # e-folds for a weight decay of 1
    if not 0 < unit_e_folds < math.inf:
        raise InputError(f"the sum of the learning rates must be positive and finite, got {sum(rates)!r}")
    decay: float = (math.log(init / ONSET) + 0.75 * (1 - sparsity) ** -0.85) / unit_e_folds
    # Beyond this limit the characteristic roots of the momentum step are complex, and s oscillates around zero.
    if decay * max(rates) > (1 - math.sqrt(momentum)) ** 2:
        raise InputError(
            f"{len(rates)} steps are too few for sparsity {sparsity:g} from init {init:g}: the weight decay this "
            f"requires, {decay:.2g}, would move s past zero; train longer or choose an init above {init:g}"
        )
    return decay


def warn_if_nothing_prunes(
    init: float, g: str, scale: float, learning_rates: Sequence[float], weight_decay: float, momentum: float
) -> None:
    """Warn if weight decay alone does not raise the thresholds far enough to prune any weight.

    The loss only slows s down, so weight decay alone gives an upper bound on the final threshold scale · g(s). Values
    that suit a large data set hardly move s on a small one, where a run has fewer steps.

    Args:
        init: value s starts from.
        g: name of the map in `sparing.threshold.MAPS`.
        scale: factor of the threshold.
        learning_rates: learning rate of every step of the run.
        weight_decay: weight decay of s.
        momentum: momentum of SGD; 0 for AdamW.
    """
    end = init * math.exp(-e_folds(learning_rates, weight_decay, momentum))
    threshold = float(scale * MAPS[g](torch.tensor(end, dtype=torch.float64)))
    if threshold >= LEAST_THRESHOLD:
        return
    try:
        decay = weight_decay_for(0.9, learning_rates, momentum, -20.0)
        remedy = (
            f"optimizer.threshold_weight_decay={decay:.2g} and method.init=-20. method.for_sparsity=0.9 chooses it "
            "(sparing.STR.for_schedule)"
        )
    except InputError:  # for_sparsity would be refused, too
        remedy = "more steps and a higher optimizer.threshold_weight_decay"
    warnings.warn(
        f"nothing can be pruned: in the {len(learning_rates)} steps of this run a weight decay of {weight_decay:.3g} "
        f"takes s from {init:g} to {end:.4g} at best, a threshold of {threshold:.1g}. A sparsity of about 90 % takes "
        f"{remedy}",
        SparsityWarning,
        stacklevel=2,
    )
